import { DynamoError } from "../errors/index.ts";

/** Largest range of one answer: a quarter of the request plane's default credit window. */
export const BYTE_RANGE_MAX = 64 * 1024;

/** Asks the `tokenizer` endpoint for `length` bytes from `offset` on: two u32 little-endian. */
export function encodeByteRange(offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeUInt32LE(offset, 0);
  bytes.writeUInt32LE(length, 4);
  return bytes;
}

/** Throws `malformed-frame`. */
export function decodeByteRange(bytes: Uint8Array): { offset: number; length: number } {
  const view = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = bytes.length === 8 ? view.readUInt32LE(4) : 0;
  if (length < 1 || length > BYTE_RANGE_MAX) {
    throw new DynamoError("malformed-frame", `byte range: expected 8 bytes and a length of 1 to ${BYTE_RANGE_MAX}`, {
      diagnostic: `got ${bytes.length} bytes, length ${length}`,
    });
  }
  return { offset: view.readUInt32LE(0), length };
}
