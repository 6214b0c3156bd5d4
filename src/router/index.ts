export * from "./policies/index.ts";
export * from "./router.ts";
