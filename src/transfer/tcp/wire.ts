import { DynamoError, errorFromWire } from "../../errors/index.ts";
import { ByteReader, ByteWriter, NONCE_BYTES, TruncatedBytes } from "../../std/index.ts";
import { DescriptorList } from "../descriptor-list.ts";
import { MAX_MESSAGE_BYTES, MAX_NAME_BYTES, MAX_TRANSFER_DESCRIPTORS } from "../limits.ts";

/**
 * Wire format of the tcp back end, version 1, little-endian. Whoever needs bytes dials and asks; so bytes always flow from
 * the accepting to the dialling side, which is the one that can read a socket straight into registered memory.
 *
 *     dialler -> server   u32 body bytes | u8 type | body
 *       HELLO   "DTXT" | u16 version | u64 server's incarnation | u64 own | u16 own port | name | nonce | u8 n | proof
 *       READ    u32 id | u32 n | n x (u32 region | f64 offset | u32 bytes)           answered by DATA
 *       FETCH   u32 id | u64 grant | f64 start | u32 bytes                           answered by DATA
 *       PULL    u32 id | u64 grant | u32 timeout ms | u32 m | message | u32 n | n x descriptor   by DONE
 *       NOTIFY  u32 id | message                                                     answered by DONE
 *       CANCEL  u32 id of a PULL                                                     not answered by itself
 *     server -> dialler   u8 type | u8 0 | u16 text bytes | u32 id | f64 payload bytes | text | payload
 *       HELLO   text: "DTXT" | u16 version | nonce       WELCOME  text: proof
 *       DATA    payload: the bytes asked for, in order   DONE
 *       ERROR   text: reason | NUL | message; in answer to any request
 *
 * A write is a PULL: it names the destination, the peer then fetches the bytes of the grant. A grant is a random number
 * that stands for the source descriptors of one running write, so a peer can fetch those bytes and no others.
 */
export const MAGIC = 0x54585444;
export const PROTOCOL_VERSION = 1;
export const PROOF_LABEL = "dynamo-ts transfer hello\n";

export const REQUEST = { hello: 1, read: 2, fetch: 3, pull: 4, notify: 5, cancel: 6 } as const;
export const RESPONSE = { hello: 1, welcome: 2, data: 3, done: 4, error: 5 } as const;

export const REQUEST_HEADER_BYTES = 5;
export const RESPONSE_HEADER_BYTES = 16;
/** A PULL of the most descriptors and the longest message. */
export const MAX_REQUEST_BYTES = MAX_TRANSFER_DESCRIPTORS * 16 + MAX_MESSAGE_BYTES + 64;
export const MAX_HELLO_BYTES = 512;
/** Bytes one READ or FETCH may ask for. We ask for less. */
export const MAX_DATA_BYTES = 16 * 1024 * 1024;
/** An error's reason and message. */
export const MAX_TEXT_BYTES = 1_024;

export interface RequestHello {
  readonly serverIncarnation: bigint;
  readonly incarnation: bigint;
  /** Where the dialler listens itself, on the address it dials from; 0: nowhere. */
  readonly port: number;
  readonly name: string;
  readonly nonce: Buffer;
  readonly proof: Buffer;
}

const writer = new ByteWriter(4096);

function begin(type: number): ByteWriter {
  writer.reset();
  writer.u32(0);
  writer.u8(type);
  return writer;
}

/** A copy, as the writer is shared. */
function finish(): Buffer {
  writer.patchU32(0, writer.length - REQUEST_HEADER_BYTES);
  return writer.copy();
}

export function encodeHello(hello: RequestHello): Buffer {
  const body = begin(REQUEST.hello);
  body.u32(MAGIC);
  body.u16(PROTOCOL_VERSION);
  body.u64(hello.serverIncarnation);
  body.u64(hello.incarnation);
  body.u16(hello.port);
  body.text(hello.name);
  body.bytes(hello.nonce);
  body.u8(hello.proof.length);
  body.bytes(hello.proof);
  return finish();
}

