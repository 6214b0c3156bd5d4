export { Exchange, type ApiFamily, type GoneReason } from "./exchange.ts";
export { HttpServer, endpointLabel, listenError, type HttpServerOptions, type Route } from "./server.ts";
export { SseWriter, isAsciiText } from "./sse-writer.ts";
