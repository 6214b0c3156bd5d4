import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { EventRing } from "./event-ring.ts";
import { NaiveSequenceTracker } from "./naive-sequence-tracker.ts";
import { SequenceTracker, type SequenceSink } from "./sequence-tracker.ts";

/** Records every call as text, adjacent losses joined, so that two trackers can be compared as lists. */
class Recorder implements SequenceSink {
  readonly calls: string[] = [];
  readonly asks: { from: number; to: number }[] = [];
  #lostFrom = 0;
  #lostTo = 0;

  deliver(sequence: number, payload: Uint8Array): void {
    this.#flush();
    this.calls.push(`deliver ${sequence} ${payload[0]}`);
  }
  lost(from: number, to: number): void {
    assert.ok(from <= to);
    if (this.#lostFrom !== 0 && this.#lostTo + 1 === from) {
      this.#lostTo = to;
      return;
    }
    this.#flush();
    this.#lostFrom = from;
    this.#lostTo = to;
  }
  ask(from: number, to: number): void {
    this.#flush();
    assert.ok(from >= 1 && from <= to);
    this.asks.push({ from, to });
    this.calls.push(`ask ${from}-${to}`);
  }
  doubt(): void {
    this.#flush();
    this.calls.push("doubt");
  }
  restarted(): void {
    this.#flush();
    this.calls.push("restarted");
  }
  #flush(): void {
    if (this.#lostFrom !== 0) this.calls.push(`lost ${this.#lostFrom}-${this.#lostTo}`);
    this.#lostFrom = 0;
  }
  take(): string[] {
    this.#flush();
    return this.calls.splice(0);
  }
}

function aTracker(start: "earliest" | "latest" = "latest", heldEvents = 1000, heldBytes = 1_000_000) {
  const sink = new Recorder();
  return { sink, tracker: new SequenceTracker(sink, { start, heldEvents, heldBytes }) };
}

const bytes = (value: number): Uint8Array => Uint8Array.of(value & 255);

test("sequence tracker: starting at latest, the first live event is the start and no gap", () => {
  const { sink, tracker } = aTracker("latest");
  tracker.live(41, bytes(41));
  tracker.live(42, bytes(42));
  assert.deepEqual(sink.take(), ["deliver 41 41", "deliver 42 42"]);
});

test("sequence tracker: starting at latest, a beacon sets the start, and what is missed after it is asked for", () => {
  const { sink, tracker } = aTracker("latest");
  tracker.beacon("a", 7);
  assert.deepEqual(sink.take(), []);
  tracker.live(9, bytes(9));
  assert.deepEqual(sink.take(), ["ask 8-8"]);
  tracker.replayed("a", 8, 9, [bytes(8)]);
  assert.deepEqual(sink.take(), ["deliver 8 8", "deliver 9 9"]);
});

test("sequence tracker: starting at earliest, the ring comes first and what it no longer holds is no gap", () => {
  const { sink, tracker } = aTracker("earliest");
  tracker.live(6, bytes(6));
  tracker.live(7, bytes(7));
  assert.deepEqual(sink.take(), ["ask 1-5"]);
  tracker.replayed("a", 4, 7, [bytes(4), bytes(5)]);
  assert.deepEqual(sink.take(), ["deliver 4 4", "deliver 5 5", "deliver 6 6", "deliver 7 7"]);
});

test("sequence tracker: a replay that fails before the first event is a gap, because the ring was not seen", () => {
  const { sink, tracker } = aTracker("earliest");
  tracker.live(3, bytes(3));
  tracker.replayFailed();
  assert.deepEqual(sink.take(), ["ask 1-2", "lost 1-2", "deliver 3 3"]);
});

test("sequence tracker: a beacon shows the loss of the last event", () => {
  const { sink, tracker } = aTracker();
  tracker.live(1, bytes(1));
  tracker.beacon("a", 3);
  assert.deepEqual(sink.take(), ["deliver 1 1", "ask 2-3"]);
  tracker.replayed("a", 3, 3, [bytes(3)]);
  assert.deepEqual(sink.take(), ["lost 2-2", "deliver 3 3"]);
});

test("sequence tracker: a replay in pages is asked for page by page", () => {
  const { sink, tracker } = aTracker("earliest");
  tracker.beacon("a", 5);
  tracker.replayed("a", 1, 5, [bytes(1), bytes(2)]);
  tracker.replayed("a", 3, 5, [bytes(3), bytes(4), bytes(5)]);
  assert.deepEqual(sink.take(), [
    "ask 1-5",
    "deliver 1 1",
    "deliver 2 2",
    "ask 3-5",
    "deliver 3 3",
    "deliver 4 4",
    "deliver 5 5",
  ]);
});

test("sequence tracker: a sequence that does not rise raises doubt, and another epoch starts anew at 1", () => {
  const { sink, tracker } = aTracker();
  tracker.beacon("a", 0);
  tracker.live(1, bytes(1));
  tracker.live(2, bytes(2));
  tracker.live(1, bytes(101));
  assert.deepEqual(sink.take(), ["deliver 1 1", "deliver 2 2", "doubt"]);
  assert.equal(tracker.duplicateCount, 1);
  tracker.beacon("b", 1);
  assert.deepEqual(sink.take(), ["restarted", "ask 1-1"]);
  tracker.replayed("b", 1, 1, [bytes(101)]);
  tracker.live(2, bytes(102));
  assert.deepEqual(sink.take(), ["deliver 1 101", "deliver 2 102"]);
});

