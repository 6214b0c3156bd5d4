import assert from "node:assert/strict";
import { mkdtempSync, rmSync, truncateSync, writeFileSync, copyFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { gguf as oracle } from "@huggingface/gguf";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { ggufBytes, numbers, string, texts, u32, u64, type FixtureValue } from "./gguf-fixture.ts";
import { GGUF_LIMITS, readGguf, type Gguf, type GgufValue } from "./gguf.ts";
import { resolveModel } from "./model-store.ts";

let folder = "";
before(() => (folder = mkdtempSync(join(tmpdir(), "gguf-test-"))));
after(() => rmSync(folder, { recursive: true, force: true }));

function read(bytes: Uint8Array): Gguf {
  const path = join(folder, "file.gguf");
  writeFileSync(path, bytes);
  return readGguf(path);
}

function refuses(bytes: Uint8Array, message: RegExp): void {
  assert.throws(
    () => read(bytes),
    (error) => error instanceof DynamoError && error.reason === "model-file-invalid" && message.test(error.message),
  );
}

/** Typed arrays and bigints as plain data, to compare with the fixture and with the oracle. */
function plain(value: unknown): unknown {
  if (ArrayBuffer.isView(value)) return [...(value as Uint8Array)].map(plain);
  if (Array.isArray(value)) return value.map(plain);
  if (typeof value === "bigint") return value.toString();
  return Object.is(value, -0) ? 0 : value;
}

function expected(value: FixtureValue, inArray = false): unknown {
  if (value.type === "array") return value.value.map((element) => expected(element, true));
  if (value.type !== "u64" && value.type !== "i64") return Object.is(value.value, -0) ? 0 : value.value;
  const number = Number(value.value);
  return Number.isSafeInteger(number) && !inArray ? number : value.value.toString();
}

const scalar: fc.Arbitrary<FixtureValue> = fc.oneof(
  fc.integer({ min: 0, max: 255 }).map((value) => ({ type: "u8", value }) as const),
  fc.integer({ min: -128, max: 127 }).map((value) => ({ type: "i8", value }) as const),
  fc.integer({ min: 0, max: 65_535 }).map((value) => ({ type: "u16", value }) as const),
  fc.integer({ min: -32_768, max: 32_767 }).map((value) => ({ type: "i16", value }) as const),
  fc.nat(0xffff_ffff).map((value) => ({ type: "u32", value }) as const),
  fc.integer().map((value) => ({ type: "i32", value }) as const),
  fc.float({ noNaN: true }).map((value) => ({ type: "f32", value }) as const),
  fc.double({ noNaN: true }).map((value) => ({ type: "f64", value }) as const),
  fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }).map((value) => ({ type: "u64", value }) as const),
  fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }).map((value) => ({ type: "i64", value }) as const),
  fc.boolean().map((value) => ({ type: "bool", value }) as const),
  fc.string({ unit: "grapheme" }).map((value) => ({ type: "string", value }) as const),
);

const value = fc.oneof(
  scalar,
  fc.array(scalar, { maxLength: 12 }).map((list): FixtureValue => {
    const of = list[0]?.type ?? "u8";
    return { type: "array", of, value: list.filter(({ type }) => type === of) };
  }),
);

const metadata = fc.uniqueArray(fc.tuple(fc.string({ unit: "grapheme", minLength: 1, maxLength: 20 }), value), {
  selector: ([key]) => key,
  maxLength: 12,
});

test("gguf: every kind of value comes back as it was written", () => {
  fc.assert(
    fc.property(metadata, (entries) => {
      const wanted = entries.filter(([key]) => key !== "general.alignment");
      const { metadata: found, version } = read(ggufBytes({ metadata: wanted }));
      assert.equal(version, 3);
      assert.deepEqual(
        [...found].map(([key, got]) => [key, plain(got)]),
        wanted.map(([key, put]) => [key, expected(put)]),
      );
    }),
    { numRuns: 150 },
  );
});

