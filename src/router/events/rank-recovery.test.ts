import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { decodeKvAnswer, type KvAnswer, type KvEvent } from "../../protocol/index.ts";
import { ManualClock } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import { RankEventLog } from "../../worker/kv-publisher/rank-event-log.ts";
import { FlatKvIndex, NaiveKvIndex, type KvIndex } from "../indexer/index.ts";
import { RankRecovery } from "./rank-recovery.ts";

const CLEARED: KvEvent = { type: "cleared", dpRank: 0 };

/** One block of a chain of its own, by number. */
function stored(number: number): KvEvent {
  const { sequenceHashes, localHashes } = hashBlocks(Uint32Array.of(number), 1, blockHashSeed());
  return {
    type: "stored",
    dpRank: 0,
    tier: "device",
    parentHash: undefined,
    startBlock: 0,
    sequenceHashes,
    localHashes,
  };
}

class Recorder {
  readonly log: string[] = [];
  asked: { askNumber: number; start: number | undefined; fruitless: number } | undefined;
  readonly recovery: RankRecovery;

  constructor(maxKept?: number) {
    this.recovery = new RankRecovery(
      {
        apply: (event) => this.log.push(event.type === "stored" ? `+${event.sequenceHashes[0]! >>> 0}` : event.type),
        clear: () => this.log.push("clear"),
        ask: (askNumber, start, fruitless) => (this.asked = { askNumber, start, fruitless }),
      },
      maxKept === undefined ? {} : { maxKept },
    );
  }

  answer(answer: KvAnswer): void {
    this.recovery.onAnswer(this.asked!.askNumber, answer);
  }

  dump(lastEventId: number, events: KvEvent[] = [], epoch = 7): void {
    this.answer({
      type: "tree-dump",
      epoch,
      lastEventId,
      dumpId: 1,
      atEventId: lastEventId,
      page: 0,
      pageCount: 1,
      events,
    });
  }

  names(...numbers: number[]): string[] {
    return numbers.map((number) => `+${(stored(number) as { sequenceHashes: Uint32Array }).sequenceHashes[0]! >>> 0}`);
  }
}

/** Restored with a dump of nothing up to event 10 of epoch 7. */
function liveAtTen(maxKept?: number): Recorder {
  const recorder = new Recorder(maxKept);
  recorder.recovery.start();
  recorder.dump(10);
  recorder.log.length = 0;
  return recorder;
}

