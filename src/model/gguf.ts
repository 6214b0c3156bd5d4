import { closeSync, fstatSync, openSync, readSync } from "node:fs";
import { DynamoError } from "../errors/index.ts";

/**
 * Reads the head of a GGUF model file: its key-value metadata and the list of its tensors, never the weights. Format:
 * GGUF version 2 and 3, little-endian, as described in ggml's `docs/gguf.md`. Synchronous and meant for start-up: few
 * large reads through one window; 49k tokens and 49k merges take about 40 ms.
 *
 * The bytes are foreign: every count and length is held against `GGUF_LIMITS` before anything is allocated for it, and
 * everything that breaks the format is `model-file-invalid` with the offset.
 */
export const GGUF_LIMITS = {
  /** Real files have 20 to 60 keys. */
  keys: 4_096,
  /** The format's own bound. */
  keyBytes: 65_535,
  /** The longest real strings are chat templates (about 20 kB); some files embed a licence. */
  stringBytes: 4 * 1024 * 1024,
  /** Merges of the largest vocabularies are about 500k. */
  arrayLength: 4_194_304,
  /** Arrays of arrays occur nowhere yet; the format allows them. */
  arrayDepth: 3,
  /** All array elements and keys of the file together: bounds memory when many arrays are at their limit. */
  values: 16_777_216,
  /** All metadata bytes of a file, strings included. */
  metadataBytes: 256 * 1024 * 1024,
  /** The largest mixture-of-experts models have a few thousand. */
  tensors: 131_072,
  /** ggml's own bound. */
  dimensions: 4,
} as const;

export type GgufArray = readonly (string | boolean | bigint | GgufArray)[] | Float32Array | Float64Array | GgufIntegers;
/** Small integers come as typed arrays; 64-bit ones as an array of bigint. */
export type GgufIntegers = Uint8Array | Int8Array | Uint16Array | Int16Array | Uint32Array | Int32Array;
/** 64-bit integers are numbers where they fit one exactly. */
export type GgufValue = string | number | bigint | boolean | GgufArray;

export interface GgufTensor {
  readonly name: string;
  readonly shape: readonly number[];
  /** ggml's type number. */
  readonly type: number;
  /** From `tensorDataOffset`. */
  readonly offset: number;
}

export interface Gguf {
  readonly version: 2 | 3;
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly tensors: readonly GgufTensor[];
  readonly alignment: number;
  /** Where the weights start. */
  readonly tensorDataOffset: number;
  readonly fileBytes: number;
}

/** Throws `model-file-invalid` when the file is missing, is no GGUF, is cut short or goes over a limit. */
export function readGguf(path: string): Gguf {
  let descriptor: number;
  try {
    descriptor = openSync(path, "r");
  } catch (cause) {
    throw new DynamoError("model-file-invalid", `${path}: cannot be opened (${(cause as Error).message})`, { cause });
  }
  try {
    const info = fstatSync(descriptor);
    if (!info.isFile()) throw new DynamoError("model-file-invalid", `${path}: not a file`);
    return new GgufReader(path, descriptor, info.size).read();
  } finally {
    closeSync(descriptor);
  }
}

/** A metadata text or undefined; a value of another type is `model-file-invalid`. */
export function ggufText(gguf: Gguf, key: string): string | undefined {
  return ggufTyped(gguf, key, "a text", (value): value is string => typeof value === "string");
}

export function ggufNumber(gguf: Gguf, key: string): number | undefined {
  return ggufTyped(gguf, key, "a number", (value): value is number => typeof value === "number");
}

export function ggufBoolean(gguf: Gguf, key: string): boolean | undefined {
  return ggufTyped(gguf, key, "true or false", (value): value is boolean => typeof value === "boolean");
}

export function ggufTexts(gguf: Gguf, key: string): readonly string[] | undefined {
  return ggufTyped(
    gguf,
    key,
    "an array of texts",
    (value): value is readonly string[] => Array.isArray(value) && (value.length === 0 || typeof value[0] === "string"),
  );
}