test("sequence tracker: without a known epoch, a publisher behind what was delivered is another one", () => {
  const { sink, tracker } = aTracker();
  tracker.live(5, bytes(5));
  tracker.beacon("b", 2);
  assert.deepEqual(sink.take(), ["deliver 5 5", "restarted", "ask 1-2"]);
});

test("sequence tracker: an answer of another epoch voids what was asked and starts anew", () => {
  const { sink, tracker } = aTracker();
  tracker.beacon("a", 10);
  tracker.live(13, bytes(13));
  tracker.replayed("b", 11, 13, [bytes(1), bytes(2), bytes(3)]);
  assert.deepEqual(sink.take(), ["ask 11-12", "restarted", "ask 1-13"]);
});

test("sequence tracker: a full hold-back buffer drops the newest and asks for them later", () => {
  const { sink, tracker } = aTracker("latest", 2);
  tracker.beacon("a", 0);
  for (const sequence of [2, 3, 4, 5]) tracker.live(sequence, bytes(sequence));
  assert.equal(tracker.heldCount, 2);
  assert.equal(tracker.overflowCount, 2);
  tracker.replayed("a", 1, 5, [bytes(1)]);
  tracker.replayed("a", 4, 5, [bytes(4), bytes(5)]);
  assert.deepEqual(sink.take(), [
    "ask 1-1",
    "deliver 1 1",
    "deliver 2 2",
    "deliver 3 3",
    "ask 4-5",
    "deliver 4 4",
    "deliver 5 5",
  ]);
});

test("sequence tracker: the hold-back buffer is bounded in bytes too, and its room comes back", () => {
  const { sink, tracker } = aTracker("latest", 1000, 100);
  tracker.beacon("a", 0);
  for (let first = 1; first <= 9; first += 4) {
    tracker.live(first + 1, new Uint8Array(60));
    tracker.live(first + 2, new Uint8Array(60));
    assert.equal(tracker.heldCount, 1);
    tracker.replayed("a", first, first + 2, [new Uint8Array(60)]);
    tracker.replayed("a", first + 2, first + 2, [new Uint8Array(60)]);
    tracker.live(first + 3, new Uint8Array(60));
  }
  assert.equal(tracker.overflowCount, 3);
  assert.equal(sink.take().filter((call) => call.startsWith("deliver")).length, 12);
});

test("sequence tracker: the next event in order needs no room in a full hold-back buffer", () => {
  const { sink, tracker } = aTracker("latest", 1);
  tracker.beacon("a", 0);
  tracker.live(2, bytes(2));
  tracker.live(1, bytes(1));
  assert.deepEqual(sink.take(), ["ask 1-1", "doubt", "deliver 1 1", "deliver 2 2"]);
  assert.equal(tracker.overflowCount, 0);
});

test("sequence tracker: an absurd sequence number costs one ask and one gap, not a walk over the distance", () => {
  const { sink, tracker } = aTracker();
  tracker.live(1, bytes(1));
  tracker.live(2 ** 52, bytes(9));
  tracker.replayed("a", 2, 1, []);
  assert.deepEqual(sink.take(), [
    "deliver 1 1",
    `ask 2-${2 ** 52 - 1}`,
    `lost 2-${2 ** 52 - 1}`,
    `deliver ${2 ** 52} 9`,
  ]);
});

test("sequence tracker: the end of a publisher delivers what is held and reports the rest as lost", () => {
  const { sink, tracker } = aTracker();
  tracker.beacon("a", 0);
  tracker.live(3, bytes(3));
  tracker.beacon("a", 5);
  tracker.finish();
  assert.deepEqual(sink.take(), ["ask 1-2", "lost 1-2", "deliver 3 3", "lost 4-5"]);
});

/** What may happen between a publisher and a subscriber, with numbers that are taken modulo what there is. */
const step = fc.oneof(
  { weight: 6, arbitrary: fc.record({ do: fc.constant("publish" as const), pick: fc.nat(3) }) },
  { weight: 4, arbitrary: fc.record({ do: fc.constant("arrive" as const), pick: fc.nat(5) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("duplicate" as const), pick: fc.nat(50) }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant("vanish" as const), pick: fc.nat(5) }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant("beacon" as const), pick: fc.constant(0) }) },
  { weight: 3, arbitrary: fc.record({ do: fc.constant("answer" as const), pick: fc.integer({ min: 1, max: 6 }) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("fail" as const), pick: fc.constant(0) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("restart" as const), pick: fc.constant(0) }) },
);

/** A publisher with a ring of 8 and a network that loses, repeats and reorders; drives any number of trackers alike. */
class World {
  epoch = 1;
  ring = new EventRing(8, 1000);
  inFlight: { sequence: number; payload: Uint8Array }[] = [];
  sent: { sequence: number; payload: Uint8Array }[] = [];

