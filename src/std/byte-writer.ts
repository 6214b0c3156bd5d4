import { IS_LITTLE_ENDIAN } from "./byte-reader.ts";

/** Up to this many values a loop beats making a view. */
const LOOP_VALUES = 64;

/**
 * A growing slab for binary messages, little-endian. One writer is reused for many messages: `reset`, write, then take
 * `bytes()`, a view that is valid until the next write. Cost: one copy per field, an allocation only when it grows.
 */
export class ByteWriter {
  #buffer: Buffer;
  #length = 0;

  constructor(initialBytes = 1024) {
    this.#buffer = Buffer.allocUnsafeSlow(initialBytes);
  }

  get length(): number {
    return this.#length;
  }

  reset(): void {
    this.#length = 0;
  }

  #reserve(byteCount: number): number {
    const at = this.#length;
    const end = at + byteCount;
    if (end > this.#buffer.length) {
      const grown = Buffer.allocUnsafeSlow(Math.max(end, this.#buffer.length * 2));
      this.#buffer.copy(grown, 0, 0, at);
      this.#buffer = grown;
    }
    this.#length = end;
    return at;
  }

  u8(value: number): void {
    const at = this.#reserve(1);
    this.#buffer[at] = value;
  }

  u16(value: number): void {
    const at = this.#reserve(2);
    this.#buffer.writeUInt16LE(value, at);
  }

  u32(value: number): void {
    const at = this.#reserve(4);
    this.#buffer.writeUInt32LE(value >>> 0, at);
  }

  u64(value: bigint): void {
    const at = this.#reserve(8);
    this.#buffer.writeBigUInt64LE(value, at);
  }

  f32(value: number): void {
    const at = this.#reserve(4);
    this.#buffer.writeFloatLE(value, at);
  }

  f64(value: number): void {
    const at = this.#reserve(8);
    this.#buffer.writeDoubleLE(value, at);
  }

  bytes(source: Uint8Array): void {
    const at = this.#reserve(source.length);
    this.#buffer.set(source, at);
  }

  /** The first `count` (default all) values as u32 little-endian. */
  u32s(source: ArrayLike<number>, count = source.length): void {
    let at = this.#reserve(count * 4);
    const buffer = this.#buffer;
    if (IS_LITTLE_ENDIAN && source instanceof Uint32Array && count > LOOP_VALUES) {
      buffer.set(new Uint8Array(source.buffer, source.byteOffset, count * 4), at);
      return;
    }
    for (let i = 0; i < count; i++, at += 4) {
      const value = source[i]!;
      buffer[at] = value;
      buffer[at + 1] = value >>> 8;
      buffer[at + 2] = value >>> 16;
      buffer[at + 3] = value >>> 24;
    }
  }

  /** u32 byte length, then UTF-8. */
  text(value: string): void {
    const byteLength = Buffer.byteLength(value);
    const at = this.#reserve(4 + byteLength);
    this.#buffer.writeUInt32LE(byteLength, at);
    this.#buffer.write(value, at + 4, byteLength, "utf8");
  }

  /** Overwrites a u32 written before, at byte offset `at`: for lengths known only at the end. */
  patchU32(at: number, value: number): void {
    this.#buffer.writeUInt32LE(value >>> 0, at);
  }

  /** What was written since `reset`, as a view into the slab: valid until the next write or reset. */
  view(): Buffer {
    return this.#buffer.subarray(0, this.#length);
  }

  /** A copy of its own of what was written since `reset`. */
  copy(): Buffer {
    return Buffer.from(this.view());
  }
}