test("gguf: a file cut short anywhere in its head or its weights is refused, never misread", () => {
  const whole = ggufBytes({
    metadata: [
      ["a", string("text")],
      ["b", texts(["x", "yy"])],
      ["c", numbers("f32", [1, 2, 3])],
    ],
    tensors: [{ name: "w", shape: [8, 4], type: 0, offset: 0 }],
    dataBytes: 8 * 4 * 4,
  });
  assert.deepEqual(read(whole).tensors, [{ name: "w", shape: [8, 4], type: 0, offset: 0 }]);
  for (let length = 0; length < whole.length; length++)
    refuses(whole.subarray(0, length), /ends|cut short|does not fit/);
});

test("gguf: damaged bytes give a value or our error, nothing else", () => {
  const whole = ggufBytes({
    metadata: [
      ["key", string("text")],
      ["list", texts(["x", "yy"])],
      ["n", { type: "u64", value: 7n }],
    ],
  });
  fc.assert(
    fc.property(fc.nat(whole.length - 1), fc.nat(255), (at, byte) => {
      const damaged = Buffer.from(whole);
      damaged[at] = byte;
      try {
        read(damaged);
      } catch (error) {
        assert.ok(error instanceof DynamoError);
        assert.equal(error.reason, "model-file-invalid");
      }
    }),
    { numRuns: 300 },
  );
});

test("gguf: counts and lengths over the limits are refused before anything is allocated for them", () => {
  const head = (tensors: number | bigint, keys: number | bigint): Buffer[] => [
    Buffer.from("GGUF"),
    u32(3),
    u64(tensors),
    u64(keys),
  ];
  const huge = 2n ** 63n;
  refuses(Buffer.concat(head(huge, 0)), /tensor count: expected at most 131072/);
  refuses(Buffer.concat(head(0, huge)), /key count: expected at most 4096/);
  refuses(Buffer.concat([...head(0, 1), u64(huge)]), /key length/);
  const key = Buffer.concat([u64(1), Buffer.from("k")]);
  refuses(Buffer.concat([...head(0, 1), key, u32(8), u64(huge)]), /text length/);
  refuses(Buffer.concat([...head(0, 1), key, u32(9), u32(4), u64(huge)]), /array length/);
  refuses(
    Buffer.concat([...head(0, 1), key, u32(9), u32(4), u64(GGUF_LIMITS.arrayLength)]),
    /does not fit the rest of the file/,
  );
  refuses(Buffer.concat([...head(0, 1), key, u32(13)]), /value type: expected 0 to 12, got 13/);
  const nested = Array.from({ length: 5 }, () => Buffer.concat([u32(9), u64(1)]));
  refuses(Buffer.concat([...head(0, 1), key, u32(9), ...nested, Buffer.alloc(64)]), /nest deeper/);
});

test("gguf: many arrays at their limit run into the limit of all values together", () => {
  // 4 arrays of 4 Mi bytes are 16 Mi values; the fifth is one too many.
  const key = (name: string): Buffer =>
    Buffer.concat([u64(1), Buffer.from(name), u32(9), u32(0), u64(GGUF_LIMITS.arrayLength)]);
  const arrays = ["a", "b", "c", "d", "e"].flatMap((name) => [key(name), Buffer.alloc(GGUF_LIMITS.arrayLength)]);
  refuses(Buffer.concat([Buffer.from("GGUF"), u32(3), u64(0), u64(5), ...arrays]), /more than 16777216 values/);
});

test("gguf: other files, other versions and repeated keys are named", () => {
  refuses(Buffer.from("PK\u0003\u0004 a zip file, longer than a head"), /does not start with GGUF/);
  refuses(ggufBytes({ version: 1, metadata: [] }), /expected 2 or 3, got 1/);
  refuses(ggufBytes({ version: 0x0300_0000, metadata: [] }), /big-endian/);
  refuses(
    ggufBytes({
      metadata: [
        ["k", string("a")],
        ["k", string("b")],
      ],
    }),
    /occurs twice/,
  );
  refuses(ggufBytes({ metadata: [["general.alignment", { type: "u32", value: 7 }]] }), /alignment/);
  assert.throws(() => readGguf(join(folder, "missing.gguf")), /cannot be opened/);
  assert.throws(() => readGguf(folder), /not a file/);
});

