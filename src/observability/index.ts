export * from "./log.ts";
export * from "./metric-names.ts";
export * from "./metrics.ts";
export * from "./system-server.ts";
export * from "./trace-settings.ts";
export * from "./tracing.ts";
