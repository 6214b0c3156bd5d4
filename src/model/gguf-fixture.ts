/** Writes GGUF files for tests: the inverse of `gguf.ts`, kept as plain as possible. */
export type FixtureValue =
  | { readonly type: "u8" | "i8" | "u16" | "i16" | "u32" | "i32" | "f32" | "f64"; readonly value: number }
  | { readonly type: "u64" | "i64"; readonly value: bigint }
  | { readonly type: "bool"; readonly value: boolean }
  | { readonly type: "string"; readonly value: string }
  | { readonly type: "array"; readonly of: FixtureValue["type"]; readonly value: readonly FixtureValue[] };

export interface FixtureTensor {
  readonly name: string;
  readonly shape: readonly number[];
  readonly type: number;
  readonly offset: number;
}

export interface FixtureFile {
  readonly version?: number;
  readonly metadata: readonly (readonly [string, FixtureValue])[];
  readonly tensors?: readonly FixtureTensor[];
  /** Zero bytes after the aligned head. */
  readonly dataBytes?: number;
}

const TYPES: FixtureValue["type"][] = [
  "u8",
  "i8",
  "u16",
  "i16",
  "u32",
  "i32",
  "f32",
  "bool",
  "string",
  "array",
  "u64",
  "i64",
  "f64",
];

export function ggufBytes({ version = 3, metadata, tensors = [], dataBytes = 0 }: FixtureFile): Buffer {
  const parts: Buffer[] = [Buffer.from("GGUF"), u32(version), u64(tensors.length), u64(metadata.length)];
  for (const [key, value] of metadata) parts.push(text(key), u32(TYPES.indexOf(value.type)), encoded(value));
  for (const { name, shape, type, offset } of tensors) {
    parts.push(text(name), u32(shape.length), ...shape.map(u64), u32(type), u64(offset));
  }
  const head = Buffer.concat(parts);
  const padding = (32 - (head.length % 32)) % 32;
  return Buffer.concat([head, Buffer.alloc(tensors.length === 0 ? 0 : padding + dataBytes)]);
}

export function texts(values: readonly string[]): FixtureValue {
  return { type: "array", of: "string", value: values.map((value) => ({ type: "string", value })) };
}

export function numbers(of: "i32" | "f32", values: readonly number[]): FixtureValue {
  return { type: "array", of, value: values.map((value) => ({ type: of, value })) };
}

export function string(value: string): FixtureValue {
  return { type: "string", value };
}

function encoded(value: FixtureValue): Buffer {
  const bytes = Buffer.alloc(8);
  switch (value.type) {
    case "u8":
      return bytes.subarray(0, bytes.writeUInt8(value.value));
    case "i8":
      return bytes.subarray(0, bytes.writeInt8(value.value));
    case "u16":
      return bytes.subarray(0, bytes.writeUInt16LE(value.value));
    case "i16":
      return bytes.subarray(0, bytes.writeInt16LE(value.value));
    case "u32":
      return bytes.subarray(0, bytes.writeUInt32LE(value.value));
    case "i32":
      return bytes.subarray(0, bytes.writeInt32LE(value.value));
    case "f32":
      return bytes.subarray(0, bytes.writeFloatLE(value.value));
    case "f64":
      return bytes.subarray(0, bytes.writeDoubleLE(value.value));
    case "u64":
      return bytes.subarray(0, bytes.writeBigUInt64LE(value.value));
    case "i64":
      return bytes.subarray(0, bytes.writeBigInt64LE(value.value));
    case "bool":
      return Buffer.from([value.value ? 1 : 0]);
    case "string":
      return text(value.value);
    case "array":
      return Buffer.concat([u32(TYPES.indexOf(value.of)), u64(value.value.length), ...value.value.map(encoded)]);
  }
}

export function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

export function u64(value: number | bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
}

function text(value: string): Buffer {
  const bytes = Buffer.from(value, "utf8");
  return Buffer.concat([u64(bytes.length), bytes]);
}
