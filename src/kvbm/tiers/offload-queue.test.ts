import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { keyOf, storedEvents } from "./block-identity.ts";
import { aBlock } from "./fixtures/blocks.ts";
import { FrequencyFilter, offloadFilter } from "./offload-filter.ts";
import { OffloadQueue, type OffloadPriority } from "./offload-queue.ts";
import { SightFilter } from "./sight-filter.ts";
import { TierCosts } from "./tier-costs.ts";

test("offload queue: priority, then arrival; bounded; nothing twice (against a plain list)", () => {
  const aStep = fc.record({
    depth: fc.nat(12),
    priority: fc.constantFrom<OffloadPriority>(0, 1),
    isTake: fc.boolean(),
  });
  fc.assert(
    fc.property(fc.array(aStep, { maxLength: 300 }), (steps) => {
      const queue = new OffloadQueue(8);
      let plain: { depth: number; priority: number }[] = [];
      for (const { depth, priority, isTake } of steps) {
        if (isTake) {
          const first = plain.find((one) => one.priority === 0) ?? plain[0];
          plain = plain.filter((one) => one !== first);
          assert.deepEqual(queue.take(), first === undefined ? undefined : aBlock(first.depth));
        } else {
          const isKnown = plain.some((one) => one.depth === depth);
          const added = queue.tryAdd(aBlock(depth), priority);
          assert.equal(added, isKnown || plain.length < 8);
          if (added && !isKnown) plain.push({ depth, priority });
        }
        assert.equal(queue.size, plain.length);
      }
    }),
  );
});

test("offload queue: a run at the head is whole when it is as long as it may be, or when something else follows", () => {
  const queue = new OffloadQueue(16);
  const isWhole = (limit: number): boolean => queue.hasWholeRun(() => limit);
  assert(!isWhole(1));
  for (const depth of [4, 5, 6]) queue.tryAdd(aBlock(depth), 0);
  assert.deepEqual([1, 2, 3, 4].map(isWhole), [true, true, true, false]);
  queue.tryAdd(aBlock(8), 0);
  assert(isWhole(4), "7 is missing: it will not come behind 8");
  queue.take();
  assert.deepEqual(queue.peek(), aBlock(5));
  assert(isWhole(2));
});

test("sight filter: the second sight passes, ten minutes later it counts from less, and memory is bounded", () => {
  const filter = new SightFilter(2, 100);
  assert(!filter.see(1, 0));
  assert(filter.see(1, 0));
  assert(filter.see(1, 0));
  // 4, then 3 after a decay, doubled.
  assert(filter.see(1, 600_000));
  assert(!filter.see(2, 600_000));
  // Once seen and decayed: as if never.
  assert(!filter.see(2, 1_200_000));
  for (let key = 10; key < 1_000; key++) filter.see(key, 1_200_000);
  assert(filter.size <= 100);
  assert(new SightFilter(1).see(5, 0), "a filter of one lets everything pass");
});

test("frequency filter: the n-th sight passes, blocks apart, until it is cleared; none means at once", () => {
  const filter = new FrequencyFilter(3, 64);
  const keys = [1, 2 ** 32, 7 + 9 * 2 ** 32].map((key) => key + 5);
  for (let sight = 1; sight <= 4; sight++) for (const key of keys) assert.equal(filter.see(key), sight >= 3);
  filter.clear();
  assert(!filter.see(keys[0]!));
  for (const minFrequency of [0, 1]) assert(offloadFilter({ minFrequency }).see(1, 0));
  assert(!offloadFilter({ minFrequency: 2, minSights: 1 }).see(1, 0));
  assert(!offloadFilter({ minSights: 2 }).see(1, 0));
});

test("tier costs: takes what saves most, leaves what is slower than computing, and tries it again some time", () => {
  const costs = new TierCosts();
  assert.equal(costs.worthTaking([0, 0, 1, 2], 16).count, 4, "everything, until prefill was measured");
  costs.tookToPrefill(10, 10_000);
  assert.equal(costs.worthTaking([2], 16).recomputeMs, Infinity, "a short prefill says nothing");
  costs.tookToPrefill(1_000, 1_000);
  for (let i = 0; i < 30; i++) costs.tookToRead(2, 1, 500);
  assert.equal(costs.worthTaking([0, 0, 1, 2], 16).count, 3);
  assert.equal(costs.worthTaking([2, 2, 0, 0, 0, -1], 16).count, 0);
  let tries = 0;
  while (costs.worthTaking([2], 16).count === 0) tries++;
  assert(tries > 5 && tries < 200);
});

test("events of stored blocks: one for each stretch that is a chain", () => {
  const events = storedEvents([aBlock(0), aBlock(1), aBlock(3), aBlock(4), aBlock(0, 1)], "disk");
  assert.deepEqual(
    events.map((event) => (event.type === "stored" ? [event.startBlock, event.sequenceHashes.length / 2] : [])),
    [
      [0, 2],
      [3, 2],
      [0, 1],
    ],
  );
  assert.notEqual(keyOf(1, 2), keyOf(2, 1));
});
