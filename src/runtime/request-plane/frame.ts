import { DynamoError, errorFromWire } from "../../errors/index.ts";
import {
  BATCH_CUT_BYTES,
  MAX_ENDPOINT_BYTES,
  MAX_ERROR_BYTES,
  MAX_ERROR_DIAGNOSTIC_BYTES,
  MAX_ERROR_MESSAGE_BYTES,
  MAX_HANDSHAKE_FRAME_BYTES,
  MAX_ITEM_BYTES,
  MAX_REQUEST_ID_BYTES,
  MAX_TRACEPARENT_BYTES,
} from "./limits.ts";

/**
 * The wire format, version 1. All integers little-endian; a frame is
 *
 *     u32 body length | u8 type | body
 *
 *     HELLO    s->c, c->s  u32 magic, u16 lowest version, u16 highest version, u8 role, u64 peer id, 16-byte nonce,
 *                          u8 proof length (0 or 32), proof                                     (see hello.ts)
 *     WELCOME  s->c        u16 version, u8 proof length (0 or 32), proof
 *     REFUSE   both        error; the connection closes behind it
 *     OPEN     c->s        u32 stream, u32 timeout ms, u32 window bytes, u16 + u16 + u16 lengths of endpoint, request id
 *                          and traceparent, the three texts (UTF-8), the payload up to the end
 *     BATCH    s->c        entries up to the end: u32 stream, u32 length, bytes: an item. With the top bit of the stream
 *                          set: its end; length 0 is a clean one, else the bytes are an error
 *     CANCEL   c->s        u32 stream, error
 *     CREDIT   c->s        pairs up to the end: u32 stream, u32 bytes
 *     PING     both        empty; answered by PONG (empty)
 *     GOAWAY   s->c        empty: the server drains, open nothing new here
 *     error                u8 + reason, u16 + message, u16 + diagnostic (lengths, then UTF-8), u32 ms until a retry may
 *                          succeed (0 = not said)
 *
 * Stream ids are under 2^31, chosen by the client, unique among the live streams of the connection. Frames and entries of
 * a stream that is not live (any more) are dropped without a word, as an end and a cancel may cross on the way; a frame
 * that breaks the format or a limit ends the connection.
 *
 * `FrameDecoder` cuts the byte stream into frames. Chunks go in, each whole frame comes out once, in order, as a range of
 * bytes that is valid during the call only: inside the chunk when the frame lies whole in it, else in the decoder's own
 * buffer. Length and type are checked before a byte is kept, and that buffer grows with what arrived, not with what the
 * length announces. Cost: a few ns per frame; frames across chunks are copied once or twice. Owned by one connection.
 */
export const MAGIC = 0x5052_5944; // "DYRP"
export const PROTOCOL_VERSION = 1;
export const HEAD_BYTES = 5;
export const END_BIT = 0x8000_0000;
export const MAX_STREAM_ID = 0x7fff_ffff;

export const FRAME = {
  hello: 1,
  welcome: 2,
  refuse: 3,
  open: 4,
  batch: 5,
  cancel: 6,
  credit: 7,
  ping: 8,
  pong: 9,
  goaway: 10,
} as const;

/** Longest body per type; -1 marks a type that is not allowed. */
export type FrameLimits = Float64Array;

function limitsOf(entries: readonly (readonly [type: number, maxBytes: number])[]): FrameLimits {
  const limits = new Float64Array(256).fill(-1);
  for (const [type, maxBytes] of entries) limits[type] = maxBytes;
  return limits;
}

/** What either side takes before the hello is through. */
export const HANDSHAKE_FRAMES = limitsOf([
  [FRAME.hello, MAX_HANDSHAKE_FRAME_BYTES],
  [FRAME.welcome, MAX_HANDSHAKE_FRAME_BYTES],
  [FRAME.refuse, MAX_ERROR_BYTES],
]);

/** What a server takes from a client. */
export function serverFrames(maxFrameBytes: number): FrameLimits {
  return limitsOf([
    [FRAME.open, maxFrameBytes],
    [FRAME.cancel, 4 + MAX_ERROR_BYTES],
    [FRAME.credit, BATCH_CUT_BYTES + 8],
    [FRAME.ping, 0],
    [FRAME.pong, 0],
  ]);
}

/** What a client takes from a server. */
export const CLIENT_FRAMES = limitsOf([
  [FRAME.batch, BATCH_CUT_BYTES + 8 + MAX_ITEM_BYTES],
  [FRAME.ping, 0],
  [FRAME.pong, 0],
  [FRAME.goaway, 0],
]);

export function malformed(diagnostic: string): DynamoError {
  return new DynamoError("malformed-frame", "the peer broke the request-plane protocol", { diagnostic });
}

