import { DynamoError, toDynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import { WheelTimer, type Clock, type Expiring, type TimerWheel } from "../../std/index.ts";
import type { ClientStream, ClientStreamHandler, OpenOptions, StreamEnd } from "./base.ts";
import type { ClientSession } from "./client-session.ts";
import type { Schedule } from "./flusher.ts";
import {
  DEFAULT_WINDOW_BYTES,
  MAX_ENDPOINT_BYTES,
  MAX_REQUEST_ID_BYTES,
  MAX_TRACEPARENT_BYTES,
  MAX_WINDOW_BYTES,
} from "./limits.ts";

/**
 * One stream on the client: `open -> ended`, whatever comes first of the server's end, `cancel`, the deadline and the loss
 * of the connection. `onEnd` is called exactly once, nothing follows it, and it is never called inside `open`.
 * Credit goes back in steps of a quarter of the window, so that a stream of small items costs no frame each.
 */
export interface ClientCore {
  readonly clock: Clock;
  readonly wheel: TimerWheel;
  readonly schedule: Schedule;
  readonly logger: Logger;
  readonly maxFrameBytes: number;
  /** Streams open to others; a gauge child or a plain cell. */
  readonly inflight: { add(amount?: number): void };
}

export class ClientStreamState implements ClientStream, Expiring {
  readonly windowBytes: number;
  /** Set by the session while an item of the present chunk was delivered. */
  touched = false;
  wireId = -1;
  readonly #core: ClientCore;
  readonly #handler: ClientStreamHandler;
  readonly #autoCredit: boolean;
  readonly #creditStepBytes: number;
  readonly #timer: WheelTimer;
  #session: ClientSession | undefined = undefined;
  #ended = false;
  /** Consumed but not yet granted. */
  #owedBytes = 0;

  constructor(core: ClientCore, options: OpenOptions, handler: ClientStreamHandler) {
    const windowBytes = Math.trunc(options.windowBytes ?? DEFAULT_WINDOW_BYTES);
    this.windowBytes = Math.min(Math.max(1, windowBytes), MAX_WINDOW_BYTES);
    this.#core = core;
    this.#handler = handler;
    this.#autoCredit = options.autoCredit ?? false;
    this.#creditStepBytes = Math.max(1, this.windowBytes >>> 2);
    this.#timer = new WheelTimer(this);
    core.inflight.add(1);
  }

  get ended(): boolean {
    return this.#ended;
  }

  cancel(error?: DynamoError): void {
    this.#stop(error ?? new DynamoError("cancelled", "the caller cancelled the request"));
  }

  grant(byteCount: number): void {
    if (this.#ended || !(byteCount > 0)) return;
    this.#owedBytes += byteCount;
    if (this.#owedBytes < this.#creditStepBytes || this.#session === undefined) return;
    this.#session.credit(this, Math.min(this.#owedBytes, MAX_WINDOW_BYTES));
    this.#owedBytes = 0;
  }

  // ---- called by the session, the client and the wheel ----

  attach(session: ClientSession, wireId: number): void {
    this.#session = session;
    this.wireId = wireId;
  }

  startDeadline(timeoutMs: number): void {
    this.#core.wheel.add(this.#timer, timeoutMs);
  }

  deliver(bytes: Buffer, start: number, end: number): void {
    try {
      this.#handler.onItem(bytes, start, end);
    } catch (thrown) {
      this.#stop(toDynamoError(thrown));
      return;
    }
    if (this.#autoCredit) this.grant(end - start);
  }

  turnEnd(): void {
    this.touched = false;
    if (this.#ended) return;
    try {
      this.#handler.onTurnEnd();
    } catch (thrown) {
      this.#stop(toDynamoError(thrown));
    }
  }

  onExpire(): void {
    this.#stop(new DynamoError("request-deadline", "the request did not finish before its deadline"));
  }

  /** The server ended it, or the connection did; the session has let go of it. */
  finish(end: StreamEnd): void {
    this.#session = undefined;
    if (this.touched) this.turnEnd();
    this.#end(end);
  }

  /** Ends with `error` on a later turn: for what `open` finds out at once. */
  failLater(error: DynamoError): void {
    this.#core.schedule(() => this.#end(error));
  }

  #stop(error: DynamoError): void {
    if (this.#ended) return;
    const session = this.#session;
    this.#session = undefined;
    session?.cancel(this, error);
    this.#end(error);
  }

  #end(end: StreamEnd): void {
    if (this.#ended) return;
    this.#ended = true;
    this.#core.wheel.cancel(this.#timer);
    this.#core.inflight.add(-1);
    try {
      this.#handler.onEnd(end);
    } catch (thrown) {
      const { diagnostic } = toDynamoError(thrown);
      this.#core.logger.error({ diagnostic }, "a stream's handler failed in onEnd");
    }
  }
}

/** Opens `stream` through the session that `sessionOf` finds, or lets it fail on a later turn. Never throws. */
export function openStream(
  core: ClientCore,
  sessionOf: () => ClientSession | DynamoError,
  payload: Uint8Array,
  options: OpenOptions,
  handler: ClientStreamHandler,
): ClientStreamState {
  const stream = new ClientStreamState(core, options, handler);
  let error = refusalOf(core, payload, options);
  if (error === undefined) {
    const session = sessionOf();
    error = session instanceof DynamoError ? session : session.open(stream, payload, options);
  }
  if (error === undefined) stream.startDeadline(options.timeoutMs);
  else stream.failLater(error);
  return stream;
}

function refusalOf(core: ClientCore, payload: Uint8Array, options: OpenOptions): DynamoError | undefined {
  if (!(options.timeoutMs > 0)) {
    return new DynamoError("request-deadline", "the request did not finish before its deadline");
  }
  // 1 KiB for the head and the texts.
  if (payload.length > core.maxFrameBytes - 1_024) {
    return new DynamoError("body-too-large", `the request of ${payload.length} bytes is over the limit`, {
      diagnostic: `limit ${core.maxFrameBytes - 1_024} bytes`,
    });
  }
  return (
    tooLong("endpoint", options.endpoint, MAX_ENDPOINT_BYTES) ??
    tooLong("request id", options.requestId, MAX_REQUEST_ID_BYTES) ??
    tooLong("traceparent", options.traceparent, MAX_TRACEPARENT_BYTES)
  );
}

function tooLong(name: string, text: string, maxBytes: number): DynamoError | undefined {
  // A UTF-16 unit takes at most three bytes: most texts need no count.
  if (text.length * 3 <= maxBytes) return undefined;
  const byteLength = Buffer.byteLength(text);
  if (byteLength <= maxBytes) return undefined;
  return new DynamoError("malformed-frame", `the ${name} of ${byteLength} bytes is over the limit of ${maxBytes}`);
}
