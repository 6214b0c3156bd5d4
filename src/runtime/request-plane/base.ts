import type { DynamoError } from "../../errors/index.ts";

/**
 * The request plane: one request to one worker, a stream of items back. Back ends `memory` and `tcp`; the battery is
 * `request-plane.battery.ts`. It knows nothing about tokens: requests and items are opaque bytes.
 *
 * One connection per pair of processes carries all streams. The server collects what it writes to all streams of a
 * connection until `flush()` (the worker calls it once per engine step) and sends it as one frame; whatever was not
 * flushed goes at the end of the loop turn. The client hands each item to its stream and, after the last item of the
 * chunk it read, calls `onTurnEnd` of every stream that got one: that is where a frontend makes its one write per stream.
 *
 * Credit: a stream may have `windowBytes` of items on the way (default 256 KiB); the client grants more as its consumer
 * takes them. Without credit the server keeps that stream's items in a bounded buffer (default 1 MiB), and when that is
 * full ends this stream alone with `slow-reader`. Other streams never wait.
 *
 * Every stream ends exactly once on both sides. Deadlines travel as remaining time and are kept on both sides.
 */
export interface RequestContext {
  /** The endpoint, `namespace.component.endpoint`, at most 256 bytes. */
  readonly endpoint: string;
  /** The caller's request id, at most 128 bytes; for logs. */
  readonly requestId: string;
  /** W3C traceparent or empty, at most 128 bytes. */
  readonly traceparent: string;
}

/** How a stream ended: cleanly, or with the error (cancelled and deadline are errors of their class). */
export type StreamEnd = DynamoError | undefined;

// ---- server side ----

export interface ServerStream extends RequestContext {
  /** Unique among the live streams of this server, under 2^31. */
  readonly id: number;
  /** On the server's monotonic clock. */
  readonly deadlineMs: number;
  /** True once ended by either side. */
  readonly ended: boolean;
  /** Appends one item (copied at once). Ignored after the end. */
  write(item: Uint8Array): void;
  /** Ends the stream after its items. The first call counts. */
  end(error?: DynamoError): void;
}

export interface ServerStreamHandler {
  /** The caller is gone, cancelled, too slow, or the deadline passed: stop working. Called at most once, never after `end`. */
  onCancel(error: DynamoError): void;
}

/** Handles a request; `payload` is valid only during the call. A thrown error ends the stream with it. */
export type EndpointHandler = (stream: ServerStream, payload: Uint8Array) => ServerStreamHandler;

export interface RequestPlaneServer {
  /** What others connect to: `tcp://127.0.0.1:39123` or `memory://7`. */
  readonly address: string;
  /** Serves an endpoint; returns a function that withdraws it (streams that run go on). */
  serve(endpoint: string, handler: EndpointHandler): () => void;
  /** Sends what was written since the last flush, one frame per connection. */
  flush(): void;
  readonly activeStreamCount: number;
  /** Resolves when no stream runs. New requests are refused with `draining` from the call on. */
  drain(): Promise<void>;
  /** Ends what still runs with `engine-stopped`, closes all connections. Idempotent. */
  close(): Promise<void>;
}

// ---- client side ----

export interface ClientStreamHandler {
  /** One item: `bytes[start, end)`, valid only during the call. */
  onItem(bytes: Uint8Array, start: number, end: number): void;
  /** After the last item of one loop turn for this stream. */
  onTurnEnd(): void;
  /** Exactly once; nothing follows it. */
  onEnd(end: StreamEnd): void;
}

export interface ClientStream {
  readonly ended: boolean;
  /** Tells the server to stop; `onEnd` follows at once with `cancelled` (or the given error). No-op after the end. */
  cancel(error?: DynamoError): void;
  /** Gives back credit for items that were consumed. Streams opened with `autoCredit` need no call. */
  grant(byteCount: number): void;
}

export interface OpenOptions extends RequestContext {
  /** Time the request may still take, in ms. */
  readonly timeoutMs: number;
  /** Grants credit as soon as an item was delivered: for readers that never block. @default false */
  readonly autoCredit?: boolean;
  /** @default 262144 */
  readonly windowBytes?: number;
  /** There is nobody else to ask: a server that could not be reached is tried again sooner. @default false */
  readonly isLastResort?: boolean;
}

export interface RequestPlaneClient {
  /**
   * Sends `payload` (copied or written before return) to the server at `address`. Never throws: an unreachable server
   * ends the stream with `worker-unreachable`, a broken connection with `worker-lost`. `onEnd` is never called inside `open`.
   */
  open(address: string, payload: Uint8Array, options: OpenOptions, handler: ClientStreamHandler): ClientStream;
  /**
   * Calls `listener` once, when the connection to `address` ends (by heartbeat too) or the server there says that it is
   * leaving. Returns a function that takes the listener back; undefined when no such connection stands now.
   */
  onceLeft(address: string, listener: () => void): (() => void) | undefined;
  /** Cancels what runs and closes all connections. Idempotent. */
  close(): Promise<void>;
}

export interface RequestPlane {
  readonly client: RequestPlaneClient;
  /** Opens this process's server; once per role. Throws `address-in-use`. */
  listen(): Promise<RequestPlaneServer>;
  /** Closes client and servers. Idempotent. */
  close(): Promise<void>;
}
