import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { ManualClock } from "../../std/index.ts";
import type { EventPlane } from "./base.ts";
import { Witness, eventPlaneBattery, range, text, until } from "./event-plane.battery.ts";
import { REPLAY_DEADLINE_MS } from "./limits.ts";
import { MemoryEventBus, MemoryEventPlane, type MemoryEventBusOptions } from "./memory.ts";

eventPlaneBattery("memory event plane", () => {
  const bus = new MemoryEventBus();
  const planes: EventPlane[] = [];
  return {
    open() {
      const plane = new MemoryEventPlane({ bus });
      planes.push(plane);
      return plane;
    },
    async close() {
      await Promise.all(planes.map((plane) => plane.close()));
      assert.equal(bus.topicCount, 0, "a topic is left on the bus");
    },
  };
});

/** A plane whose deliveries run when the test says so. */
function aPlane(options: MemoryEventBusOptions = {}) {
  const clock = new ManualClock();
  const pending: (() => void)[] = [];
  const plane = new MemoryEventPlane({
    bus: new MemoryEventBus(options),
    clock,
    schedule: (run) => pending.push(run),
  });
  const settle = () => {
    for (let run = pending.shift(); run !== undefined; run = pending.shift()) run();
  };
  return { plane, clock, settle };
}

test("memory event plane: nothing is delivered within the call that publishes", async () => {
  const { plane, settle } = aPlane();
  const witness = new Witness();
  await plane.subscribe("load", witness);
  const publisher = await plane.publish("load");
  publisher.publish(text("x"));
  assert.equal(witness.calls.length, 0);
  settle();
  assert.equal(witness.calls.length, 1);
  await plane.close();
});

test("memory event plane: a lost event is replayed from the ring, the last one too", async () => {
  const lose = new Set([3, 4, 10]);
  const { plane, settle } = aPlane({ drop: (kind, _topic, _id, sequence) => kind === "event" && lose.has(sequence) });
  const witness = new Witness();
  await plane.subscribe("load", witness);
  const publisher = await plane.publish("load");
  for (let i = 0; i < 10; i++) publisher.publish(text("x"));
  settle();
  assert.deepEqual(witness.sequences, range(1, 10));
  assert.deepEqual(witness.gaps, []);
  await plane.close();
});

test("memory event plane: an event that comes again behind its successor is delivered once", async () => {
  const { plane, settle } = aPlane({ repeat: (_topic, _id, sequence) => sequence % 3 === 0 });
  const witness = new Witness();
  await plane.subscribe("load", witness);
  const publisher = await plane.publish("load");
  for (let i = 0; i < 10; i++) publisher.publish(text("x"));
  settle();
  assert.deepEqual(witness.sequences, range(1, 10));
  assert.deepEqual(witness.gaps, []);
  await plane.close();
  assert.equal(plane.statistics.duplicates, 3);
});

test("memory event plane: a lost event that left the ring is a gap, in its place among the events", async () => {
  const lose = new Set([3, 4, 5]);
  const { plane, settle } = aPlane({ drop: (kind, _topic, _id, sequence) => kind === "event" && lose.has(sequence) });
  const witness = new Witness();
  await plane.subscribe("load", witness);
  const publisher = await plane.publish("load", { publisherId: "00000000000000aa", ringSize: 2 });
  for (let i = 0; i < 6; i++) publisher.publish(text("x"));
  settle();
  const id = "00000000000000aa";
  assert.deepEqual(witness.calls, [`${id} 1 x`, `${id} 2 x`, `${id} gap 3-4`, `${id} 5 x`, `${id} 6 x`]);
  assert.equal(plane.statistics.gaps, 1);
  assert.equal(plane.statistics.lost, 2);
  await plane.close();
});

