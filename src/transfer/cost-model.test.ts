import assert from "node:assert/strict";
import { test } from "node:test";
import { SeededRandom } from "../std/index.ts";
import { CostModel } from "./cost-model.ts";

const TYPICAL = { setupMs: 1, perDescriptorUs: 5, gigabytesPerSecond: 1 };

test("transfer cost: starts at what is typical", () => {
  const { totalMs, sampleCount } = new CostModel(TYPICAL).estimate(100, 1e6);
  assert.ok(Math.abs(totalMs - (1 + 0.5 + 1)) < 1e-9);
  assert.equal(sampleCount, 0);
});

test("transfer cost: learns set-up, descriptors and bytes from a hundred noisy transfers, and follows a change", () => {
  const random = new SeededRandom(4);
  const model = new CostModel(TYPICAL);
  const learn = (setupMs: number, perDescriptorMs: number, perByteMs: number): void => {
    for (let i = 0; i < 150; i++) {
      // From one block to a long prompt's, as many of each size.
      const descriptors = Math.floor(2 ** (random.nextFloat() * 11));
      const bytes = descriptors * (random.nextU32() % 2 === 0 ? 33_792 : 368_640);
      const noise = 0.95 + random.nextFloat() / 10;
      model.observe(descriptors, bytes, (setupMs + descriptors * perDescriptorMs + bytes * perByteMs) * noise);
    }
    for (const [descriptors, bytes] of [
      [10, 338_000],
      [1_000, 33_792_000],
      [500, 184_320_000],
    ] as const) {
      const truth = setupMs + descriptors * perDescriptorMs + bytes * perByteMs;
      const { totalMs } = model.estimate(descriptors, bytes);
      assert.ok(Math.abs(totalMs / truth - 1) < 0.15, `${totalMs} ms estimated, ${truth} ms in truth`);
    }
  };
  learn(0.3, 0.002, 1 / 2.5e6);
  learn(0.3, 0.002, 1 / 0.5e6);
});

test("transfer cost: never negative, whatever was seen", () => {
  const model = new CostModel(TYPICAL);
  for (let i = 0; i < 50; i++) model.observe(1_000, 1, 0.001);
  for (let i = 0; i < 50; i++) model.observe(1, 1e9, 100);
  const { setupMs, perDescriptorUs, gigabytesPerSecond } = model.estimate(1, 1);
  assert.ok(setupMs >= 0 && perDescriptorUs >= 0 && gigabytesPerSecond > 0);
});
