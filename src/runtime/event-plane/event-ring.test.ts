import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { EventRing } from "./event-ring.ts";

test("event ring: holds what a plain list's tail holds, by count and by bytes, and pages through it", () => {
  const event = fc.nat(12);
  const ask = fc.record({
    from: fc.integer({ min: 1, max: 30 }),
    length: fc.nat(30),
    events: fc.integer({ min: 1, max: 9 }),
  });
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 9 }), fc.array(event, { maxLength: 40 }), ask, (size, lengths, asked) => {
      const maxBytes = 40;
      const ring = new EventRing(size, maxBytes);
      let list: { sequence: number; payload: Uint8Array }[] = [];
      lengths.forEach((length, index) => {
        const payload = new Uint8Array(length).fill(index);
        assert.equal(ring.push(payload), index + 1);
        list.push({ sequence: index + 1, payload });
        list = list.slice(-size);
        const bytesOf = () => list.reduce((sum, { payload: kept }) => sum + kept.length, 0);
        while (list.length > 1 && bytesOf() > maxBytes) list.shift();
      });
      assert.equal(ring.count, list.length);
      assert.equal(ring.oldest, list[0]?.sequence ?? 1);
      const to = asked.from + asked.length;
      const { first, payloads } = ring.page(asked.from, to, asked.events, 20);
      const wanted = list.filter(({ sequence }) => sequence >= asked.from && sequence <= to).slice(0, asked.events);
      let bytes = 0;
      const expected = wanted.filter(({ payload }, index) => (bytes += payload.length) <= 20 || index === 0);
      // Only a prefix counts: a small event behind one that did not fit waits for the next page.
      assert.deepEqual(payloads, expected.map(({ payload }) => payload).slice(0, payloads.length));
      assert.equal(payloads.length > 0, expected.length > 0);
      if (payloads.length > 0) assert.equal(first, wanted[0]!.sequence);
    }),
    { numRuns: 1000 },
  );
});

test("event ring: the newest event stays even when it alone is over the byte limit", () => {
  const ring = new EventRing(4, 10);
  ring.push(new Uint8Array(3));
  ring.push(new Uint8Array(100));
  assert.deepEqual([ring.oldest, ring.count], [2, 1]);
  assert.equal(ring.page(1, 2, 10, 10).payloads.length, 1);
});
