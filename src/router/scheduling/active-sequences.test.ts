import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { ActiveSequences, type Booking } from "./active-sequences.ts";
import { NaiveActiveSequences, type NaiveBooking } from "./naive-active-sequences.ts";
import { BLOCK_SIZE, aPath, chainOf } from "./testing.ts";

const aRequest = (
  path: readonly number[],
  overrides: { shared?: boolean; prefillTokens?: number; osl?: number } = {},
) => {
  const { hashes, blockCount } = chainOf(path);
  return {
    sequenceHashes: overrides.shared === false ? undefined : hashes,
    blockCount,
    prefillTokens: overrides.prefillTokens ?? 0,
    expectedOutputTokens: overrides.osl ?? 0,
  };
};

test("active sequences: what requests share counts once, and until the last of them is freed", () => {
  const sequences = new ActiveSequences(BLOCK_SIZE);
  const slot = sequences.addSlot();
  const first = sequences.add(slot, aRequest([1, 1, 1]));
  const second = sequences.add(slot, aRequest([1, 1, 2, 2]));
  assert.equal(sequences.decodeBlocks(slot), 5);
  const shared = new Uint32Array(1);
  sequences.sharedInto(chainOf([1, 1, 2, 1]).hashes, 4, shared);
  assert.equal(shared[0], 3);
  sequences.free(first);
  assert.equal(sequences.decodeBlocks(slot), 4);
  sequences.free(second);
  assert.equal(sequences.decodeBlocks(slot), 0);
  assert.equal(sequences.requests(slot), 0);
});

test("active sequences: prefill tokens count until the first token, freeing twice and late calls do nothing", () => {
  const sequences = new ActiveSequences(BLOCK_SIZE);
  const slot = sequences.addSlot();
  const one = sequences.add(slot, aRequest([1], { prefillTokens: 100 }));
  const two = sequences.add(slot, aRequest([2], { prefillTokens: 10 }));
  sequences.prefillDone(one);
  sequences.prefillDone(one);
  assert.equal(sequences.prefillTokens(slot), 10);
  sequences.free(two);
  sequences.free(two);
  sequences.prefillDone(two);
  sequences.addOutput(two, 40);
  assert.equal(sequences.prefillTokens(slot), 0);
  assert.equal(sequences.decodeBlocks(slot), 1);
});

test("active sequences: a slot that left takes its bookings along, and its number starts clean", () => {
  const sequences = new ActiveSequences(BLOCK_SIZE);
  const slots = [sequences.addSlot(), sequences.addSlot(), sequences.addSlot()];
  const booking = sequences.add(slots[1]!, aRequest([1, 2, 3], { prefillTokens: 12 }));
  sequences.removeSlot(slots[1]!);
  assert.equal(sequences.addSlot(), slots[1]);
  sequences.free(booking);
  assert.deepEqual([sequences.requests(1), sequences.prefillTokens(1), sequences.decodeBlocks(1)], [0, 0, 0]);
});

test("active sequences: output near its expected end counts less, to the exact sum after thousands of changes", () => {
  const sequences = new ActiveSequences(BLOCK_SIZE);
  const slot = sequences.addSlot();
  const booking = sequences.add(slot, aRequest([], { osl: 40 }));
  sequences.addOutput(booking, 20);
  assert.equal(sequences.decodeBlocks(slot), 2.5);
  sequences.addOutput(booking, 20);
  assert.equal(sequences.decodeBlocks(slot), 0);
  sequences.free(booking);
  for (let i = 1; i < 3_000; i++) {
    const other = sequences.add(slot, aRequest([], { osl: 7 * i }));
    sequences.addOutput(other, 3 * i);
    sequences.free(other);
  }
  assert.equal(sequences.decodeBlocks(slot), 0);
});

type Step =
  | { do: "add"; slot: number; path: number[]; shared: boolean; prefill: number; osl: number }
  | { do: "free" | "prefilled" | "output"; which: number; tokens: number }
  | { do: "replace"; slot: number };

