import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { BlockPool, BlockState, NO_BLOCK } from "./block-pool.ts";
import { EVICTION_NAMES, type EvictionName } from "./eviction/index.ts";
import { NaiveBlockPool, pairOf } from "./naive-block-pool.ts";

/** Content hashes of a small tree: node `n` has the parent `(n - 1) >> 1`, so chains share beginnings. */
const NODES = 24;
const ROOT_PARENT = "0:0";
const hashOf = (node: number): string => `${node + 1}:${(node + 1) * 7919}`;
const parentOf = (node: number): string => (node === 0 ? ROOT_PARENT : hashOf((node - 1) >> 1));
function chainOf(node: number): string[] {
  const chain: string[] = [];
  for (let at = node; ; at = (at - 1) >> 1) {
    chain.unshift(hashOf(at));
    if (at === 0) return chain;
  }
}
const pack = (hashes: readonly string[]): Uint32Array => Uint32Array.from(hashes.flatMap(pairOf));

/** The pool beside its twin; handles of both are the same ids, or the comparison fails. */
class Twins {
  readonly pool: BlockPool;
  readonly naive: NaiveBlockPool;
  readonly partial: number[] = [];
  readonly complete: number[] = [];
  readonly strong: number[] = [];
  readonly weak: { readonly handle: number; readonly block: number; readonly generation: number }[] = [];
  readonly evicted: string[] = [];

  constructor(blockCount: number, eviction: EvictionName) {
    this.pool = new BlockPool({ blockCount, eviction });
    this.naive = new NaiveBlockPool(blockCount, eviction);
  }

  allocate(count: number): void {
    const into = new Int32Array(count);
    const isGiven = this.pool.allocate(count, into);
    const expected = this.naive.allocate(count);
    assert.deepEqual(isGiven ? [...into] : undefined, expected);
    if (isGiven) this.partial.push(...into);
  }

  stage(pick: number, node: number): void {
    const [block] = this.partial.splice(pick % Math.max(1, this.partial.length), 1);
    if (block === undefined) return;
    this.pool.stage(block, ...pairOf(hashOf(node)), ...pairOf(parentOf(node)));
    this.naive.stage(block, hashOf(node), parentOf(node));
    this.complete.push(block);
  }

  register(pick: number): void {
    const [block] = this.complete.splice(pick % Math.max(1, this.complete.length), 1);
    if (block === undefined) return;
    const held = this.pool.register(block);
    assert.equal(held, this.naive.register(block));
    this.strong.push(held);
  }

  free(pick: number): void {
    const list = this.partial.length > 0 ? this.partial : this.complete;
    const [block] = list.splice(pick % Math.max(1, list.length), 1);
    if (block === undefined) return;
    this.pool.free(block);
    this.naive.free(block);
  }

  match(node: number): void {
    const chain = chainOf(node);
    const into = new Int32Array(chain.length);
    const peeked = this.pool.prefixLength(pack(chain), chain.length);
    const count = this.pool.matchPrefix(pack(chain), chain.length, into);
    assert.equal(peeked, count);
    const found = [...into.subarray(0, count)];
    assert.deepEqual(found, this.naive.matchPrefix(chain));
    this.strong.push(...found);
  }

  scan(node: number): void {
    const chain = chainOf(node);
    const into = new Int32Array(chain.length);
    const count = this.pool.scanMatches(pack(chain), chain.length, into);
    assert.deepEqual([...into], this.naive.scanMatches(chain));
    const found = [...into].filter((block) => block !== NO_BLOCK);
    assert.equal(found.length, count);
    this.strong.push(...found);
  }

  release(pick: number): void {
    const [block] = this.strong.splice(pick % Math.max(1, this.strong.length), 1);
    if (block === undefined) return;
    this.pool.release(block);
    this.naive.release(block);
  }

  weaken(pick: number): void {
    const block = this.strong[pick % Math.max(1, this.strong.length)];
    if (block === undefined) return;
    const { generation } = this.naive.blocks[block]!;
    this.weak.push({ handle: this.pool.weakHandle(block), block, generation });
  }

