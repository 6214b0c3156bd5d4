/**
 * A small assembler for WebAssembly (core specification 2.0, binary format): as much of it as the numeric kernels of
 * this project need. Kernels are written as nested calls, operands first, and assembled at first use, in some
 * milliseconds; so there is no generated blob to trust and nothing to keep in step. What it makes is checked by the
 * engine when it is compiled; whoever uses it keeps a TypeScript twin for platforms without.
 *
 * @example
 * const add = new WasmFunction("add", ["i32", "i32"], "i32");
 * add.body(i32.add(add.parameter(0).get, add.parameter(1).get));
 * const exports = instantiateWasm({ functions: [add], memoryPages: 1 });
 */
export type Code = readonly (number | Code)[];
export type ValueType = "i32" | "i64" | "f32" | "f64" | "v128";

type Bytes = readonly number[];

const VALUE_TYPES: Record<ValueType, number> = { i32: 0x7f, i64: 0x7e, f32: 0x7d, f64: 0x7c, v128: 0x7b };
const NO_VALUE = 0x40;
const MAGIC_AND_VERSION: Bytes = [0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0];

function unsigned(value: number): Bytes {
  const bytes: number[] = [];
  for (let rest = value; ; rest = Math.floor(rest / 128)) {
    if (rest < 128) return [...bytes, rest];
    bytes.push((rest % 128) + 128);
  }
}

function signed(value: bigint): Bytes {
  const bytes: number[] = [];
  for (let rest = value; ; rest >>= 7n) {
    const byte = Number(rest & 0x7fn);
    if (rest >> 6n === 0n || rest >> 6n === -1n) return [...bytes, byte];
    bytes.push(byte + 128);
  }
}

const unary =
  (...opcode: number[]) =>
  (operand: Code): Code => [operand, ...opcode];
const binary =
  (...opcode: number[]) =>
  (left: Code, right: Code): Code => [left, right, ...opcode];
/** Loads and stores take a constant byte offset; alignment is a hint only and left at 1. */
const load =
  (...opcode: number[]) =>
  (address: Code, offset = 0): Code => [address, ...opcode, 0, ...unsigned(offset)];
const store =
  (...opcode: number[]) =>
  (address: Code, value: Code, offset = 0): Code => [address, value, ...opcode, 0, ...unsigned(offset)];
/** SIMD instructions: prefix, then the number as LEB128. */
const simd = (instruction: number): number[] => [0xfd, ...unsigned(instruction)];

export const i32 = {
  const: (value: number): Code => [0x41, ...signed(BigInt(value | 0))],
  load: load(0x28),
  store: store(0x36),
  eqz: unary(0x45),
  eq: binary(0x46),
  lessUnsigned: binary(0x49),
  add: binary(0x6a),
  sub: binary(0x6b),
  mul: binary(0x6c),
  and: binary(0x71),
  shiftLeft: binary(0x74),
  shiftRightUnsigned: binary(0x76),
};

export const i64 = {
  const: (value: bigint): Code => [0x42, ...signed(BigInt.asIntN(64, value))],
  load: load(0x29),
  load32Unsigned: load(0x35),
  store: store(0x37),
  add: binary(0x7c),
  sub: binary(0x7d),
  mul: binary(0x7e),
  and: binary(0x83),
  or: binary(0x84),
  xor: binary(0x85),
  shiftLeft: binary(0x86),
  shiftRightUnsigned: binary(0x88),
  rotateLeft: binary(0x89),
  fromI32Unsigned: unary(0xad),
};

export const f32 = {
  max: binary(0x97),
  const: (value: number): Code => [0x43, ...new Uint8Array(Float32Array.of(value).buffer)],
};

export const f64 = {
  const: (value: number): Code => [0x44, ...new Uint8Array(Float64Array.of(value).buffer)],
  store: store(0x39),
  add: binary(0xa0),
  fromF32: unary(0xbb),
};

const lane =
  (instruction: number) =>
  (operand: Code, index: number): Code => [operand, ...simd(instruction), index];

export const v128 = {
  load: load(...simd(0x00)),
  and: binary(...simd(0x4e)),
  or: binary(...simd(0x50)),
  isAnyTrue: unary(...simd(0x53)),
};

export const i32x4 = {
  splat: unary(...simd(0x11)),
  shiftLeft: binary(...simd(0xab)),
  add: binary(...simd(0xae)),
  fromF32x4: unary(...simd(0xf8)),
};

export const f32x4 = {
  splat: unary(...simd(0x13)),
  lane: lane(0x1f),
  greater: binary(...simd(0x44)),
  atLeast: binary(...simd(0x46)),
  nearest: unary(...simd(0x6a)),
  add: binary(...simd(0xe4)),
  sub: binary(...simd(0xe5)),
  mul: binary(...simd(0xe6)),
  /** a < b ? b : a, so that a NaN on the right is passed over. */
  pseudoMax: binary(...simd(0xeb)),
};

