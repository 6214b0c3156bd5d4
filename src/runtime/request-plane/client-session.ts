import { DynamoError } from "../../errors/index.ts";
import type { OpenOptions } from "./base.ts";
import type { ClientStreamState } from "./client-stream.ts";
import { END_BIT, FRAME, MAX_STREAM_ID, decodeError, malformed, u32At } from "./frame.ts";
import { wrote, type Link } from "./link.ts";

/**
 * The client's side of one connection: gives streams their wire ids, takes BATCH and GOAWAY, hands items to streams. Does
 * no I/O. A wire id is `generation << 16 | slot`: the slot finds the stream without a hash, the generation tells a late
 * item of an ended stream from one of its successor in the slot.
 *
 * Per item: two u32 reads, an array access, the consumer's callback. `turnEnd` ends the chunk: `onTurnEnd` once per stream
 * that got an item, credits in one frame.
 */
const SLOT_BITS = 16;
const SLOT_MASK = (1 << SLOT_BITS) - 1;
const MAX_TIMEOUT_MS = 2 ** 32 - 1;

export interface ClientSessionOptions {
  readonly link: Link;
  readonly maxStreams: number;
  readonly queuedBytes: number;
}

export class ClientSession {
  readonly link: Link;
  readonly #maxStreams: number;
  readonly #queuedBytes: number;
  readonly #slots: (ClientStreamState | undefined)[] = [];
  readonly #freeIds: number[] = [];
  readonly #touched: ClientStreamState[] = [];
  readonly #onLeft = new Set<() => void>();
  #streamCount = 0;
  #draining = false;

  constructor({ link, maxStreams, queuedBytes }: ClientSessionOptions) {
    this.link = link;
    this.#maxStreams = Math.min(maxStreams, SLOT_MASK + 1);
    this.#queuedBytes = queuedBytes;
  }

  get streamCount(): number {
    return this.#streamCount;
  }

  /** See `RequestPlaneClient.onceLeft`. */
  onceLeft(listener: () => void): (() => void) | undefined {
    if (this.#draining) return undefined;
    // Of its own: a listener may be given twice.
    const own = (): void => listener();
    this.#onLeft.add(own);
    return () => void this.#onLeft.delete(own);
  }

  #left(): void {
    const listeners = [...this.#onLeft];
    this.#onLeft.clear();
    for (const listener of listeners) listener();
  }

  /** Sends the request, or says why not. */
  open(stream: ClientStreamState, payload: Uint8Array, options: OpenOptions): DynamoError | undefined {
    if (this.#draining) return new DynamoError("draining", "the worker is shutting down");
    if (this.#streamCount >= this.#maxStreams) {
      return new DynamoError("stream-limit", "the connection carries as many streams as its limit allows");
    }
    const queued = this.link.inFlightBytes + this.link.outbox.byteLength;
    // An empty queue takes any payload within the frame limit.
    if (queued > 0 && queued + payload.length > this.#queuedBytes) {
      return new DynamoError("stream-limit", "the connection's send queue is full", {
        diagnostic: `${queued} bytes wait`,
      });
    }
    const wireId = this.#freeIds.pop() ?? this.#slots.length;
    this.#slots[wireId & SLOT_MASK] = stream;
    this.#streamCount++;
    stream.attach(this, wireId);
    const { endpoint, requestId, traceparent } = options;
    const timeoutMs = Math.min(MAX_TIMEOUT_MS, Math.ceil(options.timeoutMs));
    const fields = { wireId, timeoutMs, windowBytes: stream.windowBytes, endpoint, requestId, traceparent };
    this.link.outbox.open(fields, payload);
    wrote(this.link);
    return undefined;
  }

  onFrame(type: number, bytes: Buffer, start: number, end: number): void {
    if (type === FRAME.batch) this.#onBatch(bytes, start, end);
    else if (type === FRAME.goaway) {
      this.#draining = true;
      this.#left();
    } else throw malformed(`a client got frame type ${type}`);
  }

  #onBatch(bytes: Buffer, start: number, end: number): void {
    const slots = this.#slots;
    let at = start;
    while (at < end) {
      if (end - at < 8) throw malformed(`${end - at} bytes behind the last entry of a BATCH`);
      const word = u32At(bytes, at);
      const byteCount = u32At(bytes, at + 4);
      at += 8;
      if (byteCount > end - at) throw malformed(`entry of ${byteCount} bytes in a BATCH with ${end - at} left`);
      const next = at + byteCount;
      const stream = slots[word & SLOT_MASK];
      if (word >= END_BIT) {
        const error = byteCount === 0 ? undefined : decodeError(bytes, at, next);
        if (stream !== undefined && stream.wireId === word - END_BIT) this.#onStreamEnd(stream, error);
      } else if (stream !== undefined && stream.wireId === word) {
        if (!stream.touched) {
          stream.touched = true;
          this.#touched.push(stream);
        }
        stream.deliver(bytes, at, next);
      }
      at = next;
    }
  }

  #onStreamEnd(stream: ClientStreamState, error: DynamoError | undefined): void {
    this.release(stream);
    stream.finish(error);
  }

  /** The chunk is used up. */
  turnEnd(): void {
    const touched = this.#touched;
    for (let i = 0; i < touched.length; i++) touched[i]!.turnEnd();
    touched.length = 0;
  }

  credit(stream: ClientStreamState, byteCount: number): void {
    this.link.outbox.credit(stream.wireId, byteCount);
    wrote(this.link);
  }

  /** The stream ended on this side: forgets it and tells the server to stop. */
  cancel(stream: ClientStreamState, error: DynamoError): void {
    this.link.outbox.cancel(stream.wireId, error);
    wrote(this.link);
    this.release(stream);
  }

  release(stream: ClientStreamState): void {
    const wireId = stream.wireId;
    this.#slots[wireId & SLOT_MASK] = undefined;
    this.#streamCount--;
    // The next user of the slot gets the next generation; 2^15 of them before a number comes again.
    this.#freeIds.push((wireId + SLOT_MASK + 1) & MAX_STREAM_ID);
  }

  /** The connection is gone or was never made: ends all streams. */
  lost(error: DynamoError): void {
    this.turnEnd();
    for (const stream of this.#slots) {
      if (stream === undefined) continue;
      this.release(stream);
      stream.finish(error);
    }
    this.#left();
  }

  /** Cancels all streams, telling the server. */
  cancelAll(error: DynamoError): void {
    for (const stream of this.#slots) stream?.cancel(error);
  }
}
