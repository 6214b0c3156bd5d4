import { createServer, STATUS_CODES, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo, Socket } from "node:net";
import type { Duplex } from "node:stream";
import { randomUUID } from "node:crypto";
import { DynamoError, toDynamoError } from "../../errors/index.ts";
import type { Logger, Metrics } from "../../observability/index.ts";
import type { HttpNetwork } from "../../runtime/component/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import type { FrontendLimits } from "../config.ts";
import { errorBody, errorHeaders, errorMetricType, errorStatus } from "../openai/errors.ts";
import { BodyReader, bodyTooLarge, type BodyBudget } from "./body-reader.ts";
import { Exchange, STATUS_TEXT, plainError, type ApiFamily, type ExchangeOwner } from "./exchange.ts";
import { parseJsonBody } from "./json-body.ts";
import { TurnShare } from "../turn-share.ts";

/**
 * The HTTP/1.1 edge on node:http: exact-path routing, bounded reading of JSON bodies, one `Exchange` per request, and an
 * answer for everything a connection can do wrong. Requests of one connection are served one at a time and in order, so
 * a handler always owns the socket while it writes.
 *
 * Refusals before a body was read go out on the raw socket, which is then closed for writing and drained for a moment:
 * a client in the middle of sending would otherwise lose the answer to a connection reset. A handler that throws costs
 * its own exchange a 500 and nothing else. Owned by one event loop; `clock` times bodies and draining, header and idle
 * time-outs are node:http's own.
 */
export interface Route {
  readonly method: "GET" | "POST" | "DELETE";
  /** Exact, or a prefix ending in `/*`. */
  readonly path: string;
  readonly family: ApiFamily;
  /** @default "json" for POST, else "none" (a body is then discarded) */
  readonly body?: "json" | "none";
  /** May answer later. What it throws becomes a 500, or the `DynamoError`'s own status. */
  handle(exchange: Exchange): void | Promise<void>;
}

export interface HttpServerOptions {
  readonly host: string;
  /** 0 = any free port. */
  readonly port: number;
  /** Others listen on the port too, and the kernel spreads the connections. @default false */
  readonly reusePort?: boolean;
  readonly limits: FrontendLimits;
  readonly routes: readonly Route[];
  readonly logger: Logger;
  readonly clock: Clock;
  readonly metrics: Metrics;
  /** @default the system's network */
  readonly network?: HttpNetwork | undefined;
  /** A connection with unread answer bytes and no progress for this long is closed. @default 60000 */
  readonly stalledWriteMs?: number;
}

/** Request line plus headers: cookies and long authorization values fit several times. */
const MAX_HEADER_BYTES = 16 * 1024;
/** Header lines; node would drop further ones silently, so one more is read and refused. */
const MAX_HEADERS = 100;
/** Requests a client may send ahead of the answers on one connection; with more the connection is closed. */
const MAX_PIPELINED = 16;
/** Bodies being read at once may hold this many times the size of the largest single one. */
const BODIES_IN_MEMORY = 16;
/** Above the 60 s after which common proxies reuse a connection last, so that they close first. */
const KEEP_ALIVE_TIMEOUT_MS = 75_000;
const STALLED_WRITE_MS = 60_000;
/** How long a refused client may go on sending before its connection is cut. */
const LINGER_MS = 1_000;
const REQUEST_ID = /^[\x21-\x7e]{1,128}$/;

export class HttpServer implements ExchangeOwner {
  readonly responseBufferBytes: number;
  #closing = false;
  readonly #options: HttpServerOptions;
  readonly #limits: FrontendLimits;
  readonly #clock: Clock;
  readonly #logger: Logger;
  readonly #server: Server;
  /** path -> method -> route. */
  readonly #routes = new Map<string, Map<string, Route>>();
  readonly #sockets = new Set<Socket>();
  readonly #active = new Map<Socket, Exchange>();
  /** Requests that came while the one before them on their connection was being served. */
  readonly #waiting = new Map<Socket, ServerResponse[]>();
  readonly #readers = new Set<BodyReader>();
  readonly #bodyBudget: BodyBudget;
  readonly #largeBodies: TurnShare;
  #bodyTimer: TimerHandle | undefined = undefined;
  readonly #timers = new Set<TimerHandle>();
  #droppedConnections = 0;

