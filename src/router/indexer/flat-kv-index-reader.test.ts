import assert from "node:assert/strict";
import { once } from "node:events";
import { test } from "node:test";
import { Worker } from "node:worker_threads";
import { SeededRandom } from "../../std/index.ts";
import { OverlapScores } from "./base.ts";
import { FlatKvIndex } from "./flat-kv-index.ts";
import { FlatKvIndexReader } from "./flat-kv-index-reader.ts";
import { CONTROL } from "./flat-kv-memory.ts";
import { aChain, aRemoved, aStored, scoresOf } from "./kv-index.battery.ts";
import type { ReaderQuery, ReaderReport, ReaderTask } from "./kv-index-reader.fixture.ts";

test("KV index reader: sees what the writer does, through growth of every array", () => {
  const index = new FlatKvIndex({ random: new SeededRandom(1) });
  const reader = new FlatKvIndexReader(index.share());
  const scores = new OverlapScores();
  const expected = new OverlapScores();
  for (let i = 0; i < 2_000; i++) {
    const rank = index.rankOf(`w${i % 300}`, 0);
    const chain = aChain(i, 30);
    index.apply(rank, aStored({ chain }));
    // A set of its own for each of them.
    for (let j = 0; j < 4; j++) index.apply((i * (j + 3)) % index.rankCount, aStored({ chain, to: 2 + j }));
    reader.findMatches(chain, 30, scores);
    index.findMatches(chain, 30, expected);
    assert.deepEqual(scores, expected);
  }
  assert.deepEqual(reader.stats(), index.stats());
  assert.equal(reader.rankCount, index.rankCount);
  assert.deepEqual([reader.retries, reader.starvedLookups], [0, 0]);
});

test("KV index reader: inside a write that does not end it gives up, says so and claims nothing", () => {
  const index = new FlatKvIndex({ random: new SeededRandom(1) });
  const rank = index.rankOf("w", 0);
  const chain = aChain(1, 5);
  index.apply(rank, aStored({ chain }));
  const share = index.share();
  const reader = new FlatKvIndexReader(share);
  assert.deepEqual(scoresOf(reader, chain, rank), [5, 0, 0]);
  const control = new Int32Array(share.control);
  Atomics.add(control, CONTROL.sequence, 1);
  assert.deepEqual(scoresOf(reader, chain, rank), [0, 0, 0]);
  assert.equal(reader.starvedLookups, 1);
  Atomics.add(control, CONTROL.sequence, 1);
  assert.deepEqual(scoresOf(reader, chain, rank), [5, 0, 0]);
  assert.equal(reader.starvedLookups, 1);
});

test("KV index reader: while this thread does not see all of the memory yet, it claims nothing", () => {
  const index = new FlatKvIndex({ random: new SeededRandom(1) });
  const rank = index.rankOf("w", 0);
  const chain = aChain(1, 5);
  index.apply(rank, aStored({ chain }));
  const share = index.share();
  const reader = new FlatKvIndexReader(share);
  const control = new Int32Array(share.control);
  Atomics.add(control, CONTROL.pages, 1);
  assert.deepEqual(scoresOf(reader, chain, rank), [0, 0, 0]);
  assert.equal(reader.starvedLookups, 1);
  Atomics.sub(control, CONTROL.pages, 1);
  assert.deepEqual(scoresOf(reader, chain, rank), [5, 0, 0]);
});

test("KV index reader: memory that makes no sense is read to an end without a throw", () => {
  const random = new SeededRandom(3);
  const index = new FlatKvIndex({ random });
  const ranks = Array.from({ length: 100 }, (_, i) => index.rankOf(`w${i}`, 0));
  const chain = aChain(1, 200);
  for (const rank of ranks) index.apply(rank, aStored({ chain, to: 1 + rank }));
  const share = index.share();
  const reader = new FlatKvIndexReader(share);
  const scores = new OverlapScores();
  for (const memory of [share.sets, share.records, share.slots, share.directory]) {
    const words = new Uint32Array(memory.buffer);
    const before = words.slice();
    for (let i = 0; i < 2_000; i++) {
      // Small numbers make links that point at something, in circles too; large ones point nowhere.
      for (let j = 0; j < 20; j++) {
        const at = Math.floor(random.nextFloat() * Math.min(words.length, 4_096));
        words[at] = random.nextU32() >>> (i % 32);
      }
      reader.findMatches(chain, 200, scores);
    }
    words.set(before);
  }
  assert.deepEqual(scoresOf(reader, chain, 42), [43, 0, 0]);
});

