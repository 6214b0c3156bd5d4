import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DescriptorList, checkList, gatherPairs } from "./descriptor-list.ts";
import { MAX_TRANSFER_DESCRIPTORS } from "./limits.ts";
import { assertReason } from "./transfer.battery.ts";

const COUNT = 12;
const BLOCK = 8;
const blocks = (id: number): DescriptorList =>
  DescriptorList.blocks({ id, byteLength: COUNT * BLOCK }, { blockBytes: BLOCK });

/** Every byte a list of pairs moves, one by one: the naive twin. */
function bytePairs(local: DescriptorList, remote: DescriptorList): string[] {
  const pairs: string[] = [];
  for (let i = 0; i < local.count; i++) {
    for (let byte = 0; byte < local.lengths[i]!; byte++) {
      pairs.push(
        `${local.regionIds[i]}:${local.offsets[i]! + byte} ${remote.regionIds[i]}:${remote.offsets[i]! + byte}`,
      );
    }
  }
  return pairs;
}

test("descriptor lists: gathering by index moves the same bytes as pair by pair, in as few pieces as there are runs", () => {
  const someIndices = fc.array(fc.tuple(fc.nat(COUNT - 1), fc.nat(COUNT - 1)), { minLength: 1, maxLength: 30 });
  fc.assert(
    fc.property(someIndices, (indices) => {
      const here = Uint32Array.from(indices, ([l]) => l);
      const there = Uint32Array.from(indices, ([, r]) => r);
      const pairs = gatherPairs(blocks(1), blocks(2), here, there);
      const each = (region: number, list: Uint32Array): DescriptorList =>
        new DescriptorList(
          new Uint32Array(list.length).fill(region),
          Float64Array.from(list, (index) => index * BLOCK),
          new Uint32Array(list.length).fill(BLOCK),
        );
      assert.deepEqual(bytePairs(pairs.local, pairs.remote), bytePairs(each(1, here), each(2, there)));
      assert.equal(pairs.byteCount, indices.length * BLOCK);
      let runs = 1;
      for (let i = 1; i < indices.length; i++) {
        if (here[i] !== here[i - 1]! + 1 || there[i] !== there[i - 1]! + 1) runs++;
      }
      assert.equal(pairs.local.count, runs);
    }),
  );
});

test("descriptor lists: strides, unequal pairs and lists that reach outside", () => {
  const strided = DescriptorList.blocks({ id: 1, byteLength: 100 }, { blockBytes: 8, strideBytes: 30, offset: 2 });
  assert.deepEqual([...strided.offsets], [2, 32, 62, 92]);
  assert.equal(strided.byteCount, 32);
  const longer = DescriptorList.blocks({ id: 2, byteLength: 100 }, { blockBytes: 9 });
  assert.throws(
    () => gatherPairs(strided, longer, Uint32Array.of(0), Uint32Array.of(0)),
    (thrown) => assertReason(thrown, "transfer-out-of-bounds"),
  );
  assert.throws(
    () => checkList(strided, () => 99, "local"),
    (thrown) => assertReason(thrown, "transfer-out-of-bounds"),
  );
  checkList(strided, () => 100, "local");
  assert.throws(
    () => new DescriptorList(new Uint32Array(1), new Float64Array(2), new Uint32Array(1)),
    (thrown) => assertReason(thrown, "transfer-out-of-bounds"),
  );
});

test("descriptor lists: more separate pieces than one transfer takes are refused", () => {
  const count = MAX_TRANSFER_DESCRIPTORS + 1;
  const list = DescriptorList.blocks({ id: 1, byteLength: 2 * count }, { blockBytes: 1, strideBytes: 2 });
  const indices = Uint32Array.from({ length: count }, (_, i) => i);
  assert.throws(
    () => gatherPairs(list, list, indices, indices),
    (thrown) => assertReason(thrown, "transfer-full"),
  );
});