describe("rank recovery", () => {
  it("begins with a full restore, keeps events that come meanwhile, and applies them after it", () => {
    const recorder = new Recorder();
    recorder.recovery.start();
    assert.equal(recorder.asked!.start, undefined);
    recorder.recovery.onEvent(7, 3, stored(3));
    recorder.recovery.onEvent(7, 4, stored(4));
    assert.ok(recorder.recovery.recovering);
    recorder.dump(3, [stored(1), stored(2), stored(3)]);
    assert.deepEqual(recorder.log, ["clear", ...recorder.names(1, 2, 3, 4)]);
    assert.deepEqual(recorder.recovery.cursor, { kind: "live", id: 4, epoch: 7 });
    assert.ok(!recorder.recovery.recovering);
  });

  it("applies events in order and drops those that are repeated", () => {
    const recorder = liveAtTen();
    for (const id of [11, 11, 12, 10, 12]) recorder.recovery.onEvent(7, id, stored(id));
    assert.deepEqual(recorder.log, recorder.names(11, 12));
    assert.equal(recorder.recovery.duplicateCount, 3);
  });

  it("asks for what is missing at a gap, from the cursor on, and then goes on with what it kept", () => {
    const recorder = liveAtTen();
    recorder.recovery.onEvent(7, 13, stored(13));
    assert.equal(recorder.asked!.start, 11);
    recorder.recovery.onEvent(7, 14, stored(14));
    recorder.answer({ type: "events", epoch: 7, firstEventId: 11, lastEventId: 12, events: [stored(11), stored(12)] });
    assert.deepEqual(recorder.log, recorder.names(11, 12, 13, 14));
    assert.equal(recorder.recovery.missedCount, 2);
    assert.ok(!recorder.recovery.recovering);
  });

  it("asks again while the worker has more than fitted its answer", () => {
    const recorder = liveAtTen();
    recorder.recovery.suspect();
    recorder.answer({ type: "events", epoch: 7, firstEventId: 11, lastEventId: 13, events: [stored(11), stored(12)] });
    assert.equal(recorder.asked!.start, 13);
    recorder.answer({ type: "events", epoch: 7, firstEventId: 13, lastEventId: 13, events: [stored(13)] });
    assert.deepEqual(recorder.log, recorder.names(11, 12, 13));
    assert.ok(!recorder.recovery.recovering);
  });

  it("a doubt without a loss costs one question and changes nothing", () => {
    const recorder = liveAtTen();
    recorder.recovery.suspect();
    recorder.answer({ type: "too-new", epoch: 7, lastEventId: 10 });
    assert.deepEqual(recorder.log, []);
    assert.ok(!recorder.recovery.recovering);
  });

  it("a cleared event ahead of the cursor needs no restore, and voids the one under way", () => {
    const recorder = liveAtTen();
    recorder.recovery.onEvent(7, 12, stored(12));
    const voided = recorder.asked!.askNumber;
    recorder.recovery.onEvent(7, 14, CLEARED);
    assert.deepEqual(recorder.log, ["clear"]);
    assert.deepEqual(recorder.recovery.cursor, { kind: "fresh-after-barrier", id: 14, epoch: 7 });
    assert.ok(!recorder.recovery.recovering);
    recorder.recovery.onAnswer(voided, {
      type: "events",
      epoch: 7,
      firstEventId: 11,
      lastEventId: 12,
      events: [stored(11)],
    });
    assert.deepEqual(recorder.log, ["clear"]);
    assert.equal(recorder.recovery.discardedAnswerCount, 1);
    recorder.recovery.onEvent(7, 15, stored(15));
    assert.deepEqual(recorder.log, ["clear", ...recorder.names(15)]);
  });

  it("a worker that restarted with the same id is restored in full, and events of its former life are dropped", () => {
    const recorder = liveAtTen();
    recorder.recovery.onEvent(8, 1, stored(1));
    assert.equal(recorder.asked!.start, undefined);
    recorder.dump(1, [stored(1)], 8);
    assert.deepEqual(recorder.log, ["clear", ...recorder.names(1)]);
    recorder.recovery.onEvent(7, 11, stored(11));
    recorder.recovery.onEvent(8, 2, stored(2));
    assert.deepEqual(recorder.log, ["clear", ...recorder.names(1, 2)]);
    assert.equal(recorder.recovery.staleCount, 1);
  });

  it("a late event of a life it never knew does not replace the present one", () => {
    const recorder = liveAtTen();
    recorder.recovery.onEvent(5, 1, stored(99));
    recorder.dump(10);
    assert.deepEqual(recorder.recovery.cursor, { kind: "live", id: 10, epoch: 7 });
    assert.equal(recorder.recovery.staleCount, 1);
    assert.ok(!recorder.recovery.recovering);
    recorder.recovery.onEvent(5, 2, stored(98));
    assert.equal(recorder.recovery.staleCount, 2);
    assert.ok(!recorder.recovery.recovering);
  });

  it("events of a new life that come during a restore of the old one lead to another restore", () => {
    const recorder = liveAtTen();
    recorder.recovery.suspect();
    recorder.recovery.onEvent(8, 1, stored(1));
    recorder.answer({ type: "too-new", epoch: 7, lastEventId: 10 });
    assert.ok(recorder.recovery.recovering);
    assert.equal(recorder.asked!.start, undefined);
    recorder.dump(2, [stored(1), stored(2)], 8);
    assert.deepEqual(recorder.recovery.cursor, { kind: "live", id: 2, epoch: 8 });
    assert.ok(!recorder.recovery.recovering);
  });

  it("keeps a bounded number of events, and sees by their numbers that some went", () => {
    const recorder = liveAtTen(2);
    assert.equal(recorder.recovery.eventsBehind, 0);
    for (const id of [12, 13, 14, 15]) recorder.recovery.onEvent(7, id, stored(id));
    assert.equal(recorder.recovery.keptCount, 2);
    assert.equal(recorder.recovery.eventsBehind, 5);
    assert.equal(recorder.recovery.overflowCount, 2);
    recorder.answer({ type: "events", epoch: 7, firstEventId: 11, lastEventId: 12, events: [stored(11), stored(12)] });
    assert.equal(recorder.asked!.start, 13);
    recorder.answer({ type: "events", epoch: 7, firstEventId: 13, lastEventId: 15, events: [13, 14, 15].map(stored) });
    assert.deepEqual(recorder.log, recorder.names(11, 12, 13, 14, 15));
    assert.ok(!recorder.recovery.recovering);
  });

  it("a failed ask is repeated, and asks without progress are counted so that they can be spaced out", () => {
    const recorder = liveAtTen();
    recorder.recovery.suspect();
    const counts: number[] = [];
    for (let i = 0; i < 4; i++) {
      counts.push(recorder.asked!.fruitless);
      recorder.recovery.onFailure(recorder.asked!.askNumber);
    }
    assert.deepEqual(counts, [0, 1, 2, 3]);
    assert.ok(recorder.recovery.recovering);
    recorder.answer({ type: "events", epoch: 7, firstEventId: 11, lastEventId: 11, events: [stored(11)] });
    recorder.recovery.suspect();
    assert.equal(recorder.asked!.fruitless, 0);
  });

  it("a dump that breaks off starts over and leaves nothing of the first half", () => {
    const recorder = liveAtTen();
    recorder.recovery.onEvent(8, 1, stored(1));
    recorder.answer({
      type: "tree-dump",
      epoch: 8,
      lastEventId: 5,
      dumpId: 1,
      atEventId: 5,
      page: 0,
      pageCount: 2,
      events: [stored(1)],
    });
    recorder.recovery.onFailure(recorder.asked!.askNumber);
    assert.equal(recorder.asked!.start, undefined);
    recorder.dump(6, [stored(2)], 8);
    assert.deepEqual(recorder.log, ["clear", ...recorder.names(1), "clear", ...recorder.names(2)]);
    assert.equal(recorder.recovery.cursor.id, 6);
  });

  it("a dump that is a little older than the worker's newest event is followed by a question for the rest", () => {
    const recorder = new Recorder();
    recorder.recovery.start();
    const page = { type: "tree-dump", epoch: 7, dumpId: 1, atEventId: 5, page: 0, pageCount: 1, events: [] } as const;
    recorder.answer({ ...page, lastEventId: 6 });
    assert.equal(recorder.asked!.start, 6);
    recorder.answer({ type: "events", epoch: 7, firstEventId: 6, lastEventId: 6, events: [stored(6)] });
    assert.deepEqual(recorder.log, ["clear", ...recorder.names(6)]);
    assert.ok(!recorder.recovery.recovering);
  });

  it("an answer that leaves a hole, brings nothing or makes no sense leads to a full restore", () => {
    const useless: KvAnswer[] = [
      { type: "events", epoch: 7, firstEventId: 12, lastEventId: 13, events: [stored(12), stored(13)] },
      { type: "events", epoch: 7, firstEventId: 11, lastEventId: 13, events: [] },
      { type: "invalid-range", epoch: 7, lastEventId: 13 },
      { type: "dump-gone", epoch: 7, lastEventId: 13 },
      { type: "too-new", epoch: 9, lastEventId: 2 },
    ];
    for (const answer of useless) {
      const recorder = liveAtTen();
      recorder.recovery.suspect();
      recorder.answer(answer);
      assert.equal(recorder.asked!.start, undefined, answer.type);
      assert.ok(recorder.recovery.recovering);
      assert.ok(recorder.asked!.fruitless > 0);
    }
  });
});

