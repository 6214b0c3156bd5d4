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

/** Words read lately, by a hash of their bytes. A few dozen are in use; whatever else comes only replaces them. */
const WORD_SLOTS = 256;
const words: string[] = Array.from({ length: WORD_SLOTS }, () => "");

function isWordAt(word: string, bytes: Uint8Array, from: number, length: number): boolean {
  if (word.length !== length) return false;
  for (let i = 0; i < length; i++) if (word.charCodeAt(i) !== bytes[from + i]) return false;
  return true;
}

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

  /** As many `u32` as fit into `out`, from element `from` on. */
  u32s(out: Uint32Array, from: number): void {
    const bytes = this.#bytes;
    const view = this.#view;
    let at = this.#at;
    for (let i = from; i < out.length; i++) {
      const tag = bytes[at]!;
      // What is in bounds and in one of the usual forms is read here; all else by `u32`, which says what is wrong.
      if (tag <= 0x7f) {
        out[i] = tag;
        at++;
      } else if (tag >= 0xcc && tag <= 0xce && at + 5 <= bytes.length) {
        // One, two or four bytes without asking which: on real token ids a branch would be guessed wrong a third of the time.
        const width = 1 << (tag - 0xcc);
        out[i] = view.getUint32(at + 1) >>> (32 - 8 * width);
        at += 1 + width;
      } else {
        this.#at = at;
        out[i] = this.u32();
        at = this.#at;
      }
    }
    this.#at = at;
  }

  /**
   * A name of 64 bits, appended as its halves, lo and hi: an integer, signed or not (the same bits are the same name), or
   * a digest of at most `maxBytes` bytes, of which the last eight count, big-endian.
   */
  pushHash(out: number[], maxBytes: number): void {
    const tag = this.#peek();
    if (tag === 0xcf || tag === 0xd3) {
      this.#at++;
      const at = this.#take(8);
      out.push(this.#view.getUint32(at + 4), this.#view.getUint32(at));
    } else if (this.kind() === "integer") {
      const value = this.integer();
      out.push(value >>> 0, Math.floor(value / 2 ** 32) >>> 0);
    } else {
      const digest = this.bytes(maxBytes);
      if (digest.length < 8) throw new MsgpackError(`expected a digest of 8 bytes or more, got ${digest.length}`);
      const at = digest.byteOffset - this.#view.byteOffset + digest.length - 8;
      out.push(this.#view.getUint32(at + 4), this.#view.getUint32(at));
    }
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

  /** Like `text`, for the words that a format repeats: one that was read lately is not made again. */
  word(maxBytes: number): string {
    const tag = this.#peek();
    const length = tag & 0x1f;
    const from = this.#at + 1;
    if (tag < 0xa0 || tag > 0xbf || from + length > this.#bytes.length) return this.text(maxBytes);
    const bytes = this.#bytes;
    let hash = length;
    for (let i = 0; i < length; i++) hash = (Math.imul(hash, 31) + bytes[from + i]!) | 0;
    const slot = hash & (WORD_SLOTS - 1);
    const known = words[slot]!;
    if (isWordAt(known, bytes, from, length)) {
      this.#at = from + length;
      return known;
    }
    const word = this.text(maxBytes);
    // Letters of one byte only: then as many characters as bytes.
    if (word.length === length) words[slot] = word;
    return word;
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
