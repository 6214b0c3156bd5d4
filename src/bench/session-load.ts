import { Agent, request as httpRequest, type ClientRequest, type IncomingMessage } from "node:http";
import { LatencyHistogram, type Percentiles } from "./latency-histogram.ts";
import type { LoadErrorKind } from "./load-generator.ts";
import { SseCounter } from "./sse-counter.ts";

/**
 * Sends sessions of streaming requests to an OpenAI-shaped server and measures the answers. Open loop: a session begins
 * when its time has come, however slow the server is, which is what users do; or closed: a number of them at a time. The
 * requests of a session follow each other. `load-generator.ts` beside it asks how fast a server can go; this asks how it
 * does under a given load, so a request may cost an object and a body is made when it is sent.
 *
 * Bounds: `maxInFlight` requests under way (one more is not sent, counted as overload, and its session ends), `timeoutMs`
 * for each, `timeLimitMs` for beginning new ones, `signal` for all. Every request ends once, as an answer by status or as
 * an error by kind; so the report is complete whenever the run ends. A request that fails ends its session.
 */
export interface SessionLoadOptions {
  /** Of the endpoint: `http://127.0.0.1:8000/v1/completions`. */
  readonly url: URL;
  /** By arrival. */
  readonly sessions: readonly LoadSession[];
  /** So many sessions at a time instead of by their arrival. */
  readonly concurrency?: number;
  readonly maxInFlight: number;
  readonly timeoutMs: number;
  /** After this no request begins; those under way are finished. */
  readonly timeLimitMs: number;
  /** Ends the run at once; requests under way count as `aborted`. */
  readonly signal?: AbortSignal;
}

export interface LoadSession {
  /** From the start of the run. */
  readonly arrivalMs: number;
  /** Asked for the next one when the one before has ended. */
  readonly requests: Iterator<SessionRequest, void>;
}

export interface SessionRequest {
  /** After the end of the request before, or the arrival. */
  readonly delayMs: number;
  /** JSON, with `stream` and usage asked for. Made right before it is sent. */
  readonly body: () => string;
}

export interface SessionLoadReport {
  readonly endedBy: "last-session" | "time-limit" | "signal";
  readonly wallMs: number;
  readonly sessionCount: number;
  /** Sessions whose time did not come. */
  readonly notStartedCount: number;
  readonly requestCount: number;
  /** Complete answers with status 2xx. */
  readonly okCount: number;
  /** Statuses from 300 up, and errors. */
  readonly failedCount: number;
  readonly statuses: Readonly<Record<string, number>>;
  readonly errors: Readonly<Partial<Record<LoadErrorKind, number>>>;
  /** Not sent because `maxInFlight` were under way. */
  readonly overloadCount: number;
  /** Of `usage`, over the answers that were ok. */
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly outputTokens: number;
  /** cachedTokens / promptTokens; undefined when no answer told its usage. */
  readonly hitRate: number | undefined;
  readonly requestsPerSecond: number;
  readonly outputTokensPerSecond: number;
  /** From sending to the first text. */
  readonly ttftMs: Percentiles;
  /** Between two events with text; several tokens in one packet are 0 ms apart. */
  readonly itlMs: Percentiles;
  /** From sending to the end, of the answers that were ok. */
  readonly latencyMs: Percentiles;
  /** How late requests were sent: what this machine adds, not the server. */
  readonly lateMs: Percentiles;
}

export function generateSessionLoad(options: SessionLoadOptions): Promise<SessionLoadReport> {
  return new SessionLoad(options).finished;
}

/** Timers of Node hold 2^31 ms; a session further away is looked at again. */
const MAX_SLEEP_MS = 2 ** 30;
/** The usage stands in the last events of a stream. */
const TAIL_CHARACTERS = 4_096;