test("memory event plane: an unanswered replay is given up at its deadline", async () => {
  const { plane, clock, settle } = aPlane({
    drop: (kind, _topic, _id, sequence) => kind === "replay" || (kind === "event" && sequence === 2),
  });
  const witness = new Witness();
  await plane.subscribe("load", witness);
  const publisher = await plane.publish("load");
  for (let i = 0; i < 3; i++) publisher.publish(text("x"));
  settle();
  assert.deepEqual(witness.sequences, [1]);
  clock.advance(REPLAY_DEADLINE_MS - 1);
  assert.deepEqual(witness.sequences, [1]);
  clock.advance(1);
  assert.deepEqual(
    witness.gaps.map(({ from, to }) => [from, to]),
    [[2, 2]],
  );
  assert.deepEqual(witness.sequences, [1, 3]);
  await plane.close();
  assert.equal(clock.pendingTimerCount, 0);
});

test("memory event plane: a full queue drops the newest, which come by replay or as a gap", async () => {
  const { plane, settle } = aPlane({ queueEvents: 100 });
  const witness = new Witness();
  await plane.subscribe("load", witness);
  const publisher = await plane.publish("load", { ringSize: 50 });
  for (let i = 0; i < 1000; i++) publisher.publish(text("x"));
  settle();
  assert.equal(plane.statistics.overflows, 900);
  assert.deepEqual(
    witness.gaps.map(({ from, to }) => [from, to]),
    [[101, 950]],
  );
  assert.deepEqual(witness.sequences, [...range(1, 100), ...range(951, 1000)]);
  await plane.close();
});

test("memory event plane: closing while events, replays and deadlines are pending leaves nothing to run", async () => {
  const { plane, clock, settle } = aPlane({ drop: (kind, _t, _i, sequence) => kind === "replay" || sequence === 2 });
  const witness = new Witness();
  const subscription = await plane.subscribe("load", witness);
  const publisher = await plane.publish("load");
  for (let i = 0; i < 3; i++) publisher.publish(text("x"));
  settle();
  assert.equal(clock.pendingTimerCount, 1);
  publisher.publish(text("x"));
  await subscription.close();
  const before = witness.calls.length;
  settle();
  assert.equal(witness.calls.length, before);
  assert.equal(clock.pendingTimerCount, 0);
  await plane.close();
});

test("memory event plane: whatever is lost at random, every subscriber can account for every sequence", async () => {
  const loss = fc.record({
    losses: fc.array(fc.boolean(), { maxLength: 200 }),
    ringSize: fc.integer({ min: 1, max: 64 }),
  });
  await fc.assert(
    fc.asyncProperty(loss, fc.integer({ min: 1, max: 80 }), async ({ losses, ringSize }, queueEvents) => {
      let at = 0;
      const { plane, clock, settle } = aPlane({ queueEvents, drop: () => losses[at++] === true });
      const witness = new Witness();
      await plane.subscribe("load", witness);
      const publisher = await plane.publish("load", { publisherId: "00000000000000aa", ringSize });
      for (let i = 1; i <= 150; i++) {
        publisher.publish(text(`${i}`));
        if (i % 20 === 0) settle();
        if (i % 50 === 0) clock.advance(REPLAY_DEADLINE_MS);
      }
      losses.length = 0;
      for (let i = 0; i < 5; i++) {
        publisher.publish(text(`${150 + i + 1}`));
        settle();
        clock.advance(REPLAY_DEADLINE_MS);
        settle();
      }
      let next = 0;
      for (const call of witness.calls) {
        const gap = /gap (\d+)-(\d+)$/.exec(call);
        const [from, to] = gap === null ? [Number(call.split(" ")[1]), 0] : [Number(gap[1]), Number(gap[2])];
        if (next !== 0) assert.equal(from, next);
        if (gap === null) assert.equal(call, `00000000000000aa ${from} ${from}`);
        next = (gap === null ? from : to) + 1;
      }
      assert.equal(next, 156);
      await plane.close();
    }),
    { numRuns: 200 },
  );
});

test("memory event plane: one subscription does not wait for another's handler", async () => {
  const bus = new MemoryEventBus();
  const plane = new MemoryEventPlane({ bus });
  const witness = new Witness();
  await plane.subscribe("load", {
    onEvent: () => {
      throw new Error("always");
    },
    onGap: () => undefined,
  });
  await plane.subscribe("load", witness);
  const publisher = await plane.publish("load");
  publisher.publish(text("x"));
  await until(() => witness.calls.length === 1, "the other saw it");
  assert.equal(plane.statistics.handlerErrors, 1);
  await plane.close();
});

