import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { GaugeChild } from "../observability/index.ts";
import { ManualClock, SeededRandom } from "../std/index.ts";
import { AdmissionGate, ModelPlaces, type GateEntry } from "./admission.ts";

interface Caller extends GateEntry {
  state: "waiting" | "in" | "refused" | "left";
  error: DynamoError | undefined;
}

function aCaller(tenant = "", cost = 1): Caller {
  return {
    tenant,
    cost,
    patienceMs: Infinity,
    strictPriority: 0,
    priorityJump: 0,
    order: 0,
    key: 0,
    position: -1,
    state: "waiting",
    error: undefined,
    onAdmitted() {
      this.state = "in";
    },
    onRefused(error) {
      this.state = "refused";
      this.error = error;
    },
  };
}

function aGate(limit: number, queueLimit: number) {
  const clock = new ManualClock();
  const queued = new GaugeChild();
  const gate = new AdmissionGate({ limit, queueLimit, clock, queuedGauge: queued });
  const enter = (places: ModelPlaces, caller: Caller): Caller => {
    if (gate.tryEnter(places, caller.cost)) caller.state = "in";
    else {
      try {
        gate.enter(places, caller);
      } catch (thrown) {
        assert.ok(thrown instanceof DynamoError);
        caller.state = "refused";
        caller.error = thrown;
      }
    }
    return caller;
  };
  return { gate, clock, queued, enter };
}

const unlimited = (): ModelPlaces => new ModelPlaces(() => Infinity);

test("admission: places are given in order of arrival and a released place goes to the longest waiting", () => {
  const { gate, queued, enter } = aGate(1, 2);
  const places = unlimited();
  const [first, second, third] = [aCaller(), aCaller(), aCaller()].map((caller) => enter(places, caller));
  assert.deepEqual([first!.state, second!.state, third!.state], ["in", "waiting", "waiting"]);
  assert.equal(queued.value, 2);
  gate.release(places, 1);
  assert.deepEqual([second!.state, third!.state], ["in", "waiting"]);
  gate.release(places, 1);
  assert.equal(third!.state, "in");
  gate.release(places, 1);
  assert.equal(gate.activeCount, 0);
  assert.equal(places.active, 0);
  assert.equal(queued.value, 0);
});

test("admission: nobody overtakes those who wait, and who leaves takes no place", () => {
  const { gate, enter } = aGate(2, 4);
  const places = new ModelPlaces(() => 2);
  enter(places, aCaller());
  const large = enter(places, aCaller("", 2));
  assert.equal(large.state, "waiting", "it needs both places");
  const small = enter(places, aCaller());
  assert.equal(small.state, "waiting", "there is a place, and somebody before it");
  gate.leave(places, large);
  assert.equal(small.state, "in");
  gate.leave(places, large);
  gate.leave(places, small);
  assert.equal(gate.activeCount, 2);
  assert.equal(gate.queuedCount, 0);
});

test("admission: what asks for more places than the model has gets them when it is alone", () => {
  const { gate, enter } = aGate(10, 4);
  const places = new ModelPlaces(() => 2);
  enter(places, aCaller());
  const huge = enter(places, aCaller("", 5));
  assert.equal(huge.state, "waiting");
  gate.release(places, 1);
  assert.equal(huge.state, "in");
  assert.equal(enter(places, aCaller()).state, "waiting");
});

test("admission: a full model does not hold up another one, and a limit that grows lets in who waits", () => {
  const { gate, enter } = aGate(10, 10);
  let limit = 1;
  const slow = new ModelPlaces(() => limit);
  const other = new ModelPlaces(() => 1);
  enter(slow, aCaller());
  const waiting = [aCaller(), aCaller()].map((caller) => enter(slow, caller));
  assert.equal(enter(other, aCaller()).state, "in");
  limit = 2;
  gate.drain();
  assert.deepEqual(
    waiting.map(({ state }) => state),
    ["in", "waiting"],
  );
});

test("admission: a tenant that floods the gate fills the queue for itself only", () => {
  const { gate, enter } = aGate(1, 4);
  const places = unlimited();
  enter(places, aCaller("hog"));
  const flood = [1, 2, 3, 4].map(() => enter(places, aCaller("hog")));
  assert.equal(enter(places, aCaller("hog")).error?.reason, "too-many-requests");
  const small = enter(places, aCaller("small"));
  assert.equal(small.state, "waiting");
  assert.deepEqual(
    flood.map(({ state }) => state),
    ["waiting", "waiting", "waiting", "refused"],
  );
  assert.equal(flood[3]!.error?.reason, "too-many-requests");
  gate.release(places, 1);
  gate.release(places, 1);
  assert.equal(small.state, "in", "second in turn, though three came before");
});

