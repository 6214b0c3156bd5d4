import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import {
  BilinearSurface,
  LinearCurve,
  parseProfile,
  polynomialDecodeMs,
  polynomialPrefillMs,
  polynomialTiming,
  profileTiming,
  transferMs,
  withSpeedup,
} from "./index.ts";

const close = (actual: number, expected: number, tolerance: number): void =>
  assert.ok(Math.abs(actual - expected) <= tolerance, `expected ${expected}, got ${actual}`);

test("polynomial timing: the published sanity values", () => {
  close(polynomialPrefillMs(1000), 32.1, 0.05);
  close(polynomialPrefillMs(8192), 169, 0.5);
  assert.equal(polynomialPrefillMs(0), 0);
  close(polynomialDecodeMs(0.5), 26.3, 0.05);
  close(polynomialDecodeMs(1), 34.0, 0.05);
  assert.equal(polynomialDecodeMs(7), polynomialDecodeMs(1));
});

test("polynomial timing: a pass is charged for its new tokens, and for nothing without sequences", () => {
  assert.equal(
    polynomialTiming.prefillMs({ sequenceCount: 2, inputTokens: 1500, prefixTokens: 500 }),
    polynomialPrefillMs(1000),
  );
  const idle = { sequenceCount: 0, activeKvTokens: 5, totalKvTokens: 10, contextTokens: 0 };
  assert.equal(polynomialTiming.decodeMs(idle), 0);
  assert.equal(polynomialTiming.decodeMs({ ...idle, sequenceCount: 1 }), polynomialDecodeMs(0.5));
});

test("speedup: prefill is divided by one ratio, decode by both, and 0 means no time", () => {
  const prefill = { sequenceCount: 1, inputTokens: 1000, prefixTokens: 0 };
  const decode = { sequenceCount: 1, activeKvTokens: 5, totalKvTokens: 10, contextTokens: 5 };
  const fast = withSpeedup(polynomialTiming, { speedupRatio: 10, decodeSpeedupRatio: 2 });
  close(fast.prefillMs(prefill), polynomialPrefillMs(1000) / 10, 1e-9);
  close(fast.decodeMs(decode), polynomialDecodeMs(0.5) / 20, 1e-9);
  const instant = withSpeedup(polynomialTiming, { speedupRatio: 0 });
  assert.equal(instant.prefillMs(prefill) + instant.decodeMs(decode), 0);
});

test("transfer: bytes over bandwidth, and 0 turns it off", () => {
  assert.equal(transferMs(64e9, 64e9), 1000);
  assert.equal(transferMs(64e9, 0), 0);
});

test("linear curve: hits its points, is linear between them and goes on outside", () => {
  const curve = new LinearCurve([0, 10, 20], [0, 100, 120]);
  assert.deepEqual(
    [0, 5, 10, 15, 20, 30, -10].map((x) => curve.at(x)),
    [0, 50, 100, 110, 120, 140, -100],
  );
  assert.equal(new LinearCurve([5], [7]).at(100), 7);
});

test("bilinear surface: equals any function that is linear in both directions, everywhere", () => {
  const axis = fc.uniqueArray(fc.integer({ min: 0, max: 1000 }), { minLength: 1, maxLength: 6 });
  const point = fc.integer({ min: -500, max: 2000 });
  fc.assert(
    fc.property(axis, axis, point, point, (xs, ys, x, y) => {
      xs.sort((a, b) => a - b);
      ys.sort((a, b) => a - b);
      const f = (a: number, b: number): number => 3 + 2 * a - b + 0.5 * a * b;
      const surface = new BilinearSurface(
        xs,
        ys,
        xs.flatMap((a) => ys.map((b) => f(a, b))),
      );
      // An axis of one point is constant in that direction.
      const expected = f(xs.length === 1 ? xs[0]! : x, ys.length === 1 ? ys[0]! : y);
      close(surface.at(x, y), expected, 1e-6 * Math.max(1, Math.abs(expected)));
    }),
  );
});

const JSON_PROFILE = {
  prefill_isl: [100, 200],
  prefill_ttft_ms: [10, 30],
  decode_active_kv_tokens: [0, 1000],
  decode_context_length: [0, 100],
  decode_itl: [
    [2, 4],
    [6, 8],
  ],
};
const CSV_PROFILE =
  "phase,isl,active_kv_tokens,context_length,ms\r\nprefill,200,,,30\r\ndecode,,0,0,2\ndecode,,1000,100,8\n" +
  "decode,,1000,0,6\nprefill,100,,,10\n\ndecode,,0,100,4";

test("profile: JSON and CSV of the same points are the same model", () => {
  const fromJson = parseProfile(JSON.stringify(JSON_PROFILE));
  assert.deepEqual(parseProfile(CSV_PROFILE), fromJson);
  const timing = profileTiming(fromJson);
  assert.equal(timing.prefillMs({ sequenceCount: 1, inputTokens: 650, prefixTokens: 500 }), 20);
  assert.equal(timing.prefillMs({ sequenceCount: 2, inputTokens: 300, prefixTokens: 0 }), 40);
  assert.equal(timing.prefillMs({ sequenceCount: 1, inputTokens: 5, prefixTokens: 5 }), 0);
  const decode = { sequenceCount: 2, activeKvTokens: 500, totalKvTokens: 1, contextTokens: 100 };
  assert.equal(timing.decodeMs(decode), 5);
});

test("profile: decode never takes less than a millisecond", () => {
  const timing = profileTiming(parseProfile(JSON.stringify({ ...JSON_PROFILE, decode_itl: [[0, 0], [0, 0]] }))); // prettier-ignore
  assert.equal(timing.decodeMs({ sequenceCount: 1, activeKvTokens: 1, totalKvTokens: 9, contextTokens: 1 }), 1);
});

test("profile: what is wrong is named", () => {
  const cases: [string, RegExp][] = [
    ["{", /not valid JSON/],
    ["{}", /prefill_isl: expected a list/],
    [JSON.stringify({ ...JSON_PROFILE, prefill_isl: [200, 100] }), /prefill_isl: expected ascending/],
    [JSON.stringify({ ...JSON_PROFILE, prefill_ttft_ms: [1] }), /prefill_ttft_ms: expected 2 values/],
    [JSON.stringify({ ...JSON_PROFILE, decode_itl: [[1, 2]] }), /decode_itl: expected 2 rows/],
    [JSON.stringify({ ...JSON_PROFILE, decode_itl: [[1, 2], [3]] }), /decode_itl\[1\]: expected 2 values/], // prettier-ignore
    [JSON.stringify({ ...JSON_PROFILE, prefill_isl: [1, "2"] }), /prefill_isl: expected finite numbers/],
    ["a,b\n", /line 1: expected phase/],
    [`${CSV_PROFILE}\nprefill,100,,,11`, /line 9: this point was given before/],
    [`${CSV_PROFILE}\nprefill,1,,`, /line 9: expected 5 cells/],
    [`${CSV_PROFILE}\nwarm,1,,,2`, /line 9: phase/],
    [`${CSV_PROFILE}\nprefill,x,,,2`, /line 9: isl: expected a number/],
    [`${CSV_PROFILE}\ndecode,,7,0,2`, /no full grid/],
    ["phase,isl,active_kv_tokens,context_length,ms", /no prefill points/],
  ];
  for (const [text, expected] of cases) {
    assert.throws(
      () => parseProfile(text),
      (error) => error instanceof DynamoError && error.reason === "invalid-config" && expected.test(error.message),
      `${text.slice(0, 60)} -> ${expected}`,
    );
  }
});
