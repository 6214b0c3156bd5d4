import assert from "node:assert/strict";
import { test } from "node:test";
import { aBlock } from "./fixtures/blocks.ts";
import { MAX_PACK_BLOCKS, blocksOfPackKey, packKey } from "./pack-key.ts";

test("pack key: a name says every block of the object, whole", () => {
  for (let from = 0; from < 20; from++) {
    for (let count = 1; count <= MAX_PACK_BLOCKS; count++) {
      const run = Array.from({ length: count }, (_, i) => aBlock(from + i, 3));
      const name = packKey(run);
      assert.deepEqual(blocksOfPackKey(name), run);
      assert(name.length <= 153);
    }
  }
});

test("pack key: names of another make are nobody's", () => {
  const name = packKey([aBlock(1), aBlock(2)]);
  const others = [
    "",
    "0123456789abcdef",
    `${name}0`,
    name.slice(1),
    name.slice(0, -1),
    `${name}.tmp`,
    name.toUpperCase(),
  ];
  for (const other of others) assert.equal(blocksOfPackKey(other), undefined, other);
  assert.equal(blocksOfPackKey(packKey([aBlock(0)]).repeat(2)), undefined);
});
