import { connect, type Socket } from "node:net";
import { LatencyHistogram, type Percentiles } from "./latency-histogram.ts";
import { MalformedResponse, ResponseReader } from "./response-reader.ts";
import { SseCounter } from "./sse-counter.ts";

/**
 * A closed-loop HTTP/1.1 load generator on raw sockets: `concurrency` keep-alive connections, each with one request at a
 * time, the next as soon as the last has ended. It answers "how fast is that server" and therefore costs less than what
 * it measures: requests are ready-made bytes, answers are scanned, not parsed; no promise or object per token. Works on
 * any OpenAI-shaped server; streaming answers end with `data: [DONE]`, others are JSON with a `usage`.
 *
 * Times come from one clock reading per socket read: tokens of one packet are 0 ms apart. Token counts are events with
 * text for streams, `usage.completion_tokens` otherwise.
 */
export interface LoadOptions {
  readonly host: string;
  readonly port: number;
  /** @default /v1/chat/completions */
  readonly path?: string;
  /** JSON: one for all requests, or made for request number `index` (from 0). */
  readonly body: string | ((index: number) => string);
  readonly headers?: Readonly<Record<string, string>>;
  /** Connections. */
  readonly concurrency: number;
  /** Ends after this many requests, or when the duration is over (requests under way are finished); at least one of both. */
  readonly requestCount?: number;
  readonly durationMs?: number;
  /** A request that takes longer is an error and its connection is closed. @default 60,000 */
  readonly timeoutMs?: number;
  /** Ends the run at once; requests under way count as `aborted`. */
  readonly signal?: AbortSignal;
}

export type LoadErrorKind =
  | "connect"
  | "closed-early"
  | "timeout"
  | "malformed"
  /** A stream that ended without its end marker, or carried an error event. */
  | "stream-broken"
  | "aborted";

export interface LoadReport {
  readonly wallMs: number;
  /** Answers with status 2xx that were complete. */
  readonly okCount: number;
  /** All others: statuses from 300 up, and errors. */
  readonly failedCount: number;
  readonly statuses: Readonly<Record<string, number>>;
  readonly errors: Readonly<Partial<Record<LoadErrorKind, number>>>;
  readonly tokenCount: number;
  readonly bytesReceived: number;
  readonly requestsPerSecond: number;
  readonly tokensPerSecond: number;
  /** From sending to the first token of a stream. */
  readonly ttftMs: Percentiles;
  /** Between tokens of a stream. */
  readonly itlMs: Percentiles;
  /** From sending to the end of the answer, complete ones only. */
  readonly latencyMs: Percentiles;
}

export async function generateLoad(options: LoadOptions): Promise<LoadReport> {
  if (options.requestCount === undefined && options.durationMs === undefined) {
    throw new TypeError("expected requestCount or durationMs");
  }
  const run = new LoadRun(options);
  return run.finished;
}

/** The state that all connections share: what to send next, and the tallies. */
class LoadRun {
  readonly ttftMs = new LatencyHistogram();
  readonly itlMs = new LatencyHistogram();
  readonly latencyMs = new LatencyHistogram();
  readonly timeoutMs: number;
  readonly host: string;
  readonly port: number;
  readonly finished: Promise<LoadReport>;
  tokenCount = 0;
  bytesReceived = 0;
  readonly #options: LoadOptions;
  readonly #head: string;
  readonly #fixedRequest: Buffer | undefined;
  readonly #startedMs = performance.now();
  readonly #statuses = new Map<number, number>();
  readonly #errors = new Map<LoadErrorKind, number>();
  readonly #connections = new Set<LoadConnection>();
  readonly #watchdog: NodeJS.Timeout;
  readonly #onAbort = () => this.#abort();
  readonly #settle: (report: LoadReport) => void;
  #sentCount = 0;
  #okCount = 0;
  #failedCount = 0;
  #isStopped = false;

