import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../../errors/index.ts";
import { ManualClock } from "../../std/index.ts";
import { RouteQueue, type QueueItem, type QueuePolicy } from "./queue.ts";

interface Item extends QueueItem {
  readonly id: number;
  readonly cached: number;
}

function anItem(id: number, overrides: Partial<Item> = {}): Item {
  return {
    id,
    promptTokens: 100,
    strictPriority: 0,
    priorityJump: 0,
    deadlineMs: undefined,
    isConstrained: false,
    cached: 0,
    ...overrides,
  };
}

/** A queue whose place opens when told, with the order in which items were placed. */
function aQueue(options: { policy?: QueuePolicy; limit?: number; refreshAfterMs?: number } = {}) {
  const clock = new ManualClock();
  const placed: number[] = [];
  const state = { room: 0, refused: new Set<number>(), pinnedShut: false, cached: new Map<number, number>() };
  const queue = new RouteQueue<Item, number>({
    clock,
    policy: options.policy ?? "fcfs",
    limit: options.limit ?? 100,
    refreshAfterMs: options.refreshAfterMs ?? 0,
    place: (item) => {
      if (state.refused.has(item.id)) throw new DynamoError("no-workers", "none");
      if (state.room === 0 || (item.isConstrained && state.pinnedShut)) return undefined;
      state.room--;
      placed.push(item.id);
      return item.id;
    },
    cachedTokens: (item) => state.cached.get(item.id) ?? item.cached,
  });
  const enter = (item: Item) => {
    const waiting = queue.enter(item);
    const outcome: { reason?: string } = {};
    waiting.decision.catch((error: unknown) => (outcome.reason = (error as DynamoError).reason));
    return Object.assign(waiting, { outcome });
  };
  const openFor = (room: number) => {
    state.room = room;
    queue.drain();
  };
  return { queue, clock, placed, state, enter, openFor };
}

test("queue: fcfs in order of arrival, a jump is a head start in seconds, a strict priority goes before all", () => {
  const { clock, placed, enter, openFor } = aQueue();
  enter(anItem(1));
  clock.advance(1_000);
  enter(anItem(2));
  clock.advance(1_000);
  enter(anItem(3, { priorityJump: 1.5 }));
  enter(anItem(4, { priorityJump: -50 }));
  clock.advance(5_000);
  enter(anItem(5, { strictPriority: 1 }));
  openFor(5);
  assert.deepEqual(placed, [5, 1, 3, 2, 4]);
});

test("queue: lcfs serves the newest, wspt the least uncached work, raised by its jump", () => {
  const lcfs = aQueue({ policy: "lcfs" });
  for (const id of [1, 2, 3]) {
    lcfs.enter(anItem(id));
    lcfs.clock.advance(10);
  }
  lcfs.openFor(3);
  assert.deepEqual(lcfs.placed, [3, 2, 1]);
  const wspt = aQueue({ policy: "wspt" });
  wspt.enter(anItem(1, { promptTokens: 100 }));
  wspt.enter(anItem(2, { promptTokens: 1_000, cached: 950 }));
  wspt.enter(anItem(3, { promptTokens: 400, priorityJump: 9 }));
  wspt.openFor(3);
  assert.deepEqual(wspt.placed, [3, 2, 1]);
});

test("queue: full is refused with too-many-requests, and leaving makes room again", async () => {
  const { queue, enter } = aQueue({ limit: 2 });
  const first = enter(anItem(1));
  enter(anItem(2));
  assert.throws(
    () => enter(anItem(3)),
    (error) => error instanceof DynamoError && error.reason === "too-many-requests",
  );
  first.cancel(new DynamoError("client-gone", "gone"));
  first.cancel(new DynamoError("client-gone", "gone"));
  await assert.rejects(first.decision, (error) => error instanceof DynamoError && error.reason === "client-gone");
  enter(anItem(4));
  assert.equal(queue.length, 2);
});

test("queue: a deadline ends the wait, also of one that is not first, and a placed one is left alone", async () => {
  const { clock, queue, enter, openFor } = aQueue();
  const first = enter(anItem(1, { deadlineMs: 10_000 }));
  const second = enter(anItem(2, { deadlineMs: 500 }));
  clock.advance(600);
  await assert.rejects(second.decision, (error) => error instanceof DynamoError && error.reason === "request-deadline");
  openFor(1);
  assert.equal(await first.decision, 1);
  clock.advance(20_000);
  assert.equal(queue.length, 0);
  assert.equal(clock.pendingTimerCount, 0);
});