export function decodeHello(body: ByteReader): RequestHello {
  if (body.u32() !== MAGIC) throw malformed("wrong magic");
  const version = body.u16();
  if (version !== PROTOCOL_VERSION) {
    throw new DynamoError("protocol-version", `transfer protocol version ${version}, we know ${PROTOCOL_VERSION}`);
  }
  const serverIncarnation = body.u64();
  const incarnation = body.u64();
  const port = body.u16();
  const name = body.text(MAX_NAME_BYTES);
  const nonce = Buffer.from(body.bytes(NONCE_BYTES));
  const proof = Buffer.from(body.bytes(body.u8()));
  return { serverIncarnation, incarnation, port, name, nonce, proof };
}

/** Part of a list: pieces of descriptors from byte `inside` of descriptor `first` on. */
export interface Span {
  readonly list: DescriptorList;
  readonly first: number;
  readonly inside: number;
  readonly byteCount: number;
}

export function encodeRead(id: number, { list, first, inside, byteCount }: Span): Buffer {
  const body = begin(REQUEST.read);
  body.u32(id);
  const countAt = body.length;
  body.u32(0);
  let left = byteCount;
  let skip = inside;
  let count = 0;
  for (let i = first; left > 0; i++, count++) {
    const bytes = Math.min(left, list.lengths[i]! - skip);
    body.u32(list.regionIds[i]!);
    body.f64(list.offsets[i]! + skip);
    body.u32(bytes);
    left -= bytes;
    skip = 0;
  }
  body.patchU32(countAt, count);
  return finish();
}

export function encodeFetch(id: number, grant: bigint, start: number, byteCount: number): Buffer {
  const body = begin(REQUEST.fetch);
  body.u32(id);
  body.u64(grant);
  body.f64(start);
  body.u32(byteCount);
  return finish();
}

export interface PullRequest {
  readonly id: number;
  readonly grant: bigint;
  readonly timeoutMs: number;
  readonly message: Uint8Array | undefined;
  readonly destination: DescriptorList;
}

/** In place of a length: there is no message, which is not the empty one. */
const NO_MESSAGE = 0xffff_ffff;

export function encodePull(pull: PullRequest): Buffer {
  const body = begin(REQUEST.pull);
  body.u32(pull.id);
  body.u64(pull.grant);
  body.u32(Math.max(1, Math.ceil(pull.timeoutMs)));
  body.u32(pull.message?.length ?? NO_MESSAGE);
  if (pull.message !== undefined) body.bytes(pull.message);
  const { destination } = pull;
  body.u32(destination.count);
  for (let i = 0; i < destination.count; i++) {
    body.u32(destination.regionIds[i]!);
    body.f64(destination.offsets[i]!);
    body.u32(destination.lengths[i]!);
  }
  return finish();
}

export function decodePull(body: ByteReader): PullRequest {
  const id = body.u32();
  const grant = body.u64();
  const timeoutMs = body.u32();
  const messageBytes = body.u32();
  if (messageBytes !== NO_MESSAGE && messageBytes > MAX_MESSAGE_BYTES) throw malformed("a message over the limit");
  const message = messageBytes === NO_MESSAGE ? undefined : Buffer.from(body.bytes(messageBytes));
  return { id, grant, timeoutMs, message, destination: decodeDescriptors(body) };
}

/** Values are checked by whoever owns the memory; here only that they are there. */
export function decodeDescriptors(body: ByteReader): DescriptorList {
  const count = body.u32();
  if (count === 0 || count > MAX_TRANSFER_DESCRIPTORS || body.remaining !== count * 16) {
    throw malformed(`${count} descriptors in ${body.remaining} bytes`);
  }
  const list = new DescriptorList(new Uint32Array(count), new Float64Array(count), new Uint32Array(count));
  for (let i = 0; i < count; i++) {
    list.regionIds[i] = body.u32();
    list.offsets[i] = body.f64();
    list.lengths[i] = body.u32();
  }
  return list;
}

export function encodeNotify(id: number, message: Uint8Array): Buffer {
  const body = begin(REQUEST.notify);
  body.u32(id);
  body.bytes(message);
  return finish();
}

export function encodeCancel(id: number): Buffer {
  const body = begin(REQUEST.cancel);
  body.u32(id);
  return finish();
}

export function encodeResponse(
  type: number,
  id: number,
  payloadBytes = 0,
  text: Uint8Array = new Uint8Array(0),
): Buffer {
  const out = Buffer.allocUnsafe(RESPONSE_HEADER_BYTES + text.length);
  out[0] = type;
  out[1] = 0;
  out.writeUInt16LE(text.length, 2);
  out.writeUInt32LE(id, 4);
  out.writeDoubleLE(payloadBytes, 8);
  out.set(text, RESPONSE_HEADER_BYTES);
  return out;
}

