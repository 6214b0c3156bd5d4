import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import type { KvEvent } from "../../protocol/index.ts";
import { blockHashSeed } from "../../tokens/index.ts";
import { replayKvEvents } from "../engine.recorder.ts";
import { BlockChain } from "./block-chain.ts";
import { BlockHeap } from "./block-heap.ts";
import { KvEventLog } from "./kv-event-log.ts";
import { BlockTable, KvPool } from "./kv-pool.ts";
import { NaiveKvPool, type NaiveTable } from "./naive-kv-pool.ts";

const BLOCK_SIZE = 2;
const aChain = (tokens: readonly number[]): BlockChain =>
  new BlockChain(Uint32Array.from(tokens), BLOCK_SIZE, blockHashSeed());

test("KV pool: agrees with the naive pool over any sequence of admissions, growth, releases, imports and clearing", () => {
  const tokens = fc.array(fc.nat(1), { minLength: 1, maxLength: 11 });
  const operation = fc.oneof(
    fc.record({ type: fc.constant("admit" as const), tokens }),
    fc.record({ type: fc.constant("grow" as const), tokens: fc.array(fc.nat(1), { maxLength: 4 }), at: fc.nat(9) }),
    fc.record({ type: fc.constant("release" as const), tokens: fc.constant([]), at: fc.nat(9) }),
    fc.record({ type: fc.constant("import" as const), tokens }),
    fc.record({ type: fc.constant("clear" as const), tokens: fc.constant([]) }),
  );
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 14 }), fc.array(operation, { maxLength: 40 }), (totalBlocks, operations) => {
      const log = new KvEventLog(0);
      const pool = new KvPool({ totalBlocks, blockSizeTokens: BLOCK_SIZE, prefixCaching: true, log });
      const naive = new NaiveKvPool(totalBlocks, BLOCK_SIZE);
      const live: { tokens: number[]; chain: BlockChain; table: BlockTable; twin: NaiveTable }[] = [];
      const events: KvEvent[] = [];
      for (const step of operations) {
        if (step.type === "admit") {
          const chain = aChain(step.tokens);
          const cached = pool.countCached(chain);
          assert.equal(cached, naive.countCached(step.tokens));
          const entry = { tokens: step.tokens.slice(), chain, table: new BlockTable(), twin: naive.open() };
          pool.useCached(entry.table, chain, cached);
          naive.useCached(entry.twin, step.tokens, cached);
          live.push(entry);
          assert.equal(pool.tryGrow(entry.table, chain, step.tokens.length), naive.tryGrow(entry.twin, step.tokens));
        } else if (step.type === "grow" && live.length > 0) {
          const entry = live[step.at % live.length]!;
          for (const token of step.tokens) {
            entry.tokens.push(token);
            entry.chain.append(token);
          }
          const isGrown = pool.tryGrow(entry.table, entry.chain, entry.tokens.length);
          assert.equal(isGrown, naive.tryGrow(entry.twin, entry.tokens));
        } else if (step.type === "release" && live.length > 0) {
          const [entry] = live.splice(step.at % live.length, 1);
          pool.release(entry!.table);
          naive.release(entry!.twin);
        } else if (step.type === "import") {
          const before = naive.countCached(step.tokens);
          const taken = pool.importChain(aChain(step.tokens));
          assert.ok(taken >= before, "an import never loses what was there");
          const twin = naive.open();
          naive.useCached(twin, step.tokens, before);
          assert.ok(naive.tryGrow(twin, step.tokens.slice(0, taken * BLOCK_SIZE)));
          naive.release(twin);
        } else if (step.type === "clear") {
          assert.equal(pool.clear(), naive.clear());
        }
        pool.check(live.map(({ table }) => table));
        events.push(...log.take());
        const cached = replayKvEvents(events);
        assert.deepEqual(
          [pool.idleCount, pool.activeCount, pool.availableCount, cached.size],
          [naive.idleCount, naive.activeCount, naive.availableCount, naive.cachedKeys.length],
        );
        for (const key of naive.cachedKeys) {
          const chain = aChain(key.split(" ").map(Number));
          assert.equal(pool.countCached(chain), chain.blockCount, "what the naive pool has is there");
          const at = 2 * chain.blockCount - 2;
          assert.ok(cached.has(`${chain.sequenceHashes[at]},${chain.sequenceHashes[at + 1]}`), "and events told of it");
        }
      }
    }),
    { numRuns: 300 },
  );
});

