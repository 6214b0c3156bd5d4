import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import type { KvEvent } from "../../protocol/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import { BlockCache, NO_SEQUENCE } from "./block-cache.ts";
import { FakeModel } from "./fake-model.ts";
import { NaiveBlockCache } from "./naive-block-cache.ts";

const SIZE = 2;
const MAX_DEPTH = 8;
const MAX_SEQUENCES = 4;

/** A sequence that runs on the cache: what the scheduler does, in three steps. */
interface Running {
  readonly cellsId: number;
  readonly tokens: number[];
  readonly names: string[];
  readonly hashes: { sequenceHashes: Uint32Array; localHashes: Uint32Array };
  readonly blocks: Int32Array;
  blockCount: number;
  privateCount: number;
  computedCount: number;
}

/** The cache on the fake model's cells, beside its naive twin; every operation compares them. */
class Twins {
  readonly model: FakeModel;
  readonly cache: BlockCache;
  readonly naive: NaiveBlockCache | undefined;
  readonly running: Running[] = [];
  readonly events: KvEvent[] = [];
  readonly #totalBlocks: number;
  readonly #freeIds: number[];
  readonly #nameOfHash = new Map<string, string>();

  constructor(
    totalBlocks: number,
    holderCount: number,
    { compare = true, spareBlocks = 0 }: { compare?: boolean; spareBlocks?: number } = {},
  ) {
    this.#totalBlocks = totalBlocks;
    const firstHolder = MAX_SEQUENCES;
    const scratch = firstHolder + holderCount;
    const cells = (totalBlocks + spareBlocks) * SIZE;
    const model = new FakeModel({ cells, maxBatchedTokens: 1, sequenceIds: scratch + 1 });
    this.model = model;
    this.cache = new BlockCache(this.model, {
      blockSizeTokens: SIZE,
      totalBlocks,
      firstHolder,
      holderCount,
      maxDepth: MAX_DEPTH,
      spareBlocks,
      mover: {
        blockBytes: 8 * SIZE,
        read: (sequence, start, end, into) => {
          model.copyCells(sequence, scratch, start, end);
          const length = model.exportState(scratch, into);
          model.removeCells(scratch, start, end);
          return length;
        },
        write: (from, sequence, start, end) => {
          assert(model.importState(scratch, from));
          model.copyCells(scratch, sequence, start, end);
          model.removeCells(scratch, start, end);
        },
      },
    });
    this.cache.users = this.running;
    this.naive = compare ? new NaiveBlockCache(totalBlocks) : undefined;
    this.#freeIds = Array.from({ length: MAX_SEQUENCES }, (_, id) => id);
  }

