import { Pool, type Dispatcher } from "undici";
import { DynamoError } from "../../errors/index.ts";

/**
 * HTTP to one engine's server, over TCP (`http://host:port`) or a unix socket (`unix:/path`). Short questions with a
 * deadline (`ask`), and streams without one (`open`), whose connection is closed to abort them: that is how engines are
 * told to stop. A connection carries one request at a time, and is kept for the next.
 */
export interface EngineHttpOptions {
  readonly url: string;
  /** Sent as a bearer token. */
  readonly apiKey?: string;
  /** With every request. */
  readonly headers?: Readonly<Record<string, string>>;
}

export type AnswerHeaders = Readonly<Record<string, string | readonly string[] | undefined>>;

export interface HttpAnswer {
  readonly status: number;
  readonly text: string;
}

export interface AskOptions {
  readonly body?: string;
  readonly timeoutMs: number;
  readonly signal?: AbortSignal;
  /** @default 16 Mi */
  readonly maxBytes?: number;
}

export interface HttpCall {
  readonly path: string;
  readonly body: string;
  readonly headers?: Readonly<Record<string, string>>;
}

export interface CallHandler {
  /** Before the first bytes. */
  onStatus(status: number, headers: AnswerHeaders): void;
  onBytes(bytes: Buffer): void;
  /** The whole answer came. */
  onEnd(): void;
  /** It broke; not after an `abort` of ours. */
  onError(error: Error): void;
}

export interface OpenCall {
  /** Closes the connection. The handler hears nothing more. */
  abort(): void;
}

const CONNECT_TIMEOUT_MS = 5_000;
/** Engines close idle connections after 5 s (uvicorn); the reset would hit the next request. */
const KEEP_ALIVE_MS = 2_000;
const MAX_ANSWER_BYTES = 16 * 1024 * 1024;

export class EngineHttp {
  readonly url: string;
  readonly #pool: Pool;
  readonly #headers: Readonly<Record<string, string>>;

  /** Throws `invalid-config` for what is no address. */
  constructor({ url, apiKey, headers }: EngineHttpOptions) {
    this.url = url;
    const { origin, socketPath } = parseEngineUrl(url);
    this.#headers = {
      "content-type": "application/json",
      ...(apiKey === undefined ? {} : { authorization: `Bearer ${apiKey}` }),
      ...headers,
    };
    this.#pool = new Pool(origin, {
      pipelining: 1,
      keepAliveTimeout: KEEP_ALIVE_MS,
      // Prompts wait for their turn in the engine: how long is not this client's business.
      headersTimeout: 0,
      bodyTimeout: 0,
      connect: { timeout: CONNECT_TIMEOUT_MS },
      ...(socketPath === undefined ? {} : { socketPath }),
    });
  }

  /** Throws `worker-unreachable` when nobody answers, `connect-timeout` after the deadline, `cancelled`. */
  ask(method: "GET" | "POST", path: string, options: AskOptions): Promise<HttpAnswer> {
    const { body, timeoutMs, signal, maxBytes = MAX_ANSWER_BYTES } = options;
    const { promise, resolve, reject } = Promise.withResolvers<HttpAnswer>();
    const chunks: Buffer[] = [];
    let status = 0;
    let total = 0;
    let call: OpenCall;
    const send = (isRetry: boolean): void => {
      call = this.#dispatch(method, { path, body: body ?? "" }, {
        onStatus: (code) => (status = code),
        onBytes: (bytes) => {
          total += bytes.length;
          if (total <= maxBytes) chunks.push(bytes);
          else fail(new DynamoError("malformed-frame", `${path} of the engine at ${this.url} answers too much`));
        },
        onEnd: () => settle(() => resolve({ status, text: Buffer.concat(chunks).toString("utf8") })),
        onError: (error) => {
          // A kept connection that the server closed just then is no sign that it is gone; a refused one is.
          if (status === 0 && !isRetry && (error as NodeJS.ErrnoException).code !== "ECONNREFUSED") return send(true);
          settle(() => reject(unreachable(this.url, path, error)));
        },
      }); // prettier-ignore
    };
    send(false);
    const fail = (error: DynamoError): void => {
      call.abort();
      settle(() => reject(error));
    };
    const timer = setTimeout(() => {
      fail(new DynamoError("connect-timeout", `the engine at ${this.url} did not answer ${path} in ${timeoutMs} ms`));
    }, timeoutMs);
    const onAbort = (): void => fail(new DynamoError("cancelled", "the question to the engine was cancelled"));
    const settle = (how: () => void): void => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", onAbort);
      how();
    };
    signal?.addEventListener("abort", onAbort, { once: true });
    if (signal?.aborted === true) onAbort();
    return promise;
  }

  /** POST; the handler is called on later turns of the loop. */
  open(call: HttpCall, handler: CallHandler): OpenCall {
    return this.#dispatch("POST", call, handler);
  }

  close(): Promise<void> {
    return this.#pool.destroy();
  }

  #dispatch(method: "GET" | "POST", { path, body, headers }: HttpCall, handler: CallHandler): OpenCall {
    let controller: Dispatcher.DispatchController | undefined;
    let isAborted = false;
    this.#pool.dispatch(
      {
        method,
        path,
        ...(body === "" ? {} : { body }),
        headers: { ...this.#headers, ...headers },
        // Each stream is a request that runs for long: undici is not to wait for it before the next.
        blocking: false,
      },
      {
        onRequestStart(started) {
          controller = started;
          if (isAborted) started.abort(new Error("aborted"));
        },
        onResponseStart(_controller, status, headers) {
          if (!isAborted) handler.onStatus(status, headers as AnswerHeaders);
        },
        onResponseData(_controller, chunk) {
          if (!isAborted) handler.onBytes(chunk);
        },
        onResponseEnd() {
          if (!isAborted) handler.onEnd();
        },
        onResponseError(_controller, error) {
          if (!isAborted) handler.onError(error);
        },
      },
    );
    return {
      abort() {
        if (isAborted) return;
        isAborted = true;
        controller?.abort(new Error("aborted"));
      },
    };
  }
}

/** Throws `invalid-config`. */
export function parseEngineUrl(url: string): { readonly origin: string; readonly socketPath?: string } {
  if (url.startsWith("unix:")) {
    const socketPath = url.slice("unix:".length).replace(/^\/\/(?=\/)/, "");
    if (socketPath.startsWith("/")) return { origin: "http://localhost", socketPath };
  }
  const parsed = URL.parse(url);
  if (parsed !== null && ["http:", "https:"].includes(parsed.protocol) && ["", "/"].includes(parsed.pathname)) {
    return { origin: parsed.origin };
  }
  throw new DynamoError(
    "invalid-config",
    `--engine-url: expected http://host:port or unix:/path/of/socket, without a path behind it, got ${url}`,
  );
}

function unreachable(url: string, path: string, cause: Error): DynamoError {
  return new DynamoError("worker-unreachable", `the engine at ${url} cannot be reached`, {
    diagnostic: `${path}: ${cause.message}`,
    cause,
  });
}
