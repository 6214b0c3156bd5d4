import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { HashIndex } from "./hash-index.ts";

test("hash index: agrees with a Map over any sequence of additions and removals, collisions included", () => {
  // Few distinct low halves, so that runs are long and wrap around the end of the table.
  const hash = fc.tuple(fc.constantFrom(0, 1, 2, 6, 7, 0xffff_ffff, 0xffff_fff8), fc.nat(3));
  fc.assert(
    fc.property(fc.array(fc.tuple(fc.boolean(), hash), { maxLength: 60 }), (operations) => {
      const hashes = new Uint32Array(2 * 8);
      const index = new HashIndex(hashes);
      const model = new Map<string, number>();
      const free = [7, 6, 5, 4, 3, 2, 1, 0];
      for (const [isRemoval, [lo, hi]] of operations) {
        const key = `${lo},${hi}`;
        const known = model.get(key);
        assert.equal(index.find(lo, hi), known ?? -1);
        if (isRemoval && known !== undefined) {
          index.remove(known);
          model.delete(key);
          free.push(known);
        } else if (!isRemoval && known === undefined && free.length > 0) {
          const entry = free.pop()!;
          hashes.set([lo, hi], 2 * entry);
          index.add(entry);
          model.set(key, entry);
        }
      }
      for (const [key, entry] of model) {
        const [lo, hi] = key.split(",").map(Number) as [number, number];
        assert.equal(index.find(lo, hi), entry);
      }
    }),
  );
});

test("hash index: removing what is not there is a defect", () => {
  assert.throws(() => new HashIndex(new Uint32Array(8)).remove(1), /is in the index/);
});
