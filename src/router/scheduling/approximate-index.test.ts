import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { ManualClock } from "../../std/index.ts";
import { OverlapScores } from "../indexer/base.ts";
import { ApproximateIndex } from "./approximate-index.ts";
import { aPath, chainOf } from "./testing.ts";

function matches(index: ApproximateIndex, path: readonly number[]): number[] {
  const scores = new OverlapScores();
  const { hashes, blockCount } = chainOf(path);
  index.findMatches(hashes, blockCount, scores);
  return [...scores.device.subarray(0, index.rankCount)];
}

function record(index: ApproximateIndex, rank: number, path: readonly number[]): void {
  const { hashes, blockCount } = chainOf(path);
  index.record(rank, hashes, blockCount);
}

test("approximate index: what was sent to a rank counts there, until its time to live is over; sending again renews it", () => {
  const clock = new ManualClock();
  const index = new ApproximateIndex({ clock, ttlMs: 100 });
  record(index, 0, [1, 2, 3]);
  record(index, 2, [1, 2]);
  assert.deepEqual(matches(index, [1, 2, 3, 4]), [3, 0, 2]);
  clock.advance(60);
  record(index, 0, [1, 2]);
  clock.advance(60);
  assert.deepEqual(matches(index, [1, 2, 3, 4]), [2, 0, 0]);
  clock.advance(60);
  assert.deepEqual(matches(index, [1, 2, 3, 4]), [0, 0, 0]);
  assert.equal(index.stats().memberships, 0);
  assert.equal(clock.pendingTimerCount, 0);
});

test("approximate index: a rank that left is forgotten, the others are not", () => {
  const index = new ApproximateIndex({ clock: new ManualClock(), ttlMs: 100 });
  record(index, 0, [1, 2]);
  record(index, 1, [1, 2]);
  index.clearRank(0);
  assert.deepEqual(matches(index, [1, 2]), [0, 2]);
  assert.equal(index.stats().memberships, 2);
});

test("approximate index: above its bound the longest unused goes down to 80 %, leaves before their parents", () => {
  const clock = new ManualClock();
  const index = new ApproximateIndex({ clock, ttlMs: 1e6, maxMembers: 10 });
  record(index, 0, [1, 1, 1, 1]);
  clock.advance(1);
  record(index, 0, [2, 2, 2, 2]);
  record(index, 0, [1, 1]);
  record(index, 0, [3, 3, 3]);
  assert.equal(index.stats().memberships, 8);
  // The two deepest of the first chain were the oldest, then one of the second.
  assert.deepEqual(
    [matches(index, [1, 1, 1, 1]), matches(index, [2, 2, 2, 2]), matches(index, [3, 3, 3])],
    [[2], [3], [3]],
  );
  assert.equal(index.stats().evictedBlocks, 3);
});

test("approximate index: a prompt larger than the bound keeps its head", () => {
  const index = new ApproximateIndex({ clock: new ManualClock(), ttlMs: 1e6, maxMembers: 5 });
  record(index, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
  assert.deepEqual(matches(index, [1, 2, 3, 4, 5, 6, 7, 8, 9]), [4]);
});

test("approximate index: agrees with a list of what was sent when, for any history", () => {
  const step = fc.record({ rank: fc.nat(2), path: aPath, pauseMs: fc.nat(40), clear: fc.nat(9) });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 40 }), aPath, (steps, probe) => {
      const clock = new ManualClock();
      const index = new ApproximateIndex({ clock, ttlMs: 100 });
      let sent: { rank: number; path: number[]; atMs: number }[] = [];
      record(index, 2, []);
      for (const { rank, path, pauseMs, clear } of steps) {
        if (clear === 0) {
          index.clearRank(rank);
          sent = sent.filter((one) => one.rank !== rank);
        } else {
          record(index, rank, path);
          sent.push({ rank, path, atMs: clock.monotonicMs() });
        }
        clock.advance(pauseMs);
        const expected = [0, 1, 2].map((of) => {
          let best = 0;
          for (const one of sent) {
            if (one.rank !== of || clock.monotonicMs() - one.atMs >= 100) continue;
            let length = 0;
            while (length < probe.length && one.path[length] === probe[length]) length++;
            best = Math.max(best, length);
          }
          return best;
        });
        assert.deepEqual(matches(index, probe), expected);
      }
    }),
    { numRuns: 200 },
  );
});