test("queue: what place refuses goes to its waiter only", async () => {
  const { state, placed, enter, openFor } = aQueue();
  const bad = enter(anItem(1));
  enter(anItem(2));
  state.refused.add(1);
  openFor(2);
  await assert.rejects(bad.decision, /none/);
  assert.deepEqual(placed, [2]);
});

test("queue: a request bound to a full worker does not hold up those behind it, and keeps its place", () => {
  const { state, placed, enter, openFor } = aQueue();
  enter(anItem(1, { isConstrained: true }));
  enter(anItem(2));
  state.pinnedShut = true;
  openFor(1);
  assert.deepEqual(placed, [2]);
  enter(anItem(3));
  state.pinnedShut = false;
  openFor(2);
  assert.deepEqual(placed, [2, 1, 3]);
});

test("queue: after the refresh time a request gets its place by its overlap of now", () => {
  const { clock, state, placed, enter, openFor } = aQueue({ policy: "wspt", refreshAfterMs: 1_000 });
  enter(anItem(1, { promptTokens: 1_000, cached: 990 }));
  enter(anItem(2, { promptTokens: 500 }));
  state.cached.set(1, 0);
  clock.advance(999);
  openFor(0);
  clock.advance(1);
  openFor(2);
  assert.deepEqual(placed, [2, 1]);
});

test("queue: closing refuses everybody and leaves no timer", async () => {
  const { clock, queue, enter } = aQueue();
  const waiting = [1, 2, 3].map((id) => enter(anItem(id, { deadlineMs: 5_000 })));
  queue.close(new DynamoError("draining", "bye"));
  for (const { decision } of waiting) await assert.rejects(decision, /bye/);
  assert.equal(clock.pendingTimerCount, 0);
});

test("queue: any mix of entering, cancelling and draining serves by (strict, key, arrival) and loses nobody", () => {
  const step = fc.oneof(
    fc.record({ kind: fc.constant("enter" as const), strict: fc.nat(2), jump: fc.nat(3), tokens: fc.nat(500) }),
    fc.record({ kind: fc.constant("cancel" as const), which: fc.nat(50) }),
    fc.record({ kind: fc.constant("drain" as const), room: fc.nat(3) }),
  );
  fc.assert(
    fc.property(
      fc.array(step, { maxLength: 60 }),
      fc.constantFrom<QueuePolicy>("fcfs", "lcfs", "wspt"),
      (steps, policy) => {
        const { clock, queue, placed, enter, openFor } = aQueue({ policy });
        const waiting = new Map<number, { item: Item; arrivalMs: number; cancel: (error: DynamoError) => void }>();
        let ids = 0;
        const key = ({ item, arrivalMs }: { item: Item; arrivalMs: number }): number => {
          if (policy === "wspt") return (1 + item.priorityJump) / Math.max(1, item.promptTokens);
          return item.priorityJump + ((policy === "fcfs" ? -1 : 1) * arrivalMs) / 1_000;
        };
        for (const one of steps) {
          clock.advance(100);
          if (one.kind === "enter") {
            const item = anItem(ids++, {
              strictPriority: one.strict,
              priorityJump: one.jump,
              promptTokens: one.tokens,
            });
            waiting.set(item.id, { item, arrivalMs: clock.monotonicMs(), cancel: (error) => handle.cancel(error) });
            const handle = enter(item);
          } else if (one.kind === "cancel") {
            const target = [...waiting.values()][one.which % Math.max(1, waiting.size)];
            target?.cancel(new DynamoError("cancelled", "x"));
            if (target !== undefined) waiting.delete(target.item.id);
          } else {
            const expected = [...waiting.values()]
              .toSorted(
                (a, b) => b.item.strictPriority - a.item.strictPriority || key(b) - key(a) || a.item.id - b.item.id,
              )
              .slice(0, one.room)
              .map(({ item }) => item.id);
            const before = placed.length;
            openFor(one.room);
            assert.deepEqual(placed.slice(before), expected);
            for (const id of expected) waiting.delete(id);
          }
          assert.equal(queue.length, waiting.size);
        }
      },
    ),
    { numRuns: 200 },
  );
});
