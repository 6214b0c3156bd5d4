/**
 * A cursor over msgpack bytes from outside, for readers that know what they expect: it hands out lengths and values in
 * order and never builds objects. Every length is checked against what is left before anything is made of it, `skip` has
 * a bound on depth. Throws `MsgpackError`; the reader turns that into its own error class. Format: msgpack's public
 * specification; extension types are only skipped.
 */
export class MsgpackError extends Error {
  override readonly name = "MsgpackError";
}

export type MsgpackKind = "nil" | "boolean" | "integer" | "float" | "text" | "bytes" | "array" | "map" | "extension";

const MAX_DEPTH = 16;
const utf8 = new TextDecoder("utf-8", { fatal: true });

export class MsgpackCursor {
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  #at = 0;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  get remaining(): number {
    return this.#bytes.length - this.#at;
  }

  /** What comes next; nothing is consumed. */
  kind(): MsgpackKind {
    const tag = this.#peek();
    if (tag <= 0x7f || tag >= 0xe0 || (tag >= 0xcc && tag <= 0xd3)) return "integer";
    if (tag <= 0x8f || tag === 0xde || tag === 0xdf) return "map";
    if (tag <= 0x9f || tag === 0xdc || tag === 0xdd) return "array";
    if (tag <= 0xbf || (tag >= 0xd9 && tag <= 0xdb)) return "text";
    if (tag === 0xc0) return "nil";
    if (tag === 0xc2 || tag === 0xc3) return "boolean";
    if (tag >= 0xc4 && tag <= 0xc6) return "bytes";
    if (tag === 0xca || tag === 0xcb) return "float";
    if (tag === 0xc1) throw new MsgpackError("0xc1 is not used in msgpack");
    return "extension";
  }

  /** True and consumed when the next value is nil. */
  takeNil(): boolean {
    if (this.#peek() !== 0xc0) return false;
    this.#at++;
    return true;
  }

  /** Number of elements; they follow. At least one byte each must be left. */
  array(): number {
    const tag = this.#byte();
    let length: number;
    if (tag >= 0x90 && tag <= 0x9f) length = tag & 0x0f;
    else if (tag === 0xdc) length = this.#view.getUint16(this.#take(2));
    else if (tag === 0xdd) length = this.#view.getUint32(this.#take(4));
    else throw this.#unexpected("an array", tag);
    return this.#fitting(length);
  }

  /** Number of entries; key and value of each follow. */
  map(): number {
    const tag = this.#byte();
    let length: number;
    if (tag >= 0x80 && tag <= 0x8f) length = tag & 0x0f;
    else if (tag === 0xde) length = this.#view.getUint16(this.#take(2));
    else if (tag === 0xdf) length = this.#view.getUint32(this.#take(4));
    else throw this.#unexpected("a map", tag);
    this.#fitting(2 * length);
    return length;
  }

  /** A whole number of at most 53 bits. */
  integer(): number {
    const value = this.integer64();
    if (value > BigInt(Number.MAX_SAFE_INTEGER) || value < BigInt(Number.MIN_SAFE_INTEGER)) {
      throw new MsgpackError(`${value} is over 53 bits`);
    }
    return Number(value);
  }

  /** A u32, without a BigInt on the way: the path of token ids. */
  u32(): number {
    const tag = this.#byte();
    if (tag <= 0x7f) return tag;
    if (tag === 0xcc) return this.#bytes[this.#take(1)]!;
    if (tag === 0xcd) return this.#view.getUint16(this.#take(2));
    if (tag === 0xce) return this.#view.getUint32(this.#take(4));
    this.#at--;
    const value = this.integer64();
    if (value < 0n || value > 0xffff_ffffn) throw new MsgpackError(`${value} is not an unsigned 32-bit number`);
    return Number(value);
  }

  /** Any msgpack integer, signed or unsigned. */
  integer64(): bigint {
    const tag = this.#byte();
    if (tag <= 0x7f) return BigInt(tag);
    if (tag >= 0xe0) return BigInt(tag - 0x100);
    switch (tag) {
      case 0xcc:
        return BigInt(this.#bytes[this.#take(1)]!);
      case 0xcd:
        return BigInt(this.#view.getUint16(this.#take(2)));
      case 0xce:
        return BigInt(this.#view.getUint32(this.#take(4)));
      case 0xcf:
        return this.#view.getBigUint64(this.#take(8));
      case 0xd0:
        return BigInt(this.#view.getInt8(this.#take(1)));
      case 0xd1:
        return BigInt(this.#view.getInt16(this.#take(2)));
      case 0xd2:
        return BigInt(this.#view.getInt32(this.#take(4)));
      case 0xd3:
        return this.#view.getBigInt64(this.#take(8));
      default:
        throw this.#unexpected("an integer", tag);
    }
  }

  /** UTF-8 of at most `maxBytes` bytes. */
  text(maxBytes: number): string {
    const tag = this.#byte();
    let length: number;
    if (tag >= 0xa0 && tag <= 0xbf) length = tag & 0x1f;
    else if (tag === 0xd9) length = this.#bytes[this.#take(1)]!;
    else if (tag === 0xda) length = this.#view.getUint16(this.#take(2));
    else if (tag === 0xdb) length = this.#view.getUint32(this.#take(4));
    else throw this.#unexpected("text", tag);
    if (length > maxBytes) throw new MsgpackError(`text of ${length} bytes is over the limit of ${maxBytes}`);
    const at = this.#take(length);
    try {
      return utf8.decode(this.#bytes.subarray(at, at + length));
    } catch (cause) {
      throw new MsgpackError("text is not UTF-8", { cause });
    }
  }

  /** A view of at most `maxBytes` bytes, valid as long as the source is. */
  bytes(maxBytes: number): Uint8Array {
    const tag = this.#byte();
    let length: number;
    if (tag === 0xc4) length = this.#bytes[this.#take(1)]!;
    else if (tag === 0xc5) length = this.#view.getUint16(this.#take(2));
    else if (tag === 0xc6) length = this.#view.getUint32(this.#take(4));
    else throw this.#unexpected("bytes", tag);
    if (length > maxBytes) throw new MsgpackError(`${length} bytes are over the limit of ${maxBytes}`);
    const at = this.#take(length);
    return this.#bytes.subarray(at, at + length);
  }

  /** Leaves out the next value, whatever it is. */
  skip(depth = 0): void {
    if (depth > MAX_DEPTH) throw new MsgpackError(`values are nested deeper than ${MAX_DEPTH}`);
    switch (this.kind()) {
      case "array": {
        for (let left = this.array(); left > 0; left--) this.skip(depth + 1);
        return;
      }
      case "map": {
        for (let left = 2 * this.map(); left > 0; left--) this.skip(depth + 1);
        return;
      }
      case "integer":
        this.integer64();
        return;
      case "text":
      case "bytes":
        this.#take(this.#rawLength());
        return;
      case "float":
        this.#take(this.#byte() === 0xca ? 4 : 8);
        return;
      case "extension":
        this.#skipExtension();
        return;
      default:
        this.#at++;
    }
  }

  #rawLength(): number {
    const tag = this.#byte();
    if (tag >= 0xa0 && tag <= 0xbf) return tag & 0x1f;
    if (tag === 0xc4 || tag === 0xd9) return this.#bytes[this.#take(1)]!;
    if (tag === 0xc5 || tag === 0xda) return this.#view.getUint16(this.#take(2));
    return this.#view.getUint32(this.#take(4));
  }

  #skipExtension(): void {
    const tag = this.#byte();
    if (tag >= 0xd4 && tag <= 0xd8) this.#take(1 + 2 ** (tag - 0xd4));
    else if (tag === 0xc7) this.#take(1 + this.#bytes[this.#take(1)]!);
    else if (tag === 0xc8) this.#take(1 + this.#view.getUint16(this.#take(2)));
    else this.#take(1 + this.#view.getUint32(this.#take(4)));
  }

  #peek(): number {
    if (this.#at >= this.#bytes.length) throw new MsgpackError(`expected a value at offset ${this.#at}, got the end`);
    return this.#bytes[this.#at]!;
  }

  #byte(): number {
    const value = this.#peek();
    this.#at++;
    return value;
  }

  #take(byteCount: number): number {
    const at = this.#at;
    if (byteCount > this.#bytes.length - at) {
      throw new MsgpackError(`expected ${byteCount} more bytes at offset ${at}, got ${this.#bytes.length - at}`);
    }
    this.#at = at + byteCount;
    return at;
  }

  #fitting(count: number): number {
    if (count > this.remaining) throw new MsgpackError(`${count} values do not fit into ${this.remaining} bytes`);
    return count;
  }

  #unexpected(what: string, tag: number): MsgpackError {
    return new MsgpackError(`expected ${what} at offset ${this.#at - 1}, got tag 0x${tag.toString(16)}`);
  }
}
