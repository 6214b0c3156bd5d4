import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { ManualClock, systemClock } from "./clock.ts";

void test("manual clock: timers run in order of time, then of creation, each at its own instant", () => {
  fc.assert(
    fc.property(fc.array(fc.nat(50), { maxLength: 30 }), fc.array(fc.nat(20), { maxLength: 10 }), (delays, steps) => {
      const clock = new ManualClock();
      const fired: { delayMs: number; index: number; atMs: number }[] = [];
      delays.forEach((delayMs, index) => {
        clock.setTimer(delayMs, () => fired.push({ delayMs, index, atMs: clock.monotonicMs() }));
      });
      let nowMs = 0;
      for (const step of steps) {
        clock.advance(step);
        nowMs += step;
      }
      const expected = delays
        .map((delayMs, index) => ({ delayMs, index, atMs: delayMs }))
        .filter(({ delayMs }) => steps.length > 0 && delayMs <= nowMs)
        .sort((a, b) => a.delayMs - b.delayMs || a.index - b.index);
      assert.deepEqual(fired, expected);
      assert.equal(clock.monotonicMs(), nowMs);
      assert.equal(clock.pendingTimerCount, delays.length - fired.length);
    }),
  );
});

void test("manual clock: a timer set or cancelled by another takes effect at once", () => {
  const clock = new ManualClock();
  const seen: string[] = [];
  const late = clock.setTimer(20, () => seen.push("late"));
  clock.setTimer(10, () => {
    seen.push(`first at ${clock.monotonicMs()}`);
    late.cancel();
    clock.setTimer(5, () => seen.push(`second at ${clock.monotonicMs()}`));
    clock.setTimer(-3, () => seen.push(`at once at ${clock.monotonicMs()}`));
  });
  clock.advance(100);
  assert.deepEqual(seen, ["first at 10", "at once at 10", "second at 15"]);
});

void test("manual clock: the wall may jump, monotonic time does not", () => {
  const clock = new ManualClock(1_000);
  clock.advance(5);
  assert.equal(clock.wallMs(), 1_005);
  clock.wallOffsetMs = 0;
  assert.equal(clock.wallMs(), 5);
  assert.equal(clock.monotonicMs(), 5);
});

void test("system clock: time goes on, timers fire, cancelled ones do not", async () => {
  const before = systemClock.monotonicMs();
  const cancelled = systemClock.setTimer(0, () => assert.fail("was cancelled"));
  cancelled.cancel();
  // The clock's own timer does not hold the process; this one does until the test is over.
  const hold = setTimeout(() => undefined, 10_000);
  await new Promise<void>((resolve) => systemClock.setTimer(2, resolve));
  clearTimeout(hold);
  assert.ok(systemClock.monotonicMs() - before >= 1);
  assert.ok(Math.abs(systemClock.wallMs() - Date.now()) < 1_000);
});