test("admission: who would wait in vain is refused at once, once the pace is known", () => {
  const { gate, clock, enter } = aGate(1, 100);
  const places = unlimited();
  enter(places, aCaller());
  const patient = Array.from({ length: 20 }, () => enter(places, aCaller()));
  const early = enter(places, { ...aCaller(), patienceMs: 500 });
  assert.equal(early.state, "waiting", "nothing is known yet");
  for (let i = 0; i < 10; i++) {
    clock.advance(100);
    gate.release(places, 1);
  }
  assert.equal(patient.filter(({ state }) => state === "in").length, 10);
  const refused = enter(places, { ...aCaller(), patienceMs: 500 });
  assert.equal(refused.error?.reason, "too-many-requests", "eleven before it, 100 ms each");
  assert.equal(enter(places, { ...aCaller(), patienceMs: 2_000 }).state, "waiting");
  assert.equal(enter(places, { ...aCaller("other"), patienceMs: 500 }).state, "waiting", "it is another one's queue");
});

test("admission: any mix of entering, leaving and releasing keeps the limits, and at rest nothing is left", () => {
  const step = fc.record({
    type: fc.constantFrom("enter", "enter", "release", "leave"),
    tenant: fc.constantFrom("a", "b", "c"),
    model: fc.nat(1),
    cost: fc.integer({ min: 1, max: 3 }),
    at: fc.nat(),
  });
  fc.assert(
    fc.property(fc.array(step, { maxLength: 100 }), (steps) => {
      const { gate, clock, queued, enter } = aGate(4, 5);
      const models = [new ModelPlaces(() => 3), new ModelPlaces(() => 2)];
      const callers: { caller: Caller; places: ModelPlaces }[] = [];
      const finish = (state: "in" | "waiting", at: number): void => {
        const some = callers.filter(({ caller }) => caller.state === state);
        if (some.length === 0) return;
        const { caller, places } = some[at % some.length]!;
        caller.state = "left";
        if (state === "in") gate.release(places, caller.cost);
        else gate.leave(places, caller);
      };
      for (const { type, tenant, model, cost, at } of steps) {
        clock.advance(7);
        if (type === "enter")
          callers.push({ caller: enter(models[model]!, aCaller(tenant, cost)), places: models[model]! });
        else finish(type === "release" ? "in" : "waiting", at);
        const inside = callers.filter(({ caller }) => caller.state === "in");
        const waiting = callers.filter(({ caller }) => caller.state === "waiting");
        assert.equal(gate.activeCount, inside.length);
        assert.equal(gate.queuedCount, waiting.length);
        assert.equal(queued.value, waiting.length);
        assert.ok(inside.length <= 4 && waiting.length <= 5);
        for (const places of models) {
          const taken = inside.filter((each) => each.places === places);
          assert.equal(
            places.active,
            taken.reduce((sum, { caller }) => sum + caller.cost, 0),
          );
          assert.ok(places.active <= places.limit || taken.length === 1);
        }
        // Nobody waits while the one whose turn it is could go in.
        if (inside.length < 4) {
          for (const { queue, ...places } of models.map((each) => ({ queue: each.queue, each }))) {
            const next = queue.peek();
            if (next !== undefined) assert.ok(!places.each.hasRoom(next.cost));
          }
        }
      }
      while (callers.some(({ caller }) => caller.state === "in")) finish("in", 0);
      assert.equal(gate.activeCount + gate.queuedCount, 0);
      assert.deepEqual(
        models.map(({ active }) => active),
        [0, 0],
      );
    }),
  );
});

/** Ten places of 100 to 300 ms, a queue of twenty; whoever is refused comes back exactly when told. */
function retriesAdmitted(burst: number): { first: number; refused: number; longestMs: number } {
  const { gate, clock, enter } = aGate(10, 20);
  const places = unlimited();
  const random = new SeededRandom(7);
  const serve = (caller: Caller): void => {
    clock.setTimer(100 + 200 * random.nextFloat(), () => {
      caller.state = "left";
      gate.release(places, caller.cost);
    });
  };
  let refused = 0;
  let first = 0;
  let longestMs = 0;
  const call = (attempt: number): void => {
    const caller = aCaller();
    caller.onAdmitted = () => serve(caller);
    enter(places, caller);
    if (caller.state === "in") serve(caller);
    if (caller.state !== "refused") {
      if (attempt === 2) first++;
      return;
    }
    if (attempt === 1) refused++;
    const waitMs = caller.error!.retryAfterMs!;
    longestMs = Math.max(longestMs, waitMs);
    clock.setTimer(waitMs, () => call(attempt + 1));
  };
  // Full for a while first, so that the pace is known.
  for (let i = 0; i < 100; i++) clock.setTimer(i * 20, () => call(0));
  clock.advance(1_900);
  for (let i = 0; i < burst; i++) call(1);
  clock.advance(600_000);
  assert.equal(gate.activeCount + gate.queuedCount, 0);
  return { first, refused, longestMs };
}

test("admission: whoever waits exactly as long as told is let in, nearly always at the first try", () => {
  for (const burst of [50, 200, 500]) {
    const { first, refused, longestMs } = retriesAdmitted(burst);
    assert.ok(refused >= burst - 30, `${refused} of ${burst} refused`);
    assert.ok(first / refused > 0.9, `burst of ${burst}: ${first} of ${refused} let in at the first retry`);
    // Twenty milliseconds a place: nobody is sent away for much longer than it takes.
    assert.ok(longestMs < burst * 20 * 2, `burst of ${burst}: up to ${longestMs} ms`);
  }
});