  /** Starts a sequence on what is cached of it. */
  start(tokens: number[]): Running | undefined {
    const id = this.#freeIds.pop();
    if (id === undefined) return undefined;
    const hashes = hashBlocks(Uint32Array.from(tokens), SIZE, blockHashSeed());
    const names = Array.from({ length: hashes.blockCount }, (_, i) => tokens.slice(0, (i + 1) * SIZE).join(","));
    names.forEach((name, i) => this.#nameOfHash.set(hashKey(hashes.sequenceHashes, i), name));
    const blocks = new Int32Array(MAX_DEPTH);
    const count = this.cache.findPrefix(hashes.sequenceHashes, names.length, blocks);
    if (this.naive !== undefined) assert.equal(count, this.naive.findPrefix(names));
    // What is evicted at the start instead of later is not the naive one's order.
    this.cache.acquire(id, blocks, count, this.naive === undefined ? names.length - count : 0);
    this.naive?.acquire(names.slice(0, count));
    const sequence = {
      cellsId: id,
      tokens,
      names,
      hashes,
      blocks,
      blockCount: count,
      privateCount: 0,
      computedCount: count * SIZE,
    };
    this.running.push(sequence);
    return sequence;
  }

  /** Computes up to `count` tokens, registering blocks as they fill; false when there was no room. */
  compute(sequence: Running, count: number): boolean {
    const end = Math.min(sequence.computedCount + count, sequence.tokens.length);
    const needed = Math.ceil(end / SIZE) - sequence.blockCount - sequence.privateCount;
    const reserved = this.cache.reserve(needed);
    if (this.naive !== undefined) assert.equal(reserved, this.naive.reserve(needed));
    if (!reserved) return false;
    sequence.privateCount += needed;
    for (; sequence.computedCount < end; sequence.computedCount++) {
      this.model.batch.tokenIds[0] = sequence.tokens[sequence.computedCount]!;
      this.model.batch.positions[0] = sequence.computedCount;
      this.model.batch.sequenceIds[0] = sequence.cellsId;
      this.model.decode(1);
    }
    const complete = Math.floor(end / SIZE);
    const { blockCount } = sequence;
    this.cache.register(sequence.cellsId, sequence.blocks, blockCount, complete, sequence.hashes);
    this.naive?.register(sequence.names.slice(blockCount, complete));
    sequence.privateCount -= complete - blockCount;
    sequence.blockCount = complete;
    return true;
  }

  end(sequence: Running): void {
    this.running.splice(this.running.indexOf(sequence), 1);
    this.#freeIds.push(sequence.cellsId);
    this.cache.release(sequence.cellsId, sequence.blocks, sequence.blockCount, sequence.privateCount);
    this.naive?.release(sequence.names.slice(0, sequence.blockCount), sequence.privateCount);
    assert.deepEqual(this.model.positionsOf(sequence.cellsId), { start: 0, end: 0 });
  }

  clear(): void {
    const cleared = this.cache.clear();
    if (this.naive !== undefined) assert.equal(cleared, this.naive.clear());
  }

  /** Everything that must hold between two operations. */
  check(): void {
    const { cache, naive } = this;
    this.events.push(...cache.takeEvents());
    assert.equal(cache.freeBlocks + cache.unusedBlocks + cache.activeBlocks, this.#totalBlocks);
    assert(cache.freeBlocks >= 0 && cache.unusedBlocks >= 0, "no count below zero");
    assert(this.model.usedCells <= (this.#totalBlocks - cache.freeBlocks) * SIZE, "no cell is used uncounted");
    for (const { cellsId, tokens, computedCount } of this.running) {
      assert.deepEqual(this.model.tokensOf(cellsId), tokens.slice(0, computedCount), "a sequence sees its own tokens");
      assert(this.model.isOrdered(cellsId), "a sequence's cells lie in order");
    }
    assert.equal(cache.unordered, 0);
    const { stored, removed } = this.#replay();
    assert.equal(cache.registeredBlocks, stored.size, "the events tell what is there");
    if (naive === undefined) return;
    assert.equal(cache.freeBlocks, naive.freeBlocks, "free blocks");
    assert.equal(cache.unusedBlocks, naive.unusedBlocks, "unused blocks");
    assert.deepEqual([...stored].toSorted(), naive.names, "registered blocks");
    assert.deepEqual(removed, naive.evictions, "evicted in the same order");
  }

  #replay(): { stored: Set<string>; removed: string[] } {
    const stored = new Set<string>();
    const removed: string[] = [];
    for (const event of this.events) {
      assert(event.type !== "cleared");
      for (let i = 0; i < event.sequenceHashes.length / 2; i++) {
        const name: string = this.#nameOfHash.get(hashKey(event.sequenceHashes, i))!;
        if (event.type === "stored") {
          assert(!stored.has(name), "a block is stored once");
          stored.add(name);
        } else {
          assert(stored.delete(name), "a removed block was stored");
          removed.push(name);
        }
      }
    }
    return { stored, removed };
  }
}

function hashKey(hashes: Uint32Array, block: number): string {
  return `${hashes[2 * block]}:${hashes[2 * block + 1]}`;
}

const aSequence = fc.array(fc.integer({ min: 0, max: 2 }), { minLength: 1, maxLength: MAX_DEPTH * SIZE });
const anOperation = fc.oneof(
  { weight: 3, arbitrary: fc.record({ kind: fc.constant("start" as const), tokens: aSequence }) },
  {
    weight: 6,
    arbitrary: fc.record({
      kind: fc.constant("compute" as const),
      which: fc.nat({ max: MAX_SEQUENCES - 1 }),
      count: fc.integer({ min: 1, max: 6 }),
    }),
  },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant("end" as const), which: fc.nat({ max: MAX_SEQUENCES - 1 }) }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant("clear" as const) }) },
);