export function ggufNumbers(gguf: Gguf, key: string): GgufIntegers | Float32Array | Float64Array | undefined {
  return ggufTyped(gguf, key, "an array of numbers", (value): value is GgufIntegers | Float32Array | Float64Array =>
    ArrayBuffer.isView(value),
  );
}

function ggufTyped<T extends GgufValue>(
  gguf: Gguf,
  key: string,
  expected: string,
  is: (value: GgufValue) => value is T,
): T | undefined {
  const value = gguf.metadata.get(key);
  if (value === undefined || is(value)) return value;
  throw new DynamoError("model-file-invalid", `GGUF key ${key}: expected ${expected}, got ${typeof value}`);
}

const TYPE_U8 = 0;
const TYPE_I8 = 1;
const TYPE_U16 = 2;
const TYPE_I16 = 3;
const TYPE_U32 = 4;
const TYPE_I32 = 5;
const TYPE_F32 = 6;
const TYPE_BOOL = 7;
const TYPE_STRING = 8;
const TYPE_ARRAY = 9;
const TYPE_U64 = 10;
const TYPE_I64 = 11;
const TYPE_F64 = 12;

const INTEGERS_AND_FLOATS = {
  [TYPE_U8]: Uint8Array,
  [TYPE_I8]: Int8Array,
  [TYPE_U16]: Uint16Array,
  [TYPE_I16]: Int16Array,
  [TYPE_U32]: Uint32Array,
  [TYPE_I32]: Int32Array,
  [TYPE_F32]: Float32Array,
  [TYPE_F64]: Float64Array,
} as const;

/** Bytes per value, undefined for strings and arrays. */
const WIDTHS: readonly (number | undefined)[] = [1, 1, 2, 2, 4, 4, 4, 1, undefined, undefined, 8, 8, 8];

/** ggml type number -> values per block, bytes per block. Types that are not here are not checked against the file size. */
const TENSOR_TYPES: Readonly<Record<number, readonly [number, number]>> = {
  0: [1, 4], // F32
  1: [1, 2], // F16
  2: [32, 18], // Q4_0
  3: [32, 20], // Q4_1
  6: [32, 22], // Q5_0
  7: [32, 24], // Q5_1
  8: [32, 34], // Q8_0
  10: [256, 84], // Q2_K
  11: [256, 110], // Q3_K
  12: [256, 144], // Q4_K
  13: [256, 176], // Q5_K
  14: [256, 210], // Q6_K
  24: [1, 1], // I8
  25: [1, 2], // I16
  26: [1, 4], // I32
  27: [1, 8], // I64
  28: [1, 8], // F64
  30: [1, 2], // BF16
};

/** First read; covers the whole head of most files in one or two. */
const WINDOW_BYTES = 1024 * 1024;

class GgufReader {
  readonly #path: string;
  readonly #descriptor: number;
  readonly #fileBytes: number;
  /** `#window[#at, #filled)` is read but not taken; `#window[0]` is at `#base` in the file. */
  #window = Buffer.allocUnsafe(WINDOW_BYTES);
  #at = 0;
  #filled = 0;
  #base = 0;
  #valueBudget: number = GGUF_LIMITS.values;

  constructor(path: string, descriptor: number, fileBytes: number) {
    this.#path = path;
    this.#descriptor = descriptor;
    this.#fileBytes = fileBytes;
  }

