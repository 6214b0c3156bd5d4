export * from "./config.ts";
export * from "./frontend.ts";
export * from "./threads/index.ts";
export type { DisaggReport } from "./disagg-api.ts";
