import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { CounterChild, silentLogger } from "../../observability/index.ts";
import {
  KV_ANSWER_EVENT_BYTES,
  decodeKvAnswer,
  decodeKvEventBatch,
  type KvAnswer,
  type KvEvent,
  type KvEventBatch,
  type KvQuery,
  type KvStored,
} from "../../protocol/index.ts";
import { ManualClock } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import { coalesceKvEvents } from "./event-coalescer.ts";
import { KvPublisher } from "./kv-publisher.ts";
import { LocalBlockIndex } from "./local-block-index.ts";
import { RankEventLog } from "./rank-event-log.ts";

/** Blocks `from` to `to` of the chain of a prompt whose tokens are its path, one token per block. */
function storedEvent(path: readonly number[], from = 0, tier: KvStored["tier"] = "device"): KvStored {
  const { sequenceHashes, localHashes } = hashBlocks(Uint32Array.from(path), 1, blockHashSeed());
  return {
    type: "stored",
    dpRank: 0,
    tier,
    parentHash: from === 0 ? undefined : [sequenceHashes[2 * from - 2]!, sequenceHashes[2 * from - 1]!],
    startBlock: from,
    sequenceHashes: sequenceHashes.slice(2 * from),
    localHashes: localHashes.slice(2 * from),
  };
}

function removedEvent(path: readonly number[], from = 0, tier: KvStored["tier"] = "device"): KvEvent {
  return { type: "removed", dpRank: 0, tier, sequenceHashes: storedEvent(path, from).sequenceHashes };
}

function counting(count: number): number[] {
  return Array.from({ length: count }, (_, i) => i);
}

const path = fc.array(fc.nat(2), { minLength: 1, maxLength: 6 });
const tiers = fc.constantFrom("device" as const, "host" as const);
const engineEvent: fc.Arbitrary<KvEvent> = fc.oneof(
  {
    weight: 5,
    arbitrary: fc
      .tuple(path, fc.nat(5), tiers)
      .map(([p, from, tier]) => storedEvent(p, Math.min(from, p.length - 1), tier)),
  },
  {
    weight: 4,
    arbitrary: fc
      .tuple(path, fc.nat(5), tiers)
      .map(([p, from, tier]) => removedEvent(p, Math.min(from, p.length - 1), tier)),
  },
  { weight: 1, arbitrary: fc.constant({ type: "cleared" as const, dpRank: 0 }) },
);

function keys(hashes: Uint32Array): string[] {
  return Array.from({ length: hashes.length / 2 }, (_, i) => `${hashes[2 * i]} ${hashes[2 * i + 1]}`);
}

/** What is held after a list of events, `tier key` -> true; a stored event whose parent was never there is left out. */
class NaiveTruth {
  readonly held = new Set<string>();
  readonly #known = new Set<string>();

  apply(event: KvEvent): void {
    if (event.type === "cleared") {
      this.held.clear();
      return;
    }
    for (const key of keys(event.sequenceHashes)) {
      if (event.type === "removed") this.held.delete(`${event.tier} ${key}`);
      else this.held.add(`${event.tier} ${key}`);
      this.#known.add(key);
    }
  }
}

