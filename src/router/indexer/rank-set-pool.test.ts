import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { FlatKvMemory } from "./flat-kv-memory.ts";
import { EMPTY_SET, NO_ROOM, RankSetPool, memberOf } from "./rank-set-pool.ts";

function aPool(nodes = 100_000): RankSetPool {
  return new RankSetPool(new FlatKvMemory({ records: 10, slots: 2_048, nodes }), nodes);
}

function membersOf(pool: RankSetPool, set: number): number[] {
  const members: number[] = [];
  pool.forEachMember(set, (plane, rank) => members.push(memberOf(plane, rank)));
  return members.toSorted((a, b) => a - b);
}

const aMember = fc
  .tuple(fc.nat(3), fc.oneof(fc.nat(40), fc.nat(300), fc.nat(65_535)))
  .map(([plane, rank]) => memberOf(plane, rank));

test("rank sets: members come and go as in a Set, and equal sets are one set", () => {
  const pool = aPool();
  fc.assert(
    fc.property(fc.array(fc.tuple(aMember, fc.boolean()), { maxLength: 60 }), (changes) => {
      const model = new Set<number>();
      let set = EMPTY_SET;
      for (const [member, isAdded] of changes) {
        const hadIt = model.has(member);
        const next = isAdded ? pool.with(set, member) : pool.without(set, member);
        assert.equal(next === set, isAdded === hadIt, "a set changes when its members do, and only then");
        if (isAdded) model.add(member);
        else model.delete(member);
        pool.move(set, next);
        set = next;
        assert.equal(pool.has(set, member), isAdded);
        assert.equal(set === EMPTY_SET, model.size === 0);
      }
      const expected = [...model].toSorted((a, b) => a - b);
      assert.deepEqual(membersOf(pool, set), expected);
      let again = EMPTY_SET;
      for (const member of expected.toReversed()) again = pool.with(again, member);
      assert.equal(again, set, "made in another order it is the same set");
      pool.move(set, EMPTY_SET);
    }),
    { numRuns: 300 },
  );
  pool.sweep();
  assert.equal(pool.setCount, 0);
});

test("rank sets: a rank is found in whatever tier it is", () => {
  const pool = aPool();
  for (const plane of [0, 1, 2, 3]) {
    const set = pool.with(pool.with(EMPTY_SET, memberOf(plane, 700)), memberOf(0, 5));
    assert.deepEqual([pool.hasRank(set, 700), pool.hasRank(set, 5), pool.hasRank(set, 701)], [true, true, false]);
    assert.equal(pool.hasRank(set, 700 - 512), false);
  }
});

test("rank sets: a full pool says so, and has room again when sets are no longer used", () => {
  const pool = aPool(100);
  const sets: number[] = [];
  for (let rank = 0; ; rank++) {
    const set = pool.with(EMPTY_SET, memberOf(0, rank));
    if (set === NO_ROOM) break;
    pool.move(EMPTY_SET, set);
    sets.push(set);
  }
  assert.equal(sets.length, 99);
  assert.equal(pool.with(sets[0]!, memberOf(0, 200)), NO_ROOM);
  assert.deepEqual(membersOf(pool, sets[0]!), [memberOf(0, 0)], "a refused change leaves the set alone");
  for (const set of sets.slice(50)) pool.move(set, EMPTY_SET);
  const fresh = pool.with(EMPTY_SET, memberOf(2, 1_000));
  assert.notEqual(fresh, NO_ROOM);
  assert.deepEqual(membersOf(pool, fresh), [memberOf(2, 1_000)]);
  sets.slice(0, 50).forEach((set, rank) => assert.deepEqual(membersOf(pool, set), [memberOf(0, rank)]));
});
