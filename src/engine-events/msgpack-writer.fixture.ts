/** A small msgpack writer of the tests' own. */
export type Value =
  null | boolean | number | bigint | string | Uint8Array | readonly Value[] | { readonly [key: string]: Value };
export function pack(value: Value): Buffer {
  const head = (tag: number, length: number): Buffer => {
    const bytes = Buffer.alloc(5);
    bytes[0] = tag;
    bytes.writeUInt32BE(length, 1);
    return bytes;
  };
  if (value === null) return Buffer.of(0xc0);
  if (typeof value === "boolean") return Buffer.of(value ? 0xc3 : 0xc2);
  if (typeof value === "number") {
    const bytes = Buffer.alloc(9);
    if (Number.isSafeInteger(value)) return pack(BigInt(value));
    bytes[0] = 0xcb;
    bytes.writeDoubleBE(value, 1);
    return bytes;
  }
  if (typeof value === "bigint") {
    const bytes = Buffer.alloc(9);
    bytes[0] = value < 0n ? 0xd3 : 0xcf;
    if (value < 0n) bytes.writeBigInt64BE(value, 1);
    else bytes.writeBigUInt64BE(value, 1);
    return bytes;
  }
  if (typeof value === "string") return Buffer.concat([head(0xdb, Buffer.byteLength(value)), Buffer.from(value)]);
  if (value instanceof Uint8Array) return Buffer.concat([head(0xc6, value.length), value]);
  if (Array.isArray(value)) return Buffer.concat([head(0xdd, value.length), ...(value as Value[]).map(pack)]);
  const entries = Object.entries(value as Record<string, Value>);
  return Buffer.concat([head(0xdf, entries.length), ...entries.flatMap(([key, one]) => [pack(key), pack(one)])]);
}