describe("KV event coalescer", () => {
  it("joins stores that chain, and nothing else", () => {
    const whole = storedEvent([1, 2, 3, 4]);
    const parts = [storedEvent([1, 2]), storedEvent([1, 2, 3, 4], 2)];
    assert.deepEqual(coalesceKvEvents(parts, 128), [whole]);
    const apart = [storedEvent([1, 2]), storedEvent([1, 3, 4], 2), storedEvent([1, 3, 4, 5], 3, "host")];
    assert.deepEqual(coalesceKvEvents(apart, 128), apart);
    const barrier: KvEvent[] = [storedEvent([1]), { type: "cleared", dpRank: 0 }, storedEvent([1, 2], 1)];
    assert.deepEqual(coalesceKvEvents(barrier, 128), barrier);
  });

  it("joins removals in their order, and cuts what is over the cap into chained pieces", () => {
    const [joined] = coalesceKvEvents([removedEvent([2]), removedEvent([1, 2])], 128);
    assert.deepEqual(keys((joined as KvStored).sequenceHashes), [
      ...keys(storedEvent([2]).sequenceHashes),
      ...keys(storedEvent([1, 2]).sequenceHashes),
    ]);
    const long = storedEvent(counting(300));
    const pieces = coalesceKvEvents([long], 128) as KvStored[];
    assert.deepEqual(
      pieces.map((piece) => piece.sequenceHashes.length / 2),
      [128, 128, 44],
    );
    assert.deepEqual(
      pieces.map((piece) => piece.startBlock),
      [0, 128, 256],
    );
    assert.deepEqual(pieces[1]!.parentHash, [long.sequenceHashes[254], long.sequenceHashes[255]]);
    assert.deepEqual(coalesceKvEvents([removedEvent(counting(129))], 128).length, 2);
  });

  it("whatever it joins and cuts, the outcome is that of the events one by one", () => {
    fc.assert(
      fc.property(fc.array(engineEvent, { maxLength: 12 }), fc.integer({ min: 1, max: 4 }), (events, cap) => {
        const [before, after] = [new NaiveTruth(), new NaiveTruth()];
        for (const event of events) before.apply(event);
        for (const event of coalesceKvEvents(events, cap)) {
          after.apply(event);
          if (event.type !== "cleared")
            assert.ok(event.sequenceHashes.length >= 2 && event.sequenceHashes.length <= 2 * cap);
        }
        assert.deepEqual(after.held, before.held);
      }),
    );
  });
});

describe("local block index", () => {
  it("a removal of one of two copies is kept from routers, that of the last one is not", () => {
    const index = new LocalBlockIndex({ maxBlocks: 100 });
    const event = storedEvent([1]);
    const [lo, hi] = [event.sequenceHashes[0]!, event.sequenceHashes[1]!];
    index.store(event);
    index.store(event);
    assert.equal(index.remove(lo, hi, "device"), false);
    assert.equal(index.remove(lo, hi, "device"), true);
    assert.equal(index.size, 0);
    assert.equal(index.remove(lo, hi, "device"), true, "unknown blocks pass");
  });

  it("is full at its bound: further blocks are refused from the first one on, and there is room again after a removal", () => {
    const index = new LocalBlockIndex({ maxBlocks: 3 });
    assert.equal(index.store(storedEvent([1, 2, 3, 4, 5])), 3);
    assert.equal(index.size, 3);
    assert.equal(index.store(storedEvent([1, 2, 3, 4, 5], 3)), 0);
    const last = storedEvent([1, 2, 3], 2).sequenceHashes;
    index.remove(last[0]!, last[1]!, "device");
    assert.equal(index.store(storedEvent([9])), 1);
  });

  it("counts are those of a naive map, and the dump leads to the same blocks, parents first", () => {
    fc.assert(
      fc.property(fc.array(engineEvent, { maxLength: 40 }), fc.integer({ min: 1, max: 3 }), (events, cap) => {
        const index = new LocalBlockIndex({ maxBlocks: 10_000, initialBlocks: 1 });
        const copies = new Map<string, number>();
        for (const event of events) {
          if (event.type === "cleared") {
            index.clear();
            copies.clear();
          } else if (event.type === "stored") {
            const taken = index.store(event);
            for (const key of keys(event.sequenceHashes).slice(0, taken)) {
              copies.set(`${event.tier} ${key}`, (copies.get(`${event.tier} ${key}`) ?? 0) + 1);
            }
          } else {
            for (const key of keys(event.sequenceHashes)) {
              const [lo, hi] = key.split(" ").map(Number) as [number, number];
              const count: number = copies.get(`${event.tier} ${key}`) ?? 0;
              assert.equal(index.remove(lo, hi, event.tier), count <= 1);
              if (count <= 1) copies.delete(`${event.tier} ${key}`);
              else copies.set(`${event.tier} ${key}`, count - 1);
            }
          }
        }
        const truth = new NaiveTruth();
        const known = new Set<string>();
        for (const event of index.dump(0, cap)) {
          if (event.type === "stored") {
            if (event.parentHash !== undefined)
              assert.ok(known.has(event.parentHash.join(" ")), "the parent came before");
            for (const key of keys(event.sequenceHashes)) known.add(key);
            assert.ok(event.sequenceHashes.length <= 2 * cap);
          }
          truth.apply(event);
        }
        assert.deepEqual([...truth.held].toSorted(), [...copies.keys()].toSorted());
        for (const [name, count] of copies) {
          const [tier, lo, hi] = name.split(" ") as ["device" | "host", string, string];
          assert.equal(index.countOf(Number(lo), Number(hi), tier), count);
        }
      }),
      { numRuns: 500 },
    );
  });
});