test("memory event plane: a publisher that leaves while its last event is lost reports it lost, and throws nothing", async () => {
  const { plane, settle } = aPlane({ drop: (kind) => kind !== "replay" });
  const witness = new Witness();
  await plane.subscribe("load", witness);
  const publisher = await plane.publish("load");
  settle();
  publisher.publish(text("x"));
  settle();
  assert.equal(witness.calls.length, 0);
  await publisher.close();
  settle();
  assert.deepEqual([witness.sequences, witness.gaps.length, witness.gone.length], [[], 1, 1]);
  await plane.close();
});

test("memory event plane: a beacon that was lost comes again, and brings the event back", async () => {
  let isCut = true;
  const { plane, clock, settle } = aPlane({ drop: () => isCut });
  const witness = new Witness();
  await plane.subscribe("load", witness);
  const publisher = await plane.publish("load");
  publisher.publish(text("x"));
  settle();
  clock.advance(1_000);
  settle();
  assert.equal(witness.calls.length, 0);
  isCut = false;
  clock.advance(1_000);
  settle();
  assert.deepEqual([witness.sequences, witness.gaps.length], [[1], 0]);
  await plane.close();
  assert.equal(clock.pendingTimerCount, 0);
});

test("memory event plane: an abandoned plane hears, says and answers nothing; losses are told whose they are", async () => {
  const bus = new MemoryEventBus({ drop: (_kind, _topic, _id, _sequence, to) => to === "deaf" });
  const turns: (() => void)[] = [];
  const open = (name: string): MemoryEventPlane =>
    new MemoryEventPlane({ bus, name, schedule: (run) => turns.push(run) });
  const settle = (): void => {
    for (let run = turns.shift(); run !== undefined; run = turns.shift()) run();
  };
  const [speaker, hearer, deaf] = [open("speaker"), open("hearer"), open("deaf")];
  const [heard, missed] = [new Witness(), new Witness()];
  await hearer.subscribe("load", heard);
  await deaf.subscribe("load", missed);
  const publisher = await speaker.publish("load");
  publisher.publish(text("x"));
  settle();
  assert.deepEqual([heard.calls.length, missed.calls.length], [1, 0]);
  hearer.abandon();
  publisher.publish(text("x"));
  settle();
  assert.equal(heard.calls.length, 1);
  await Promise.all([speaker.close(), hearer.close(), deaf.close()]);
  assert.equal(bus.topicCount, 0);
});

test("memory event plane: a publisher that is held back is overtaken by another, and its own order stays", async () => {
  let isHeld = true;
  const [slowId, quickId] = ["0".repeat(15) + "a", "0".repeat(15) + "b"];
  const bus = new MemoryEventBus({ hold: (_topic, publisherId) => publisherId === slowId && isHeld });
  const pending: (() => void)[] = [];
  const plane = new MemoryEventPlane({ bus, clock: new ManualClock(), schedule: (run) => pending.push(run) });
  const got: string[] = [];
  await plane.subscribe("load", {
    onEvent: (publisherId, sequence) => void got.push(`${publisherId === slowId ? "slow" : "quick"} ${sequence}`),
    onGap: () => assert.fail("nothing was lost"),
  });
  const [slow, quick] = [
    await plane.publish("load", { publisherId: slowId }),
    await plane.publish("load", { publisherId: quickId }),
  ];
  for (let i = 0; i < 2; i++) for (const publisher of [slow, quick]) publisher.publish(text("x"));
  pending.shift()!();
  assert.deepEqual(got, ["quick 1", "quick 2"]);
  isHeld = false;
  for (let run = pending.shift(); run !== undefined; run = pending.shift()) run();
  assert.deepEqual(got, ["quick 1", "quick 2", "slow 1", "slow 2"]);
  await plane.close();
});
