import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { ByteReader, TruncatedBytes } from "./byte-reader.ts";
import { ByteWriter } from "./byte-writer.ts";

type Field =
  | { kind: "u8" | "u16" | "u32" | "f32" | "f64"; value: number }
  | { kind: "u64"; value: bigint }
  | { kind: "bytes"; value: Uint8Array }
  | { kind: "u32s"; value: Uint32Array }
  | { kind: "text"; value: string };

const aField: fc.Arbitrary<Field> = fc.oneof(
  fc.nat(0xff).map((value) => ({ kind: "u8" as const, value })),
  fc.nat(0xffff).map((value) => ({ kind: "u16" as const, value })),
  fc.nat(0xffffffff).map((value) => ({ kind: "u32" as const, value })),
  fc.float().map((value) => ({ kind: "f32" as const, value })),
  fc.double().map((value) => ({ kind: "f64" as const, value })),
  fc.bigInt({ min: 0n, max: 0xffff_ffff_ffff_ffffn }).map((value) => ({ kind: "u64" as const, value })),
  fc.uint8Array({ maxLength: 300 }).map((value) => ({ kind: "bytes" as const, value: Uint8Array.from(value) })),
  fc.uint32Array({ maxLength: 80 }).map((value) => ({ kind: "u32s" as const, value: Uint32Array.from(value) })),
  fc.string({ unit: "grapheme", maxLength: 80 }).map((value) => ({ kind: "text" as const, value })),
);
const someFields = fc.array(aField, { maxLength: 20 });

function write(writer: ByteWriter, field: Field): void {
  switch (field.kind) {
    case "u64":
      return writer.u64(field.value);
    case "bytes":
      return writer.bytes(field.value);
    case "u32s":
      return writer.u32s(field.value);
    case "text":
      return writer.text(field.value);
    default:
      return writer[field.kind](field.value);
  }
}

function read(reader: ByteReader, field: Field): unknown {
  switch (field.kind) {
    case "bytes":
      return Uint8Array.from(reader.bytes(field.value.length));
    case "u32s":
      return reader.u32s(field.value.length);
    case "text":
      return reader.text(1_000);
    default:
      return reader[field.kind]();
  }
}

void test("byte writer and reader: every field comes back, from slabs that grow and are reused", () => {
  const writer = new ByteWriter(8);
  fc.assert(
    fc.property(someFields, fc.nat(5), (fields, shift) => {
      writer.reset();
      for (const field of fields) write(writer, field);
      assert.equal(writer.view().length, writer.length);
      const shifted = Buffer.alloc(shift + writer.length + 3);
      shifted.set(writer.copy(), shift);
      const reader = new ByteReader(shifted, shift, shift + writer.length);
      for (const field of fields) assert.deepEqual(read(reader, field), field.value);
      assert.equal(reader.remaining, 0);
      assert.equal(reader.offset, shift + writer.length);
    }),
  );
});

void test("byte reader: reading past the end throws at every length, also when the buffer goes on", () => {
  fc.assert(
    fc.property(fc.array(aField, { minLength: 1, maxLength: 6 }), (fields) => {
      const writer = new ByteWriter();
      for (const field of fields) write(writer, field);
      const bytes = writer.view();
      for (let end = 0; end < bytes.length; end++) {
        const reader = new ByteReader(bytes, 0, end);
        assert.throws(() => fields.forEach((field) => read(reader, field)), TruncatedBytes);
      }
    }),
    { numRuns: 30 },
  );
});

void test("byte reader: hostile counts and texts are refused before memory is taken", () => {
  const reader = new ByteReader(Buffer.from("ffffffff41", "hex"));
  assert.throws(() => reader.u32s(0x4000_0000), TruncatedBytes);
  assert.throws(() => reader.bytes(-1), TruncatedBytes);
  assert.throws(() => reader.text(100), /over the limit of 100/);
});

void test("byte reader: broken UTF-8 becomes replacement characters, not an exception", () => {
  assert.equal(new ByteReader(Buffer.from("02000000c328", "hex")).text(10), "\ufffd(");
});

void test("byte writer: a length can be written once it is known", () => {
  const writer = new ByteWriter(4);
  writer.u8(1);
  const at = writer.length;
  writer.u32(0);
  writer.text("héllo");
  writer.patchU32(at, writer.length);
  const reader = new ByteReader(writer.view());
  assert.deepEqual([reader.u8(), reader.u32(), reader.text(10)], [1, 15, "héllo"]);
});

void test("byte writer: u32s takes the head of an array and values above 2^31", () => {
  const writer = new ByteWriter(4);
  writer.u32s([1, 0xffffffff, 0x80000000, 7], 3);
  assert.deepEqual([...new ByteReader(writer.view()).u32s(3)], [1, 0xffffffff, 0x80000000]);
});