// ---- The worker's own log on one side, a network that loses, repeats and reorders in between, an index on the other ----

interface Message {
  readonly rank: number;
  readonly epoch: number;
  readonly id: number;
  readonly event: KvEvent;
}

/** Engine events over prefixes of three token values, so that chains share, and holes and orphans happen. */
const engineEvent = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      type: fc.constant("stored" as const),
      path: fc.array(fc.nat(2), { minLength: 1, maxLength: 5 }),
      from: fc.nat(4),
      tier: fc.constantFrom("device" as const, "device" as const, "host" as const, "disk" as const),
    }),
  },
  {
    weight: 4,
    arbitrary: fc.record({
      type: fc.constant("removed" as const),
      path: fc.array(fc.nat(2), { minLength: 1, maxLength: 5 }),
      from: fc.nat(4),
      tier: fc.constantFrom("device" as const, "host" as const, "disk" as const),
    }),
  },
  { weight: 1, arbitrary: fc.record({ type: fc.constant("cleared" as const) }) },
);
type EngineEvent = typeof engineEvent extends fc.Arbitrary<infer T> ? T : never;

function toKvEvent(spec: EngineEvent, dpRank: number): KvEvent {
  if (spec.type === "cleared") return { type: "cleared", dpRank };
  const { sequenceHashes, localHashes, blockCount } = hashBlocks(Uint32Array.from(spec.path), 1, blockHashSeed());
  const from = Math.min(spec.from, blockCount - 1);
  const tail = sequenceHashes.slice(2 * from);
  if (spec.type === "removed") return { type: "removed", dpRank, tier: spec.tier, sequenceHashes: tail };
  const parentHash = from === 0 ? undefined : ([sequenceHashes[2 * from - 2]!, sequenceHashes[2 * from - 1]!] as const);
  const { tier } = spec;
  return {
    type: "stored",
    dpRank,
    tier,
    parentHash,
    startBlock: from,
    sequenceHashes: tail,
    localHashes: localHashes.slice(2 * from),
  };
}