test("gguf: a head much larger than one read is put together from several", () => {
  const words = Array.from({ length: 60_000 }, (_, index) => `token-${index}-${"x".repeat(index % 50)}`);
  const long = "y".repeat(3 * 1024 * 1024);
  const { metadata: found } = read(
    ggufBytes({
      metadata: [
        ["long", string(long)],
        ["words", texts(words)],
        ["end", { type: "bool", value: true }],
      ],
    }),
  );
  assert.equal(found.get("long"), long);
  assert.deepEqual(found.get("words"), words);
  assert.equal(found.get("end"), true);
});

/** Named like the library does: arrays are plain, 64-bit numbers bigint. */
function oraclePlain(got: unknown): unknown {
  if (Array.isArray(got)) return got.map(oraclePlain);
  return typeof got === "bigint" ? (Number.isSafeInteger(Number(got)) ? Number(got) : got.toString()) : got;
}

async function compareWithOracle(path: string): Promise<void> {
  const ours = readGguf(path);
  const theirs = await oracle(path, { allowLocalFile: true });
  const own = new Set(["version", "tensor_count", "kv_count"]);
  const keys = Object.keys(theirs.metadata).filter((key) => !own.has(key));
  assert.deepEqual([...ours.metadata.keys()].toSorted(), keys.toSorted());
  for (const key of keys) {
    const wanted = oraclePlain((theirs.metadata as Record<string, unknown>)[key]);
    assert.deepEqual(plain(ours.metadata.get(key) as GgufValue), wanted, key);
  }
  assert.deepEqual(
    ours.tensors.map(({ name, shape, type, offset }) => ({ name, shape, type, offset })),
    theirs.tensorInfos.map(({ name, shape, dtype, offset }) => ({
      name,
      shape: shape.map(Number),
      type: dtype,
      offset: Number(offset),
    })),
  );
  assert.equal(ours.tensorDataOffset, Number(theirs.tensorDataOffset));
}

test("gguf: agrees with the library on a file with every type", async () => {
  const path = join(folder, "every.gguf");
  const entries: (readonly [string, FixtureValue])[] = [
    ["general.architecture", string("llama")],
    ["u8", { type: "u8", value: 200 }],
    ["i8", { type: "i8", value: -100 }],
    ["u16", { type: "u16", value: 60_000 }],
    ["i16", { type: "i16", value: -30_000 }],
    ["u32", { type: "u32", value: 4_000_000_000 }],
    ["i32", { type: "i32", value: -2_000_000_000 }],
    ["f32", { type: "f32", value: 1.5 }],
    ["f64", { type: "f64", value: Math.PI }],
    ["u64", { type: "u64", value: 12_345n }],
    ["bool", { type: "bool", value: true }],
    ["texts", texts(["", "é", "日本語", "🙂"])],
    ["floats", numbers("f32", [0.5, -0.25])],
  ];
  writeFileSync(
    path,
    ggufBytes({ metadata: entries, tensors: [{ name: "w", shape: [32, 2], type: 3, offset: 0 }], dataBytes: 40 }),
  );
  await compareWithOracle(path);
});

test("gguf: agrees with the library on the real SmolLM2, and finds out when it is cut short", async (t) => {
  const model = resolveModel("smollm2");
  if (model === undefined) return t.skip("SmolLM2 is not on this machine: dynamo model pull smollm2");
  await compareWithOracle(model.path);
  const short = join(folder, "short.gguf");
  copyFileSync(model.path, short);
  truncateSync(short, model.bytes - 1);
  assert.throws(() => readGguf(short), /cut short/);
});