describe("rank event log", () => {
  const makeLog = (ringEvents = 8): { log: RankEventLog; clock: ManualClock; ask: (query: KvQuery) => KvAnswer } => {
    const clock = new ManualClock();
    const log = new RankEventLog({ dpRank: 0, epoch: 5, maxBlocks: 100_000, clock, ringEvents });
    return { log, clock, ask: (query) => decodeKvAnswer(log.answer(query), 0) };
  };
  const range = (start?: number, end?: number): KvQuery => ({ type: "range", start, end });

  it("answers ranges from its ring, a dump for what is older, and says when a range is wrong or ahead", () => {
    const { log, ask } = makeLog();
    for (let i = 1; i <= 10; i++) log.append([storedEvent([i])]);
    const some = ask(range(4, 6));
    assert.equal(some.type, "events");
    assert.equal(some.type === "events" && some.firstEventId, 4);
    assert.deepEqual(
      some.type === "events" && some.events,
      [4, 5, 6].map((i) => storedEvent([i])),
    );
    assert.equal(some.lastEventId, 10);
    assert.equal(ask(range(3)).type, "events");
    assert.equal(ask(range(2)).type, "tree-dump");
    assert.equal(ask(range()).type, "tree-dump");
    assert.equal(ask(range(11)).type, "too-new");
    for (const wrong of [range(0), range(1, 0), range(6, 5)]) assert.equal(ask(wrong).type, "invalid-range");
    log.close();
  });

  it("an empty rank has an empty dump of one page", () => {
    const { log, ask } = makeLog();
    const answer = ask(range());
    assert.deepEqual(answer, {
      type: "tree-dump",
      epoch: 5,
      lastEventId: 0,
      dumpId: 1,
      atEventId: 0,
      page: 0,
      pageCount: 1,
      events: [],
    });
    log.close();
  });

  it("a large dump comes in pages that fit the credit window, made once for all who ask, and is forgotten after a while", () => {
    const { log, clock, ask } = makeLog(1_024);
    for (let i = 0; i < 40; i++) log.append([storedEvent([i, ...counting(599)])]);
    const first = ask(range());
    assert.ok(first.type === "tree-dump" && first.pageCount > 3);
    let blocks = 0;
    for (let page = 0; page < first.pageCount; page++) {
      assert.ok(log.answer({ type: "page", dumpId: first.dumpId, page }).length < KV_ANSWER_EVENT_BYTES + 1_000);
      const answer = ask({ type: "page", dumpId: first.dumpId, page });
      assert.ok(answer.type === "tree-dump" && answer.atEventId === first.atEventId);
      for (const event of answer.events) if (event.type === "stored") blocks += event.sequenceHashes.length / 2;
    }
    assert.equal(blocks, 40 * 600);
    log.append([storedEvent([100])]);
    const second = ask(range());
    assert.ok(second.type === "tree-dump" && second.dumpId === first.dumpId, "shared; the newest event is in the ring");
    assert.equal(log.dumpCount, 1);
    clock.advance(1_500);
    const third = ask(range());
    assert.ok(third.type === "tree-dump" && third.dumpId !== first.dumpId, "too old to be shared");
    assert.equal(third.atEventId, log.lastEventId);
    assert.ok(second.atEventId < second.lastEventId, "so that the router asks for the rest");
    assert.equal(ask({ type: "page", dumpId: first.dumpId, page: 0 }).type, "dump-gone");
    clock.advance(11_000);
    assert.equal(
      ask({ type: "page", dumpId: third.type === "tree-dump" ? third.dumpId : 0, page: 0 }).type,
      "dump-gone",
    );
    log.close();
    assert.equal(clock.pendingTimerCount, 0);
  });

  it("a long range comes as much as fits, from its start", () => {
    const { log, ask } = makeLog(1_024);
    for (let i = 0; i < 20; i++) log.append([storedEvent([i, ...counting(599)])]);
    const answer = ask(range(1));
    assert.ok(answer.type === "events" && answer.events.length < log.lastEventId && answer.events.length > 10);
    log.close();
  });
});

