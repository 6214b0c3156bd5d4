import type { IncomingMessage } from "node:http";
import { DynamoError } from "../../errors/index.ts";
import type { TurnShare } from "../turn-share.ts";

/**
 * Collects one request body, never more than its limit, under a budget that all bodies being read share. Chunked bodies
 * are counted as they come; what is over a limit is dropped unread. `onEnd` is called once, unless `stop` comes first;
 * the body it gets is valid until it returns.
 */
export interface BodyBudget {
  /** Bytes of all bodies that are being read now. */
  bytes: number;
  readonly limitBytes: number;
}

export class BodyReader {
  /** For the server's check of body time-outs. */
  readonly startedMs: number;
  readonly #limitBytes: number;
  readonly #budget: BodyBudget;
  readonly #onEnd: (failure: DynamoError | undefined, body: Buffer) => void;
  readonly #turns: TurnShare;
  #chunks: Buffer[] = [];
  #byteCount = 0;
  #done = false;

  constructor(
    request: IncomingMessage,
    limitBytes: number,
    budget: BodyBudget,
    startedMs: number,
    turns: TurnShare,
    onEnd: (failure: DynamoError | undefined, body: Buffer) => void,
  ) {
    this.startedMs = startedMs;
    this.#limitBytes = limitBytes;
    this.#budget = budget;
    this.#turns = turns;
    this.#onEnd = onEnd;
    request.on("data", (chunk: Buffer) => this.#take(chunk));
    request.on("end", () => this.#onComplete());
  }

  /** Gives the bytes back; nothing is called any more and the rest of the body is discarded as it arrives. */
  stop(): void {
    if (this.#done) return;
    this.#done = true;
    this.#release();
  }

  fail(failure: DynamoError): void {
    this.#finish(failure);
  }

  #take(chunk: Buffer): void {
    if (this.#done) return;
    this.#byteCount += chunk.length;
    this.#budget.bytes += chunk.length;
    if (this.#byteCount > this.#limitBytes) return this.#finish(bodyTooLarge(this.#limitBytes));
    if (this.#budget.bytes > this.#budget.limitBytes) {
      return this.#finish(
        new DynamoError("too-many-requests", "the server is reading as many request bodies as it has memory for", {
          retryAfterMs: 1_000,
        }),
      );
    }
    this.#chunks.push(chunk);
  }

  #onComplete(): void {
    if (this.#byteCount <= LARGE_BODY_BYTES) this.#finish(undefined);
    else void this.#turns.wait().then(() => this.#finish(undefined));
  }

  #finish(failure: DynamoError | undefined): void {
    if (this.#done) return;
    this.#done = true;
    const chunks = this.#chunks;
    const byteCount = this.#byteCount;
    this.#release();
    if (failure !== undefined) this.#onEnd(failure, EMPTY);
    else this.#onEnd(undefined, joined(chunks, byteCount));
  }

  #release(): void {
    this.#budget.bytes -= this.#byteCount;
    this.#byteCount = 0;
    this.#chunks = [];
  }
}

const EMPTY = Buffer.alloc(0);

/** Reading a larger one takes a tenth of a millisecond and more: they are read one per turn of the loop. */
const LARGE_BODY_BYTES = 64 * 1024;

/** Bodies up to this size are put together in one buffer of this process, instead of one that is garbage at once. */
const JOINED_BYTES_MAX = 1024 * 1024;
let joinBuffer = EMPTY;

/** In one piece, valid until the next call. */
function joined(chunks: readonly Buffer[], byteCount: number): Buffer {
  if (chunks.length === 1) return chunks[0]!;
  if (byteCount > JOINED_BYTES_MAX) return Buffer.concat(chunks, byteCount);
  if (joinBuffer.length < byteCount) joinBuffer = Buffer.allocUnsafeSlow(Math.min(JOINED_BYTES_MAX, byteCount * 2));
  let at = 0;
  for (const chunk of chunks) {
    joinBuffer.set(chunk, at);
    at += chunk.length;
  }
  return joinBuffer.subarray(0, byteCount);
}

export function bodyTooLarge(limitBytes: number): DynamoError {
  return new DynamoError("body-too-large", `the request body is too large: expected at most ${limitBytes} bytes`);
}