export function encodeServerHello(nonce: Buffer): Buffer {
  const body = new ByteWriter(32);
  body.u32(MAGIC);
  body.u16(PROTOCOL_VERSION);
  body.bytes(nonce);
  return encodeResponse(RESPONSE.hello, 0, 0, body.view());
}

export function decodeServerHello(text: Buffer): Buffer {
  const body = new ByteReader(text);
  if (body.u32() !== MAGIC) throw malformed("wrong magic");
  const version = body.u16();
  if (version !== PROTOCOL_VERSION) {
    throw new DynamoError("protocol-version", `transfer protocol version ${version}, we know ${PROTOCOL_VERSION}`);
  }
  return Buffer.from(body.bytes(NONCE_BYTES));
}

export function encodeError(id: number, error: DynamoError): Buffer {
  const text = Buffer.from(`${error.reason}\0${error.publicMessage}`).subarray(0, MAX_TEXT_BYTES);
  return encodeResponse(RESPONSE.error, id, 0, text);
}

export function decodeError(text: Buffer): DynamoError {
  const end = text.indexOf(0);
  const reason = text.toString("utf8", 0, end < 0 ? text.length : end);
  return errorFromWire(reason, end < 0 ? "" : text.toString("utf8", end + 1), "from the peer");
}

export function malformed(diagnostic: string): DynamoError {
  return new DynamoError("malformed-frame", "a peer's transfer frame is malformed", { diagnostic });
}

/** Runs a decoder over foreign bytes; what does not fit becomes `malformed-frame`. */
export function decoding<T>(decode: () => T): T {
  try {
    return decode();
  } catch (thrown) {
    if (thrown instanceof TruncatedBytes || thrown instanceof RangeError) throw malformed(thrown.message);
    throw thrown;
  }
}

/**
 * Cuts requests out of a stream. A frame that lies whole in a chunk is handed out in place; one that does not is collected
 * in a buffer of its own size, allocated once its length is known and within the limit.
 */
export class RequestDecoder {
  /** Raised from the hello's to the full limit when the handshake is through. */
  maxBytes = MAX_HELLO_BYTES;
  #partial: Buffer = Buffer.allocUnsafe(REQUEST_HEADER_BYTES);
  #have = 0;

  /** Calls `onRequest` for each frame; the body is valid during the call only. Throws `malformed-frame`. */
  feed(chunk: Buffer, onRequest: (type: number, body: ByteReader) => void): void {
    let at = 0;
    while (at < chunk.length) {
      if (this.#have === 0 && chunk.length - at >= REQUEST_HEADER_BYTES) {
        const end = at + REQUEST_HEADER_BYTES + this.#bodyBytes(chunk, at);
        if (end <= chunk.length) {
          onRequest(chunk[at + 4]!, new ByteReader(chunk, at + REQUEST_HEADER_BYTES, end));
          at = end;
          continue;
        }
      }
      at += this.#collect(chunk, at);
      if (this.#have < REQUEST_HEADER_BYTES) continue;
      const whole = REQUEST_HEADER_BYTES + this.#bodyBytes(this.#partial, 0);
      if (this.#partial.length < whole) {
        const grown = Buffer.allocUnsafe(whole);
        this.#partial.copy(grown, 0, 0, this.#have);
        this.#partial = grown;
      }
      if (this.#have < whole) continue;
      const frame = this.#partial;
      this.#partial = Buffer.allocUnsafe(REQUEST_HEADER_BYTES);
      this.#have = 0;
      onRequest(frame[4]!, new ByteReader(frame, REQUEST_HEADER_BYTES, whole));
    }
  }

  #collect(chunk: Buffer, at: number): number {
    const copied = chunk.copy(
      this.#partial,
      this.#have,
      at,
      Math.min(chunk.length, at + this.#partial.length - this.#have),
    );
    this.#have += copied;
    return copied;
  }

  #bodyBytes(bytes: Buffer, at: number): number {
    const byteCount = bytes.readUInt32LE(at);
    if (byteCount > this.maxBytes) throw malformed(`a request of ${byteCount} bytes, the limit is ${this.maxBytes}`);
    return byteCount;
  }
}