/** How long the writer of the stress test goes on. */
const STRESS_MS = 1_500;

test("KV index reader: two reader threads never see a mixture of two states while the writer is at full speed", async () => {
  const random = new SeededRandom(5);
  const index = new FlatKvIndex({ maxBytes: 8 * 2 ** 20, random });
  const [steady, jumper, guest, churn] = ["steady", "jumper", "guest", "churn"].map((id) => index.rankOf(id, 0));
  const shared = aChain(1, 100);
  const pair = aChain(2, 2);
  const visited = aChain(3, 60);
  index.apply(steady!, aStored({ chain: shared }));
  index.apply(steady!, aStored({ chain: pair }));
  const queries: ReaderQuery[] = [
    // Never changes, whatever happens around it.
    { name: "steady", chain: shared, allowed: [{ rank: steady!, scores: [100] }] },
    // The jumper holds block 0 or block 1, never both: 2 would be a mixture of two states.
    {
      name: "jumper",
      chain: pair,
      allowed: [
        { rank: steady!, scores: [2] },
        { rank: jumper!, scores: [0, 1] },
      ],
    },
    // Its records are freed and used for others all the time. A section is 64 blocks: all or nothing.
    { name: "guest", chain: visited, allowed: [{ rank: guest!, scores: [0, 60] }] },
    { name: "unknown", chain: aChain(4, 50), allowed: [] },
  ];
  const signals = new Int32Array(new SharedArrayBuffer(8));
  const task: ReaderTask = { share: index.share(), signals, queries };
  const threads = [1, 2].map(
    () => new Worker(new URL("./kv-index-reader.fixture.ts", import.meta.url), { workerData: task }),
  );
  const reports = threads.map((thread) => once(thread, "message") as Promise<[ReaderReport]>);
  const exits = threads.map((thread) => once(thread, "exit"));
  const deadlineMs = performance.now() + 10_000;
  for (let running = 0; running < 2; running = Atomics.load(signals, 1)) {
    assert.ok(performance.now() < deadlineMs, "the readers start");
    Atomics.wait(signals, 1, running, 100);
  }
  const bytesBefore = index.stats().bytes;
  let rounds = 0;
  for (const endMs = performance.now() + STRESS_MS; performance.now() < endMs; rounds++) {
    index.apply(jumper!, aStored({ chain: pair, to: 1 }));
    index.apply(jumper!, aRemoved({ chain: pair, to: 1 }));
    index.apply(jumper!, aStored({ chain: pair, from: 1 }));
    index.apply(jumper!, aRemoved({ chain: pair, from: 1 }));
    index.apply(guest!, aStored({ chain: visited }));
    index.apply(guest!, aRemoved({ chain: visited }));
    index.apply(churn!, aStored({ chain: aChain(1_000 + rounds, 40) }));
    if (rounds % 3 === 0)
      index.apply(churn!, aRemoved({ chain: aChain(1_000 + Math.floor(random.nextFloat() * rounds), 40) }));
    if (rounds % 2_000 === 1_999) index.clearRank(churn!);
  }
  Atomics.store(signals, 0, 1);
  for (const [report] of await Promise.all(reports)) {
    assert.deepEqual(report.wrong, []);
    assert.ok(report.lookups > 100, `${report.lookups} lookups`);
    assert.ok(report.starved <= report.lookups / 100, `${report.starved} of ${report.lookups} lookups starved`);
    assert.ok(report.bytesSeen > bytesBefore, "the index grew meanwhile");
  }
  await Promise.all(exits);
  assert.ok(rounds > 100, `${rounds} rounds`);
});
