import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import type { KvEvent, StorageTier } from "../../protocol/index.ts";
import { SeededRandom } from "../../std/index.ts";
import { OverlapScores, type KvIndex } from "./base.ts";
import { FlatKvIndex, MIN_INDEX_BYTES } from "./flat-kv-index.ts";
import { aChain, aRemoved, aStored, contentsOf, scoresOf } from "./kv-index.battery.ts";
import { NaiveKvIndex } from "./naive-kv-index.ts";

/** Random histories: the flat index against the naive one, and both against what the workers really hold. */
const TIERS: readonly StorageTier[] = ["device", "host", "disk", "external"];
const LENGTH = 8;
const RANKS = [0, 1, 2].flatMap((worker) => [0, 1].map((dpRank) => ({ worker: `worker-${worker}`, dpRank })));

/** Four chains in a tree: they part at blocks 0, 2 and 5. */
const CHAINS = [aChain(1, LENGTH), aChain(2, LENGTH), aChain(3, LENGTH), aChain(4, LENGTH)];
CHAINS[1]!.set(CHAINS[0]!.subarray(0, 4));
CHAINS[2]!.set(CHAINS[1]!.subarray(0, 10));

interface Step {
  readonly kind: "stored" | "removed" | "cleared" | "worker-removed";
  readonly rank: number;
  readonly chain: number;
  readonly from: number;
  readonly length: number;
  readonly tier: number;
}

const step: fc.Arbitrary<Step> = fc.record({
  kind: fc.oneof(
    { weight: 10, arbitrary: fc.constant("stored" as const) },
    { weight: 10, arbitrary: fc.constant("removed" as const) },
    { weight: 1, arbitrary: fc.constant("cleared" as const) },
    { weight: 1, arbitrary: fc.constant("worker-removed" as const) },
  ),
  rank: fc.nat(RANKS.length - 1),
  chain: fc.nat(CHAINS.length - 1),
  from: fc.nat(LENGTH - 1),
  length: fc.integer({ min: 1, max: LENGTH }),
  tier: fc.nat(TIERS.length - 1),
});

function eventOf(step: Step): KvEvent {
  if (step.kind === "cleared") return { type: "cleared", dpRank: 0 };
  const parts = {
    chain: CHAINS[step.chain]!,
    from: step.from,
    to: Math.min(LENGTH, step.from + step.length),
    tier: TIERS[step.tier]!,
  };
  return step.kind === "removed" ? aRemoved(parts) : aStored(parts);
}

function applyStep(index: KvIndex, step: Step): unknown {
  const { worker, dpRank } = RANKS[step.rank]!;
  if (step.kind === "worker-removed") return index.removeWorker(worker);
  return index.apply(index.rankOf(worker, dpRank), eventOf(step));
}

function assertSame(a: KvIndex, b: KvIndex): void {
  assert.equal(a.rankCount, b.rankCount);
  const [scoresA, scoresB] = [new OverlapScores(), new OverlapScores()];
  for (const chain of CHAINS) {
    a.findMatches(chain, LENGTH, scoresA);
    b.findMatches(chain, LENGTH, scoresB);
    assert.deepEqual(scoresA, scoresB);
  }
  const [statsA, statsB] = [a.stats(), b.stats()];
  for (const figure of ["ranks", "blocks", "memberships", "evictedBlocks"] as const) {
    assert.equal(statsA[figure], statsB[figure], figure);
  }
}

test("KV index: flat and naive agree on every answer, figure and status after every step of a random history", () => {
  fc.assert(
    fc.property(fc.array(step, { minLength: 1, maxLength: 120 }), fc.nat(), (steps, seed) => {
      const flat = new FlatKvIndex({ maxBytes: MIN_INDEX_BYTES, random: new SeededRandom(seed) });
      const naive = new NaiveKvIndex();
      for (const next of steps) {
        assert.deepEqual(applyStep(flat, next), applyStep(naive, next));
        assertSame(flat, naive);
      }
      for (let rank = 0; rank < naive.rankCount; rank++)
        assert.deepEqual(contentsOf(flat, rank), contentsOf(naive, rank));
    }),
    { numRuns: 400 },
  );
});

