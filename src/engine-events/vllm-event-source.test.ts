import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, it } from "node:test";
import fc from "fast-check";
import { Publisher, Router } from "zeromq";
import { DynamoError } from "../errors/index.ts";
import { createLogger, silentLogger } from "../observability/index.ts";
import type { KvEvent } from "../protocol/index.ts";
import { FlatKvIndex, OverlapScores } from "../router/indexer/index.ts";
import { openEngineLink, type EngineLink, type ReplayHandler } from "../runtime/event-plane/index.ts";
import { ManualClock, systemClock, type Clock } from "../std/index.ts";
import { blockHashSeed, hashBlocks } from "../tokens/index.ts";
import { pack, type Value } from "./msgpack-writer.fixture.ts";
import { VllmEventMapper } from "./vllm-event-mapper.ts";
import { VllmEventSource, type VllmEventSourceOptions } from "./vllm-event-source.ts";
import { decodeVllmBatch } from "./vllm-events.ts";

const BLOCK = 4;
const LIMIT = { timeout: 20_000 };

/** Block `id` holds four tokens that no other block holds. */
function tokensOf(id: number): number[] {
  return Array.from({ length: BLOCK }, (_, i) => 1_000 * id + i);
}

/** Block `id` on top of nothing, under the engine's name 7,000,000 + id. */
function stored(id: number): Value {
  return ["BlockStored", [7_000_000 + id], null, tokensOf(id), BLOCK, null, "GPU"];
}

function removed(id: number): Value {
  return ["BlockRemoved", [7_000_000 + id], "GPU"];
}

function batch(...events: Value[]): Buffer {
  return pack([1.5, events, 0]);
}

function be8(sequence: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigInt64BE(BigInt(sequence));
  return bytes;
}

/** An index fed by a source, asked by block id. */
class FedIndex {
  readonly index = new FlatKvIndex();
  readonly rank = this.index.rankOf("engine", 0);
  readonly events: KvEvent[] = [];

  readonly onEvents = (events: readonly KvEvent[]): void => {
    for (const event of events) {
      this.events.push(event);
      this.index.apply(this.rank, event);
    }
  };

  has(id: number): boolean {
    const scores = new OverlapScores();
    const { sequenceHashes } = hashBlocks(Uint32Array.from(tokensOf(id)), BLOCK, blockHashSeed());
    this.index.findMatches(sequenceHashes, 1, scores);
    return scores.device[this.rank]! > 0;
  }

  ids(limit: number): number[] {
    return Array.from({ length: limit }, (_, id) => id).filter((id) => this.has(id));
  }
}

/** vLLM's publisher thread as far as a subscriber can tell: PUB, and a ROUTER that replays the newest batches. */
class FakeEngine {
  readonly #publisher = new Publisher({ linger: 0 });
  readonly #replay = new Router({ linger: 0 });
  readonly #kept: { sequence: number; payload: Buffer }[] = [];
  readonly #keep: number;
  readonly #hasTopicInReplies: boolean;
  #sequence = 0;
  #sending = Promise.resolve();

  constructor({ keep = 10_000, hasTopicInReplies = true } = {}) {
    this.#keep = keep;
    this.#hasTopicInReplies = hasTopicInReplies;
  }

