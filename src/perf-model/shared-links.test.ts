import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { VirtualClock } from "../std/index.ts";
import { SharedLinks, type SharedLink } from "./shared-links.ts";

const link = (bytesPerMs: number): SharedLink => ({ bytesPerMs });

/** Ends of transfers by name, ms. */
function run(begin: (links: SharedLinks, clock: VirtualClock, end: (name: string) => () => void) => void) {
  const clock = new VirtualClock();
  const ends: Record<string, number> = {};
  begin(new SharedLinks(clock), clock, (name) => () => {
    ends[name] = clock.monotonicMs();
  });
  while (clock.runNext());
  return ends;
}

function assertEnds(ends: Record<string, number>, expected: Record<string, number>): void {
  assert.deepEqual(Object.keys(ends).toSorted(), Object.keys(expected).toSorted());
  for (const [name, ms] of Object.entries(expected)) {
    assert.ok(Math.abs(ends[name]! - ms) < 1e-3, `${name} ends at ${ms}, got ${ends[name]}`);
  }
}

test("shared links: a transfer alone takes its bytes over the slowest of its links", () => {
  const ends = run((links, _clock, end) => links.move(1_000, [link(100), link(10), link(50)], end("a")));
  assertEnds(ends, { a: 100 });
});

test("shared links: two halve a link, and the longer one has all of it afterwards", () => {
  const ends = run((links, _clock, end) => {
    const bus = link(10);
    links.move(100, [bus], end("short"));
    links.move(300, [bus], end("long"));
  });
  assertEnds(ends, { short: 20, long: 40 });
});

test("shared links: what a transfer that is held up elsewhere leaves goes to the others", () => {
  const ends = run((links, _clock, end) => {
    const out = link(10);
    const slowDisk = link(2);
    links.move(20, [out, slowDisk], end("held up"));
    links.move(80, [out], end("other"));
  });
  assertEnds(ends, { "held up": 10, other: 10 });
});

test("shared links: many senders to one receiver share its card, and one that is cancelled makes room", () => {
  const ends = run((links, clock, end) => {
    const into = link(12);
    for (const name of ["a", "b", "c"]) links.move(120, [link(100), into], end(name));
    const given = links.move(120, [link(100), into], end("given up"));
    clock.setTimer(10, () => given.cancel());
  });
  assertEnds(ends, { a: 32.5, b: 32.5, c: 32.5 });
});

test("shared links: no link carries more than it can, and each transfer has a full one on which nobody is faster", () => {
  const pool = Array.from({ length: 6 }, (_, i) => link(1 + i * 7));
  const flow = fc.record({
    bytes: fc.integer({ min: 1, max: 10_000 }),
    over: fc.uniqueArray(fc.nat(pool.length - 1), { minLength: 1, maxLength: 3 }),
  });
  fc.assert(
    fc.property(fc.array(flow, { minLength: 1, maxLength: 20 }), (flows) => {
      const clock = new VirtualClock();
      const links = new SharedLinks(clock);
      let left = flows.length;
      let sentBytes = 0;
      for (const { bytes, over } of flows)
        links.move(
          bytes,
          over.map((i) => pool[i]!),
          () => left--,
        );
      while (left > 0) {
        const rates = links.rates();
        const used = (at: SharedLink): number =>
          rates.reduce((sum, { links: crossed, bytesPerMs }) => sum + (crossed.includes(at) ? bytesPerMs : 0), 0);
        for (const at of pool) assert.ok(used(at) <= at.bytesPerMs * (1 + 1e-9));
        for (const { links: crossed, bytesPerMs } of rates) {
          const hasBottleneck = crossed.some(
            (at) =>
              used(at) >= at.bytesPerMs * (1 - 1e-9) &&
              rates.every((other) => !other.links.includes(at) || other.bytesPerMs <= bytesPerMs * (1 + 1e-9)),
          );
          assert.ok(hasBottleneck, "a transfer could be faster without making a slower one slower");
        }
        const beforeMs = clock.monotonicMs();
        assert.ok(clock.runNext(), "what is under way ends");
        const elapsedMs = clock.monotonicMs() - beforeMs;
        for (const { bytesPerMs } of rates) sentBytes += bytesPerMs * elapsedMs;
      }
      const all = flows.reduce((sum, { bytes }) => sum + bytes, 0);
      assert.ok(Math.abs(sentBytes - all) < 1e-3 * flows.length, `${sentBytes} bytes crossed, ${all} were to`);
      assert.equal(links.count, 0);
    }),
  );
});