class SessionLoad {
  readonly finished: Promise<SessionLoadReport>;
  readonly ttftMs = new LatencyHistogram();
  readonly itlMs = new LatencyHistogram();
  readonly #latencyMs = new LatencyHistogram();
  readonly #lateMs = new LatencyHistogram();
  readonly agent = new Agent({ keepAlive: true, scheduling: "lifo" });
  readonly options: SessionLoadOptions;
  readonly #settle: (report: SessionLoadReport) => void;
  readonly #fail: (thrown: unknown) => void;
  readonly #startedMs = performance.now();
  readonly #statuses = new Map<number, number>();
  readonly #errors = new Map<LoadErrorKind, number>();
  readonly #inFlight = new Set<Exchange>();
  /** Between two requests of a session. */
  readonly #pauses = new Set<NodeJS.Timeout>();
  readonly #onAbort = (): void => this.#stop("signal");
  readonly #limit: NodeJS.Timeout;
  #arrival: NodeJS.Timeout | undefined;
  #endedBy: SessionLoadReport["endedBy"] = "last-session";
  #isStopped = false;
  #isSettled = false;
  #nextSession = 0;
  #activeSessions = 0;
  #requestCount = 0;
  #okCount = 0;
  #overloadCount = 0;
  #promptTokens = 0;
  #cachedTokens = 0;
  #outputTokens = 0;

