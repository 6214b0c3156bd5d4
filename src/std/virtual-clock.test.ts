import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { VirtualClock } from "./virtual-clock.ts";

test("virtual clock: runs timers by time, then by creation, and never one that was cancelled", () => {
  const step = fc.record({ delayMs: fc.nat(20), cancels: fc.option(fc.nat(30)), nested: fc.nat(5) });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 40 }), (steps) => {
      const clock = new VirtualClock();
      const ran: { dueMs: number; order: number }[] = [];
      const handles: { cancel(): void }[] = [];
      const cancelled = new Set<number>();
      const add = (delayMs: number, nested: number): void => {
        const order = handles.length;
        const dueMs = clock.monotonicMs() + delayMs;
        const run = (): void => {
          assert.equal(clock.monotonicMs(), dueMs);
          assert.ok(!cancelled.has(order));
          ran.push({ dueMs, order });
          if (nested > 0) add(nested, nested - 1);
        };
        handles.push(clock.setTimer(delayMs, run));
      };
      for (const { delayMs, cancels, nested } of steps) {
        add(delayMs, nested);
        if (cancels === null || cancels >= handles.length) continue;
        handles[cancels]!.cancel();
        cancelled.add(cancels);
      }
      while (clock.runNext());
      assert.equal(ran.length, handles.length - cancelled.size);
      for (let i = 1; i < ran.length; i++) {
        const [a, b] = [ran[i - 1]!, ran[i]!];
        assert.ok(a.dueMs < b.dueMs || (a.dueMs === b.dueMs && a.order < b.order));
      }
    }),
  );
});
