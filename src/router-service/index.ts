export * from "./config.ts";
export * from "./messages.ts";
export * from "./remote-router.ts";
export * from "./route-query.ts";
export * from "./router-service-client.ts";
export * from "./router-role.ts";