  constructor(options: HttpServerOptions) {
    const { limits } = options;
    this.#options = options;
    this.#limits = limits;
    this.#clock = options.clock;
    this.#logger = options.logger;
    this.responseBufferBytes = limits.responseBufferBytes;
    this.#largeBodies = new TurnShare(options.clock);
    this.#bodyBudget = { bytes: 0, limitBytes: limits.bodyBytes * BODIES_IN_MEMORY };
    for (const route of options.routes) {
      const methods = this.#routes.get(route.path) ?? new Map<string, Route>();
      if (methods.has(route.method)) throw new Error(`${route.method} ${route.path} is routed twice`);
      methods.set(route.method, route);
      this.#routes.set(route.path, methods);
    }
    this.#server = this.#createServer();
  }

  get closing(): boolean {
    return this.#closing;
  }

  /** Throws `address-in-use`, or `invalid-config` for an address this machine does not have. */
  listen(): Promise<{ port: number }> {
    const { host, port, network, reusePort = false } = this.#options;
    if (network !== undefined) return network.listen(this.#server, { host, port });
    return new Promise((resolve, reject) => {
      const onError = (cause: NodeJS.ErrnoException): void => reject(listenError(host, port, cause));
      this.#server.once("error", onError);
      this.#server.listen({ port, host, reusePort }, () => {
        this.#server.off("error", onError);
        this.#server.on("error", (error) => this.#logger.error({ err: error }, "the HTTP listener failed"));
        resolve({ port: (this.#server.address() as AddressInfo).port });
      });
    });
  }

  /**
   * From now on each answer closes its connection. Resolves when none is left, or after `lingerMs`: a client that just
   * sends on an idle connection gets an answer rather than a broken connection, and one that asks `/health` learns why.
   */
  async linger(lingerMs: number): Promise<void> {
    this.#closing = true;
    const late = Promise.withResolvers<void>();
    const timer = this.#clock.setTimer(lingerMs, () => late.resolve());
    while (this.#sockets.size > 0) {
      const gone = Promise.all([...this.#sockets].map(whenClosed)).then(() => "gone" as const);
      if ((await Promise.race([gone, late.promise])) !== "gone") break;
    }
    timer.cancel();
  }

  /** Accepts nothing more, closes idle connections, waits for running answers, and after `graceMs` cuts them off. */
  async close({ graceMs }: { graceMs: number }): Promise<void> {
    this.#closing = true;
    const stopped = new Promise<void>((resolve) => {
      this.#server.close(() => resolve());
    });
    const closed = Promise.all([stopped, ...[...this.#sockets].map(whenClosed)]);
    for (const socket of this.#sockets) if (!this.#active.has(socket)) socket.destroy();
    const grace = this.#clock.setTimer(graceMs, () => {
      for (const socket of this.#sockets) socket.destroy();
    });
    await closed;
    grace.cancel();
    this.#bodyTimer?.cancel();
    for (const timer of this.#timers) timer.cancel();
  }

  #createServer(): Server {
    const { limits } = this.#options;
    const server = createServer({
      noDelay: true,
      keepAlive: true,
      keepAliveInitialDelay: 30_000,
      insecureHTTPParser: false,
      requireHostHeader: true,
      maxHeaderSize: MAX_HEADER_BYTES,
      keepAliveTimeout: KEEP_ALIVE_TIMEOUT_MS,
      headersTimeout: limits.headersTimeoutMs,
      // Bodies are timed by #checkBodies: node's clock for this would also run while a pipelined request waits.
      requestTimeout: 0,
      connectionsCheckingInterval: Math.max(20, Math.min(1_000, limits.headersTimeoutMs / 4)),
    });
    server.maxHeadersCount = MAX_HEADERS + 1;
    server.maxConnections = limits.connections;
    server.timeout = this.#options.stalledWriteMs ?? STALLED_WRITE_MS;
    server.on("connection", (socket: Socket) => this.#onConnection(socket));
    server.on("drop", () => this.#onDrop());
    server.on("request", (request, response) => this.#onRequest(request, response));
    server.on("checkContinue", (request, response) => this.#onRequest(request, response));
    server.on("checkExpectation", (request, response) => this.#onRequest(request, response));
    server.on("clientError", (error: NodeJS.ErrnoException, socket) => this.#onClientError(error, socket));
    server.on("timeout", (socket: Socket) => this.#onStalled(socket));
    return server;
  }

  // Connections.

  #onConnection(socket: Socket): void {
    this.#sockets.add(socket);
    socket.on("close", () => {
      this.#sockets.delete(socket);
      this.#waiting.delete(socket);
    });
  }

  #onDrop(): void {
    this.#droppedConnections++;
    this.#options.metrics.counter("dynamo_frontend_admission_rejection_total").labels("connections", "").add();
    if (this.#droppedConnections === 1) {
      this.#logger.warn({ limit: this.#limits.connections }, "connections are refused: as many as the limit are open");
    }
  }

  /** No byte moved for a while. A quiet stream is fine; unread bytes mean that the client stopped reading. */
  #onStalled(socket: Socket): void {
    if (socket.writableLength > 0 || !this.#active.has(socket)) socket.destroy();
  }

  #onClientError(error: NodeJS.ErrnoException, stream: Duplex): void {
    const socket = stream as Socket;
    const exchange = this.#active.get(socket);
    if (error.code === "ECONNRESET" || !socket.writable || exchange?.headersSent === true) {
      if (exchange?.answered === true && socket.writable) socket.destroySoon();
      else socket.destroy();
      return;
    }
    const { status, failure } = describeClientError(error);
    this.#count("unknown", failure);
    exchange?.connectionClosed();
    this.#refuse(socket, failure, { status, family: "openai", requestId: exchange?.requestId });
  }

  // Requests.

  #onRequest(request: IncomingMessage, response: ServerResponse): void {
    const { socket } = request;
    const waiting = this.#waiting.get(socket);
    if (waiting === undefined && !this.#active.has(socket)) {
      this.#begin(request, response, socket);
      return;
    }
    if (waiting === undefined) this.#waiting.set(socket, [response]);
    else if (waiting.length < MAX_PIPELINED) waiting.push(response);
    else {
      this.#logger.warn({ limit: MAX_PIPELINED }, "a connection was closed: too many requests sent ahead");
      socket.destroy();
    }
  }

  /** The answer left or its connection closed: the connection's next request, if one waits, has its turn. */
  #onResponseClosed(socket: Socket, exchange: Exchange): void {
    this.#active.delete(socket);
    exchange.connectionClosed();
    const waiting = this.#waiting.get(socket);
    if (waiting !== undefined) {
      const next = waiting.shift();
      if (waiting.length === 0) this.#waiting.delete(socket);
      if (next !== undefined && !socket.destroyed) return this.#begin(next.req, next, socket);
    }
    if (this.#closing) socket.destroySoon();
  }

  /** Routes whose path ends in `/*`, by what comes before it. */
  #prefixRoutes(path: string): Map<string, Route> | undefined {
    for (const [pattern, methods] of this.#routes) {
      if (pattern.endsWith("/*") && path.startsWith(pattern.slice(0, -1)) && path.length >= pattern.length)
        return methods;
    }
    return undefined;
  }

  #begin(request: IncomingMessage, response: ServerResponse, socket: Socket): void {
    const url = request.url ?? "/";
    const queryAt = url.indexOf("?");
    const path = queryAt < 0 ? url : url.slice(0, queryAt);
    const methods = this.#routes.get(path) ?? this.#prefixRoutes(path);
    const method = request.method === "HEAD" ? "GET" : (request.method ?? "");
    const route = methods?.get(method);
    const id = request.headers["x-request-id"];
    const family = route?.family ?? methods?.values().next().value?.family ?? "openai";
    const exchange = new Exchange(this, request, response, {
      requestId: typeof id === "string" && REQUEST_ID.test(id) ? id : randomUUID(),
      path,
      queryText: queryAt < 0 ? "" : url.slice(queryAt + 1),
      family,
      arrivalMs: this.#clock.monotonicMs(),
      closeAfter: route !== undefined && !wantsJsonBody(route) && hasBody(request),
    });
    this.#active.set(socket, exchange);
    response.on("close", () => this.#onResponseClosed(socket, exchange));

    if (route === undefined) {
      const allow = methods === undefined ? undefined : [...methods.keys()].join(", ");
      this.#refuseExchange(request, exchange, family, noRoute(method, path, allow), "unknown", {
        status: allow === undefined ? 404 : 405,
        headers: allow === undefined ? {} : { allow },
      });
      return;
    }
    const wantsBody = wantsJsonBody(route);
    const refusal = checkHead(request, wantsBody, this.#limits.bodyBytes);
    if (refusal !== undefined) {
      const { failure, status } = refusal;
      this.#refuseExchange(request, exchange, family, failure, route.path, status === undefined ? {} : { status });
    } else if (wantsBody) {
      this.#readBody(request, response, exchange, route);
    } else {
      this.#handle(route, exchange);
    }
  }

  #readBody(request: IncomingMessage, response: ServerResponse, exchange: Exchange, route: Route): void {
    if (request.headers.expect !== undefined && request.httpVersionMinor >= 1) response.writeContinue();
    const reader = new BodyReader(
      request,
      this.#limits.bodyBytes,
      this.#bodyBudget,
      exchange.arrivalMs,
      this.#largeBodies,
      (failure, bytes) => {
        this.#readers.delete(reader);
        if (failure !== undefined) {
          this.#refuseExchange(request, exchange, route.family, failure, route.path, {});
          return;
        }
        try {
          exchange.body = parseJsonBody(bytes);
        } catch (thrown) {
          const error = toDynamoError(thrown);
          this.#count(route.path, error);
          exchange.sendError(error);
          return;
        }
        this.#handle(route, exchange);
      },
    );
    this.#readers.add(reader);
    response.on("close", () => {
      this.#readers.delete(reader);
      reader.stop();
    });
    this.#bodyTimer ??= this.#clock.setTimer(this.#bodyCheckMs, () => this.#checkBodies());
  }

  /** Body time-outs are this exact: a quarter of the limit, at most a second. */
  get #bodyCheckMs(): number {
    return Math.min(1_000, Math.max(10, this.#limits.bodyTimeoutMs / 4));
  }

  /** One timer for all bodies, running only while some are being read. Oldest first, so it stops at the first in time. */
  #checkBodies(): void {
    this.#bodyTimer = undefined;
    const overdueMs = this.#clock.monotonicMs() - this.#limits.bodyTimeoutMs;
    for (const reader of this.#readers) {
      if (reader.startedMs > overdueMs) break;
      const limitMs = this.#limits.bodyTimeoutMs;
      reader.fail(new DynamoError("body-timeout", `the request body did not arrive within ${limitMs} ms`));
    }
    if (this.#readers.size > 0) {
      this.#bodyTimer = this.#clock.setTimer(this.#bodyCheckMs, () => this.#checkBodies());
    }
  }

  #handle(route: Route, exchange: Exchange): void {
    try {
      const running = route.handle(exchange);
      if (running instanceof Promise) {
        running.catch((thrown: unknown) => this.#onHandlerFailed(route, exchange, thrown));
      }
    } catch (thrown) {
      this.#onHandlerFailed(route, exchange, thrown);
    }
  }

  /** For exchanges: a defect in a callback costs its own connection, not the process. */
  onCallbackFailed(exchange: Exchange, thrown: unknown): void {
    const { diagnostic } = toDynamoError(thrown);
    this.#logger.error({ x_request_id: exchange.requestId, path: exchange.path, diagnostic }, "a callback failed");
    exchange.destroy();
  }

  #onHandlerFailed(route: Route, exchange: Exchange, thrown: unknown): void {
    const error = toDynamoError(thrown);
    if (error.class === "internal") {
      const { diagnostic } = error;
      this.#logger.error({ x_request_id: exchange.requestId, path: route.path, diagnostic }, "a handler failed");
    }
    this.#count(route.path, error);
    if (exchange.headersSent) {
      if (!exchange.answered) exchange.destroy();
    } else {
      exchange.sendError(error);
    }
  }

  // Refusals.

  /** Answers in place of a handler; through the raw socket when there may be a body that nobody will read. */
  #refuseExchange(
    request: IncomingMessage,
    exchange: Exchange,
    family: ApiFamily,
    failure: DynamoError,
    endpoint: string,
    answer: { readonly status?: number; readonly headers?: Readonly<Record<string, string>> },
  ): void {
    this.#count(endpoint, failure);
    if (exchange.gone) return;
    if (!hasBody(request)) {
      exchange.sendError(failure, answer);
      return;
    }
    exchange.markAnswered();
    const { requestId } = exchange;
    this.#refuse(request.socket, failure, { family, requestId, ...answer });
    // Whatever is still on its way is taken off the wire and dropped.
    request.resume();
  }

  /** One raw answer, end of writing, then at most `LINGER_MS` of draining what the client still sends. */
  #refuse(
    socket: Socket,
    failure: DynamoError,
    answer: {
      readonly family: ApiFamily;
      readonly status?: number | undefined;
      readonly requestId?: string | undefined;
      readonly headers?: Readonly<Record<string, string>>;
    },
  ): void {
    socket.end(rawAnswer(failure, answer));
    this.#waiting.delete(socket);
    const timer = this.#clock.setTimer(LINGER_MS, () => {
      this.#timers.delete(timer);
      socket.destroy();
    });
    this.#timers.add(timer);
    socket.on("close", () => {
      this.#timers.delete(timer);
      timer.cancel();
    });
  }

  /** Requests that never reached a handler, or whose handler failed; the others are counted by their handlers. */
  #count(path: string, failure: DynamoError): void {
    this.#options.metrics
      .counter("dynamo_frontend_requests_total")
      .labels("", endpointLabel(path), "", "error", errorMetricType(failure))
      .add();
  }
}

/** `/v1/chat/completions` -> `chat_completions`, as Dynamo labels its endpoints. */
export function endpointLabel(path: string): string {
  return path.replace(/^\/(v1\/)?/, "").replaceAll("/", "_");
}

function whenClosed(socket: Socket): Promise<void> {
  return new Promise((resolve) => socket.once("close", () => resolve()));
}

export function listenError(host: string, port: number, cause: NodeJS.ErrnoException): DynamoError {
  const address = host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
  if (cause.code === "EADDRINUSE") {
    return new DynamoError("address-in-use", `the address ${address} is already in use`, { cause });
  }
  return new DynamoError("invalid-config", `cannot listen on ${address}: ${cause.code ?? cause.message}`, { cause });
}

function noRoute(method: string, path: string, allow: string | undefined): DynamoError {
  const shownPath = path.length > 200 ? `${path.slice(0, 200)}...` : path;
  return new DynamoError(
    "route-not-found",
    allow === undefined
      ? `no such path: ${method} ${shownPath}`
      : `${shownPath} does not take ${method}; it takes ${allow}`,
  );
}

function wantsJsonBody(route: Route): boolean {
  return (route.body ?? (route.method === "POST" ? "json" : "none")) === "json";
}

function hasBody({ headers }: IncomingMessage): boolean {
  const length = headers["content-length"];
  return headers["transfer-encoding"] !== undefined || (length !== undefined && length !== "0");
}

interface Refusal {
  readonly failure: DynamoError;
  /** Where HTTP has a nearer one than the failure's class. */
  readonly status?: number;
}

/** What the head of a request alone decides; nothing of the body was read yet. */
function checkHead(request: IncomingMessage, wantsBody: boolean, limitBytes: number): Refusal | undefined {
  const { headers } = request;
  if (request.httpVersionMajor !== 1) return malformed("expected HTTP/1.1 or HTTP/1.0");
  if (request.rawHeaders.length > MAX_HEADERS * 2) {
    return malformed(`the request has too many headers: expected at most ${MAX_HEADERS}`, 431);
  }
  const { expect } = headers;
  if (expect !== undefined && expect.toLowerCase() !== "100-continue") {
    return malformed("the expect header has a value other than 100-continue", 417);
  }
  const length = headers["content-length"];
  if (length !== undefined && Number(length) > limitBytes) return { failure: bodyTooLarge(limitBytes) };
  if (!wantsBody) return undefined;
  const encoding = headers["content-encoding"];
  if (encoding !== undefined && encoding.toLowerCase() !== "identity") {
    return unsupportedMedia("content-encoding", "no encoding or identity", encoding);
  }
  const transfer = headers["transfer-encoding"];
  if (transfer !== undefined && transfer.toLowerCase() !== "chunked") {
    return unsupportedMedia("transfer-encoding", "chunked", transfer);
  }
  const type = headers["content-type"];
  if (type !== undefined && !isJsonType(type)) return unsupportedMedia("content-type", "application/json", type);
  return undefined;
}

function malformed(message: string, status = 400): Refusal {
  return { failure: new DynamoError("malformed-http", message), status };
}

function unsupportedMedia(header: string, expected: string, got: string): Refusal {
  const shown = JSON.stringify(got.slice(0, 100));
  return { failure: new DynamoError("unsupported-media-type", `${header}: expected ${expected}, got ${shown}`) };
}

/** `application/json`, with UTF-8 as its charset if it names one. */
function isJsonType(type: string): boolean {
  if (type === "application/json") return true;
  const [essence, ...parameters] = type.toLowerCase().split(";");
  if (essence!.trim() !== "application/json") return false;
  return parameters.every((parameter) => {
    const [name, value] = parameter.split("=");
    return name!.trim() !== "charset" || /^"?(utf-?8|us-ascii)"?$/.test(value?.trim() ?? "");
  });
}

/** Errors of node's parser and of its header time-out. */
function describeClientError(error: NodeJS.ErrnoException): Refusal {
  switch (error.code) {
    case "HPE_HEADER_OVERFLOW":
      return malformed(`the request's headers are too large: expected at most ${MAX_HEADER_BYTES} bytes`, 431);
    case "ERR_HTTP_REQUEST_TIMEOUT":
      return { failure: new DynamoError("body-timeout", "the request's headers did not arrive in time") };
    default:
      return malformed("the bytes on the connection are not a valid HTTP/1.1 request");
  }
}

function rawAnswer(
  failure: DynamoError,
  answer: {
    readonly family: ApiFamily;
    readonly status?: number | undefined;
    readonly requestId?: string | undefined;
    readonly headers?: Readonly<Record<string, string>>;
  },
): string {
  const status = answer.status ?? errorStatus(failure);
  const openai = answer.family === "openai";
  const body = openai ? errorBody(failure) : plainError(failure);
  const headers: Record<string, string> = {
    "content-type": openai ? "application/json" : "text/plain; charset=utf-8",
    "content-length": String(Buffer.byteLength(body)),
    connection: "close",
    date: new Date().toUTCString(),
    ...(answer.requestId === undefined ? {} : { "x-request-id": answer.requestId }),
    ...errorHeaders(failure),
    ...answer.headers,
  };
  const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`);
  const statusText = STATUS_TEXT[status] ?? STATUS_CODES[status] ?? "Error";
  return `HTTP/1.1 ${status} ${statusText}\r\n${lines.join("")}\r\n${body}`;
}
