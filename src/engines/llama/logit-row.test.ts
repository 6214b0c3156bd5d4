import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import {
  BLOCK_TOKENS,
  CUTOFF,
  GROUP_TOKENS,
  PlainLogitRow,
  borrowRow,
  expOfNegative,
  trySimdLogitRow,
} from "./logit-row.ts";

const aLogit = fc.oneof(
  { weight: 6, arbitrary: fc.float({ min: -50, max: 50, noNaN: true, noDefaultInfinity: true }) },
  { weight: 1, arbitrary: fc.constantFrom(NaN, -Infinity, 0, -0, 3.5) },
);
const aRow = fc.array(aLogit, { minLength: 1, maxLength: 1200 }).map((logits) => Float32Array.from(logits));

void test("logit row: four at a time finds the same maximum, groups and sums as one at a time", () => {
  fc.assert(
    fc.property(aRow, fc.constantFrom(0.2, 1, 1 / 0.7, 10), (logits, perTemperature) => {
      const plain = new PlainLogitRow(logits.length);
      const simd = trySimdLogitRow(logits.length);
      assert.ok(simd, "this platform has WebAssembly with SIMD");
      plain.logits.set(logits);
      simd.logits.set(logits);
      const max = plain.maximum();
      assert.equal(simd.maximum() + 0, max + 0, "apart from the sign of zero");
      if (max === -Infinity) return;
      for (const floor of [max, max - 1, 0, -Infinity, max + 1]) {
        for (let start = 0; start < logits.length; start += GROUP_TOKENS * 7) {
          const group = simd.nextGroup(start, floor);
          assert.equal(Math.min(group, logits.length), plain.nextGroup(start, floor));
          assert.ok(group >= start && group % GROUP_TOKENS === 0);
        }
      }
      const total = plain.sumWeights(max, perTemperature);
      assert.ok(Math.abs(simd.sumWeights(max, perTemperature) / total - 1) < 3e-6);
      plain.blockSums.forEach((sum, block) => {
        // At the cutoff a logit may fall on either side.
        const slack = 3e-6 * sum + BLOCK_TOKENS * Math.exp(-CUTOFF);
        assert.ok(
          Math.abs(simd.blockSums[block]! - sum) <= slack,
          `block ${block}: ${simd.blockSums[block]} for ${sum}`,
        );
      });
    }),
    { numRuns: 150 },
  );
});

void test("logit row: the fast exponential is within 3e-9 over its whole range", () => {
  for (let x = -CUTOFF; x <= 0; x += 0.0007) {
    assert.ok(Math.abs(expOfNegative(x) / Math.exp(x) - 1) < 3e-9, `exp(${x})`);
  }
  assert.equal(expOfNegative(0), 1);
});

void test("logit row: borrowing copies, also when the vocabulary changes", () => {
  for (const length of [300, 5, 300]) {
    const logits = new Float32Array(length).fill(2);
    const row = borrowRow(logits);
    row.logits[0] = 9;
    assert.equal(logits[0], 2);
    assert.equal(row.logits.length, length);
    assert.equal(row.maximum(), 9);
    assert.ok(Math.abs(row.sumWeights(9, 1) - 1 - (length - 1) * Math.exp(-7)) < 1e-5);
  }
});