/** What happens to an event on its way: most arrive; some are lost, doubled, or overtaken by the next one. */
const fate = fc.constantFrom("arrives", "arrives", "arrives", "lost", "doubled", "late") as fc.Arbitrary<
  "arrives" | "lost" | "doubled" | "late"
>;

for (const [name, create] of [
  ["flat", (seed: number) => new FlatKvIndex({ maxBytes: MIN_INDEX_BYTES, random: new SeededRandom(seed) })],
  ["naive", () => new NaiveKvIndex()],
] as const) {
  test(`KV index: after loss, duplication, reordering and restarts, a restored ${name} index claims nothing a worker has not`, () => {
    const history = fc.array(fc.tuple(step, fate), { minLength: 1, maxLength: 80 });
    fc.assert(
      fc.property(history, fc.nat(), (steps, seed) => {
        const index: KvIndex = create(seed);
        // The truth is kept per worker, as its local index does; a removed worker restarts empty under the same id.
        const truth = new NaiveKvIndex();
        let late: Step[] = [];
        for (const [next, what] of steps) {
          applyStep(truth, next);
          if (next.kind === "worker-removed" || what === "arrives") applyStep(index, next);
          if (what === "doubled") [next, next].forEach((twice) => applyStep(index, twice));
          if (what !== "late") late.forEach((overtaken) => applyStep(index, overtaken));
          late = what === "late" ? [...late, next] : [];
        }
        for (const { worker, dpRank } of RANKS) {
          const [rank, trueRank] = [index.rankOf(worker, dpRank), truth.rankOf(worker, dpRank)];
          index.clearRank(rank);
          for (const event of truth.dump(trueRank)) index.apply(rank, event);
        }
        for (const { worker, dpRank } of RANKS) {
          const [rank, trueRank] = [index.rankOf(worker, dpRank), truth.rankOf(worker, dpRank)];
          for (const chain of CHAINS) {
            // Blocks behind a hole may be missing, and no match reaches those: so the answers are equal.
            assert.deepEqual(scoresOf(index, chain, rank), scoresOf(truth, chain, trueRank));
          }
          const held = new Set(contentsOf(truth, trueRank));
          for (const block of contentsOf(index, rank)) assert.ok(held.has(block), `${block} is not held`);
        }
      }),
      { numRuns: 200 },
    );
  });
}

/** A history large enough for splits, growth and reuse of records; the naive index follows it block by block. */
test("KV index: flat and naive agree through thousands of chains that come and go", () => {
  const random = new SeededRandom(7);
  const pick = (count: number): number => Math.floor(random.nextFloat() * count);
  const flat = new FlatKvIndex({ maxBytes: 16 * 2 ** 20, random });
  const naive = new NaiveKvIndex();
  const ranks = Array.from({ length: 70 }, (_, i) => [flat.rankOf(`w${i}`, 0), naive.rankOf(`w${i}`, 0)] as const);
  const chains = Array.from({ length: 400 }, (_, i) => aChain(100 + i, 40));
  const [scores, expected] = [new OverlapScores(), new OverlapScores()];
  for (let round = 0; round < 2_500; round++) {
    const [flatRank, naiveRank] = ranks[pick(ranks.length)]!;
    const chain = chains[pick(chains.length)]!;
    const from = pick(4) === 0 ? pick(40) : 0;
    const parts = { chain, from, to: from + 1 + pick(40 - from), tier: TIERS[pick(8) < 6 ? 0 : pick(4)]! };
    const event = pick(3) === 0 ? aRemoved(parts) : aStored(parts);
    assert.equal(flat.apply(flatRank, event), naive.apply(naiveRank, event));
    if (round % 500 === 499) {
      flat.clearRank(flatRank);
      naive.clearRank(naiveRank);
    }
    flat.findMatches(chain, 40, scores);
    naive.findMatches(chain, 40, expected);
    assert.deepEqual(scores, expected);
  }
  const { blocks, memberships } = naive.stats();
  assert.ok(blocks > 10_000, "the history is as large as it is meant to be");
  assert.deepEqual([flat.stats().blocks, flat.stats().memberships], [blocks, memberships]);
  for (const [flatRank, naiveRank] of ranks) assert.deepEqual(contentsOf(flat, flatRank), contentsOf(naive, naiveRank));
  for (const [flatRank] of ranks) flat.clearRank(flatRank);
  assert.deepEqual([flat.stats().blocks, flat.stats().memberships], [0, 0]);
});

