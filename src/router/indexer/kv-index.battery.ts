import assert from "node:assert/strict";
import { test } from "node:test";
import type { KvEvent, KvStored, StorageTier } from "../../protocol/index.ts";
import { OverlapScores, type KvIndex } from "./base.ts";

/** A chain of blocks `name`/0, `name`/1, ... as if hashed; equal names are equal chains. */
export function aChain(name: number, length: number): Uint32Array {
  return Uint32Array.from(
    { length: 2 * length },
    (_, i) => (Math.imul(name * 4_096 + i + 1, 0x9e3779b1) ^ 0x5bd1e995) >>> 0,
  );
}

export interface StoredParts {
  readonly chain: Uint32Array;
  /** First and one past the last block of the chain that the event stores. @default all */
  readonly from?: number;
  readonly to?: number;
  readonly tier?: StorageTier;
}

export function aStored({ chain, from = 0, to = chain.length / 2, tier = "device" }: StoredParts): KvStored {
  return {
    type: "stored",
    dpRank: 0,
    tier,
    parentHash: from === 0 ? undefined : [chain[2 * from - 2]!, chain[2 * from - 1]!],
    startBlock: from,
    sequenceHashes: chain.slice(2 * from, 2 * to),
    localHashes: chain.slice(2 * from, 2 * to).map((word) => ~word),
  };
}

export function aRemoved({ chain, from = 0, to = chain.length / 2, tier = "device" }: StoredParts): KvEvent {
  return { type: "removed", dpRank: 0, tier, sequenceHashes: chain.slice(2 * from, 2 * to) };
}

/** [device, host, disk] of one rank. */
export function scoresOf(
  index: Pick<KvIndex, "findMatches">,
  chain: Uint32Array,
  rank: number,
): [number, number, number] {
  const scores = new OverlapScores();
  index.findMatches(chain, chain.length / 2, scores);
  return [scores.device[rank]!, scores.host[rank]!, scores.disk[rank]!];
}

/** Blocks that continue those of `scoresOf` in the shared store. */
function sharedOf(index: Pick<KvIndex, "findMatches">, chain: Uint32Array, rank: number): number {
  const scores = new OverlapScores();
  index.findMatches(chain, chain.length / 2, scores);
  return scores.shared[rank]!;
}

/** A dump as one line per (tier, block), sorted: equal texts mean equal contents. */
export function contentsOf(index: KvIndex, rank: number): string[] {
  const lines: string[] = [];
  for (const event of index.dump(rank)) {
    assert.equal(event.type, "stored");
    if (event.type !== "stored") continue;
    let parent: readonly number[] | undefined = event.parentHash;
    for (let i = 0; i < event.sequenceHashes.length; i += 2) {
      const hash = [...event.sequenceHashes.subarray(i, i + 2)];
      const local = [...event.localHashes.subarray(i, i + 2)];
      lines.push(
        `${event.tier} ${event.startBlock + i / 2} ${hash.join()} ${local.join()} after ${parent?.join() ?? "root"}`,
      );
      parent = hash;
    }
  }
  return lines.toSorted();
}