  upgrade(pick: number): void {
    const weak = this.weak[pick % Math.max(1, this.weak.length)];
    if (weak === undefined) return;
    const upgraded = this.pool.upgrade(weak.handle);
    const isAlive = this.naive.blocks[weak.block]!.generation === weak.generation;
    assert.equal(upgraded, isAlive ? weak.block : NO_BLOCK, "a weak handle finds its block or nothing");
    if (!isAlive) return;
    this.naive.retain(weak.block);
    this.strong.push(weak.block);
  }

  drop(node: number): void {
    const block = this.pool.find(...pairOf(hashOf(node)));
    assert.equal(block, this.naive.find(hashOf(node)));
    if (block !== NO_BLOCK) assert.equal(this.pool.drop(block), this.naive.drop(block));
  }

  clear(): void {
    assert.equal(this.pool.clear(), this.naive.clear());
  }

  check(): void {
    const { pool, naive } = this;
    const gone = pool.takeEvicted();
    for (let i = 0; i < gone.length; i += 2) this.evicted.push(`${gone[i]}:${gone[i + 1]}`);
    assert.deepEqual(this.evicted, naive.evicted, "the same blocks went, in the same order");
    assert.equal(pool.resetCount, naive.count("reset"));
    assert.equal(pool.mutableCount, naive.count("partial") + naive.count("complete"));
    assert.equal(pool.registeredCount, naive.count("registered"));
    assert.equal(pool.inactiveCount, naive.inactive.length);
    assert.equal(pool.resetCount + pool.mutableCount + pool.registeredCount, pool.blockCount, "no block is lost");
    const held = new Map<number, number>();
    for (const block of this.strong) held.set(block, (held.get(block) ?? 0) + 1);
    const seen = new Set<string>();
    naive.blocks.forEach(({ state, references }, block) => {
      assert.equal(pool.stateOf(block), BlockState[state]);
      assert.equal(references, held.get(block) ?? 0, "each handle counts once");
      if (state !== "registered") return;
      assert.equal(pool.referencesOf(block), references);
      const hash = pool.hashOf(block).join(":");
      assert(!seen.has(hash), "no content is registered twice");
      seen.add(hash);
    });
  }
}

type Step = (twins: Twins) => void;
const pick = fc.nat(1_000);
const node = fc.nat(NODES - 1);
const step: fc.Arbitrary<Step> = fc.oneof(
  {
    weight: 3,
    arbitrary: fc.nat(5).map(
      (count): Step =>
        (twins) =>
          twins.allocate(count),
    ),
  },
  {
    weight: 4,
    arbitrary: fc.tuple(pick, node).map(
      ([at, of]): Step =>
        (twins) =>
          twins.stage(at, of),
    ),
  },
  {
    weight: 4,
    arbitrary: pick.map(
      (at): Step =>
        (twins) =>
          twins.register(at),
    ),
  },
  {
    weight: 1,
    arbitrary: pick.map(
      (at): Step =>
        (twins) =>
          twins.free(at),
    ),
  },
  {
    weight: 3,
    arbitrary: node.map(
      (of): Step =>
        (twins) =>
          twins.match(of),
    ),
  },
  {
    weight: 2,
    arbitrary: node.map(
      (of): Step =>
        (twins) =>
          twins.scan(of),
    ),
  },
  {
    weight: 6,
    arbitrary: pick.map(
      (at): Step =>
        (twins) =>
          twins.release(at),
    ),
  },
  {
    weight: 1,
    arbitrary: pick.map(
      (at): Step =>
        (twins) =>
          twins.weaken(at),
    ),
  },
  {
    weight: 2,
    arbitrary: pick.map(
      (at): Step =>
        (twins) =>
          twins.upgrade(at),
    ),
  },
  {
    weight: 1,
    arbitrary: node.map(
      (of): Step =>
        (twins) =>
          twins.drop(of),
    ),
  },
  {
    weight: 1,
    arbitrary: fc.nat(4).map(
      (roll): Step =>
        (twins) =>
          roll === 0 ? twins.clear() : undefined,
    ),
  },
);