test("KV index: over its byte budget the flat index forgets old leaves, claims nothing false and stays within bounds", () => {
  const random = new SeededRandom(11);
  const flat = new FlatKvIndex({ maxBytes: MIN_INDEX_BYTES, random });
  const naive = new NaiveKvIndex();
  for (let i = 0; i < 8; i++) assert.equal(flat.rankOf(`w${i}`, 0), naive.rankOf(`w${i}`, 0));
  const [scores, limit] = [new OverlapScores(), new OverlapScores()];
  const hot = aChain(999_999, 30);
  flat.apply(0, aStored({ chain: hot }));
  naive.apply(0, aStored({ chain: hot }));
  for (let i = 0; i < 3_000; i++) {
    const chain = aChain(i, 30);
    const rank = i % 8;
    assert.equal(flat.apply(rank, aStored({ chain })), "ok");
    naive.apply(rank, aStored({ chain }));
    // Not every time: a lookup is a use, and where everything is used nothing is older than the rest.
    if (i % 50 === 0) assert.equal(scoresOf(flat, chain, rank)[0], 30, "what has just been stored is there");
    assert.equal(scoresOf(flat, hot, 0)[0], 30, "what is asked for all the time is there");
    const old = aChain(Math.floor(random.nextFloat() * i), 30);
    flat.findMatches(old, 30, scores);
    naive.findMatches(old, 30, limit);
    for (let r = 0; r < 8; r++) assert.ok(scores.device[r]! <= limit.device[r]!);
    assert.ok(flat.stats().bytes <= MIN_INDEX_BYTES);
  }
  const { blocks, memberships, evictedBlocks } = flat.stats();
  assert.ok(evictedBlocks > 0);
  assert.equal(blocks + evictedBlocks, 3_001 * 30);
  assert.equal(memberships, blocks);
});

test("KV index: rank sets over their part of the budget cost blocks, never truth, and the room comes back", () => {
  const random = new SeededRandom(13);
  const flat = new FlatKvIndex({ maxBytes: MIN_INDEX_BYTES, random });
  const naive = new NaiveKvIndex();
  const ranks = Array.from({ length: 640 }, (_, i) => {
    assert.equal(flat.rankOf(`w${i}`, 0), naive.rankOf(`w${i}`, 0));
    return i;
  });
  const [scores, limit] = [new OverlapScores(), new OverlapScores()];
  // Every block has a set of its own, many nodes long.
  for (let i = 0; i < 700; i++) {
    const chain = aChain(i, 3);
    for (let j = 0; j < 40; j++) {
      const rank = Math.floor(random.nextFloat() * ranks.length);
      const parts = { chain, from: 0, to: 1 + (j % 3) };
      assert.equal(flat.apply(rank, aStored(parts)), "ok");
      naive.apply(rank, aStored(parts));
    }
    const old = aChain(Math.floor(random.nextFloat() * i), 3);
    flat.findMatches(old, 3, scores);
    naive.findMatches(old, 3, limit);
    for (const rank of ranks) assert.ok(scores.device[rank]! <= limit.device[rank]!);
  }
  assert.ok(flat.stats().evictedBlocks > 0);
  assert.ok(flat.stats().bytes <= MIN_INDEX_BYTES);
  for (const rank of ranks) flat.clearRank(rank);
  assert.deepEqual([flat.stats().blocks, flat.stats().memberships], [0, 0]);
  flat.apply(0, aStored({ chain: aChain(1, 3) }));
  assert.deepEqual(scoresOf(flat, aChain(1, 3), 0), [3, 0, 0]);
});
