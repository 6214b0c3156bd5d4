import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import type { KvEvent } from "../../protocol/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import { replayKvEvents } from "../engine.recorder.ts";
import { SlotCache } from "./slot-cache.ts";

const BLOCK = 4;
const SLOTS = 3;

/** The blocks of one sequence. */
function blocksOf(tokenIds: readonly number[]): string[] {
  const whole = Uint32Array.from(tokenIds.slice(0, Math.floor(tokenIds.length / BLOCK) * BLOCK));
  const { sequenceHashes } = hashBlocks(whole, BLOCK, blockHashSeed());
  return Array.from({ length: whole.length / BLOCK }, (_, i) => `${sequenceHashes[2 * i]},${sequenceHashes[2 * i + 1]}`);
} // prettier-ignore

test("slot cache: what its events leave is what the slots hold, whatever comes; unknown slots change nothing", () => {
  // Few tokens, so that sequences share beginnings.
  const sequence = fc.array(fc.nat(1), { maxLength: 6 * BLOCK });
  const slot = fc.constantFrom(undefined, 0, 1, 2, 99);
  fc.assert(
    fc.property(fc.array(fc.tuple(sequence, slot), { maxLength: 30 }), (steps) => {
      const cache = new SlotCache({ blockSizeTokens: BLOCK, slots: SLOTS, dpRank: 0 });
      const slots: (readonly number[])[] = Array.from({ length: SLOTS }, () => []);
      const events: KvEvent[] = [];
      for (const [tokens, id] of steps) {
        events.push(...cache.computed(Uint32Array.from(tokens), "", id));
        if (id !== undefined && id < SLOTS) slots[id] = tokens;
        const held = new Set(replayKvEvents(events));
        assert.deepEqual(held, new Set(slots.flatMap((one) => blocksOf(one))));
      }
      cache.clear();
      assert.deepEqual(cache.computed(Uint32Array.of(1, 2, 3), "", 0), []);
    }),
  );
});
