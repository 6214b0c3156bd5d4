import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import type { KvEvent } from "../../protocol/index.ts";
import { replayKvEvents } from "../engine.recorder.ts";
import { EstimatedCache } from "./estimated-cache.ts";
import { MirroredBlocks } from "./mirrored-blocks.ts";

const BLOCK = 4;

function sequence(words: readonly number[]): Uint32Array {
  return Uint32Array.from(words.flatMap((word) => [word, word + 1, word + 2, word + 3]));
}

test("estimated cache: what was computed is there, what is shared is told once, the oldest goes, deepest first", () => {
  const cache = new EstimatedCache({ blockSizeTokens: BLOCK, totalBlocks: 4, dpRank: 0 });
  const events: KvEvent[] = [];
  events.push(...cache.computed(sequence([1, 2, 3]), ""));
  events.push(...cache.computed(sequence([1, 2, 3]), ""));
  assert.equal(events.length, 1);
  events.push(...cache.computed(sequence([1, 2, 9]), ""));
  assert.equal(replayKvEvents(events).size, 4);
  // A fifth block: [1, 2, 3]'s last one was used longest ago.
  events.push(...cache.computed(sequence([7]), ""));
  const removed = events.filter(({ type }) => type === "removed");
  assert.equal(removed.length, 1);
  const mirror = new MirroredBlocks();
  mirror.apply(events);
  assert.equal(mirror.deviceBlockCount, 4);
  assert.equal(cache.computed(sequence([1, 2, 9]), "").length, 0);
  assert.equal(cache.computed(sequence([1, 2, 3]), "").filter(({ type }) => type === "stored").length, 1);
});

test("estimated cache: whatever comes, its events are true and no more blocks than the engine has", () => {
  const sequences = fc.array(fc.tuple(fc.array(fc.integer({ min: 1, max: 4 }), { maxLength: 8 }), fc.boolean()), {
    maxLength: 40,
  });
  fc.assert(
    fc.property(sequences, fc.integer({ min: 1, max: 12 }), (all, totalBlocks) => {
      const cache = new EstimatedCache({ blockSizeTokens: BLOCK, totalBlocks, dpRank: 0 });
      const present = new Map<string, string | undefined>();
      for (const [words, isSalted] of all) {
        for (const event of cache.computed(sequence(words), isSalted ? "a" : "")) {
          if (event.type === "removed") {
            for (let i = 0; i < event.sequenceHashes.length; i += 2) {
              assert.ok(present.delete(event.sequenceHashes.slice(i, i + 2).join()), "only what was told is removed");
            }
          } else if (event.type === "stored") {
            let parent = event.parentHash?.join();
            if (parent !== undefined) assert.ok(present.has(parent), "the parent is there");
            for (let i = 0; i < event.sequenceHashes.length; i += 2) {
              const key = event.sequenceHashes.slice(i, i + 2).join();
              present.set(key, parent);
              parent = key;
            }
          }
        }
        assert.ok(cache.blockCount <= totalBlocks);
        assert.equal(present.size, cache.blockCount);
      }
    }),
    { numRuns: 300 },
  );
});