/** No bounds check: the caller has made one. */
export function u32At(bytes: Uint8Array, at: number): number {
  return (bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)) >>> 0;
}

export function u16At(bytes: Uint8Array, at: number): number {
  return bytes[at]! | (bytes[at + 1]! << 8);
}

export function putU32(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value;
  bytes[at + 1] = value >>> 8;
  bytes[at + 2] = value >>> 16;
  bytes[at + 3] = value >>> 24;
}

export function putU16(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value;
  bytes[at + 1] = value >>> 8;
}

// ---- OPEN ----

export const OPEN_HEAD_BYTES = 18;

export interface OpenFrame {
  readonly wireId: number;
  readonly timeoutMs: number;
  readonly windowBytes: number;
  readonly endpoint: string;
  readonly requestId: string;
  readonly traceparent: string;
  /** Where the payload begins; it goes to the end of the frame. */
  readonly payloadStart: number;
}

/** Throws `malformed-frame`. */
export function decodeOpen(bytes: Buffer, start: number, end: number): OpenFrame {
  if (end - start < OPEN_HEAD_BYTES) throw malformed(`OPEN of ${end - start} bytes`);
  const wireId = u32At(bytes, start);
  if (wireId > MAX_STREAM_ID) throw malformed(`OPEN with stream id ${wireId}`);
  const endpointBytes = u16At(bytes, start + 12);
  const requestIdBytes = u16At(bytes, start + 14);
  const traceparentBytes = u16At(bytes, start + 16);
  if (endpointBytes > MAX_ENDPOINT_BYTES) throw malformed(`endpoint of ${endpointBytes} bytes`);
  if (requestIdBytes > MAX_REQUEST_ID_BYTES) throw malformed(`request id of ${requestIdBytes} bytes`);
  if (traceparentBytes > MAX_TRACEPARENT_BYTES) throw malformed(`traceparent of ${traceparentBytes} bytes`);
  const endpointAt = start + OPEN_HEAD_BYTES;
  const requestIdAt = endpointAt + endpointBytes;
  const traceparentAt = requestIdAt + requestIdBytes;
  const payloadStart = traceparentAt + traceparentBytes;
  if (payloadStart > end) throw malformed(`OPEN of ${end - start} bytes is shorter than its texts`);
  return {
    wireId,
    timeoutMs: u32At(bytes, start + 4),
    windowBytes: u32At(bytes, start + 8),
    endpoint: bytes.toString("utf8", endpointAt, requestIdAt),
    requestId: bytes.toString("utf8", requestIdAt, traceparentAt),
    traceparent: bytes.toString("utf8", traceparentAt, payloadStart),
    payloadStart,
  };
}

// ---- errors ----

export function encodeError(error: DynamoError): Buffer {
  const { reason, publicMessage, diagnostic = "", retryAfterMs = 0 } = error;
  const messageRoom = Math.min(MAX_ERROR_MESSAGE_BYTES, Buffer.byteLength(publicMessage));
  const diagnosticRoom = Math.min(MAX_ERROR_DIAGNOSTIC_BYTES, Buffer.byteLength(diagnostic));
  const bytes = Buffer.allocUnsafe(9 + reason.length + messageRoom + diagnosticRoom);
  // Reasons are ASCII words of the catalogue.
  bytes[0] = reason.length;
  let at = 1 + bytes.write(reason, 1, "latin1");
  // `write` stops in front of a character that does not fit whole.
  const messageBytes = bytes.write(publicMessage, at + 2, messageRoom);
  putU16(bytes, at, messageBytes);
  at += 2 + messageBytes;
  const diagnosticBytes = bytes.write(diagnostic, at + 2, diagnosticRoom);
  putU16(bytes, at, diagnosticBytes);
  at += 2 + diagnosticBytes;
  putU32(bytes, at, Math.min(0xffff_ffff, Math.max(0, Math.ceil(retryAfterMs))));
  return bytes.subarray(0, at + 4);
}

/** Throws `malformed-frame`. */
export function decodeError(bytes: Buffer, start: number, end: number): DynamoError {
  if (end - start < 9) throw malformed(`error of ${end - start} bytes`);
  const messageLengthAt = start + 1 + bytes[start]!;
  if (messageLengthAt + 8 > end) throw malformed("error shorter than its reason");
  const diagnosticLengthAt = messageLengthAt + 2 + u16At(bytes, messageLengthAt);
  if (diagnosticLengthAt + 6 > end) throw malformed("error shorter than its message");
  const retryAfterAt = diagnosticLengthAt + 2 + u16At(bytes, diagnosticLengthAt);
  if (retryAfterAt + 4 !== end) throw malformed("error of a wrong length");
  return errorFromWire(
    bytes.toString("utf8", start + 1, messageLengthAt),
    bytes.toString("utf8", messageLengthAt + 2, diagnosticLengthAt),
    bytes.toString("utf8", diagnosticLengthAt + 2, retryAfterAt),
    u32At(bytes, retryAfterAt),
  );
}