/** `body` again and again as long as `condition`, looked at after each round, is not 0. */
export function doWhile(body: Code, condition: Code): Code {
  return [0x03, NO_VALUE, body, condition, 0x0d, 0, 0x0b];
}

/** Runs `then` when `condition` is not 0, else `otherwise`. */
export function when(condition: Code, then: Code, otherwise: Code = []): Code {
  const alternative = otherwise.length === 0 ? [] : [0x05, otherwise];
  return [condition, 0x04, NO_VALUE, then, alternative, 0x0b];
}

/** Ends the function with the value. */
export function leave(value: Code = []): Code {
  return [value, 0x0f];
}

export class WasmLocal {
  readonly get: Code;
  readonly #index: Bytes;

  constructor(index: number) {
    this.#index = unsigned(index);
    this.get = [0x20, ...this.#index];
  }

  set(value: Code): Code {
    return [value, 0x21, ...this.#index];
  }

  /** Sets, and leaves the value as an operand. */
  tee(value: Code): Code {
    return [value, 0x22, ...this.#index];
  }
}

/** A function under construction: parameters and locals first, then one body. */
export class WasmFunction {
  readonly name: string;
  readonly parameterTypes: readonly ValueType[];
  readonly resultType: ValueType | undefined;
  readonly #localTypes: ValueType[] = [];
  #code: Code = [];

  constructor(name: string, parameterTypes: readonly ValueType[], resultType?: ValueType) {
    this.name = name;
    this.parameterTypes = parameterTypes;
    this.resultType = resultType;
  }

  parameter(index: number): WasmLocal {
    return new WasmLocal(index);
  }

  local(type: ValueType): WasmLocal {
    return new WasmLocal(this.parameterTypes.length + this.#localTypes.push(type) - 1);
  }

  body(...code: Code[]): void {
    this.#code = code;
  }

  signature(): Bytes {
    const results = this.resultType === undefined ? [] : [VALUE_TYPES[this.resultType]];
    return [
      0x60,
      ...vector(this.parameterTypes.map((type) => [VALUE_TYPES[type]])),
      ...unsigned(results.length),
      ...results,
    ];
  }

  codeEntry(): Bytes {
    const locals = vector(this.#localTypes.map((type) => [1, VALUE_TYPES[type]]));
    const bytes = [...locals];
    flatten(this.#code, bytes);
    return sized([...bytes, 0x0b]);
  }
}

export interface WasmModuleParts {
  /** All are exported under their names. */
  readonly functions: readonly WasmFunction[];
  /** Pages of 64 KiB that the memory starts with; it is exported as `memory` and may grow. */
  readonly memoryPages: number;
}

/** The bytes of a module. */
export function assembleWasm({ functions, memoryPages }: WasmModuleParts): Uint8Array<ArrayBuffer> {
  const exports = functions.map(({ name }, index) => [...text(name), 0, ...unsigned(index)]);
  exports.push([...text("memory"), 2, 0]);
  return Uint8Array.from([
    ...MAGIC_AND_VERSION,
    ...section(1, vector(functions.map((each) => each.signature()))),
    ...section(3, vector(functions.map((_, index) => unsigned(index)))),
    ...section(5, vector([[0, ...unsigned(memoryPages)]])),
    ...section(7, vector(exports)),
    ...section(10, vector(functions.map((each) => each.codeEntry()))),
  ]);
}

/** What a module made here exports. A memory's `buffer` changes when it grows. */
export interface WasmExports<F> {
  readonly functions: F;
  readonly memory: { readonly buffer: ArrayBuffer; grow(pages: number): number };
}

interface WebAssemblyGlobal {
  Module: new (bytes: Uint8Array<ArrayBuffer>) => object;
  Instance: new (module: object) => { exports: Record<string, unknown> };
}

/**
 * Assembles, compiles and instantiates, synchronously; undefined when this platform cannot (no WebAssembly, no SIMD).
 * `F` is the caller's word for the functions' types.
 */
export function instantiateWasm<F>(parts: WasmModuleParts): WasmExports<F> | undefined {
  const { WebAssembly } = globalThis as unknown as { WebAssembly?: WebAssemblyGlobal };
  if (WebAssembly === undefined) return undefined;
  try {
    const { exports } = new WebAssembly.Instance(new WebAssembly.Module(assembleWasm(parts)));
    return { functions: exports as F, memory: exports["memory"] as WasmExports<F>["memory"] };
  } catch {
    return undefined;
  }
}

/** Code is a tree until here, so that building it copies nothing. */
function flatten(code: Code, into: number[]): void {
  for (const part of code) {
    if (typeof part === "number") into.push(part);
    else flatten(part, into);
  }
}

function vector(items: readonly Bytes[]): Bytes {
  return [...unsigned(items.length), ...items.flat()];
}

function sized(bytes: Bytes): Bytes {
  return [...unsigned(bytes.length), ...bytes];
}

function section(id: number, bytes: Bytes): Bytes {
  return [id, ...sized(bytes)];
}

function text(value: string): Bytes {
  return sized([...new TextEncoder().encode(value)]);
}