describe("KV publisher", () => {
  const setUp = (publish?: () => never): { publisher: KvPublisher; batches: KvEventBatch[]; dropped: CounterChild } => {
    const batches: KvEventBatch[] = [];
    const dropped = new CounterChild();
    const publisher = new KvPublisher({
      publisher: {
        publisherId: "00c0ffee00c0ffee",
        publish: publish ?? ((payload) => batches.push(decodeKvEventBatch(payload))),
        close: () => Promise.resolve(),
      },
      clock: new ManualClock(),
      logger: silentLogger,
      dropped,
      epoch: 9,
      maxBlocks: 1_000,
    });
    return { publisher, batches, dropped };
  };

  it("numbers the events of each rank from 1 without holes, one message per rank and step", () => {
    const { publisher, batches } = setUp();
    publisher.onKvEvents([storedEvent([1]), storedEvent([1, 2], 1), { ...storedEvent([1]), dpRank: 1 }]);
    publisher.onKvEvents([storedEvent([3]), { type: "cleared", dpRank: 0 }]);
    const told = batches.map(({ dpRank, epoch, firstEventId, events }) => [dpRank, epoch, firstEventId, events.length]);
    assert.deepEqual(told, [
      [0, 9, 1, 1],
      [1, 9, 1, 1],
      [0, 9, 2, 2],
    ]);
  });

  it("tells nothing of a step that changed nothing for routers", () => {
    const { publisher, batches } = setUp();
    publisher.onKvEvents([storedEvent([1]), storedEvent([1])]);
    publisher.onKvEvents([removedEvent([1])]);
    assert.equal(batches.length, 1);
    publisher.onKvEvents([removedEvent([1])]);
    assert.equal(batches.length, 2);
  });

  it("an endless stream of blocks that are never removed is bounded, counted and does not end the engine", () => {
    const { publisher, batches, dropped } = setUp();
    for (let i = 0; i < 30; i++) publisher.onKvEvents([storedEvent([i, ...counting(99)])]);
    assert.equal(publisher.rank(0)!.blockCount, 1_000);
    assert.equal(dropped.value, 2_000);
    assert.equal(batches.length, 10);
  });

  it("a plane that cannot publish and a rank that cannot be are counted, not thrown into the engine", () => {
    const { publisher, dropped } = setUp(() => {
      throw new Error("closed");
    });
    publisher.onKvEvents([storedEvent([1])]);
    publisher.onKvEvents([{ ...storedEvent([1]), dpRank: 4_000_000_000 }]);
    assert.equal(dropped.value, 2);
    assert.equal(publisher.rank(0)!.lastEventId, 1);
  });
});
