import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { IndexedHeap } from "./indexed-heap.ts";

interface Item {
  position: number;
  key: number;
  readonly order: number;
}

test("indexed heap: any pushes, shifts, removals and moves give what a sorted array gives", () => {
  const operation = fc.oneof(
    fc.record({ type: fc.constant("push" as const), key: fc.nat(20) }),
    fc.record({ type: fc.constant("shift" as const) }),
    fc.record({ type: fc.constant("remove" as const), at: fc.nat() }),
    fc.record({ type: fc.constant("move" as const), at: fc.nat(), key: fc.nat(20) }),
  );
  const isBefore = (a: Item, b: Item): boolean => (a.key === b.key ? a.order < b.order : a.key < b.key);
  fc.assert(
    fc.property(fc.array(operation, { maxLength: 120 }), (operations) => {
      const heap = new IndexedHeap<Item>(isBefore);
      const naive: Item[] = [];
      let order = 0;
      for (const step of operations) {
        naive.sort((a, b) => (isBefore(a, b) ? -1 : 1));
        assert.equal(heap.first, naive[0]);
        if (step.type === "push") {
          const item = { position: -1, key: step.key, order: order++ };
          heap.push(item);
          naive.push(item);
        } else if (step.type === "shift") {
          const first = naive.shift();
          assert.equal(heap.shift(), first);
          if (first !== undefined) assert.equal(first.position, -1);
        } else if (naive.length > 0) {
          const item = naive[step.at % naive.length]!;
          if (step.type === "remove") {
            heap.remove(item);
            naive.splice(naive.indexOf(item), 1);
          } else {
            item.key = step.key;
            heap.moved(item);
          }
        }
        assert.deepEqual(new Set(heap.values()), new Set(naive));
        assert.equal(heap.length, naive.length);
      }
    }),
  );
});
