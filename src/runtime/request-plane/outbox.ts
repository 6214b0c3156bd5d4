import type { DynamoError } from "../../errors/index.ts";
import { END_BIT, FRAME, HEAD_BYTES, MAX_STREAM_ID, OPEN_HEAD_BYTES, encodeError, putU16, putU32 } from "./frame.ts";
import { BATCH_CUT_BYTES, MAX_ENDPOINT_BYTES, MAX_REQUEST_ID_BYTES, MAX_TRACEPARENT_BYTES } from "./limits.ts";

/**
 * What a connection sends with its next flush: one slab into which all streams write their frames directly. Items and
 * credits that follow each other share one frame, whose length is filled in when another frame begins or the slab is
 * taken:
 *
 *     [OPEN ...][CREDIT a b c][BATCH item item end item      <- length of the last one still open
 *
 * An item costs one copy and no object. `take` gives the slab away whole (a socket may hold it until the kernel has the
 * bytes); `giveBack` returns it for reuse. Owned by one connection; bounded by whoever asks `byteLength` before writing.
 */
const FIRST_SLAB_BYTES = 16 * 1024;
/** A larger slab is left to the garbage collector after its flush. */
const KEPT_SLAB_BYTES = 1024 * 1024;
/** Below this a byte loop beats the call into `TypedArray.set`. */
const LOOP_BYTES = 24;

export interface OpenFields {
  readonly wireId: number;
  readonly timeoutMs: number;
  readonly windowBytes: number;
  readonly endpoint: string;
  readonly requestId: string;
  readonly traceparent: string;
}

const NO_BYTES: Buffer = Buffer.alloc(0);

export class Outbox {
  #slab: Buffer = NO_BYTES;
  #length = 0;
  /** Where the head of the open BATCH or CREDIT frame is, -1 without one. */
  #openAt = -1;
  #openType = 0;
  #spare: Buffer = NO_BYTES;
  /** All of the slab that `take` gave out last. */
  #lent: Buffer = NO_BYTES;

  /** Bytes that wait for the next `take`. */
  get byteLength(): number {
    return this.#length;
  }

  /** One item of a stream. */
  item(wireId: number, item: Uint8Array): void {
    const byteCount = item.length;
    const at = this.#entry(FRAME.batch, 8 + byteCount);
    const slab = this.#slab;
    putU32(slab, at, wireId);
    putU32(slab, at + 4, byteCount);
    if (byteCount > LOOP_BYTES) slab.set(item, at + 8);
    else for (let i = 0; i < byteCount; i++) slab[at + 8 + i] = item[i]!;
  }

  /** The end of a stream, in order behind its items. */
  streamEnd(wireId: number, error: DynamoError | undefined): void {
    const bytes = error === undefined ? NO_BYTES : encodeError(error);
    const at = this.#entry(FRAME.batch, 8 + bytes.length);
    putU32(this.#slab, at, wireId | END_BIT);
    putU32(this.#slab, at + 4, bytes.length);
    this.#slab.set(bytes, at + 8);
  }

  credit(wireId: number, byteCount: number): void {
    const at = this.#entry(FRAME.credit, 8);
    putU32(this.#slab, at, wireId);
    putU32(this.#slab, at + 4, byteCount);
  }

  /** The texts have been checked against their limits. */
  open(fields: OpenFields, payload: Uint8Array): void {
    const textBytes = MAX_ENDPOINT_BYTES + MAX_REQUEST_ID_BYTES + MAX_TRACEPARENT_BYTES;
    const start = this.#begin(HEAD_BYTES + OPEN_HEAD_BYTES + textBytes + payload.length);
    const slab = this.#slab;
    const at = start + HEAD_BYTES;
    putU32(slab, at, fields.wireId & MAX_STREAM_ID);
    putU32(slab, at + 4, fields.timeoutMs);
    putU32(slab, at + 8, fields.windowBytes);
    let end = at + OPEN_HEAD_BYTES;
    const endpointBytes = slab.write(fields.endpoint, end, MAX_ENDPOINT_BYTES);
    putU16(slab, at + 12, endpointBytes);
    end += endpointBytes;
    const requestIdBytes = slab.write(fields.requestId, end, MAX_REQUEST_ID_BYTES);
    putU16(slab, at + 14, requestIdBytes);
    end += requestIdBytes;
    const traceparentBytes = slab.write(fields.traceparent, end, MAX_TRACEPARENT_BYTES);
    putU16(slab, at + 16, traceparentBytes);
    end += traceparentBytes;
    slab.set(payload, end);
    this.#finish(start, FRAME.open, end + payload.length);
  }

  cancel(wireId: number, error: DynamoError): void {
    const bytes = encodeError(error);
    const start = this.#begin(HEAD_BYTES + 4 + bytes.length);
    putU32(this.#slab, start + HEAD_BYTES, wireId);
    this.#slab.set(bytes, start + HEAD_BYTES + 4);
    this.#finish(start, FRAME.cancel, start + HEAD_BYTES + 4 + bytes.length);
  }

  /** A frame without a body: PING, PONG, GOAWAY. */
  control(type: number): void {
    const start = this.#begin(HEAD_BYTES);
    this.#finish(start, type, start + HEAD_BYTES);
  }

  /** Everything written so far, now the caller's; empty when there is nothing. */
  take(): Buffer {
    this.#seal();
    const taken = this.#slab.subarray(0, this.#length);
    this.#lent = this.#slab;
    this.#slab = this.#spare;
    this.#spare = NO_BYTES;
    this.#length = 0;
    return taken;
  }

  /** A slab from `take` that nobody reads any more. */
  giveBack(taken: Buffer): void {
    const slab = this.#lent;
    this.#lent = NO_BYTES;
    // With several on loan only the last one comes back whole; the others are left to the garbage collector.
    if (slab.buffer !== taken.buffer || slab.length > KEPT_SLAB_BYTES) return;
    if (this.#slab.length === 0) this.#slab = slab;
    else if (this.#spare.length === 0) this.#spare = slab;
  }

  #reserve(byteCount: number): number {
    const at = this.#length;
    const end = at + byteCount;
    if (end > this.#slab.length) {
      const grown = Buffer.allocUnsafeSlow(Math.max(FIRST_SLAB_BYTES, end, this.#slab.length * 2));
      this.#slab.copy(grown, 0, 0, at);
      this.#slab = grown;
    }
    this.#length = end;
    return at;
  }

  /** Space for an entry of the open frame of `type`; opens one where there is none or it is long enough. */
  #entry(type: number, byteCount: number): number {
    if (this.#openType !== type || this.#length - this.#openAt > BATCH_CUT_BYTES) {
      this.#seal();
      const head = this.#reserve(HEAD_BYTES);
      this.#slab[head + 4] = type;
      this.#openAt = head;
      this.#openType = type;
    }
    return this.#reserve(byteCount);
  }

  #begin(byteCount: number): number {
    this.#seal();
    return this.#reserve(byteCount);
  }

  #finish(start: number, type: number, end: number): void {
    putU32(this.#slab, start, end - start - HEAD_BYTES);
    this.#slab[start + 4] = type;
    this.#length = end;
  }

  #seal(): void {
    if (this.#openType === 0) return;
    putU32(this.#slab, this.#openAt, this.#length - this.#openAt - HEAD_BYTES);
    this.#openType = 0;
    this.#openAt = -1;
  }
}