class Simulation {
  readonly index: KvIndex;
  readonly recoveries: RankRecovery[];
  readonly #ringEvents: number;
  readonly #clock = new ManualClock();
  #epoch = 100;
  #logs: RankEventLog[];
  readonly #wire: Message[] = [];
  #asks: { rank: number; askNumber: number; start: number | undefined }[] = [];
  #answers: { rank: number; askNumber: number; answer: KvAnswer }[] = [];
  /** Ranks of which the plane lost something and has not told yet. */
  readonly #untold = new Set<number>();
  #hasJoined = false;

  constructor(index: KvIndex, ringEvents: number) {
    this.index = index;
    this.#ringEvents = ringEvents;
    this.#logs = this.#newLogs();
    this.recoveries = [0, 1].map((rank) => {
      const number = index.rankOf("worker", rank);
      const sink = {
        apply: (event: KvEvent) => void index.apply(number, event),
        clear: () => index.clearRank(number),
        ask: (askNumber: number, start: number | undefined) => void this.#asks.push({ rank, askNumber, start }),
      };
      return new RankRecovery(sink, { maxKept: 5 });
    });
  }

  #newLogs(): RankEventLog[] {
    return [0, 1].map(
      (dpRank) =>
        new RankEventLog({
          dpRank,
          epoch: this.#epoch,
          maxBlocks: 1_000,
          clock: this.#clock,
          ringEvents: this.#ringEvents,
        }),
    );
  }

  engine(rank: number, events: readonly KvEvent[]): void {
    const log = this.#logs[rank]!;
    const out = log.append(events);
    const first = log.lastEventId - out.length + 1;
    out.forEach((event, i) => this.#wire.push({ rank, epoch: this.#epoch, id: first + i, event }));
  }

  doubt(rank: number): void {
    if (this.#hasJoined) this.recoveries[rank]!.suspect();
  }

  restart(): void {
    for (const log of this.#logs) log.close();
    this.#epoch += 1;
    // The plane tells that the publisher is another one.
    for (const rank of [0, 1]) this.#untold.add(rank);
    this.#logs = this.#newLogs();
  }

  /** Another router asks for everything: makes the dump that is shared for a while. */
  otherRouterAsks(rank: number): void {
    this.#logs[rank]!.answer({ type: "range", start: undefined, end: undefined });
  }

  /** The router learns of the worker only now; what was on the way is not for it. */
  join(): void {
    this.#wire.length = 0;
    this.#untold.clear();
    this.#hasJoined = true;
    for (const recovery of this.recoveries) recovery.start();
  }

  deliver(which: number, alsoKeep: boolean): void {
    if (this.#wire.length === 0 || !this.#hasJoined) return;
    const at = which % this.#wire.length;
    const { rank, epoch, id, event } = this.#wire[at]!;
    if (!alsoKeep) this.#wire.splice(at, 1);
    this.recoveries[rank]!.onEvent(epoch, id, event);
  }

  lose(which: number): void {
    if (this.#wire.length === 0) return;
    const [lost] = this.#wire.splice(which % this.#wire.length, 1);
    this.#untold.add(lost!.rank);
  }

  /** The worker answers an ask; a dump goes out in two pages. */
  answerAsk(): void {
    const ask = this.#asks.shift();
    if (ask === undefined) return;
    const query = { type: "range", start: ask.start, end: undefined } as const;
    const answer = decodeKvAnswer(this.#logs[ask.rank]!.answer(query), ask.rank);
    if (answer.type === "tree-dump") {
      const half = answer.events.length >> 1;
      this.#answers.push({
        ...ask,
        answer: { ...answer, page: 0, pageCount: 2, events: answer.events.slice(0, half) },
      });
      this.#answers.push({ ...ask, answer: { ...answer, page: 1, pageCount: 2, events: answer.events.slice(half) } });
    } else this.#answers.push({ ...ask, answer });
  }

  deliverAnswer(): void {
    const next = this.#answers.shift();
    if (next !== undefined) this.recoveries[next.rank]!.onAnswer(next.askNumber, next.answer);
  }

  failAsk(): void {
    const ask = this.#asks.shift();
    if (ask !== undefined) this.recoveries[ask.rank]!.onFailure(ask.askNumber);
  }

  /** No more losses: what is on the way arrives, the plane tells of what it lost, asks are answered. */
  settle(): void {
    for (let round = 0; round < 200; round++) {
      while (this.#wire.length > 0) this.deliver(0, false);
      for (const rank of this.#untold) this.recoveries[rank]!.suspect();
      this.#untold.clear();
      while (this.#asks.length > 0 || this.#answers.length > 0) {
        this.answerAsk();
        this.deliverAnswer();
      }
      if (this.#wire.length + this.#asks.length + this.#answers.length === 0) break;
    }
    for (const recovery of this.recoveries) assert.ok(!recovery.recovering, "the recovery comes to rest");
    for (const log of this.#logs) log.close();
  }

  /** What the worker really holds, as the index would show it. */
  truth(): string[][] {
    const naive = new NaiveKvIndex();
    return this.#logs.map((log, rank) => {
      const number = naive.rankOf("worker", rank);
      for (const event of log.blocks()) assert.equal(naive.apply(number, event), "ok");
      return memberships(naive, number);
    });
  }
}

function memberships(index: KvIndex, rank: number): string[] {
  const held = new Set<string>();
  for (const event of index.dump(rank)) {
    if (event.type === "cleared") continue;
    for (let i = 0; i < event.sequenceHashes.length; i += 2) {
      const name = `${event.tier} ${event.sequenceHashes[i]} ${event.sequenceHashes[i + 1]}`;
      if (event.type === "stored") held.add(name);
      else held.delete(name);
    }
  }
  return [...held].toSorted();
}

const step = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.record({
      do: fc.constant("engine" as const),
      rank: fc.nat(1),
      events: fc.array(engineEvent, { minLength: 1, maxLength: 3 }),
    }),
  },
  { weight: 8, arbitrary: fc.record({ do: fc.constant("deliver" as const), which: fc.nat(3), again: fc.boolean() }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant("lose" as const), which: fc.nat(3) }) },
  { weight: 4, arbitrary: fc.record({ do: fc.constant("answer" as const) }) },
  { weight: 4, arbitrary: fc.record({ do: fc.constant("deliver-answer" as const) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("fail" as const) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("suspect" as const), rank: fc.nat(1) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("restart" as const) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant("other-asks" as const), rank: fc.nat(1) }) },
);

describe("rank recovery: random histories", () => {
  for (const [name, makeIndex] of [
    ["naive", () => new NaiveKvIndex()],
    ["flat", () => new FlatKvIndex({ maxBytes: 4 * 2 ** 20 })],
  ] as const) {
    it(`under loss, repetition, reordering, failed queries and restarts of two ranks the ${name} index ends with exactly the worker's blocks`, () => {
      fc.assert(
        fc.property(
          fc.array(step, { minLength: 1, maxLength: 60 }),
          fc.integer({ min: 1, max: 6 }),
          fc.nat(10),
          (steps, ringEvents, joinAt) => {
            const simulation = new Simulation(makeIndex(), ringEvents);
            for (const [at, next] of [...steps, undefined].entries()) {
              if (at === Math.min(joinAt, steps.length)) simulation.join();
              if (next === undefined) break;
              if (next.do === "engine")
                simulation.engine(
                  next.rank,
                  next.events.map((event) => toKvEvent(event, next.rank)),
                );
              else if (next.do === "deliver") simulation.deliver(next.which, next.again);
              else if (next.do === "lose") simulation.lose(next.which);
              else if (next.do === "answer") simulation.answerAsk();
              else if (next.do === "deliver-answer") simulation.deliverAnswer();
              else if (next.do === "other-asks") simulation.otherRouterAsks(next.rank);
              else if (next.do === "fail") simulation.failAsk();
              else if (next.do === "suspect") simulation.doubt(next.rank);
              else simulation.restart();
            }
            simulation.settle();
            const { index } = simulation;
            assert.deepEqual(
              [0, 1].map((rank) => memberships(index, index.rankOf("worker", rank))),
              simulation.truth(),
            );
          },
        ),
        { numRuns: name === "naive" ? 1_500 : 300 },
      );
    });
  }
});
