import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { ParkedItems } from "./parked-items.ts";

test("parked items: come out as they went in, whatever the order of pushes and shifts", () => {
  const step = fc.oneof(fc.constant(undefined), fc.uint8Array({ maxLength: 3_000 }));
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
      const parked = new ParkedItems();
      const model: Buffer[] = [];
      for (const item of steps) {
        if (item !== undefined) {
          parked.push(item);
          model.push(Buffer.from(item));
        } else if (model.length > 0) {
          assert.deepEqual(Buffer.from(parked.shift()), model.shift());
        }
        const cost = model.reduce((sum, { length }) => sum + ParkedItems.costOf(length), 0);
        assert.equal(parked.byteLength, cost);
      }
      while (model.length > 0) assert.deepEqual(Buffer.from(parked.shift()), model.shift());
      assert.equal(parked.byteLength, 0);
    }),
  );
});
