export * from "./config.ts";
export * from "./frontend.ts";
