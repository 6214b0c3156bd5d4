import assert from "node:assert/strict";
import { test } from "node:test";
import { SeededRandom, randomId64, systemRandom } from "./random.ts";

void test("seeded random: xoshiro128**, step by step as published", () => {
  // The same in BigInt, from the same four words that splitmix32 gives for the seed.
  const mask = 0xffff_ffffn;
  let mixState = 42n;
  const words = Array.from({ length: 4 }, () => {
    mixState = (mixState + 0x9e3779b9n) & mask;
    let z = mixState;
    z = ((z ^ (z >> 16n)) * 0x21f0aaadn) & mask;
    z = ((z ^ (z >> 15n)) * 0x735a2d97n) & mask;
    return z ^ (z >> 15n);
  });
  let [a, b, c, d] = words as [bigint, bigint, bigint, bigint];
  const rotate = (value: bigint, bits: bigint): bigint => ((value << bits) | (value >> (32n - bits))) & mask;
  const random = new SeededRandom(42);
  for (let i = 0; i < 1000; i++) {
    const expected = (rotate((b * 5n) & mask, 7n) * 9n) & mask;
    const t = (b << 9n) & mask;
    c ^= a;
    d ^= b;
    b ^= c;
    a ^= d;
    c ^= t;
    d = rotate(d, 11n);
    assert.equal(BigInt(random.nextU32()), expected);
  }
});

void test("seeded random: floats are in [0, 1) and even", () => {
  const random = new SeededRandom(7);
  const buckets = new Float64Array(16);
  for (let i = 0; i < 32_000; i++) {
    const value = random.nextFloat();
    assert.ok(value >= 0 && value < 1);
    buckets[Math.floor(value * 16)]!++;
  }
  const chiSquare = buckets.reduce((sum, count) => sum + (count - 2_000) ** 2 / 2_000, 0);
  // 99.9 % of even samples with 15 degrees of freedom stay under 37.7.
  assert.ok(chiSquare < 37.7, `chi-square ${chiSquare}`);
});

void test("seeded random: the seed decides all, the system's source and ids differ", () => {
  const draw = (seed: number): number[] => {
    const random = new SeededRandom(seed);
    return Array.from({ length: 5 }, () => random.nextU32());
  };
  assert.deepEqual(draw(0), draw(0));
  assert.notDeepEqual(draw(0), draw(1));
  assert.notEqual(systemRandom.nextFloat(), systemRandom.nextFloat());
  const ids = new Set(Array.from({ length: 1_000 }, randomId64));
  assert.equal(ids.size, 1_000);
  for (const id of ids) assert.ok(id > 0n && id < 1n << 64n);
});
