import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { ManualClock, SeededRandom } from "../std/index.ts";
import { HandoffStore, type HandoffOutcome } from "./handoff-store.ts";
import { SlotTable } from "./slot-table.ts";

const BLOCK = 4;
const LEASE_MS = 100;
const CLAIM_MS = 50;

function newStore(blocks: number): {
  store: HandoffStore;
  clock: ManualClock;
  bytes: Uint8Array;
  outcomes: HandoffOutcome[];
} {
  const clock = new ManualClock();
  const bytes = new Uint8Array(blocks * BLOCK);
  const outcomes: HandoffOutcome[] = [];
  const store = new HandoffStore({
    bytes,
    blockBytes: BLOCK,
    clock,
    random: new SeededRandom(1),
    leaseMs: LEASE_MS,
    claimMs: CLAIM_MS,
    onEnd: (outcome) => outcomes.push(outcome),
  });
  return { store, clock, bytes, outcomes };
}

const isGone = (error: unknown): boolean => error instanceof DynamoError && error.reason === "handoff-gone";
const nothing = (): void => undefined;

test("handoff store: a claim is granted once, a release frees, and a second reader finds nothing", () => {
  const { store, outcomes } = newStore(8);
  let freed = 0;
  const { id } = store.offer(new Uint8Array(3 * BLOCK), () => freed++);
  store.claim(id);
  assert.throws(() => store.claim(id), isGone);
  store.cancel(id);
  assert.equal(store.heldBlocks, 3, "whoever reads is not disturbed by a cancel");
  store.release(id);
  store.release(id);
  assert.throws(() => store.claim(id), isGone);
  assert.deepEqual([store.heldBlocks, freed, outcomes], [0, 1, ["fetched"]]);
});

test("handoff store: what nobody claims, and a claim that nobody ends, run out", () => {
  const { store, clock, outcomes } = newStore(8);
  store.offer(new Uint8Array(2 * BLOCK), nothing);
  const { id } = store.offer(new Uint8Array(2 * BLOCK), nothing);
  clock.advance(LEASE_MS - 1);
  store.claim(id);
  clock.advance(1);
  assert.equal(store.heldBlocks, 2);
  clock.advance(CLAIM_MS);
  assert.deepEqual([store.heldBlocks, outcomes], [0, ["expired", "expired"]]);
});

test("handoff store: as many blocks as fit are kept, none is an error", () => {
  const { store } = newStore(4);
  assert.equal(store.offer(new Uint8Array(6 * BLOCK), nothing).blockCount, 4);
  assert.throws(
    () => store.offer(new Uint8Array(BLOCK), nothing),
    (error) => error instanceof DynamoError && error.reason === "transfer-full",
  );
  store.close();
  assert.equal(store.heldBlocks, 0);
});

test("handoff store: over random histories no slot is lost or held twice, and held bytes stay what was offered", () => {
  const step = fc.oneof(
    fc.record({ type: fc.constant("offer" as const), blocks: fc.integer({ min: 1, max: 5 }) }),
    fc.record({ type: fc.constantFrom("claim" as const, "release" as const, "cancel" as const), which: fc.nat(20) }),
    fc.record({ type: fc.constant("wait" as const), ms: fc.integer({ min: 1, max: 60 }) }),
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
      const { store, clock, bytes } = newStore(12);
      // The naive twin: what is held, by whom, since when.
      const held = new Map<string, { data: Uint8Array; runs: Uint32Array; untilMs: number; isClaimed: boolean }>();
      const ids: string[] = [];
      for (const [i, action] of steps.entries()) {
        const nowMs = clock.monotonicMs();
        if (action.type === "wait") clock.advance(action.ms);
        else if (action.type === "offer") {
          const data = new Uint8Array(action.blocks * BLOCK).fill(i + 1);
          try {
            const { id, runs, blockCount } = store.offer(data, () => held.delete(id));
            held.set(id, {
              data: data.subarray(0, blockCount * BLOCK),
              runs,
              untilMs: nowMs + LEASE_MS,
              isClaimed: false,
            });
            ids.push(id);
          } catch {
            assert.equal(store.freeBlocks, 0);
          }
        } else {
          const id = ids[action.which % Math.max(1, ids.length)] ?? "none";
          const known = held.get(id);
          if (action.type === "release") store.release(id);
          else if (action.type === "cancel") {
            store.cancel(id);
            assert.equal(held.has(id), known?.isClaimed === true);
          } else if (known === undefined || known.isClaimed) assert.throws(() => store.claim(id), isGone);
          else {
            store.claim(id);
            known.isClaimed = true;
            known.untilMs = nowMs + CLAIM_MS;
          }
        }
        const taken = new Set<number>();
        for (const { data, runs, untilMs } of held.values()) {
          assert.ok(untilMs > clock.monotonicMs(), "what is over is not held");
          let block = 0;
          for (let run = 0; run < runs.length; run += 2) {
            for (let slot = runs[run]!; slot < runs[run]! + runs[run + 1]!; slot++, block++) {
              assert.ok(!taken.has(slot), "a slot has one owner");
              taken.add(slot);
              const there = bytes.subarray(slot * BLOCK, (slot + 1) * BLOCK);
              assert.deepEqual(there, data.subarray(block * BLOCK, (block + 1) * BLOCK));
            }
          }
        }
        assert.equal(store.heldBlocks, taken.size);
        assert.equal(store.heldCount, held.size);
      }
      store.close();
      assert.equal(held.size, 0);
    }),
    { numRuns: 150 },
  );
});

test("slot table: runs are as few as the free slots allow", () => {
  const slots = new SlotTable(10);
  const first = slots.take(4);
  assert.deepEqual([...first], [0, 4]);
  const second = slots.take(3);
  slots.free(first);
  assert.deepEqual([...slots.take(6)], [0, 4, 7, 2]);
  slots.free(second);
  assert.equal(slots.freeCount, 4);
});
