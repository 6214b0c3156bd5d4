import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { ManualClock } from "./clock.ts";
import { VirtualClock } from "./virtual-clock.ts";
import { TimerWheel, WheelTimer } from "./timer-wheel.ts";

const TICK_MS = 25;

function aTimer(run: () => void): WheelTimer {
  return new WheelTimer({ onExpire: run });
}

test("timer wheel: fires never early and at most one tick late", () => {
  const clock = new ManualClock();
  clock.advance(7);
  const wheel = new TimerWheel({ clock, tickMs: TICK_MS, slotCount: 8 });
  for (const delayMs of [0, 1, 24, 25, 26, 199, 200, 201, 5_000]) {
    const startMs = clock.monotonicMs();
    let firedMs = -1;
    wheel.add(
      aTimer(() => (firedMs = clock.monotonicMs())),
      delayMs,
    );
    clock.advance(delayMs + TICK_MS);
    assert.ok(firedMs >= startMs + delayMs, `${delayMs} ms fired after ${firedMs - startMs}`);
    assert.ok(firedMs <= startMs + delayMs + TICK_MS, `${delayMs} ms fired after ${firedMs - startMs}`);
    assert.equal(wheel.size, 0);
  }
});

test("timer wheel: on a clock with fractions of milliseconds a wake-up that came a hair early is not asked for again at once", () => {
  fc.assert(
    fc.property(
      fc.double({ min: 0, max: 1e6, noNaN: true }),
      fc.array(fc.double({ min: 0, max: 400, noNaN: true }), { minLength: 1, maxLength: 20 }),
      fc.double({ min: 0.1, max: 50, noNaN: true }),
      (startMs, delaysMs, tickMs) => {
        const clock = new VirtualClock();
        clock.moveTo(startMs);
        const wheel = new TimerWheel({ clock, tickMs, slotCount: 8 });
        const lateMs: number[] = [];
        for (const delayMs of delaysMs) {
          const dueMs = startMs + delayMs;
          wheel.add(
            aTimer(() => lateMs.push(clock.monotonicMs() - dueMs)),
            delayMs,
          );
        }
        for (let wakeUps = 0; lateMs.length < delaysMs.length; wakeUps++) {
          assert.ok(wakeUps < 10_000, `still waiting after ${wakeUps} wake-ups`);
          clock.runNext();
        }
        for (const late of lateMs) assert.ok(late > -1e-6 && late <= tickMs + 1 + 1e-6, `late by ${late} ms`);
      },
    ),
    { examples: [[0.1, [24.9999999, 25.3, 0.7], 25]] },
  );
});

test("timer wheel: an empty wheel sets no timer and wakes nobody", () => {
  const clock = new ManualClock();
  const wheel = new TimerWheel({ clock });
  assert.equal(clock.pendingTimerCount, 0);
  const timer = aTimer(() => assert.fail("cancelled timer fired"));
  wheel.add(timer, 100);
  assert.equal(clock.pendingTimerCount, 1);
  wheel.cancel(timer);
  clock.advance(1_000);
  assert.equal(clock.pendingTimerCount, 0);
});

test("timer wheel: a far deadline costs one wake-up per round of the wheel, not one per tick", () => {
  let wakeCount = 0;
  const manual = new ManualClock();
  const wheel = new TimerWheel({
    clock: {
      monotonicMs: () => manual.monotonicMs(),
      wallMs: () => manual.wallMs(),
      nextTurn: (run) => manual.nextTurn(run),
      setTimer: (delayMs, run) =>
        manual.setTimer(delayMs, () => {
          wakeCount++;
          run();
        }),
    },
    tickMs: 10,
    slotCount: 16,
  });
  let fired = false;
  wheel.add(
    aTimer(() => (fired = true)),
    1_600,
  );
  wheel.add(
    aTimer(() => undefined),
    5,
  );
  manual.advance(1_610);
  assert.ok(fired);
  assert.ok(wakeCount <= 12, `${wakeCount} wake-ups for 160 ticks`);
});

test("timer wheel: a target may cancel a timer due at the same tick, add itself again and add others", () => {
  const clock = new ManualClock();
  const wheel = new TimerWheel({ clock, tickMs: 10, slotCount: 4 });
  const order: string[] = [];
  const second = aTimer(() => order.push("second"));
  const first = aTimer(() => {
    order.push("first");
    wheel.cancel(second);
    if (order.length < 3) wheel.add(first, 0);
  });
  wheel.add(first, 5);
  wheel.add(second, 5);
  clock.advance(100);
  assert.deepEqual(order, ["first", "first", "first"]);
  assert.equal(wheel.size, 0);
});

test("timer wheel: a target that throws does not lose the timers behind it", () => {
  const clock = new ManualClock();
  const wheel = new TimerWheel({ clock, tickMs: 10, slotCount: 4 });
  let fired = false;
  wheel.add(
    aTimer(() => {
      throw new Error("defect");
    }),
    5,
  );
  wheel.add(
    aTimer(() => (fired = true)),
    5,
  );
  assert.throws(() => clock.advance(10), /defect/);
  clock.advance(20);
  assert.ok(fired);
});

test("timer wheel: close forgets everything", () => {
  const clock = new ManualClock();
  const wheel = new TimerWheel({ clock });
  for (let i = 0; i < 100; i++)
    wheel.add(
      aTimer(() => assert.fail("fired after close")),
      i * 100,
    );
  wheel.close();
  assert.equal(wheel.size, 0);
  assert.equal(clock.pendingTimerCount, 0);
  clock.advance(100_000);
});

test("timer wheel: agrees with a plain list of deadlines under random adds, cancels and steps", () => {
  const step = fc.oneof(
    fc.record({ kind: fc.constant("add" as const), id: fc.nat(15), ms: fc.nat(900) }),
    fc.record({ kind: fc.constant("cancel" as const), id: fc.nat(15), ms: fc.constant(0) }),
    fc.record({ kind: fc.constant("advance" as const), id: fc.constant(0), ms: fc.nat(600) }),
  );
  fc.assert(
    fc.property(fc.array(step, { maxLength: 80 }), (steps) => {
      const clock = new ManualClock();
      const wheel = new TimerWheel({ clock, tickMs: 10, slotCount: 8 });
      const due = new Map<number, number>();
      const timers = Array.from({ length: 16 }, (_, id) =>
        aTimer(() => {
          const dueMs = due.get(id);
          assert.notEqual(dueMs, undefined, "fired without a deadline");
          assert.ok(clock.monotonicMs() >= dueMs! && clock.monotonicMs() <= dueMs! + 10, "fired off its time");
          due.delete(id);
        }),
      );
      for (const { kind, id, ms } of steps) {
        if (kind === "add") {
          wheel.add(timers[id]!, ms);
          due.set(id, clock.monotonicMs() + ms);
        } else if (kind === "cancel") {
          wheel.cancel(timers[id]!);
          due.delete(id);
        } else {
          clock.advance(ms);
          for (const dueMs of due.values()) assert.ok(dueMs + 10 > clock.monotonicMs(), "a deadline was missed");
        }
        assert.equal(wheel.size, due.size);
      }
    }),
  );
});