for (const eviction of EVICTION_NAMES) {
  test(`${eviction}: long random histories agree with the naive pool; nothing lost, nothing twice`, () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 12 }),
        fc.array(step, { minLength: 40, maxLength: 300, size: "max" }),
        (size, steps) => {
          const twins = new Twins(size, eviction);
          for (const run of steps) {
            run(twins);
            twins.check();
          }
          // At rest: every handle back, everything evictable.
          while (twins.strong.length > 0) twins.release(0);
          while (twins.partial.length + twins.complete.length > 0) twins.free(0);
          twins.clear();
          twins.check();
          assert.equal(twins.pool.resetCount, size);
        },
      ),
      { numRuns: 150 },
    );
  });
}

/** Registers a chain of blocks and gives the handles back from its end. */
function store(pool: BlockPool, nodes: readonly number[]): void {
  const blocks = new Int32Array(nodes.length);
  assert(pool.allocate(nodes.length, blocks));
  nodes.forEach((of, i) => {
    pool.stage(blocks[i]!, ...pairOf(hashOf(of)), ...pairOf(parentOf(of)));
    blocks[i] = pool.register(blocks[i]!);
  });
  pool.releaseAll(blocks, nodes.length);
}

test("all or nothing: what cannot be given whole changes nothing", () => {
  const pool = new BlockPool({ blockCount: 4 });
  const into = new Int32Array(8);
  assert(pool.allocate(3, into));
  assert(!pool.allocate(2, into, 3));
  assert.equal(pool.availableCount, 1);
  assert.equal(pool.counters.allocations, 3);
});

test("lineage keeps the beginning of a chain, whatever the order of release", () => {
  const pool = new BlockPool({ blockCount: 4, eviction: "lineage" });
  const blocks = new Int32Array(4);
  assert(pool.allocate(4, blocks));
  [0, 1, 3, 7].forEach((of, i) => {
    pool.stage(blocks[i]!, ...pairOf(hashOf(of)), ...pairOf(parentOf(of)));
    blocks[i] = pool.register(blocks[i]!);
  });
  // From the beginning: plain LRU would now lose the root first.
  for (const block of blocks) pool.release(block);
  assert(pool.allocate(2, new Int32Array(2)));
  assert.equal(pool.prefixLength(pack(chainOf(7)), 4), 2);
});

test("frequency keeps what is asked for often over what came last", () => {
  const pool = new BlockPool({ blockCount: 4, eviction: "frequency" });
  store(pool, [0]);
  for (let i = 0; i < 5; i++) {
    const into = new Int32Array(1);
    assert.equal(pool.matchPrefix(pack([hashOf(0)]), 1, into), 1);
    pool.release(into[0]!);
  }
  for (const once of [9, 11, 13, 15, 17]) store(pool, [once]);
  assert.notEqual(pool.find(...pairOf(hashOf(0))), NO_BLOCK);
  assert.equal(pool.find(...pairOf(hashOf(9))), NO_BLOCK);
});

test("a weak handle does not come back to life with the block's next content", () => {
  const pool = new BlockPool({ blockCount: 1 });
  store(pool, [0]);
  const weak = pool.weakHandle(0);
  store(pool, [5]);
  assert.equal(pool.upgrade(weak), NO_BLOCK);
  assert.equal(pool.upgrade(pool.weakHandle(0)), 0);
});

test("misuse is caught: double release, staging twice, dropping what is held", () => {
  const pool = new BlockPool({ blockCount: 2 });
  const into = new Int32Array(1);
  assert(pool.allocate(1, into));
  pool.stage(into[0]!, 1, 1, 0, 0);
  assert.throws(() => pool.stage(into[0]!, 1, 1, 0, 0), /partial/);
  const block = pool.register(into[0]!);
  assert(!pool.drop(block));
  pool.release(block);
  assert.throws(() => pool.release(block), /released/);
  assert.throws(() => pool.free(block), /mutable/);
});
