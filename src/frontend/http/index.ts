export { Exchange, type ApiFamily, type GoneReason } from "./exchange.ts";
export { HttpServer, endpointLabel, type HttpServerOptions, type Route } from "./server.ts";
export { SseWriter, isAsciiText } from "./sse-writer.ts";