test("KV pool: without the prefix cache nothing is shared, kept or told", () => {
  const log = new KvEventLog(0);
  const pool = new KvPool({ totalBlocks: 4, blockSizeTokens: BLOCK_SIZE, prefixCaching: false, log });
  const chain = aChain([1, 2, 3, 4]);
  const tables = [new BlockTable(), new BlockTable()];
  for (const table of tables) assert.ok(pool.tryGrow(table, chain, 4));
  assert.equal(pool.countCached(chain), 0);
  assert.equal(pool.tryGrow(new BlockTable(), chain, 1), false);
  for (const table of tables) pool.release(table);
  assert.equal(pool.availableCount, 4);
  assert.equal(pool.importChain(chain), 0);
  assert.ok(log.isEmpty);
});

test("KV pool: evicts the least recently used chain from its end", () => {
  const log = new KvEventLog(0);
  const pool = new KvPool({ totalBlocks: 5, blockSizeTokens: BLOCK_SIZE, prefixCaching: true, log });
  const old = aChain([1, 1, 2, 2, 3, 3]);
  const recent = aChain([9, 9, 8, 8]);
  for (const chain of [old, recent]) pool.importChain(chain);
  const table = new BlockTable();
  assert.ok(pool.tryGrow(table, aChain([5, 5, 6, 6]), 4));
  assert.deepEqual([pool.countCached(old), pool.countCached(recent)], [1, 2]);
});

test("block chain: grows to the same hashes as the whole sequence has", () => {
  const tokens = fc.array(fc.nat(9), { maxLength: 40 });
  fc.assert(
    fc.property(tokens, tokens, (prompt, answer) => {
      const grown = aChain(prompt);
      for (const token of answer) grown.append(token);
      const whole = aChain([...prompt, ...answer]);
      assert.equal(grown.blockCount, whole.blockCount);
      const end = 2 * whole.blockCount;
      assert.deepEqual(grown.sequenceHashes.subarray(0, end), whole.sequenceHashes.subarray(0, end));
      assert.deepEqual(grown.localHashes.subarray(0, end), whole.localHashes.subarray(0, end));
    }),
  );
});

test("block heap: gives the smallest key first, whatever was removed in between", () => {
  fc.assert(
    fc.property(
      fc.array(fc.tuple(fc.constantFrom("add", "remove", "take"), fc.nat(15), fc.nat(5)), { maxLength: 80 }),
      (steps) => {
        // prettier-ignore
        const heap = new BlockHeap(16);
        const model = new Map<number, number>();
        for (const [what, block, key] of steps) {
          if (what === "take") {
            const first = heap.takeFirst();
            assert.equal(first === -1 ? Infinity : model.get(first), Math.min(...model.values(), Infinity));
            model.delete(first);
          } else if (what === "add" && !model.has(block)) {
            heap.add(block, key);
            model.set(block, key);
          } else if (what === "remove" && model.delete(block)) {
            heap.remove(block);
          }
          assert.equal(heap.count, model.size);
          for (let i = 0; i < 16; i++) assert.equal(heap.has(i), model.has(i));
        }
      },
    ),
  );
});

test("KV event log: long chains are split under the wire's bound and still form one chain", () => {
  const log = new KvEventLog(3);
  const hashes = Uint32Array.from({ length: 2 * 150_000 }, (_, i) => i);
  log.stored(hashes, hashes, 0, 150_000);
  log.removed([...hashes]);
  const events = log.take();
  assert.deepEqual(events.map((event) => event.type !== "cleared" && event.sequenceHashes.length / 2), [65_536, 65_536, 18_928, 65_536, 65_536, 18_928]); // prettier-ignore
  assert.equal(replayKvEvents(events).size, 0);
  assert.ok(log.isEmpty && events.every(({ dpRank }) => dpRank === 3));
});
