import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { SeededRandom } from "../../std/index.ts";
import { OverlapScores } from "./base.ts";
import { FlatKvIndex } from "./flat-kv-index.ts";
import { aChain, aStored, scoresOf } from "./kv-index.battery.ts";
import { SharedKvIndex } from "./shared-kv-index.ts";

const BLOCKS = 6;

test("shared KV index: a worker scores nothing until the index and its ranks were told, in either order", () => {
  const writer = new FlatKvIndex({ random: new SeededRandom(1) });
  // Numbers differ on both sides.
  writer.rankOf("other", 0);
  const writerRank = writer.rankOf("w", 0);
  const chain = aChain(1, BLOCKS);
  writer.apply(writerRank, aStored({ chain }));
  const late = new SharedKvIndex();
  const rank = late.rankOf("w", 0);
  assert.deepEqual(scoresOf(late, chain, rank), [0, 0, 0]);
  assert.equal(late.stats().blocks, 0);
  late.attach(writer.share());
  assert.deepEqual(scoresOf(late, chain, rank), [0, 0, 0]);
  late.setWriterRanks("w", [writerRank]);
  assert.deepEqual(scoresOf(late, chain, rank), [BLOCKS, 0, 0]);
  assert.equal(late.stats().blocks, BLOCKS);

  const early = new SharedKvIndex();
  early.attach(writer.share());
  early.setWriterRanks("w", [writerRank]);
  assert.equal(early.rankCount, 0);
  assert.deepEqual(scoresOf(early, chain, early.rankOf("w", 0)), [BLOCKS, 0, 0]);
});

test("shared KV index: another index in its place starts from nothing, and without one nobody scores", () => {
  const [first, second] = [1, 2].map((seed) => new FlatKvIndex({ random: new SeededRandom(seed) }));
  const chain = aChain(1, BLOCKS);
  const shared = new SharedKvIndex();
  const rank = shared.rankOf("w", 0);
  first!.apply(first!.rankOf("w", 0), aStored({ chain }));
  shared.attach(first!.share());
  shared.setWriterRanks("w", [0]);
  assert.deepEqual(scoresOf(shared, chain, rank), [BLOCKS, 0, 0]);
  shared.attach(undefined);
  assert.deepEqual(scoresOf(shared, chain, rank), [0, 0, 0]);
  second!.apply(second!.rankOf("stranger", 0), aStored({ chain }));
  shared.attach(second!.share());
  assert.deepEqual(scoresOf(shared, chain, rank), [0, 0, 0]);
});

/** What reaches a thread: its own router's workers, and the writer's messages, each in its order but interleaved at will. */
const step = fc.record({
  kind: fc.constantFrom("writer-join", "writer-leave", "store", "router-join", "router-leave", "deliver", "deliver"),
  worker: fc.nat(3),
  chain: fc.nat(2),
  count: fc.integer({ min: 1, max: BLOCKS }),
});

test("shared KV index: however both sides' joins interleave, it agrees with the writer once the messages have come", () => {
  const chains = [aChain(1, BLOCKS), aChain(2, BLOCKS), aChain(3, BLOCKS)];
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
      const writer = new FlatKvIndex({ random: new SeededRandom(1) });
      const shared = new SharedKvIndex();
      shared.attach(writer.share());
      const fed = new Map<string, number[]>();
      const routed = new Set<string>();
      const messages: { instanceId: string; ranks: number[] }[] = [];
      const deliver = (): void => {
        const message = messages.shift();
        if (message !== undefined) shared.setWriterRanks(message.instanceId, message.ranks);
      };
      for (const { kind, worker, chain, count } of steps) {
        const instanceId = `w${worker}`;
        const ranks = fed.get(instanceId);
        if (kind === "writer-join" && ranks === undefined) {
          const numbers = [writer.rankOf(instanceId, 0), writer.rankOf(instanceId, 1)];
          fed.set(instanceId, numbers);
          messages.push({ instanceId, ranks: numbers });
        } else if (kind === "writer-leave" && ranks !== undefined) {
          messages.push({ instanceId, ranks: [] });
          writer.removeWorker(instanceId);
          fed.delete(instanceId);
        } else if (kind === "store" && ranks !== undefined) {
          writer.apply(ranks[count % 2]!, aStored({ chain: chains[chain]!, to: count }));
        } else if (kind === "router-join") {
          routed.add(instanceId);
          for (const dpRank of [0, 1]) shared.rankOf(instanceId, dpRank);
        } else if (kind === "router-leave") {
          routed.delete(instanceId);
          shared.removeWorker(instanceId);
        } else if (kind === "deliver") deliver();
      }
      while (messages.length > 0) deliver();
      const scores = new OverlapScores();
      for (const chain of chains) {
        shared.findMatches(chain, BLOCKS, scores);
        for (const instanceId of routed) {
          for (const dpRank of [0, 1]) {
            const writerRank = fed.get(instanceId)?.[dpRank];
            const expected = writerRank === undefined ? 0 : scoresOf(writer, chain, writerRank)[0];
            assert.equal(scores.device[shared.rankOf(instanceId, dpRank)], expected, `${instanceId} ${dpRank}`);
          }
        }
      }
    }),
    { numRuns: 300 },
  );
});