  constructor(options: SessionLoadOptions) {
    this.options = options;
    const { promise, resolve, reject } = Promise.withResolvers<SessionLoadReport>();
    this.finished = promise;
    this.#settle = resolve;
    this.#fail = reject;
    this.#limit = setTimeout(() => this.#stop("time-limit"), Math.min(options.timeLimitMs, MAX_SLEEP_MS));
    options.signal?.addEventListener("abort", this.#onAbort);
    if (options.signal?.aborted === true) this.#stop("signal");
    else this.#startDueSessions();
  }

  // ---- Sessions ----

  readonly #startDueSessions = (): void => {
    const { sessions, concurrency } = this.options;
    while (!this.#isStopped) {
      const session = sessions[this.#nextSession];
      if (session === undefined) break;
      if (concurrency === undefined) {
        const waitMs = session.arrivalMs - (performance.now() - this.#startedMs);
        if (waitMs > 0) {
          this.#arrival = setTimeout(this.#startDueSessions, Math.min(waitMs, MAX_SLEEP_MS));
          break;
        }
      } else if (this.#activeSessions >= concurrency) break;
      this.#nextSession++;
      this.#activeSessions++;
      const dueMs = concurrency === undefined ? this.#startedMs + session.arrivalMs : performance.now();
      this.#continue(session.requests, dueMs);
    }
    this.#endWhenDone();
  };

  /** The next request of a session whose last one ended, or that arrived, at `sinceMs`. */
  #continue(requests: Iterator<SessionRequest, void>, sinceMs: number): void {
    let request: SessionRequest | undefined;
    try {
      request = this.#isStopped ? undefined : (requests.next().value ?? undefined);
    } catch (thrown) {
      this.#crash(thrown);
      return;
    }
    if (request === undefined) {
      this.#endSession();
      return;
    }
    const dueMs = sinceMs + request.delayMs;
    const waitMs = dueMs - performance.now();
    if (waitMs <= 0) {
      this.#send(request, requests, dueMs);
      return;
    }
    const pause = setTimeout(
      () => {
        this.#pauses.delete(pause);
        this.#send(request, requests, dueMs);
      },
      Math.min(waitMs, MAX_SLEEP_MS),
    );
    this.#pauses.add(pause);
  }

  #send(request: SessionRequest, requests: Iterator<SessionRequest, void>, dueMs: number): void {
    if (this.#inFlight.size >= this.options.maxInFlight) {
      this.#overloadCount++;
      this.#endSession();
      return;
    }
    let body: string;
    try {
      body = request.body();
    } catch (thrown) {
      this.#crash(thrown);
      return;
    }
    this.#requestCount++;
    this.#lateMs.add(Math.max(0, performance.now() - dueMs));
    const exchange = new Exchange(this, body, (isOk) => {
      this.#inFlight.delete(exchange);
      // A turn later the connection is free again, and a server that refuses them does not make this a recursion.
      setImmediate(() => (isOk ? this.#continue(requests, exchange.endMs) : this.#endSession()));
    });
    this.#inFlight.add(exchange);
    exchange.start();
  }

  #endSession(): void {
    this.#activeSessions--;
    if (this.options.concurrency === undefined) this.#endWhenDone();
    // Not in its own loop.
    else setImmediate(this.#startDueSessions);
  }

  // ---- What exchanges tell ----

  answered(exchange: Exchange, status: number, usage: Usage): void {
    this.#statuses.set(status, (this.#statuses.get(status) ?? 0) + 1);
    if (status >= 300) return;
    this.#okCount++;
    this.#promptTokens += usage.promptTokens;
    this.#cachedTokens += usage.cachedTokens;
    this.#outputTokens += usage.outputTokens;
    this.#latencyMs.add(exchange.endMs - exchange.sentMs);
  }

  failed(kind: LoadErrorKind): void {
    this.#errors.set(kind, (this.#errors.get(kind) ?? 0) + 1);
  }

  // ---- Ends ----

  #stop(why: "time-limit" | "signal"): void {
    if (this.#endedBy !== "signal") this.#endedBy = why;
    this.#isStopped = true;
    clearTimeout(this.#arrival);
    for (const pause of this.#pauses) {
      clearTimeout(pause);
      this.#activeSessions--;
    }
    this.#pauses.clear();
    if (why === "signal") for (const exchange of this.#inFlight) exchange.end("aborted");
    this.#endWhenDone();
  }

  #endWhenDone(): void {
    const hasMore = !this.#isStopped && this.#nextSession < this.options.sessions.length;
    if (hasMore || this.#activeSessions > 0 || this.#isSettled) return;
    this.#close();
    this.#settle(this.#report());
  }

  /** The caller's code threw: its error is the run's. */
  #crash(thrown: unknown): void {
    this.#isStopped = true;
    this.#close();
    this.#fail(thrown);
  }

  #close(): void {
    this.#isSettled = true;
    clearTimeout(this.#limit);
    clearTimeout(this.#arrival);
    for (const pause of this.#pauses) clearTimeout(pause);
    for (const exchange of this.#inFlight) exchange.end("aborted");
    this.options.signal?.removeEventListener("abort", this.#onAbort);
    this.agent.destroy();
  }

  #report(): SessionLoadReport {
    const wallMs = performance.now() - this.#startedMs;
    const sessionCount = this.options.sessions.length;
    return {
      endedBy: this.#endedBy,
      wallMs,
      sessionCount,
      notStartedCount: sessionCount - this.#nextSession,
      requestCount: this.#requestCount,
      okCount: this.#okCount,
      failedCount: this.#requestCount - this.#okCount,
      statuses: Object.fromEntries(this.#statuses),
      errors: Object.fromEntries(this.#errors),
      overloadCount: this.#overloadCount,
      promptTokens: this.#promptTokens,
      cachedTokens: this.#cachedTokens,
      outputTokens: this.#outputTokens,
      hitRate: this.#promptTokens === 0 ? undefined : this.#cachedTokens / this.#promptTokens,
      requestsPerSecond: (this.#okCount / wallMs) * 1_000,
      outputTokensPerSecond: (this.#outputTokens / wallMs) * 1_000,
      ttftMs: this.ttftMs.percentiles(),
      itlMs: this.itlMs.percentiles(),
      latencyMs: this.#latencyMs.percentiles(),
      lateMs: this.#lateMs.percentiles(),
    };
  }
}

interface Usage {
  readonly promptTokens: number;
  readonly cachedTokens: number;
  readonly outputTokens: number;
}

/** One request and its answer. Ends once. */
class Exchange {
  sentMs = 0;
  endMs = 0;
  readonly #load: SessionLoad;
  readonly #body: Buffer;
  readonly #onEnd: (isOk: boolean) => void;
  readonly #sse = new SseCounter();
  #request: ClientRequest | undefined;
  #response: IncomingMessage | undefined;
  #timeout: NodeJS.Timeout | undefined;
  #lastTokenMs = 0;
  #tail = "";
  #isEventStream = false;
  #isConnected = false;
  #isMalformed = false;
  #isResent = false;
  #isEnded = false;

  constructor(load: SessionLoad, body: string, onEnd: (isOk: boolean) => void) {
    this.#load = load;
    this.#body = Buffer.from(body);
    this.#onEnd = onEnd;
  }

  start(): void {
    this.#timeout = setTimeout(() => this.end("timeout"), Math.min(this.#load.options.timeoutMs, MAX_SLEEP_MS));
    this.#sendOut();
  }

  /** Gives up, as `kind`. */
  end(kind: LoadErrorKind): void {
    if (this.#isEnded) return;
    this.#load.failed(kind);
    this.#finish(false);
    this.#request?.destroy();
  }

  #sendOut(): void {
    const request = httpRequest(this.#load.options.url, {
      method: "POST",
      agent: this.#load.agent,
      headers: { "content-type": "application/json", "content-length": this.#body.length },
    });
    this.#request = request;
    this.sentMs = performance.now();
    let isStale = false;
    request.on("socket", (socket) => {
      this.#isConnected = !socket.connecting;
      if (socket.connecting) socket.once("connect", () => (this.#isConnected = true));
    });
    request.on("error", (error: NodeJS.ErrnoException) => {
      // The server closed a kept connection while this request was on its way: it was not looked at.
      isStale = request.reusedSocket && error.code === "ECONNRESET" && this.#response === undefined;
      if (error.code?.startsWith("HPE_") === true) this.#isMalformed = true;
    });
    request.on("response", (response) => this.#onResponse(response));
    request.on("close", () => {
      if (this.#isEnded) return;
      if (isStale && !this.#isResent) {
        this.#isResent = true;
        this.#sendOut();
      } else this.#onClose();
    });
    request.end(this.#body);
  }

  #onResponse(response: IncomingMessage): void {
    this.#response = response;
    this.#isEventStream = /^text\/event-stream\b/i.test(response.headers["content-type"] ?? "");
    response.on("data", (bytes: Buffer) => this.#onData(bytes));
    // "close" of the request follows and decides what it was.
    response.on("error", () => undefined);
  }

  #onData(bytes: Buffer): void {
    if (this.#isEnded) return;
    this.#tail = (this.#tail + bytes.toString("latin1", Math.max(0, bytes.length - TAIL_CHARACTERS))).slice(
      -TAIL_CHARACTERS,
    );
    if (!this.#isEventStream) return;
    const nowMs = performance.now();
    const before = this.#sse.tokenCount;
    this.#sse.write(bytes, 0, bytes.length);
    for (let count = this.#sse.tokenCount - before; count > 0; count--) {
      if (this.#lastTokenMs === 0) this.#load.ttftMs.add(nowMs - this.sentMs);
      else this.#load.itlMs.add(nowMs - this.#lastTokenMs);
      this.#lastTokenMs = nowMs;
    }
  }

  #onClose(): void {
    const response = this.#response;
    if (this.#isMalformed) return this.end("malformed");
    if (response === undefined || !response.complete) return this.end(this.#isConnected ? "closed-early" : "connect");
    const status = response.statusCode!;
    const { isDone, errorCount, isOverlong } = this.#sse;
    const isOk = status < 300;
    if (isOk && this.#isEventStream && (!isDone || errorCount > 0 || isOverlong)) return this.end("stream-broken");
    this.endMs = performance.now();
    this.#load.answered(this, status, usageOf(this.#tail, this.#sse.tokenCount));
    this.#finish(isOk);
  }

  #finish(isOk: boolean): void {
    this.#isEnded = true;
    this.endMs = performance.now();
    clearTimeout(this.#timeout);
    this.#onEnd(isOk);
  }
}

/** Found as bytes, not parsed: inside a JSON string the quotes of the keys would be escaped. */
function usageOf(tail: string, eventCount: number): Usage {
  const usage = tail.slice(Math.max(0, tail.lastIndexOf('"usage"')));
  const count = (key: string): number | undefined => {
    const found = new RegExp(`"${key}"\\s*:\\s*(\\d{1,12})`).exec(usage);
    return found === null ? undefined : Number(found[1]);
  };
  return {
    promptTokens: count("prompt_tokens") ?? 0,
    cachedTokens: count("cached_tokens") ?? 0,
    outputTokens: count("completion_tokens") ?? eventCount,
  };
}