const SLOTS = 3;
const aStep: fc.Arbitrary<Step> = fc.oneof(
  {
    weight: 4,
    arbitrary: fc.record({
      do: fc.constant("add" as const),
      slot: fc.nat(SLOTS - 1),
      path: aPath,
      shared: fc.boolean(),
      prefill: fc.nat(50),
      osl: fc.nat(30),
    }),
  },
  {
    weight: 4,
    arbitrary: fc.record({
      do: fc.constantFrom("free" as const, "prefilled" as const, "output" as const),
      which: fc.nat(20),
      tokens: fc.nat(20),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("replace" as const), slot: fc.nat(SLOTS - 1) }) },
);

test("active sequences: the flat and the naive one agree after every step of any history", () => {
  fc.assert(
    fc.property(
      fc.array(aStep, { maxLength: 60 }),
      fc.array(aPath, { minLength: 1, maxLength: 3 }),
      (steps, probes) => {
        const flat = new ActiveSequences(BLOCK_SIZE);
        const naive = new NaiveActiveSequences(BLOCK_SIZE);
        for (let slot = 0; slot < SLOTS; slot++) flat.addSlot();
        const pairs: [Booking, NaiveBooking][] = [];
        for (const step of steps) {
          if (step.do === "add") {
            const request = aRequest(step.path, { shared: step.shared, prefillTokens: step.prefill, osl: step.osl });
            pairs.push([flat.add(step.slot, request), naive.add(step.slot, request)]);
          } else if (step.do === "replace") {
            flat.removeSlot(step.slot);
            assert.equal(flat.addSlot(), step.slot);
            naive.removeSlot(step.slot);
          } else if (pairs.length > 0) {
            const [mine, theirs] = pairs[step.which % pairs.length]!;
            if (step.do === "free") {
              flat.free(mine);
              naive.bookings.delete(theirs);
            } else if (step.do === "prefilled") {
              flat.prefillDone(mine);
              theirs.isPrefilled = true;
            } else {
              flat.addOutput(mine, step.tokens);
              theirs.outputTokens += step.tokens;
            }
          }
          for (let slot = 0; slot < SLOTS; slot++) {
            assert.equal(flat.requests(slot), naive.requests(slot));
            assert.equal(flat.prefillTokens(slot), naive.prefillTokens(slot));
            assert.equal(flat.decodeBlocks(slot), naive.decodeBlocks(slot));
          }
          for (const path of probes) {
            const { hashes, blockCount } = chainOf(path);
            const shared = new Uint32Array(SLOTS);
            flat.sharedInto(hashes, blockCount, shared);
            for (let slot = 0; slot < SLOTS; slot++) assert.equal(shared[slot], naive.shared(slot, hashes, blockCount));
          }
        }
        for (const [mine] of pairs) flat.free(mine);
        for (let slot = 0; slot < SLOTS; slot++) assert.equal(flat.decodeBlocks(slot), 0);
      },
    ),
    { numRuns: 150 },
  );
});

test("active sequences: growth keeps what was there", () => {
  const sequences = new ActiveSequences(BLOCK_SIZE);
  for (let slot = 0; slot < 40; slot++) assert.equal(sequences.addSlot(), slot);
  const bookings: Booking[] = [];
  for (let i = 0; i < 1_500; i++) bookings.push(sequences.add(i % 40, aRequest([i, i + 1, i + 2])));
  const shared = new Uint32Array(40);
  const { hashes } = chainOf([777, 778, 779]);
  sequences.sharedInto(hashes, 3, shared);
  assert.deepEqual(
    [...shared.keys()].filter((slot) => shared[slot] === 3),
    [777 % 40],
  );
  assert.equal(
    [...shared].reduce((sum, blocks) => sum + blocks),
    3,
  );
  for (const booking of bookings) sequences.free(booking);
  assert.equal(sequences.decodeBlocks(777 % 40), 0);
});