/** A whole frame of its own, for the handshake and tests; the hot path writes into an `Outbox`. */
export function encodeFrame(type: number, body: Uint8Array = new Uint8Array(0)): Buffer {
  const frame = Buffer.allocUnsafe(HEAD_BYTES + body.length);
  putU32(frame, 0, body.length);
  frame[4] = type;
  frame.set(body, HEAD_BYTES);
  return frame;
}

// ---- the decoder ----

export interface FrameSink {
  /** One frame; its body is `bytes[start, end)`, valid during the call. May throw `malformed-frame`. */
  onFrame(type: number, bytes: Buffer, start: number, end: number): void;
  /** True once nothing more may be delivered: the rest of the chunk is dropped. */
  readonly closed: boolean;
}

const FIRST_BUFFER_BYTES = 4 * 1024;
/** A buffer above this is given up after its frame, so that one large payload does not stay in memory. */
const KEPT_BUFFER_BYTES = 256 * 1024;

export class FrameDecoder {
  /** Allowed types with their limits; may be replaced between two frames, counts for the next head. */
  limits: FrameLimits;
  #partial: Buffer = Buffer.alloc(0);
  /** Bytes of an incomplete frame that are in `#partial`. */
  #have = 0;
  /** Head and body of that frame, once its head is complete; before, `HEAD_BYTES`. */
  #need = HEAD_BYTES;

  constructor(limits: FrameLimits) {
    this.limits = limits;
  }

  /** Bytes kept of a frame that is not complete. */
  get pendingBytes(): number {
    return this.#have;
  }

  /** Memory held for incomplete frames. */
  get bufferBytes(): number {
    return this.#partial.length;
  }

  /** Throws `malformed-frame`; after that the decoder must not be used again. */
  push(chunk: Buffer, sink: FrameSink): void {
    let at = this.#have === 0 ? 0 : this.#complete(chunk, 0, sink);
    const end = chunk.length;
    while (end - at >= HEAD_BYTES && !sink.closed) {
      const bodyBytes = this.#checkedLength(chunk, at);
      const next = at + HEAD_BYTES + bodyBytes;
      if (next > end) break;
      sink.onFrame(chunk[at + 4]!, chunk, at + HEAD_BYTES, next);
      at = next;
    }
    if (at < end && !sink.closed) this.#complete(chunk, at, sink);
  }

  #checkedLength(bytes: Buffer, at: number): number {
    const bodyBytes = u32At(bytes, at);
    const type = bytes[at + 4]!;
    const limit = this.limits[type]!;
    if (bodyBytes > limit) {
      throw malformed(limit < 0 ? `frame type ${type} not expected here` : `frame type ${type} of ${bodyBytes} bytes`);
    }
    return bodyBytes;
  }

  /** Adds to the incomplete frame from `at` on, delivers it when it is whole, and returns where the next one begins. */
  #complete(chunk: Buffer, at: number, sink: FrameSink): number {
    if (this.#have < HEAD_BYTES) {
      at = this.#keep(chunk, at, HEAD_BYTES);
      if (this.#have < HEAD_BYTES) return at;
      this.#need = HEAD_BYTES + this.#checkedLength(this.#partial, 0);
    }
    at = this.#keep(chunk, at, this.#need);
    if (this.#have < this.#need) return at;
    const frame = this.#partial;
    const frameEnd = this.#need;
    this.#have = 0;
    this.#need = HEAD_BYTES;
    sink.onFrame(frame[4]!, frame, HEAD_BYTES, frameEnd);
    if (frame.length > KEPT_BUFFER_BYTES) this.#partial = Buffer.alloc(0);
    return at;
  }

  /** Copies from the chunk until `until` bytes are held or the chunk is used up; returns where it stopped. */
  #keep(chunk: Buffer, at: number, until: number): number {
    const stop = Math.min(chunk.length, at + until - this.#have);
    const have = this.#have + stop - at;
    if (have > this.#partial.length) {
      const grown = Buffer.allocUnsafeSlow(Math.max(FIRST_BUFFER_BYTES, have, Math.min(until, have * 2)));
      this.#partial.copy(grown, 0, 0, this.#have);
      this.#partial = grown;
    }
    chunk.copy(this.#partial, this.#have, at, stop);
    this.#have = have;
    return stop;
  }
}
