import { endianness } from "node:os";

/**
 * Reads little-endian binary messages from foreign bytes. Every read checks the bound first and throws `TruncatedBytes`
 * instead of reading past the end; callers turn that into their own error class. Views, not copies.
 */
export class TruncatedBytes extends Error {
  override readonly name = "TruncatedBytes";
}

/** The order of bytes in this machine's typed arrays; where it is the wire's, whole arrays are copied at once. */
export const IS_LITTLE_ENDIAN = endianness() === "LE";

export class ByteReader {
  readonly #buffer: Buffer;
  #at: number;
  readonly #end: number;

  constructor(source: Uint8Array, start = 0, end = source.length) {
    this.#buffer = Buffer.from(source.buffer, source.byteOffset, source.byteLength);
    this.#at = start;
    this.#end = end;
  }

  get offset(): number {
    return this.#at;
  }

  get remaining(): number {
    return this.#end - this.#at;
  }

  #take(byteCount: number): number {
    const at = this.#at;
    if (byteCount < 0 || byteCount > this.#end - at) {
      throw new TruncatedBytes(`expected ${byteCount} more bytes at offset ${at}, got ${this.#end - at}`);
    }
    this.#at = at + byteCount;
    return at;
  }

  u8(): number {
    return this.#buffer[this.#take(1)]!;
  }

  u16(): number {
    return this.#buffer.readUInt16LE(this.#take(2));
  }

  u32(): number {
    return this.#buffer.readUInt32LE(this.#take(4));
  }

  u64(): bigint {
    return this.#buffer.readBigUInt64LE(this.#take(8));
  }

  f32(): number {
    return this.#buffer.readFloatLE(this.#take(4));
  }

  f64(): number {
    return this.#buffer.readDoubleLE(this.#take(8));
  }

  /** A view of the next `byteCount` bytes, valid as long as the source is. */
  bytes(byteCount: number): Buffer {
    const at = this.#take(byteCount);
    return this.#buffer.subarray(at, at + byteCount);
  }

  /** Copies `count` u32 values out; checks the length before it allocates. */
  u32s(count: number): Uint32Array {
    const at = this.#take(count * 4);
    const values = new Uint32Array(count);
    if (IS_LITTLE_ENDIAN) new Uint8Array(values.buffer).set(this.#buffer.subarray(at, at + count * 4));
    else for (let i = 0; i < count; i++) values[i] = this.#buffer.readUInt32LE(at + i * 4);
    return values;
  }

  /** u32 byte length of at most `maxBytes`, then UTF-8. */
  text(maxBytes: number): string {
    const byteLength = this.u32();
    if (byteLength > maxBytes) throw new TruncatedBytes(`text of ${byteLength} bytes is over the limit of ${maxBytes}`);
    const at = this.#take(byteLength);
    return this.#buffer.toString("utf8", at, at + byteLength);
  }
}