  /** Returns the two addresses. */
  async bind(endpoint = "tcp://127.0.0.1:*", replayEndpoint = "tcp://127.0.0.1:*"): Promise<[string, string]> {
    await this.#publisher.bind(endpoint);
    await this.#replay.bind(replayEndpoint);
    void this.#serve();
    return [this.#publisher.lastEndpoint!, this.#replay.lastEndpoint!];
  }

  connect(endpoint: string): void {
    this.#publisher.connect(endpoint);
  }

  publish(payload: Buffer, { isLost = false } = {}): void {
    const sequence = this.#sequence++;
    this.#kept.push({ sequence, payload });
    if (this.#kept.length > this.#keep) this.#kept.shift();
    if (isLost) return;
    this.#sending = this.#sending.then(() => this.#publisher.send(["kv", be8(sequence), payload]));
  }

  close(): void {
    this.#publisher.close();
    this.#replay.close();
  }

  async #serve(): Promise<void> {
    try {
      for (;;) {
        const [identity, empty, wanted] = await this.#replay.receive();
        const from = Number(wanted!.readBigUInt64BE());
        const topic = (text: string): string[] => (this.#hasTopicInReplies ? [text] : []);
        for (const { sequence, payload } of this.#kept) {
          if (sequence >= from) await this.#replay.send([identity!, empty!, ...topic("kv"), be8(sequence), payload]);
        }
        await this.#replay.send([identity!, empty!, ...topic(""), be8(-1), ""]);
      }
    } catch {
      // Closed.
    }
  }
}

async function until(condition: () => boolean, what: string): Promise<void> {
  const deadlineMs = performance.now() + 10_000;
  while (!condition()) {
    if (performance.now() > deadlineMs) throw new Error(`waited in vain for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

interface Opened {
  readonly source: VllmEventSource;
  readonly fed: FedIndex;
}

async function open(
  endpoint: string,
  replayEndpoint: string | undefined,
  overrides: Partial<VllmEventSourceOptions> & { direction?: "connect" | "bind"; clock?: Clock } = {},
): Promise<Opened> {
  const fed = new FedIndex();
  const { direction = "connect", clock = systemClock, ...options } = overrides;
  const source = new VllmEventSource({
    blockSizeTokens: BLOCK,
    dpRank: 0,
    logger: silentLogger,
    onEvents: fed.onEvents,
    ...options,
  });
  const replay = replayEndpoint === undefined ? {} : { replayEndpoint };
  source.attach(await openEngineLink({ endpoint, direction, clock, ...replay }, source));
  return { source, fed };
}

/** A message gets through: the subscription has reached the engine. Publishes block 99 until it does. */
async function subscribed(engine: FakeEngine, { fed }: Opened): Promise<void> {
  await until(() => {
    if (!fed.has(99)) engine.publish(batch(stored(99)));
    return fed.has(99);
  }, "the subscription");
}

describe("vllm event source, over real sockets", () => {
  it("the recorded messages arrive as they decode, and the index has the same", LIMIT, async () => {
    const fixture = join(import.meta.dirname, "../../test/fixtures/vllm-kv-events.json");
    const { samples } = JSON.parse(readFileSync(fixture, "utf8")) as { samples: { messages: string[][] }[] };
    assert.ok(samples.length > 1);
    for (const { messages } of samples) {
      const payloads = messages
        .filter(([, sequence]) => sequence !== "f".repeat(16))
        .map((frames) => Buffer.from(frames[2]!, "hex"));
      const mapper = new VllmEventMapper({ blockSizeTokens: 16 });
      const wanted = payloads.flatMap((payload) => mapper.map({ ...decodeVllmBatch(payload), dpRank: 0 }));
      assert.ok(wanted.length > 0);
      const engine = new FakeEngine();
      const [endpoint, replay] = await engine.bind();
      for (const payload of payloads) engine.publish(payload);
      const { source, fed } = await open(endpoint, replay, { blockSizeTokens: 16 });
      // The last ones may be such that only the counts tell of them.
      await until(() => source.counts.batches >= payloads.length, "the recorded events");
      assert.deepEqual(fed.events, wanted);
      assert.deepEqual(source.leftOut, mapper.leftOut);
      source.close();
      engine.close();
    }
  });

  for (const hasTopicInReplies of [false, true]) {
    const form = hasTopicInReplies ? "with the topic" : "without topic";
    it(`late, and after losses, it has everything (replies ${form})`, LIMIT, async () => {
      const engine = new FakeEngine({ hasTopicInReplies });
      const [endpoint, replay] = await engine.bind();
      for (let id = 0; id < 50; id++) engine.publish(batch(stored(id)));
      const opened = await open(endpoint, replay);
      const { source, fed } = opened;
      await until(() => fed.has(49), "what was before");
      await subscribed(engine, opened);
      engine.publish(batch(removed(3)), { isLost: true });
      engine.publish(batch(stored(50)), { isLost: true });
      engine.publish(batch(stored(51)));
      await until(() => fed.has(51), "the batch behind the hole");
      assert.ok(!fed.has(3) && fed.has(50));
      assert.equal(source.counts.gaps, 1);
      assert.equal(source.resets.size, 0);
      assert.ok(source.isWhole);
      source.close();
      engine.close();
    });
  }

  it("an engine that restarts begins anew, at the same address", LIMIT, async () => {
    const first = new FakeEngine();
    const [endpoint, replay] = await first.bind();
    const opened = await open(endpoint, replay);
    const { source, fed } = opened;
    await subscribed(first, opened);
    for (let id = 0; id < 20; id++) first.publish(batch(stored(id)));
    await until(() => fed.has(19), "the first life");
    first.close();
    const second = new FakeEngine();
    await rebind(second, endpoint, replay);
    second.publish(batch(stored(30)));
    await until(() => fed.has(30), "the second life");
    assert.deepEqual(
      fed.ids(31).filter((id) => id !== 30),
      [],
    );
    assert.ok((source.resets.get("reconnected") ?? 0) + (source.resets.get("restarted") ?? 0) > 0);
    source.close();
    second.close();
  });

  it("a hole that the engine cannot fill any more, or has no way to, forgets the rank first", LIMIT, async () => {
    const short = new FakeEngine({ keep: 2 });
    const [endpoint, replay] = await short.bind();
    for (const replayEndpoint of [replay, undefined]) {
      const opened = await open(endpoint, replayEndpoint);
      const { source, fed } = opened;
      await subscribed(short, opened);
      short.publish(batch(stored(1)));
      await until(() => fed.has(1), "a block");
      for (let id = 2; id < 8; id++) short.publish(batch(id === 2 ? removed(1) : stored(id)), { isLost: true });
      short.publish(batch(stored(8)));
      await until(() => fed.has(8), "the batch behind the hole");
      assert.deepEqual(fed.ids(10), replayEndpoint === undefined ? [8] : [7, 8]);
      assert.equal(source.resets.get("lost"), 1);
      source.close();
    }
    short.close();
  });

  it("what nobody can read is counted, said once, and costs the rank's blocks, not the stream", LIMIT, async () => {
    const engine = new FakeEngine();
    const [endpoint, replay] = await engine.bind();
    const lines: string[] = [];
    const logger = createLogger({ level: "warn", format: "jsonl", write: (line) => lines.push(line) });
    const opened = await open(endpoint, replay, { logger });
    const { source, fed } = opened;
    await subscribed(engine, opened);
    engine.publish(batch(stored(1)));
    engine.publish(Buffer.from("not msgpack"));
    engine.publish(Buffer.alloc(0));
    engine.publish(batch(stored(2)));
    await until(() => fed.has(2), "the batch after");
    assert.ok(!fed.has(1));
    assert.equal(source.counts.malformed, 2);
    assert.equal(lines.length, 1, lines.join(""));
    source.close();
    engine.close();
  });

  it("an engine that connects out finds this side bound", LIMIT, async () => {
    const probe = new Publisher({ linger: 0 });
    await probe.bind("tcp://127.0.0.1:*");
    const endpoint = probe.lastEndpoint!;
    probe.close();
    const opened = await open(endpoint, undefined, { direction: "bind" });
    const engine = new FakeEngine();
    engine.connect(endpoint);
    await subscribed(engine, opened);
    engine.publish(batch(stored(5)));
    await until(() => opened.fed.has(5), "a block");
    opened.source.close();
    engine.close();
  });

  it("a replay that nobody answers ends by its deadline, and live events go on", LIMIT, async () => {
    const engine = new FakeEngine();
    const [endpoint] = await engine.bind();
    const silent = new Router({ linger: 0 });
    await silent.bind("tcp://127.0.0.1:*");
    const clock = new ManualClock();
    const { source, fed } = await open(endpoint, silent.lastEndpoint!, { clock });
    await until(() => clock.pendingTimerCount > 0, "the replay to be asked for");
    assert.ok(!source.isWhole);
    clock.advance(5_000);
    assert.ok(source.isWhole);
    await until(() => {
      engine.publish(batch(stored(1)));
      return fed.has(1);
    }, "a block in spite of it");
    assert.equal(clock.pendingTimerCount, 0);
    source.close();
    silent.close();
    engine.close();
  });

  it("addresses that the library refuses are an error", async () => {
    await assert.rejects(open("nonsense", undefined), (error) => {
      return error instanceof DynamoError && error.reason === "event-plane-unavailable";
    });
  });
});

async function rebind(engine: FakeEngine, endpoint: string, replay: string): Promise<void> {
  for (let tries = 0; ; tries++) {
    try {
      await engine.bind(endpoint, replay);
      return;
    } catch (error) {
      // The library closes sockets beside us.
      if (tries === 200) throw error;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
}

/** The engine and its sockets, in this thread: what arrives is decided by the test. */
class SimulatedEngine implements EngineLink {
  readonly canReplay: boolean;
  readonly blocks = new Set<number>();
  readonly #keep: number;
  #kept: { sequence: number; payload: Buffer }[] = [];
  #late: Buffer[][] = [];
  #sequence = 0;
  #replay: { from: number; handler: ReplayHandler } | undefined;
  readonly source: VllmEventSource;

  constructor(fed: FedIndex, keep: number, canReplay: boolean) {
    this.#keep = keep;
    this.canReplay = canReplay;
    this.source = new VllmEventSource({
      blockSizeTokens: BLOCK,
      dpRank: 0,
      logger: silentLogger,
      onEvents: fed.onEvents,
    });
    this.source.attach(this);
    this.source.onConnected();
  }

  replay(from: number, handler: ReplayHandler): () => void {
    const mine = { from, handler };
    this.#replay = mine;
    return () => {
      if (this.#replay === mine) this.#replay = undefined;
    };
  }

  /** `late`: it arrives with the next one that does not, while a replay may overtake it. */
  change(id: number, how: "arrives" | "late" | "lost"): void {
    const isStored = !this.blocks.has(id);
    if (isStored) this.blocks.add(id);
    else this.blocks.delete(id);
    const sequence = this.#sequence++;
    const payload = batch(isStored ? stored(id) : removed(id));
    this.#kept.push({ sequence, payload });
    if (this.#kept.length > this.#keep) this.#kept.shift();
    if (how !== "lost") this.#late.push([Buffer.from("kv"), be8(sequence), payload]);
    if (how === "arrives") this.arrive();
  }

  /** A new process: a new connection, numbers from 0. */
  restart(): void {
    this.blocks.clear();
    this.#kept = [];
    this.#late = [];
    this.#sequence = 0;
    this.source.onConnected();
  }

  /** What was held up arrives. */
  arrive(): void {
    const late = this.#late;
    this.#late = [];
    for (const frames of late) this.source.onFrames(frames);
  }

  /** Answers the replay under way, or fails it. */
  answer(isFailing: boolean): void {
    const asked = this.#replay;
    this.#replay = undefined;
    if (asked === undefined) return;
    if (isFailing) return asked.handler.onEnd(new DynamoError("event-plane-unavailable", "no answer"));
    for (const { sequence, payload } of this.#kept) {
      if (sequence >= asked.from) asked.handler.onFrames([be8(sequence), payload]);
    }
    assert.equal(asked.handler.onFrames([be8(-1), Buffer.alloc(0)]), true);
    asked.handler.onEnd(undefined);
  }

  get isAsked(): boolean {
    return this.#replay !== undefined;
  }

  close(): void {}
}

describe("vllm event source, any history", () => {
  const step = fc.oneof(
    {
      weight: 8,
      arbitrary: fc.record({
        type: fc.constant("change" as const),
        id: fc.nat(7),
        how: fc.constantFrom("arrives" as const, "late" as const, "lost" as const),
      }),
    },
    { weight: 3, arbitrary: fc.record({ type: fc.constant("answer" as const), failing: fc.boolean() }) },
    { weight: 1, arbitrary: fc.record({ type: fc.constant("restart" as const) }) },
  );

  it("once a batch got through and replays are answered, the index has no block that the engine has not", () => {
    fc.assert(
      fc.property(
        fc.array(step, { maxLength: 60 }),
        fc.integer({ min: 1, max: 12 }),
        fc.boolean(),
        (steps, keep, can) => {
          const fed = new FedIndex();
          const engine = new SimulatedEngine(fed, keep, can);
          for (const one of steps) {
            if (one.type === "change") engine.change(one.id, one.how);
            else if (one.type === "answer") engine.answer(one.failing);
            else engine.restart();
          }
          engine.change(8, "arrives");
          while (engine.isAsked) engine.answer(false);
          for (const id of fed.ids(9)) assert.ok(engine.blocks.has(id), `block ${id} is gone`);
          assert.ok(fed.has(8));
          assert.ok(engine.source.isWhole);
          // With all batches kept and every replay answered, it has every block.
          const neverFailed = !steps.some((one) => one.type === "answer" && one.failing);
          if (can && keep === 12 && steps.length <= 11 && neverFailed) {
            assert.deepEqual(
              fed.ids(9),
              [...engine.blocks].toSorted((a, b) => a - b),
            );
          }
        },
      ),
      { numRuns: 300 },
    );
  });
});
