import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DEFAULT_ROUTER_CONFIG } from "../config.ts";
import { CandidateColumns, computeCosts, costTerms, taintMultiplier, type CostWeights } from "./cost.ts";

interface Row {
  device?: number;
  host?: number;
  disk?: number;
  shared?: number;
  prefillTokens?: number;
  decodeBlocks?: number;
  activeRequests?: number;
  multiplier?: number;
}

function columnsOf(rows: readonly Row[]): CandidateColumns {
  const columns = new CandidateColumns();
  columns.resize(rows.length);
  rows.forEach((row, i) => {
    for (const name of [
      "device",
      "host",
      "disk",
      "shared",
      "prefillTokens",
      "decodeBlocks",
      "activeRequests",
    ] as const) {
      columns[name][i] = row[name] ?? 0;
    }
    columns.multiplier[i] = row.multiplier ?? 1;
  });
  return columns;
}

const PROMPT = { tokens: 160, blocks: 10, blockSizeTokens: 16 };

function costs(rows: readonly Row[], weights: Partial<CostWeights> = {}): number[] {
  const columns = columnsOf(rows);
  computeCosts(columns, PROMPT, { ...DEFAULT_ROUTER_CONFIG, ...weights });
  return [...columns.cost.subarray(0, rows.length)];
}

test("cost: the reference's example, 10 prompt blocks with overlaps 2, 5, 8 and decode 10, 5, 9, costs 18, 10, 11", () => {
  const rows = [
    { device: 2, decodeBlocks: 10 },
    { device: 5, decodeBlocks: 5 },
    { device: 8, decodeBlocks: 9 },
  ];
  assert.deepEqual(costs(rows), [18, 10, 11]);
});

test("cost: each term and weight does what the formula says", () => {
  assert.deepEqual(costs([{ host: 4 }, { disk: 4 }, { shared: 5 }]), [7, 9, 9.5]);
  assert.deepEqual(costs([{ shared: 4 }], { sharedCacheMultiplier: 0.5 }), [8]);
  assert.deepEqual(costs([{ prefillTokens: 32 }]), [12]);
  assert.deepEqual(costs([{ device: 10, prefillTokens: 32 }], { overlapScoreCredit: 2 }), [0]);
  assert.deepEqual(costs([{ device: 2 }], { prefillLoadScale: 0.5 }), [4]);
  assert.deepEqual(costs([{ activeRequests: 3 }], { decodeActiveRequestWeight: 2 }), [16]);
  assert.deepEqual(costs([{ decodeBlocks: 2, multiplier: 0.5 }]), [6]);
});

test("cost: without prefill tracking the credit comes off the decode blocks", () => {
  assert.deepEqual(costs([{ decodeBlocks: 9, device: 4, prefillTokens: 999 }], { trackPrefillTokens: false }), [5]);
  assert.deepEqual(costs([{ decodeBlocks: 3, device: 4 }], { trackPrefillTokens: false }), [0]);
});

test("cost: with decay a prefix is worth half on a worker that is one prompt further behind than the least loaded", () => {
  const [ahead, behind] = costs([{ device: 8 }, { device: 8, prefillTokens: 160 }], { overlapScoreCreditDecay: 1 });
  assert.equal(ahead, 2);
  assert.equal(behind, 20 - 4);
});

test("cost: taints multiply by 0.368 at best and 2.718 at worst", () => {
  assert.equal(taintMultiplier(0), 1);
  assert.ok(Math.abs(taintMultiplier(100) - 0.367_879) < 1e-6);
  assert.ok(Math.abs(taintMultiplier(-100) - 2.718_281) < 1e-6);
});

test("cost: the terms of the explanation add up to the cost, for any load and weights", () => {
  const amount = fc.nat(1_000);
  const row = fc.record({
    device: amount,
    host: amount,
    disk: amount,
    shared: amount,
    prefillTokens: fc.nat(100_000),
    decodeBlocks: amount,
    activeRequests: amount,
    multiplier: fc.double({ min: 0.3, max: 2.8, noNaN: true }),
  });
  const weight = fc.double({ min: 0, max: 4, noNaN: true });
  const weights = fc.record({
    overlapScoreCredit: weight,
    overlapScoreCreditDecay: fc.constantFrom(0, 0.5, 3),
    prefillLoadScale: weight,
    hostCacheHitWeight: weight,
    diskCacheHitWeight: weight,
    sharedCacheMultiplier: weight,
    decodeActiveRequestWeight: weight,
    trackPrefillTokens: fc.boolean(),
  });
  fc.assert(
    fc.property(fc.array(row, { minLength: 1, maxLength: 20 }), weights, (rows, given) => {
      const columns = columnsOf(rows);
      computeCosts(columns, PROMPT, given);
      rows.forEach((_, i) => {
        const { total } = costTerms(columns, i, PROMPT, given);
        assert.ok(Math.abs(total - columns.cost[i]!) <= 1e-9 * Math.max(1, total), `${total} ${columns.cost[i]}`);
        assert.ok(columns.cost[i]! >= 0);
      });
    }),
  );
});