  publish(): void {
    const payload = Uint8Array.of((this.epoch * 100 + this.ring.newest + 1) & 255);
    const event = { sequence: this.ring.push(payload), payload };
    this.inFlight.push(event);
    this.sent.push(event);
  }

  restart(): void {
    this.epoch++;
    this.ring = new EventRing(8, 1000);
    this.sent = [];
    // What was on the way ends with the connection.
    this.inFlight = [];
  }

  /** Removes one of the events on the way. */
  take(pick: number): { sequence: number; payload: Uint8Array } | undefined {
    return this.inFlight.splice(pick % Math.max(1, this.inFlight.length), 1)[0];
  }
}

interface Driven {
  live(sequence: number, payload: Uint8Array): void;
  beacon(epoch: string, newest: number): void;
  replayed(epoch: string, first: number, newest: number, payloads: readonly Uint8Array[]): void;
  replayFailed(): void;
  finish(): void;
}

function drive(tracker: Driven, sink: Recorder, steps: readonly { do: string; pick: number }[]): string[] {
  const world = new World();
  let answered = 0;
  for (const { do: what, pick } of steps) {
    const ask = sink.asks.length > answered ? sink.asks.at(-1)! : undefined;
    if (what === "publish") for (let i = 0; i <= pick; i++) world.publish();
    if (what === "vanish") world.take(pick);
    if (what === "restart") world.restart();
    if (what === "beacon") tracker.beacon(`e${world.epoch}`, world.ring.newest);
    if (what === "arrive") {
      const event = world.take(pick);
      if (event !== undefined) tracker.live(event.sequence, event.payload);
    }
    if (what === "duplicate" && world.sent.length > 0) {
      const event = world.sent[pick % world.sent.length]!;
      tracker.live(event.sequence, event.payload);
    }
    if (what === "answer" && ask !== undefined) {
      answered = sink.asks.length;
      const { first, payloads } = world.ring.page(ask.from, ask.to, pick, 1000);
      tracker.replayed(`e${world.epoch}`, first, world.ring.newest, payloads);
    }
    if (what === "fail" && ask !== undefined) {
      answered = sink.asks.length;
      tracker.replayFailed();
    }
  }
  // The network heals: a beacon, then every ask is answered.
  tracker.beacon(`e${world.epoch}`, world.ring.newest);
  for (let i = 0; i < 100 && sink.asks.length > answered; i++) {
    answered = sink.asks.length;
    const ask = sink.asks.at(-1)!;
    const { first, payloads } = world.ring.page(ask.from, ask.to, 3, 1000);
    tracker.replayed(`e${world.epoch}`, first, world.ring.newest, payloads);
  }
  assert.equal(sink.asks.length, answered, "a healed network ends every ask");
  return sink.take();
}

test("sequence tracker: does what the naive twin does under random loss, repetition, reorder, replay and restart", () => {
  fc.assert(
    fc.property(fc.array(step, { maxLength: 80 }), fc.constantFrom("earliest", "latest"), (steps, start) => {
      const real = aTracker(start);
      const naiveSink = new Recorder();
      const naive = new NaiveSequenceTracker(naiveSink, start);
      assert.deepEqual(drive(real.tracker, real.sink, steps), drive(naive, naiveSink, steps));
    }),
    { numRuns: 1500 },
  );
});

test("sequence tracker: with any hold-back size, what is delivered or lost is consecutive, true, and complete once healed", () => {
  fc.assert(
    fc.property(fc.array(step, { maxLength: 120 }), fc.integer({ min: 1, max: 5 }), (steps, heldEvents) => {
      const { sink, tracker } = aTracker("earliest", heldEvents);
      tracker.beacon("e1", 0);
      const calls = drive(tracker, sink, steps);
      let next = 0;
      for (const call of calls) {
        const [what, range, payload] = call.split(" ") as [string, string, string];
        if (what === "restarted") next = 0;
        if (what !== "deliver" && what !== "lost") continue;
        const [from, to = from] = range.split("-").map(Number) as [number, number?];
        if (next !== 0) assert.equal(from, next, `${call} after ${next - 1}`);
        if (what === "deliver") assert.ok(isPayloadOfSomeEpoch(Number(payload), from), call);
        next = to! + 1;
      }
      const published = drivenNewest(steps);
      if (published > 0) assert.equal(tracker.next, published + 1, "all that was published is accounted for");
      assert.equal(tracker.heldCount, 0);
    }),
    { numRuns: 800 },
  );
});

function isPayloadOfSomeEpoch(payload: number, sequence: number): boolean {
  for (let epoch = 1; epoch <= 200; epoch++) if (((epoch * 100 + sequence) & 255) === payload) return true;
  return false;
}

/** The newest sequence of the last publisher of a history. */
function drivenNewest(steps: readonly { do: string; pick: number }[]): number {
  let newest = 0;
  for (const { do: what, pick } of steps) {
    if (what === "publish") newest += pick + 1;
    if (what === "restart") newest = 0;
  }
  return newest;
}