  constructor(options: LoadOptions) {
    this.#options = options;
    this.host = options.host;
    this.port = options.port;
    this.timeoutMs = options.timeoutMs ?? 60_000;
    this.#head = headOf(options);
    this.#fixedRequest = typeof options.body === "string" ? requestOf(this.#head, options.body) : undefined;
    const { promise, resolve } = Promise.withResolvers<LoadReport>();
    this.finished = promise;
    this.#settle = resolve;
    // One coarse timer for all requests: timeouts are exact to 50 ms.
    this.#watchdog = setInterval(() => {
      for (const connection of this.#connections) connection.checkTimeout();
    }, 50);
    for (let i = 0; i < options.concurrency; i++) this.#connections.add(new LoadConnection(this));
    options.signal?.addEventListener("abort", this.#onAbort);
    if (options.signal?.aborted === true) this.#isStopped = true;
    for (const connection of this.#connections) connection.next();
  }

  /** The next request as bytes, or undefined when the run is over. */
  takeRequest(): Buffer | undefined {
    const { requestCount = Infinity, durationMs = Infinity, body } = this.#options;
    if (this.#isStopped || this.#sentCount >= requestCount) return undefined;
    if (durationMs !== Infinity && performance.now() - this.#startedMs >= durationMs) return undefined;
    const index = this.#sentCount++;
    return this.#fixedRequest ?? requestOf(this.#head, (body as (index: number) => string)(index));
  }

  answered(status: number): void {
    this.#statuses.set(status, (this.#statuses.get(status) ?? 0) + 1);
    if (status >= 200 && status < 300) this.#okCount++;
    else this.#failedCount++;
  }

  failed(kind: LoadErrorKind): void {
    this.#failedCount++;
    this.#errors.set(kind, (this.#errors.get(kind) ?? 0) + 1);
  }

  /** A connection has nothing more to do. */
  ended(connection: LoadConnection): void {
    this.#connections.delete(connection);
    if (this.#connections.size > 0) return;
    clearInterval(this.#watchdog);
    this.#options.signal?.removeEventListener("abort", this.#onAbort);
    this.#settle(this.#report());
  }

  #abort(): void {
    this.#isStopped = true;
    for (const connection of this.#connections) connection.abort();
  }

  #report(): LoadReport {
    const wallMs = performance.now() - this.#startedMs;
    return {
      wallMs,
      okCount: this.#okCount,
      failedCount: this.#failedCount,
      statuses: Object.fromEntries(this.#statuses),
      errors: Object.fromEntries(this.#errors),
      tokenCount: this.tokenCount,
      bytesReceived: this.bytesReceived,
      requestsPerSecond: (this.#okCount / wallMs) * 1000,
      tokensPerSecond: (this.tokenCount / wallMs) * 1000,
      ttftMs: this.ttftMs.percentiles(),
      itlMs: this.itlMs.percentiles(),
      latencyMs: this.latencyMs.percentiles(),
    };
  }
}

/** A JSON answer over this is counted without its usage. */
const MAX_JSON_BYTES = 16 * 1024 * 1024;

/** One connection and the request on it; reconnects when the server closed it. */
class LoadConnection {
  readonly #run: LoadRun;
  readonly #reader: ResponseReader;
  readonly #sse = new SseCounter();
  #socket: Socket | undefined;
  #isBusy = false;
  #isConnected = false;
  #sentMs = 0;
  #nowMs = 0;
  #lastTokenMs = 0;
  #json: Buffer[] = [];
  #jsonBytes = 0;

  constructor(run: LoadRun) {
    this.#run = run;
    this.#reader = new ResponseReader((bytes, start, end) => this.#onBody(bytes, start, end));
  }

  next(): void {
    const request = this.#run.takeRequest();
    if (request === undefined) {
      this.#drop();
      this.#run.ended(this);
      return;
    }
    this.#reader.reset();
    this.#sse.reset();
    this.#json = [];
    this.#jsonBytes = 0;
    this.#lastTokenMs = 0;
    this.#isBusy = true;
    const socket = this.#socket ?? this.#open();
    this.#sentMs = performance.now();
    socket.write(request);
  }

  checkTimeout(): void {
    if (this.#isBusy && performance.now() - this.#sentMs > this.#run.timeoutMs) this.#fail("timeout");
  }

  abort(): void {
    if (this.#isBusy) this.#fail("aborted");
  }

  #open(): Socket {
    const socket = connect({ host: this.#run.host, port: this.#run.port, noDelay: true });
    this.#socket = socket;
    this.#isConnected = false;
    const isCurrent = () => this.#socket === socket;
    socket.on("connect", () => (this.#isConnected = true));
    socket.on("data", (bytes: Buffer) => {
      if (isCurrent()) this.#onData(bytes);
    });
    // "close" follows and decides what it was.
    socket.on("error", () => undefined);
    socket.on("close", () => {
      if (isCurrent()) this.#onClose();
    });
    return socket;
  }

  #onData(bytes: Buffer): void {
    this.#nowMs = performance.now();
    this.#run.bytesReceived += bytes.length;
    if (!this.#isBusy) return this.#drop();
    try {
      this.#reader.write(bytes);
    } catch (thrown) {
      if (!(thrown instanceof MalformedResponse)) throw thrown;
      return this.#fail("malformed");
    }
    if (this.#reader.isComplete) this.#complete();
  }

  #onBody(bytes: Buffer, start: number, end: number): void {
    if (!this.#reader.isEventStream) {
      this.#jsonBytes += end - start;
      if (this.#jsonBytes <= MAX_JSON_BYTES) this.#json.push(bytes.subarray(start, end));
      return;
    }
    const before = this.#sse.tokenCount;
    this.#sse.write(bytes, start, end);
    for (let count = this.#sse.tokenCount - before; count > 0; count--) {
      if (this.#lastTokenMs === 0) this.#run.ttftMs.add(this.#nowMs - this.#sentMs);
      else this.#run.itlMs.add(this.#nowMs - this.#lastTokenMs);
      this.#lastTokenMs = this.#nowMs;
    }
  }

  #onClose(): void {
    this.#socket = undefined;
    if (!this.#isBusy) return;
    this.#nowMs = performance.now();
    this.#reader.end();
    if (this.#reader.isComplete) this.#complete();
    else this.#fail(this.#isConnected ? "closed-early" : "connect");
  }

  #complete(): void {
    const { status, isEventStream, isKeptAlive } = this.#reader;
    this.#isBusy = false;
    if (!isKeptAlive) this.#drop();
    if (isEventStream && status < 300 && (!this.#sse.isDone || this.#sse.errorCount > 0 || this.#sse.isOverlong)) {
      this.#run.tokenCount += this.#sse.tokenCount;
      this.#run.failed("stream-broken");
    } else {
      if (status < 300) this.#run.latencyMs.add(this.#nowMs - this.#sentMs);
      this.#run.tokenCount += isEventStream ? this.#sse.tokenCount : completionTokensOf(this.#json);
      this.#run.answered(status);
    }
    this.next();
  }

  #fail(kind: LoadErrorKind): void {
    this.#isBusy = false;
    this.#run.tokenCount += this.#sse.tokenCount;
    this.#drop();
    this.#run.failed(kind);
    // A turn later, so that a server that refuses connections does not make this a recursion.
    setImmediate(() => this.next());
  }

  #drop(): void {
    const socket = this.#socket;
    this.#socket = undefined;
    socket?.destroy();
  }
}

function headOf({ path = "/v1/chat/completions", host, port, headers = {} }: LoadOptions): string {
  const extra = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`);
  return `POST ${path} HTTP/1.1\r\nhost: ${host}:${port}\r\ncontent-type: application/json\r\n${extra.join("")}`;
}

function requestOf(head: string, body: string): Buffer {
  return Buffer.from(`${head}content-length: ${Buffer.byteLength(body)}\r\n\r\n${body}`);
}

function completionTokensOf(pieces: readonly Buffer[]): number {
  const whole = pieces.length === 1 ? pieces[0]! : Buffer.concat(pieces);
  const at = whole.lastIndexOf('"completion_tokens"');
  if (at === -1) return 0;
  const found = /^"completion_tokens"\s*:\s*(\d{1,9})/.exec(
    whole.toString("latin1", at, Math.min(whole.length, at + 64)),
  );
  return found === null ? 0 : Number(found[1]);
}