type Operation = typeof anOperation extends fc.Arbitrary<infer T> ? T : never;

function runOperations(twins: Twins, operations: readonly Operation[]): void {
  for (const operation of operations) {
    if (operation.kind === "start") twins.start(operation.tokens);
    else if (operation.kind === "clear") twins.clear();
    else {
      const sequence = twins.running[operation.which % Math.max(1, twins.running.length)];
      if (sequence === undefined) continue;
      // A sequence that finds no room ends, as if preempted.
      if (operation.kind === "end" || !twins.compute(sequence, operation.count)) twins.end(sequence);
    }
    twins.check();
  }
  while (twins.running.length > 0) twins.end(twins.running[0]!);
  twins.check();
  assert.equal(twins.model.usedCells, twins.cache.unusedBlocks * SIZE, "what is left is what is cached");
}

test("block cache: any use leaves the same counts, content, events and evictions as the naive one", () => {
  fc.assert(
    fc.property(
      fc.integer({ min: 1, max: 20 }),
      fc.integer({ min: 0, max: 4 }),
      fc.array(anOperation, { maxLength: 60, size: "max" }),
      (totalBlocks, spareBlocks, operations) => {
        // Every block has a holder of its own if need be.
        runOperations(new Twins(totalBlocks, totalBlocks, { spareBlocks }), operations);
      },
    ),
    { numRuns: 400 },
  );
});

test("block cache: with no more holders than sequences nothing is lost, only evicted sooner", () => {
  fc.assert(
    fc.property(fc.array(anOperation, { maxLength: 200, size: "max" }), (operations) => {
      // The naive cache knows no holders, so it cannot say what is evicted for want of one.
      runOperations(new Twins(40, MAX_SEQUENCES, { compare: false, spareBlocks: 3 }), operations);
    }),
    { numRuns: 300 },
  );
});

test("block cache: a block computed twice at the same time is kept once", () => {
  const twins = new Twins(8, 8);
  const first = twins.start([1, 1, 2, 2])!;
  const second = twins.start([1, 1, 2, 2])!;
  twins.compute(first, 4);
  twins.compute(second, 4);
  twins.check();
  assert.equal(twins.cache.activeBlocks, 2);
  assert.equal(twins.model.usedCells, 4);
  assert.equal(twins.events.length, 1);
});

test("block cache: a stored event names its parent and place, and what made room comes before it", () => {
  const twins = new Twins(2, 2);
  const first = twins.start([1, 1, 2, 2])!;
  twins.compute(first, 2);
  twins.compute(first, 2);
  twins.end(first);
  const second = twins.start([1, 1, 0, 0])!;
  twins.compute(second, 2);
  twins.check();
  const hash = (event: KvEvent | undefined): number[] => (event?.type === "stored" ? [...event.sequenceHashes] : []);
  const [root, child, removed, other] = twins.events;
  assert.deepEqual(
    twins.events.map((event) => event.type),
    ["stored", "stored", "removed", "stored"],
  );
  assert(root?.type === "stored" && root.parentHash === undefined && root.startBlock === 0);
  assert(child?.type === "stored" && child.startBlock === 1);
  assert.deepEqual(child.parentHash, hash(root));
  assert(removed?.type === "removed");
  assert.deepEqual([...removed.sequenceHashes], hash(child));
  assert(other?.type === "stored");
  assert.deepEqual(other.parentHash, hash(root));
});

test("block cache: pinning without a sequence keeps blocks from being evicted", () => {
  const twins = new Twins(2, 2);
  const sequence = twins.start([1, 1, 2, 2])!;
  twins.compute(sequence, 4);
  twins.end(sequence);
  const blocks = new Int32Array(2);
  assert.equal(twins.cache.findPrefix(sequence.hashes.sequenceHashes, 2, blocks), 2);
  twins.cache.acquire(NO_SEQUENCE, blocks, 2);
  assert.equal(twins.cache.reserve(1), false);
  assert.equal(twins.cache.clear(), 0);
  twins.cache.release(NO_SEQUENCE, blocks, 2, 0);
  assert.equal(twins.cache.reserve(1), true);
  assert.equal(twins.cache.findPrefix(sequence.hashes.sequenceHashes, 2, blocks), 1);
});
