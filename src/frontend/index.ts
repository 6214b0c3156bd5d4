export * from "./config.ts";
export * from "./frontend.ts";
export * from "./threads/index.ts";