/** What every KV index must keep. */
export function kvIndexBattery(name: string, create: () => KvIndex): void {
  const chain = aChain(1, 6);
  const create2 = (): { index: KvIndex; a: number; b: number } => {
    const index = create();
    return { index, a: index.rankOf("worker-a", 0), b: index.rankOf("worker-b", 0) };
  };

  test(`${name}: an empty index matches nothing`, () => {
    const { index, a } = create2();
    assert.deepEqual(scoresOf(index, chain, a), [0, 0, 0]);
    assert.equal(index.stats().memberships, 0);
    assert.deepEqual(index.dump(a), []);
  });

  test(`${name}: a rank scores the leading blocks it stored, another rank none of them`, () => {
    const { index, a, b } = create2();
    assert.equal(index.apply(a, aStored({ chain, to: 4 })), "ok");
    assert.deepEqual(scoresOf(index, chain, a), [4, 0, 0]);
    assert.deepEqual(scoresOf(index, chain, b), [0, 0, 0]);
    index.apply(b, aStored({ chain, to: 2 }));
    assert.deepEqual(scoresOf(index, chain, b), [2, 0, 0]);
    const { ranks, blocks, memberships } = index.stats();
    assert.deepEqual({ ranks, blocks, memberships }, { ranks: 2, blocks: 4, memberships: 6 });
  });

  test(`${name}: only the asked number of blocks counts`, () => {
    const { index, a } = create2();
    index.apply(a, aStored({ chain }));
    const scores = new OverlapScores();
    for (const count of [0, 1, 5, 6]) {
      index.findMatches(chain, count, scores);
      assert.equal(scores.device[a], count);
    }
  });

  test(`${name}: branches of one prefix are told apart`, () => {
    const { index, a, b } = create2();
    const other = aChain(2, 6);
    other.set(chain.subarray(0, 6));
    index.apply(a, aStored({ chain }));
    index.apply(b, aStored({ chain: other, to: 5 }));
    assert.deepEqual([scoresOf(index, chain, a)[0], scoresOf(index, chain, b)[0]], [6, 3]);
    assert.deepEqual([scoresOf(index, other, a)[0], scoresOf(index, other, b)[0]], [3, 5]);
  });

  test(`${name}: storing twice is storing once`, () => {
    const { index, a } = create2();
    index.apply(a, aStored({ chain }));
    assert.equal(index.apply(a, aStored({ chain })), "ok");
    assert.equal(index.stats().memberships, 6);
    index.apply(a, aRemoved({ chain }));
    assert.deepEqual(scoresOf(index, chain, a), [0, 0, 0]);
  });

  test(`${name}: blocks with an unknown parent are refused and match nothing`, () => {
    const { index, a } = create2();
    assert.equal(index.apply(a, aStored({ chain, from: 3 })), "parent-block-not-found");
    assert.equal(index.stats().blocks, 0);
    assert.deepEqual(scoresOf(index, chain, a), [0, 0, 0]);
    assert.deepEqual(scoresOf(index, chain.subarray(6), a), [0, 0, 0]);
  });

  test(`${name}: a block behind a block of somebody else counts once its rank has the whole prefix`, () => {
    const { index, a, b } = create2();
    index.apply(a, aStored({ chain, to: 3 }));
    assert.equal(index.apply(b, aStored({ chain, from: 3 })), "ok");
    assert.deepEqual(scoresOf(index, chain, b), [0, 0, 0]);
    index.apply(b, aStored({ chain, to: 3 }));
    assert.deepEqual(scoresOf(index, chain, b), [6, 0, 0]);
  });

  for (const hole of [0, 2, 5]) {
    test(`${name}: a hole at block ${hole} stops matches there, and storing it again heals it`, () => {
      const { index, a, b } = create2();
      index.apply(a, aStored({ chain }));
      index.apply(b, aStored({ chain }));
      assert.equal(index.apply(a, aRemoved({ chain, from: hole, to: hole + 1 })), "ok");
      assert.deepEqual(scoresOf(index, chain, a), [hole, 0, 0]);
      assert.deepEqual(scoresOf(index, chain, b), [6, 0, 0]);
      index.apply(b, aRemoved({ chain, from: hole, to: hole + 1 }));
      assert.deepEqual(scoresOf(index, chain, b), [hole, 0, 0]);
      index.apply(a, aStored({ chain, from: hole, to: hole + 1 }));
      assert.deepEqual(scoresOf(index, chain, a), [6, 0, 0]);
      assert.deepEqual(scoresOf(index, chain, b), [hole, 0, 0]);
    });
  }

  test(`${name}: blocks are removed in any order, and the last one leaves nothing behind`, () => {
    for (const order of [
      [0, 1, 2, 3, 4, 5],
      [5, 4, 3, 2, 1, 0],
      [2, 5, 0, 4, 1, 3],
    ]) {
      const { index, a } = create2();
      index.apply(a, aStored({ chain }));
      for (const at of order) assert.equal(index.apply(a, aRemoved({ chain, from: at, to: at + 1 })), "ok");
      assert.equal(index.stats().blocks, 0);
      assert.equal(index.apply(a, aStored({ chain, from: 1 })), "parent-block-not-found");
    }
  });

  test(`${name}: removing what is not there is said, and the rest of the event is applied`, () => {
    const { index, a, b } = create2();
    index.apply(a, aStored({ chain, to: 3 }));
    assert.equal(index.apply(a, aRemoved({ chain, from: 2, to: 6 })), "block-not-found");
    assert.deepEqual(scoresOf(index, chain, a), [2, 0, 0]);
    assert.equal(index.apply(b, aRemoved({ chain, to: 2 })), "block-not-found");
    assert.equal(index.apply(a, aRemoved({ chain, to: 2, tier: "host" })), "block-not-found");
    assert.deepEqual(scoresOf(index, chain, a), [2, 0, 0]);
  });

  test(`${name}: host memory continues the device match, disk continues both, the shared store all`, () => {
    const { index, a } = create2();
    index.apply(a, aStored({ chain, to: 2 }));
    index.apply(a, aStored({ chain, from: 1, to: 4, tier: "host" }));
    index.apply(a, aStored({ chain, from: 3, to: 5, tier: "disk" }));
    index.apply(a, aStored({ chain, from: 5, to: 6, tier: "external" }));
    assert.deepEqual(scoresOf(index, chain, a), [2, 2, 1]);
    assert.equal(sharedOf(index, chain, a), 1);
    index.apply(a, aRemoved({ chain, from: 2, to: 3, tier: "host" }));
    assert.deepEqual(scoresOf(index, chain, a), [2, 0, 0]);
    index.apply(a, aRemoved({ chain, to: 2 }));
    assert.deepEqual(scoresOf(index, chain, a), [0, 0, 0], "nothing starts at block 0");
  });

  test(`${name}: a block may start in a lower tier`, () => {
    const { index, a, b } = create2();
    index.apply(a, aStored({ chain, to: 3, tier: "disk" }));
    index.apply(b, aStored({ chain, to: 1, tier: "host" }));
    index.apply(b, aStored({ chain, from: 1, to: 3, tier: "external" }));
    assert.deepEqual(scoresOf(index, chain, a), [0, 0, 3]);
    assert.deepEqual(scoresOf(index, chain, b), [0, 1, 0]);
    assert.equal(sharedOf(index, chain, b), 2);
  });

  test(`${name}: what continues a block of the shared store on disk counts as shared`, () => {
    const { index, a } = create2();
    index.apply(a, aStored({ chain, to: 2, tier: "external" }));
    index.apply(a, aStored({ chain, from: 2, to: 4, tier: "disk" }));
    index.apply(a, aStored({ chain, from: 4, to: 5, tier: "host" }));
    assert.deepEqual(scoresOf(index, chain, a), [0, 0, 0]);
    assert.equal(sharedOf(index, chain, a), 4);
  });

  test(`${name}: a block in disk and in external memory stays when it leaves one of them`, () => {
    const { index, a } = create2();
    index.apply(a, aStored({ chain, to: 1, tier: "disk" }));
    index.apply(a, aStored({ chain, to: 1, tier: "external" }));
    assert.equal(index.stats().memberships, 2);
    assert.deepEqual([...scoresOf(index, chain, a), sharedOf(index, chain, a)], [0, 0, 1, 0]);
    index.apply(a, aRemoved({ chain, to: 1, tier: "disk" }));
    assert.deepEqual([...scoresOf(index, chain, a), sharedOf(index, chain, a)], [0, 0, 0, 1]);
  });

  test(`${name}: cleared forgets one rank in all tiers and leaves the other rank of the worker alone`, () => {
    const index = create();
    const [a0, a1] = [index.rankOf("worker-a", 0), index.rankOf("worker-a", 1)];
    for (const rank of [a0, a1]) {
      index.apply(rank, aStored({ chain }));
      index.apply(rank, aStored({ chain, to: 2, tier: "host" }));
    }
    assert.equal(index.apply(a0, { type: "cleared", dpRank: 0 }), "ok");
    assert.deepEqual(scoresOf(index, chain, a0), [0, 0, 0]);
    assert.deepEqual(scoresOf(index, chain, a1), [6, 0, 0]);
    assert.equal(index.stats().memberships, 8);
  });

  test(`${name}: a removed worker gives its rank numbers back, empty`, () => {
    const { index, a, b } = create2();
    const a1 = index.rankOf("worker-a", 1);
    for (const rank of [a, b, a1]) index.apply(rank, aStored({ chain }));
    index.removeWorker("worker-a");
    assert.equal(index.stats().memberships, 6);
    assert.equal(index.rankCount, 2);
    assert.equal(index.apply(a, aStored({ chain })), "invalid-block", "a rank that is not in use takes nothing");
    assert.equal(index.rankOf("worker-c", 0), a);
    assert.deepEqual(scoresOf(index, chain, a), [0, 0, 0]);
    assert.deepEqual(scoresOf(index, chain, b), [6, 0, 0]);
    assert.equal(index.rankOf("worker-d", 0), a1);
    index.removeWorker("nobody");
  });

  test(`${name}: malformed events are refused`, () => {
    const { index, a } = create2();
    const stored = aStored({ chain });
    assert.equal(
      index.apply(a, { ...stored, sequenceHashes: chain.slice(0, 3), localHashes: chain.slice(0, 3) }),
      "invalid-block",
    );
    assert.equal(index.apply(a, { ...stored, localHashes: chain.slice(0, 2) }), "invalid-block");
    assert.equal(index.apply(a, { ...stored, tier: "tape" as StorageTier }), "invalid-block");
    assert.equal(index.apply(99, stored), "invalid-block");
    assert.equal(index.apply(-1, stored), "invalid-block");
    assert.equal(index.apply(0.5, stored), "invalid-block");
    assert.equal(index.stats().blocks, 0);
    index.clearRank(99);
    assert.deepEqual(index.dump(99), []);
  });

  test(`${name}: a block that claims another parent than it has, or itself, is refused`, () => {
    const { index, a } = create2();
    index.apply(a, aStored({ chain }));
    const third = { ...aStored({ chain, from: 3, to: 4 }), parentHash: undefined };
    assert.equal(index.apply(a, third), "invalid-block");
    assert.equal(index.apply(a, { ...third, parentHash: [chain[6]!, chain[7]!] }), "invalid-block");
    const looped = aChain(7, 3);
    looped.copyWithin(4, 0, 2);
    assert.equal(index.apply(a, aStored({ chain: looped })), "invalid-block");
    assert.deepEqual(scoresOf(index, chain, a), [6, 0, 0]);
    assert.equal(index.stats().blocks, 8, "the blocks before the refused one are in");
  });

  test(`${name}: the hash 0 is a hash like any other`, () => {
    const { index, a } = create2();
    const zero = new Uint32Array([0, 0, 1, 0]);
    index.apply(a, aStored({ chain: zero }));
    assert.deepEqual(scoresOf(index, zero, a), [2, 0, 0]);
    index.apply(a, aRemoved({ chain: zero }));
    assert.deepEqual(scoresOf(index, zero, a), [0, 0, 0]);
  });

  test(`${name}: a block with the hash 0 takes no place that another block left`, () => {
    const { index, a } = create2();
    const gone = new Uint32Array([5, 5, 6, 6]);
    const zero = new Uint32Array([5, 5, 0, 0]);
    index.apply(a, aStored({ chain: gone }));
    index.apply(a, aRemoved({ chain: gone, from: 1 }));
    index.apply(a, aStored({ chain: zero }));
    assert.deepEqual(scoresOf(index, zero, a), [2, 0, 0]);
    index.apply(a, aStored({ chain: gone }));
    assert.deepEqual(scoresOf(index, zero, a), [2, 0, 0]);
    assert.equal(index.apply(a, aRemoved({ chain: zero, from: 1 })), "ok");
    assert.deepEqual(scoresOf(index, zero, a), [1, 0, 0]);
    assert.deepEqual(scoresOf(index, gone, a), [2, 0, 0]);
  });

  test(`${name}: a dump rebuilds the rank in an empty index`, () => {
    const { index, a, b } = create2();
    const branch = aChain(2, 6);
    branch.set(chain.subarray(0, 4));
    index.apply(b, aStored({ chain }));
    index.apply(a, aStored({ chain, to: 3 }));
    index.apply(a, aStored({ chain, from: 3, tier: "host" }));
    index.apply(a, aStored({ chain: branch, from: 2 }));
    index.apply(a, aStored({ chain: branch, from: 4, tier: "external" }));
    const copy = create();
    const rank = copy.rankOf("worker-a", 0);
    for (const event of index.dump(a)) assert.equal(copy.apply(rank, event), "ok");
    assert.deepEqual(contentsOf(copy, rank), contentsOf(index, a));
    for (const query of [chain, branch]) assert.deepEqual(scoresOf(copy, query, rank), scoresOf(index, query, a));
  });

  test(`${name}: a thousand ranks hold one prefix and score by their own depth`, () => {
    const index = create();
    const long = aChain(3, 40);
    for (let worker = 0; worker < 1_000; worker++) {
      const rank = index.rankOf(`worker-${worker}`, 0);
      index.apply(rank, aStored({ chain: long, to: 1 + (worker % 40) }));
    }
    const scores = new OverlapScores();
    index.findMatches(long, 40, scores);
    for (let rank = 0; rank < 1_000; rank++) assert.equal(scores.device[rank], 1 + (rank % 40));
  });
}
