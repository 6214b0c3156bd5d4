import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { FrequencySketch } from "./frequency-sketch.ts";

test("never counts below the truth before a halving, never above 15", () => {
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.nat(20), fc.nat(3)), { maxLength: 300 }), (seen) => {
      const sketch = new FrequencySketch(64);
      const truth = new Map<string, number>();
      for (const [lo, hi] of seen) {
        sketch.add(lo, hi);
        truth.set(`${lo}:${hi}`, (truth.get(`${lo}:${hi}`) ?? 0) + 1);
      }
      for (const [key, count] of truth) {
        const [lo, hi] = key.split(":").map(Number);
        const estimate = sketch.count(lo!, hi!);
        assert(estimate >= Math.min(15, count) && estimate <= 15);
      }
    }),
  );
});

test("at the capacity it is named for, few hashes that were never seen look seen twice", () => {
  const capacity = 4_096;
  const sketch = new FrequencySketch(capacity);
  for (let i = 0; i < capacity; i++) sketch.add(Math.imul(i + 1, 0x9e3779b1) >>> 0, Math.imul(i, 0x85ebca77) >>> 0);
  let wrong = 0;
  for (let i = 0; i < capacity; i++) {
    if (sketch.count(Math.imul(i + 1, 0x1b873593) >>> 0, Math.imul(i, 0xcc9e2d51) >>> 0) >= 2) wrong++;
  }
  assert(wrong < capacity / 100, `${wrong} of ${capacity}`);
});

test("old counts fade: ten times the capacity halves everything", () => {
  const sketch = new FrequencySketch(16);
  for (let i = 0; i < 12; i++) sketch.add(1, 1);
  assert.equal(sketch.count(1, 1), 12);
  for (let i = 0; i < 148; i++) sketch.add(1_000 + i, 7);
  const faded = sketch.count(1, 1);
  assert(faded >= 6 && faded < 12, `${faded}`);
});