  read(): Gguf {
    const magicAt = this.#take(4);
    if (this.#window.toString("latin1", magicAt, magicAt + 4) !== "GGUF") {
      throw this.#invalid("not a GGUF file: it does not start with GGUF");
    }
    const version = this.#u32();
    if (version === 0x0300_0000 || version === 0x0200_0000) throw this.#invalid("big-endian GGUF files are not read");
    if (version !== 2 && version !== 3) throw this.#invalid(`GGUF version: expected 2 or 3, got ${version}`);
    const tensorCount = this.#count("tensor count", GGUF_LIMITS.tensors);
    const keyCount = this.#count("key count", GGUF_LIMITS.keys);
    const metadata = this.#metadata(keyCount);
    const tensors: GgufTensor[] = [];
    for (let i = 0; i < tensorCount; i++) tensors.push(this.#tensor());
    const alignment = metadata.get("general.alignment") ?? 32;
    if (typeof alignment !== "number" || alignment < 8 || alignment > 65_536 || alignment % 8 !== 0) {
      throw this.#invalid("general.alignment: expected a multiple of 8 up to 65536");
    }
    const tensorDataOffset = Math.ceil((this.#base + this.#at) / alignment) * alignment;
    this.#checkExtent(tensors, tensorDataOffset);
    return { version, metadata, tensors, alignment, tensorDataOffset, fileBytes: this.#fileBytes };
  }

  #metadata(keyCount: number): Map<string, GgufValue> {
    const metadata = new Map<string, GgufValue>();
    for (let i = 0; i < keyCount; i++) {
      const key = this.#text(GGUF_LIMITS.keyBytes, "key");
      if (metadata.has(key)) throw this.#invalid(`key ${JSON.stringify(key.slice(0, 80))} occurs twice`);
      metadata.set(key, this.#value(this.#u32(), 0));
    }
    return metadata;
  }

  #tensor(): GgufTensor {
    const name = this.#text(GGUF_LIMITS.keyBytes, "tensor name");
    const dimensions = this.#u32();
    if (dimensions > GGUF_LIMITS.dimensions) {
      throw this.#invalid(`tensor dimensions: expected at most ${GGUF_LIMITS.dimensions}, got ${dimensions}`);
    }
    const shape: number[] = [];
    for (let i = 0; i < dimensions; i++) shape.push(this.#count("tensor shape", Number.MAX_SAFE_INTEGER));
    const type = this.#u32();
    return { name, shape, type, offset: this.#count("tensor offset", Number.MAX_SAFE_INTEGER) };
  }

  /** A file that was cut short (a broken download) is found here, before a native library maps it. */
  #checkExtent(tensors: readonly GgufTensor[], dataOffset: number): void {
    for (const { name, shape, type, offset } of tensors) {
      const [blockValues, blockBytes] = TENSOR_TYPES[type] ?? [1, 0];
      const values = shape.reduce((product, length) => product * length, 1);
      const endsAt = dataOffset + offset + Math.ceil(values / blockValues) * blockBytes;
      if (!(endsAt <= this.#fileBytes)) {
        throw this.#invalid(
          `the file is cut short: tensor ${JSON.stringify(name.slice(0, 80))} ends at byte ${endsAt}, the file at ${this.#fileBytes}`,
        );
      }
    }
  }

  #value(type: number, depth: number): GgufValue {
    if (--this.#valueBudget < 0) throw this.#invalid(`more than ${GGUF_LIMITS.values} values`);
    if (type === TYPE_STRING) return this.#text(GGUF_LIMITS.stringBytes, "text");
    if (type === TYPE_ARRAY) return this.#array(depth + 1);
    const width = WIDTHS[type];
    if (width === undefined) throw this.#invalid(`value type: expected 0 to 12, got ${type}`);
    const at = this.#take(width);
    return scalar(this.#window, type, at);
  }

  #array(depth: number): GgufArray {
    if (depth > GGUF_LIMITS.arrayDepth) throw this.#invalid(`arrays nest deeper than ${GGUF_LIMITS.arrayDepth}`);
    const type = this.#u32();
    const length = this.#count("array length", GGUF_LIMITS.arrayLength);
    this.#valueBudget -= length;
    if (this.#valueBudget < 0) throw this.#invalid(`more than ${GGUF_LIMITS.values} values`);
    const width = WIDTHS[type];
    // Each element takes at least its width (a string or array its 8-byte length), so a hostile length ends here.
    const leastBytes = length * (width ?? 8);
    if (leastBytes > this.#left) throw this.#invalid(`an array of ${length} values does not fit the rest of the file`);
    if (type === TYPE_STRING) {
      const texts: string[] = [];
      for (let i = 0; i < length; i++) texts.push(this.#text(GGUF_LIMITS.stringBytes, "text"));
      return texts;
    }
    if (type === TYPE_ARRAY) {
      const arrays: GgufArray[] = [];
      for (let i = 0; i < length; i++) arrays.push(this.#array(depth + 1));
      return arrays;
    }
    if (width === undefined) throw this.#invalid(`array type: expected 0 to 12, got ${type}`);
    return this.#scalars(type, length, width);
  }

  #scalars(type: number, length: number, width: number): GgufArray {
    const at = this.#take(length * width);
    if (type in INTEGERS_AND_FLOATS) {
      const values = new INTEGERS_AND_FLOATS[type as keyof typeof INTEGERS_AND_FLOATS](length);
      // One copy: the file and every platform we run on are little-endian.
      new Uint8Array(values.buffer).set(this.#window.subarray(at, at + length * width));
      return values;
    }
    const wide: (boolean | bigint)[] = [];
    for (let i = 0; i < length; i++) {
      const value = scalar(this.#window, type, at + i * width);
      wide.push(typeof value === "number" ? BigInt(value) : (value as boolean | bigint));
    }
    return wide;
  }

  #u32(): number {
    return this.#window.readUInt32LE(this.#take(4));
  }

  /** A u64 that must not be above `max`. */
  #count(what: string, max: number): number {
    const at = this.#take(8);
    const low = this.#window.readUInt32LE(at);
    const value = this.#window.readUInt32LE(at + 4) * 4_294_967_296 + low;
    if (value > max) throw this.#invalid(`${what}: expected at most ${max}, got ${value}`);
    return value;
  }

  #text(maxBytes: number, what: string): string {
    const byteLength = this.#count(`${what} length`, maxBytes);
    const at = this.#take(byteLength);
    return this.#window.toString("utf8", at, at + byteLength);
  }

  get #left(): number {
    return this.#fileBytes - this.#base - this.#at;
  }

  /** Makes the next `byteCount` bytes lie in the window and moves past them; returns where they start. */
  #take(byteCount: number): number {
    if (this.#filled - this.#at < byteCount) this.#fill(byteCount);
    const at = this.#at;
    this.#at = at + byteCount;
    return at;
  }

  #fill(byteCount: number): void {
    if (byteCount > this.#left) throw this.#invalid(`the file ends in the middle of its head`);
    if (this.#base + this.#at + byteCount > GGUF_LIMITS.metadataBytes) {
      throw this.#invalid(`more than ${GGUF_LIMITS.metadataBytes} bytes of metadata`);
    }
    const rest = this.#filled - this.#at;
    const window = byteCount > this.#window.length ? Buffer.allocUnsafe(byteCount + WINDOW_BYTES) : this.#window;
    this.#window.copy(window, 0, this.#at, this.#filled);
    this.#base += this.#at;
    this.#window = window;
    this.#at = 0;
    this.#filled = rest;
    while (this.#filled < byteCount) {
      const offset = this.#base + this.#filled;
      const got = readSync(this.#descriptor, window, this.#filled, window.length - this.#filled, offset);
      if (got === 0) throw this.#invalid("the file ends in the middle of its head");
      this.#filled += got;
    }
  }

  #invalid(detail: string): DynamoError {
    return new DynamoError("model-file-invalid", `${this.#path}: ${detail} (at byte ${this.#base + this.#at})`);
  }
}

function scalar(buffer: Buffer, type: number, at: number): number | bigint | boolean {
  switch (type) {
    case TYPE_U8:
      return buffer[at]!;
    case TYPE_I8:
      return buffer.readInt8(at);
    case TYPE_U16:
      return buffer.readUInt16LE(at);
    case TYPE_I16:
      return buffer.readInt16LE(at);
    case TYPE_U32:
      return buffer.readUInt32LE(at);
    case TYPE_I32:
      return buffer.readInt32LE(at);
    case TYPE_F32:
      return buffer.readFloatLE(at);
    case TYPE_BOOL:
      return buffer[at] !== 0;
    case TYPE_U64:
      return exact(buffer.readBigUInt64LE(at));
    case TYPE_I64:
      return exact(buffer.readBigInt64LE(at));
    default:
      return buffer.readDoubleLE(at);
  }
}

function exact(value: bigint): number | bigint {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}
