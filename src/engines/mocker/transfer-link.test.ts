import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { TransferLink } from "./transfer-link.ts";

const BYTES_PER_SECOND = 1_000_000;

test("transfer link: a transfer alone takes bytes over bandwidth", () => {
  const link = new TransferLink<string>(BYTES_PER_SECOND);
  link.add("a", 5_000, 10);
  assert.equal(link.nextEndMs(), 15);
  const ended: string[] = [];
  link.advance(14.9, (item) => ended.push(item));
  assert.equal(ended.length, 0);
  link.advance(15, (item) => ended.push(item));
  assert.deepEqual(ended, ["a"]);
  assert.equal(link.nextEndMs(), Infinity);
});

test("transfer link: two at once take twice as long, and the rest of the longer one is quick again", () => {
  const link = new TransferLink<string>(BYTES_PER_SECOND);
  const ends: [string, number][] = [];
  link.add("long", 10_000, 0);
  link.add("short", 4_000, 0);
  while (link.count > 0) {
    const endMs = link.nextEndMs();
    link.advance(endMs, (item) => ends.push([item, endMs]));
  }
  assert.deepEqual(ends, [["short", 8], ["long", 14]]); // prettier-ignore
});

test("transfer link: one that is removed leaves its share to the others", () => {
  const link = new TransferLink<string>(BYTES_PER_SECOND);
  link.add("a", 10_000, 0);
  link.add("b", 10_000, 0);
  link.remove("b", 10);
  assert.equal(link.nextEndMs(), 15);
});

test("transfer link: no byte is lost or moved twice, and the link is never faster than it is", () => {
  const jobs = fc.array(fc.record({ bytes: fc.integer({ min: 1, max: 50_000 }), gapMs: fc.nat(30) }), { minLength: 1, maxLength: 20 }); // prettier-ignore
  fc.assert(
    fc.property(jobs, (list) => {
      const link = new TransferLink<number>(BYTES_PER_SECOND);
      const started: number[] = [];
      const ended = new Map<number, number>();
      let nowMs = 0;
      const advanceTo = (toMs: number): void => {
        while (link.nextEndMs() <= toMs) {
          const endMs = link.nextEndMs();
          link.advance(endMs, (item) => ended.set(item, endMs));
        }
        link.advance(toMs, () => assert.fail("all that ends by then has ended"));
      };
      list.forEach(({ bytes, gapMs }, i) => {
        nowMs += gapMs;
        advanceTo(nowMs);
        started[i] = nowMs;
        link.add(i, bytes, nowMs);
      });
      advanceTo(1e9);
      assert.equal(ended.size, list.length);
      let busyUntilMs = 0;
      list.forEach(({ bytes }, i) => {
        assert.ok(ended.get(i)! - started[i]! >= bytes / 1_000 - 1e-6, "not faster than alone");
        // The link works whenever there is work: what all need in a row bounds the last end.
        busyUntilMs = Math.max(busyUntilMs, started[i]!) + bytes / 1_000;
      });
      assert.ok(Math.abs(Math.max(...ended.values()) - busyUntilMs) < 1e-6 * Math.max(1, busyUntilMs));
    }),
  );
});
