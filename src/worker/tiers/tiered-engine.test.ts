import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { LoopEngine, type LoopEngineOptions } from "../../engines/llama/fixtures/loop-engine.ts";
import { FakeModel } from "../../engines/llama/fake-model.ts";
import { engineBattery } from "../../engines/engine.battery.ts";
import { EngineRecorder, aRequest } from "../../engines/engine.recorder.ts";
import { HostTier, TieredCache, offloadFilter, type LowerTier } from "../../kvbm/index.ts";
import { FORMAT, aBlock, itsBytes } from "../../kvbm/tiers/fixtures/blocks.ts";
import { MemoryTier, RecordingMeters } from "../../kvbm/tiers/fixtures/memory-tier.ts";
import { silentLogger } from "../../observability/index.ts";
import type { KvEvent } from "../../protocol/index.ts";
import { ManualClock, systemClock } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import type { ImportedBlocks } from "../../engines/index.ts";
import { TieredEngine } from "./tiered-engine.ts";

/**
 * Tiers under the real engine loop on the fake model, whose text depends on every cell: a lost, foreign or doubled block
 * changes what comes out.
 */
const BLOCK = 4;

class Rig {
  readonly inner: LoopEngine;
  readonly engine: TieredEngine;
  readonly recorder: EngineRecorder;
  readonly meters = new RecordingMeters();
  host!: HostTier;
  cache!: TieredCache;

  constructor(
    options: LoopEngineOptions & {
      hostBlocks?: number;
      lower?: readonly LowerTier[];
      minSights?: number;
      hostMinFrequency?: number;
    } = {},
  ) {
    const { hostBlocks = 64, lower = [], minSights = 1, hostMinFrequency = 0 } = options;
    for (const tier of lower) if (tier instanceof MemoryTier) tier.meters = this.meters;
    this.inner = new LoopEngine(options);
    this.engine = new TieredEngine({
      engine: this.inner,
      clock: systemClock,
      onParkingFull: () => this.meters.failed("host", "busy"),
      makeCache: (info, { attach, ...hooks }) => {
        this.host = new HostTier({ bytes: hostBlocks * info.blockBytes, blockBytes: info.blockBytes });
        attach(this.host.memory);
        this.cache = new TieredCache({
          ...hooks,
          blockSizeTokens: info.blockSizeTokens,
          totalBlocks: info.totalBlocks,
          host: this.host,
          hostFilter: hostMinFrequency === 0 ? undefined : offloadFilter({ minFrequency: hostMinFrequency }),
          lower: lower.map((tier) => ({ tier, filter: offloadFilter({ minSights }) })),
          clock: systemClock,
          logger: silentLogger,
          meters: this.meters,
        });
        return Promise.resolve(this.cache);
      },
    });
    this.recorder = new EngineRecorder(this.engine);
  }

  /** Runs a greedy prompt, checks its text and returns how much of it came from caches. */
  async say(prompt: readonly number[], maxTokens = 5): Promise<number> {
    const record = await this.recorder.run(aRequest(Uint32Array.from(prompt), { stop: { maxTokens } }));
    assert.equal(record.error, undefined);
    assert.deepEqual(record.tokens, FakeModel.continuation(prompt, maxTokens));
    return record.first!.cachedTokens;
  }

  /** What must hold at rest: nothing is held, nothing counted twice, the events tell what is there. */
  async checkAtRest(): Promise<void> {
    // What a request asked for begins to move a turn later.
    for (let turn = 0; turn < 2; turn++) {
      await this.cache.settled();
      await new Promise((resolve) => setImmediate(resolve));
    }
    await this.cache.settled();
    const { pool } = this.host;
    assert.equal(pool.mutableCount, 0, "no slot is left half filled");
    assert.equal(pool.activeCount, 0, "no slot is left held");
    assert.equal(told(this.recorder.kvEvents, "host").size, pool.registeredCount, "events tell what the host has");
    assert.equal(this.engine.load().waitingRequests + this.engine.load().runningRequests, 0);
  }
}

async function withRig(
  options: ConstructorParameters<typeof Rig>[0],
  body: (rig: Rig) => Promise<void>,
): Promise<void> {
  const rig = new Rig(options);
  await rig.recorder.start();
  try {
    await body(rig);
    await rig.checkAtRest();
    await rig.engine.clearBlocks();
    assert.equal(rig.host.usedBytes, 0, "nothing is left after clear");
    assert.equal(rig.meters.usedBytes.get("host"), 0);
  } finally {
    await rig.recorder.stop();
  }
  rig.recorder.check();
}

/** The blocks of a tier according to the events; each comes and goes once. */
function told(events: readonly KvEvent[], tier: string): Set<string> {
  const blocks = new Set<string>();
  for (const event of events) {
    if (event.type === "cleared" || event.tier !== tier) continue;
    for (let i = 0; i < event.sequenceHashes.length; i += 2) {
      const key: string = `${event.sequenceHashes[i]}:${event.sequenceHashes[i + 1]}`;
      if (event.type === "stored") assert(!blocks.has(key), "a block is told once");
      else assert(blocks.has(key), "a block that left had come");
      if (event.type === "stored") blocks.add(key);
      else blocks.delete(key);
    }
  }
  return blocks;
}

const prompt = (length: number, salt = 0): number[] => Array.from({ length }, (_, i) => (i * 7 + salt * 13 + 1) % 64);

engineBattery("tiered engine", () => {
  const rig = new Rig({ totalBlocks: 32, contextLength: 96, maxWaitingRequests: 40 });
  return Promise.resolve({
    engine: rig.engine,
    promptTokenIds: (length) => Uint32Array.from(prompt(length)),
    supportsExport: true,
    maxWaitingRequests: 40,
  });
});

test("tiers: what left the engine's cache comes back from the host, and the text is the same", () =>
  withRig({}, async (rig) => {
    assert.equal(await rig.say(prompt(33)), 0);
    await rig.cache.settled();
    assert.equal(rig.meters.offloadedBlocks.get("host"), Math.floor((33 + 4) / BLOCK));
    await rig.inner.clearBlocks();
    rig.inner.model.decodedTokens = 0;
    assert.equal(await rig.say(prompt(33)), 32);
    assert.equal(rig.inner.model.decodedTokens, 5, "only the last token of the prompt and the answer were computed");
    assert.equal(rig.meters.onboardedBlocks.get("host"), 8);
  }));

test("tiers: a host that is smaller than the load evicts leaves first and tells", () =>
  withRig({ hostBlocks: 6 }, async (rig) => {
    for (let salt = 0; salt < 6; salt++) await rig.say(prompt(17, salt));
    await rig.cache.settled();
    assert.equal(rig.host.pool.registeredCount, 6);
    await rig.inner.clearBlocks();
    assert((await rig.say(prompt(17, 5))) > 0);
  }));

test("tiers: an engine that cannot export blocks, and a host without room for one, are refused by name", async () => {
  const { EchoEngine } = await import("../../engines/echo/echo-engine.ts");
  const echo = new EchoEngine({ kind: "echo", contextLength: 64, maxSequences: 2, blockSizeTokens: 4, stepMs: 0 });
  const engine = new TieredEngine({
    engine: echo,
    clock: systemClock,
    onParkingFull: () => undefined,
    makeCache: () => Promise.reject(new Error("is not asked for")),
  });
  const recorder = new EngineRecorder(engine);
  await assert.rejects(recorder.start(), /the echo engine has no KV blocks/);
  await recorder.stop();
  assert.throws(() => new HostTier({ bytes: 10, blockBytes: 32 }), /expected at least 32 bytes/);
});

test("tiers: one that hangs when it is opened keeps no worker from starting, and tells what it has later", async () => {
  const clock = new ManualClock();
  const { promise: disk, resolve: recover } = Promise.withResolvers<void>();
  class HangingTier extends MemoryTier {
    override open(): Promise<void> {
      return disk;
    }
  }
  const below = new HangingTier("disk");
  const block = aBlock(0);
  await below.write([block], [itsBytes(block)]);
  const events: KvEvent[] = [];
  const cache = new TieredCache({
    blockSizeTokens: 16,
    totalBlocks: 4,
    port: { copyOut: () => Promise.reject(new Error()), copyIn: () => Promise.resolve(0) },
    host: new HostTier({ bytes: 4 * FORMAT.blockBytes, blockBytes: FORMAT.blockBytes }),
    lower: [{ tier: below, filter: offloadFilter({ minSights: 1 }) }],
    clock,
    logger: silentLogger,
    meters: new RecordingMeters(),
    onEvents: (told) => void events.push(...told),
    isBusy: () => false,
  });
  const opening = cache.open();
  clock.advance(5_000);
  await opening;
  assert.equal(events.length, 0);
  recover();
  await cache.settled();
  assert.equal(told(events, "disk").size, 1);
  await cache.close();
});

test("tiers: while requests run at most four blocks are copied between two steps", () =>
  withRig({ totalBlocks: 40, hostBlocks: 64 }, async (rig) => {
    const { blockPort, loop, model } = rig.inner;
    const copyOut = blockPort.copyOut.bind(blockPort);
    let sinceStep = 0;
    let most = 0;
    model.onDecode = () => (sinceStep = 0);
    blockPort.copyOut = (hashes, slots) => {
      if (loop.load().runningRequests > 0) {
        sinceStep += slots.length;
        most = Math.max(most, sinceStep);
      }
      return copyOut(hashes, slots);
    };
    const ids = [0, 1, 2].map((salt) =>
      rig.recorder.submit(aRequest(Uint32Array.from(prompt(33, salt)), { stop: { maxTokens: 12 } })),
    );
    await rig.recorder.ended(ids);
    await rig.cache.settled();
    assert(most > 0 && most <= 4, `${most} blocks between two steps`);
    assert.equal(rig.host.pool.registeredCount, 3 * Math.floor((33 + 11) / BLOCK));
  }));

test("tiers: blocks of another namespace are not found", () =>
  withRig({}, async (rig) => {
    await rig.say(prompt(20));
    await rig.cache.settled();
    await rig.inner.clearBlocks();
    const other = await rig.recorder.run(aRequest(Uint32Array.from(prompt(20)), { cacheNamespace: "tenant" }));
    assert.equal(other.first?.cachedTokens, 0);
  }));

test("tiers: from below the host the request is parked; several that want the same blocks read them once", async () => {
  const below = new MemoryTier("disk");
  await withRig({ hostBlocks: 24, lower: [below] }, async (rig) => {
    await rig.say(prompt(33));
    await rig.cache.settled();
    await rig.inner.clearBlocks();
    rig.host.pool.clear();
    rig.cache.costs.tookToPrefill(100, 100_000);
    below.hold();
    const ids = [1, 2].map(() =>
      rig.recorder.submit(aRequest(Uint32Array.from(prompt(33)), { stop: { maxTokens: 5 } })),
    );
    assert.equal(rig.engine.load().waitingRequests, 2);
    const readsBefore = below.reads;
    below.release();
    await rig.recorder.ended(ids);
    for (const id of ids) {
      assert.equal(rig.recorder.record(id).first?.cachedTokens, 32);
      assert.deepEqual(rig.recorder.record(id).tokens, FakeModel.continuation(prompt(33), 5));
    }
    assert.equal(readsBefore, 8);
    assert.equal(below.reads, 8);
  });
});

/** The blocks of a prompt as another worker has them. */
async function blocksElsewhere(tokens: readonly number[], startBlock: number): Promise<ImportedBlocks> {
  const other = new LoopEngine();
  const recorder = new EngineRecorder(other);
  await recorder.start();
  await recorder.run(aRequest(Uint32Array.from(tokens), { stop: { maxTokens: 1 } }));
  const blockCount = Math.floor(tokens.length / BLOCK);
  const { sequenceHashes } = hashBlocks(Uint32Array.from(tokens), BLOCK, blockHashSeed());
  const { data, blockBytes } = await other.exportBlocks(sequenceHashes);
  await recorder.stop();
  assert.equal(data.length, blockCount * blockBytes);
  return {
    sequenceHashes,
    tokenIds: Uint32Array.from(tokens.slice(0, blockCount * BLOCK)),
    blockBytes,
    startBlock,
    data: data.subarray(startBlock * blockBytes),
  };
}

for (const tier of ["host", "disk"] as const) {
  test(`tiers: blocks in the ${tier} tier count as held, and come in before an import that goes on behind them`, async () => {
    const below = new MemoryTier("disk");
    await withRig({ lower: [below] }, async (rig) => {
      const elsewhere = await blocksElsewhere(prompt(33), 5);
      await rig.say(prompt(5 * BLOCK, 0), 1);
      await rig.cache.settled();
      await rig.inner.clearBlocks();
      if (tier === "disk") rig.host.pool.clear();
      assert.equal(await rig.inner.countBlocks(elsewhere.sequenceHashes), 0);
      assert.equal(await rig.engine.countBlocks(elsewhere.sequenceHashes), 5);
      assert.equal(await rig.engine.importBlocks(elsewhere), 3);
      assert.equal(rig.meters.onboardedBlocks.get(tier), 5);
      assert.equal(await rig.say(prompt(33)), 32);
    });
  });
}

test("tiers: blocks of an object store do not count as held: another worker may be nearer", async () => {
  const below = new MemoryTier("object");
  await withRig({ lower: [below] }, async (rig) => {
    await rig.say(prompt(33));
    await rig.cache.settled();
    await rig.inner.clearBlocks();
    rig.host.pool.clear();
    const { sequenceHashes } = hashBlocks(Uint32Array.from(prompt(33)), BLOCK, blockHashSeed());
    assert.equal(await rig.engine.countBlocks(sequenceHashes), 0);
    // A request of its own takes them all the same.
    assert.equal(await rig.say(prompt(33)), 32);
  });
});

test("tiers: held blocks that are gone, or cannot be read, when an import needs them: it takes nothing, the text is the same", async () => {
  const below = new MemoryTier("disk");
  await withRig({ lower: [below] }, async (rig) => {
    const elsewhere = await blocksElsewhere(prompt(33), 5);
    await rig.say(prompt(5 * BLOCK, 0), 1);
    await rig.cache.settled();
    await rig.inner.clearBlocks();
    rig.host.pool.clear();
    assert.equal(await rig.engine.countBlocks(elsewhere.sequenceHashes), 5);
    await rig.engine.clearBlocks();
    assert.equal(await rig.engine.importBlocks(elsewhere), 0);
    assert.equal(await rig.say(prompt(33)), 0);
    // And a read that never ends is waited for only as long as computing would take.
    await rig.cache.settled();
    await rig.inner.clearBlocks();
    rig.host.pool.clear();
    below.hold();
    rig.cache.costs.tookToPrefill(100, 100);
    assert.equal(await rig.engine.importBlocks(elsewhere), 0);
    below.release();
    assert.equal((await rig.say(prompt(33))) % BLOCK, 0);
  });
});

test("tiers: a prompt's blocks go down and come back in runs that end at the same depths, whatever the batches were", async () => {
  const below = new MemoryTier("object", Infinity, 3);
  // The prompt is one chunk, of three offload batches: a chunk's end would end a run too.
  await withRig({ lower: [below], maxBatchedTokens: 64 }, async (rig) => {
    const told = (): number[] =>
      rig.recorder.kvEvents.flatMap((event) =>
        event.type === "stored" && event.tier === "external" ? [event.startBlock] : [],
      );
    await rig.say(prompt(41));
    await rig.cache.settled();
    // 10 blocks of the prompt and one of the answer: 0-2, 3-5, 6-8, 9 and what came after it.
    assert.deepEqual(below.writes.slice(0, 3), [3, 3, 3]);
    assert.equal(
      below.writes.reduce((sum, count) => sum + count, 0),
      11,
    );
    assert.equal(told()[0], 0, "routers are told what is in the store");
    await rig.inner.clearBlocks();
    rig.host.pool.clear();
    rig.cache.costs.tookToPrefill(100, 100_000);
    assert.equal(await rig.say(prompt(41)), 40);
    assert.equal(rig.meters.onboardedBlocks.get("object"), 10);
  });
});

test("tiers: with a frequency filter a block goes down when it was asked for often enough, wherever it is", () =>
  withRig({ hostMinFrequency: 3 }, async (rig) => {
    // Computed, then asked for while the engine has it, then again.
    for (const offloaded of [0, 0, 5]) {
      await rig.say(prompt(21));
      await rig.cache.settled();
      assert.equal(rig.meters.offloadedBlocks.get("host") ?? 0, offloaded);
    }
    await rig.inner.clearBlocks();
    assert.equal(await rig.say(prompt(21)), 20);
    await rig.say(prompt(21, 9));
    await rig.cache.settled();
    assert.equal(rig.host.pool.registeredCount, 5, "what was asked for once stays above");
  }));

test("tiers: a prompt that is asked for again before it has reached the host is on disk all the same", async () => {
  const below = new MemoryTier("disk");
  await withRig({ lower: [below], minSights: 2 }, async (rig) => {
    const { blockPort } = rig.inner;
    const copyOut = blockPort.copyOut.bind(blockPort);
    const gate = Promise.withResolvers<void>();
    blockPort.copyOut = async (hashes, slots) => {
      await gate.promise;
      return copyOut(hashes, slots);
    };
    await rig.say(prompt(33));
    assert.equal(await rig.say(prompt(33)), 32);
    gate.resolve();
    await rig.cache.settled();
    assert.equal(below.writes.length, 8);
  });
});

test("tiers: abort, stop and the engine's death while parked end the stream once", async () => {
  const below = new MemoryTier("disk");
  const parkOne = async (rig: Rig): Promise<number> => {
    await rig.say(prompt(21));
    await rig.cache.settled();
    await rig.inner.clearBlocks();
    rig.host.pool.clear();
    below.hold();
    return rig.recorder.submit(aRequest(Uint32Array.from(prompt(21))));
  };
  await withRig({ lower: [below] }, async (rig) => {
    const id = await parkOne(rig);
    rig.recorder.abort(id);
    rig.recorder.abort(id);
    await rig.recorder.ended([id]);
    assert.equal(rig.recorder.record(id).finish, "cancelled");
    below.release();
    assert.equal(await rig.say(prompt(21)), 20);
  });
  const stopped = new Rig({ lower: [below] });
  await stopped.recorder.start();
  const id = await parkOne(stopped);
  const stopping = stopped.recorder.stop();
  below.release();
  await stopping;
  assert.equal(stopped.recorder.record(id).error?.reason, "engine-stopped");
  stopped.recorder.check();
  const dying = new Rig({ lower: [below] });
  await dying.recorder.start();
  const other = await parkOne(dying);
  dying.inner.die();
  assert.equal(dying.recorder.record(other).error?.reason, "engine-stopped");
  below.release();
  await dying.recorder.stop();
  dying.recorder.check();
});

test("tiers: a drain waits for parked requests", async () => {
  const below = new MemoryTier("disk");
  const rig = new Rig({ lower: [below] });
  await rig.recorder.start();
  await rig.say(prompt(21));
  await rig.cache.settled();
  await rig.inner.clearBlocks();
  rig.host.pool.clear();
  below.hold();
  const id = rig.recorder.submit(aRequest(Uint32Array.from(prompt(21))));
  const drained = rig.recorder.drain();
  const late = rig.recorder.submit(aRequest(Uint32Array.from(prompt(3))));
  below.release();
  await drained;
  assert.equal(rig.recorder.record(id).finish, "length");
  assert.equal(rig.recorder.record(late).error?.reason, "draining");
  await rig.recorder.stop();
  rig.recorder.check();
});

test("tiers: a read that is late or fails leads to recomputation, counted", async () => {
  const below = new MemoryTier("disk");
  await withRig({ lower: [below] }, async (rig) => {
    await rig.say(prompt(33));
    await rig.cache.settled();
    for (const failure of ["late", "fails"] as const) {
      await rig.inner.clearBlocks();
      await rig.cache.settled();
      await new Promise((resolve) => setImmediate(resolve));
      rig.host.pool.clear();
      // Fast prefill: the request waits as short as it may.
      for (let i = 0; i < 40; i++) rig.cache.costs.tookToPrefill(1_000, 1_000);
      if (failure === "late") below.hold();
      else below.failReads = true;
      assert.equal(await rig.say(prompt(33)), 0);
      below.failReads = false;
      below.release();
    }
    assert.equal(rig.meters.failures.get("disk deadline"), 1);
    assert.deepEqual(Object.fromEntries(rig.meters.parkedRequests), { late: 1, restored: 1 });
    assert.equal(rig.meters.failures.get("disk read-failed"), 8);
  });
});

test("tiers: random loads over small tiers with faults: every text right, nothing leaks", async () => {
  const aStep = fc.record({
    salt: fc.integer({ min: 0, max: 3 }),
    length: fc.integer({ min: 1, max: 40 }),
    maxTokens: fc.integer({ min: 1, max: 6 }),
    abort: fc.boolean(),
    clear: fc.integer({ min: 0, max: 5 }),
    fault: fc.constantFrom("none", "none", "read", "write"),
  });
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.array(aStep, { minLength: 1, maxLength: 4 }), { minLength: 1, maxLength: 6 }),
      fc.integer({ min: 3, max: 24 }),
      fc.constantFrom(0, 2),
      async (rounds, hostBlocks, hostMinFrequency) => {
        const disk = new MemoryTier("disk", 12);
        const object = new MemoryTier("object", Infinity, 3);
        await withRig({ hostBlocks, hostMinFrequency, lower: [disk, object] }, async (rig) => {
          for (const round of rounds) {
            const submitted = round.map((step) => {
              disk.failReads = step.fault === "read";
              disk.failWrites = step.fault === "write";
              const tokens = prompt(step.length, step.salt);
              const id = rig.recorder.submit(
                aRequest(Uint32Array.from(tokens), { stop: { maxTokens: step.maxTokens } }),
              );
              if (step.clear === 0) void rig.inner.clearBlocks();
              if (step.abort) rig.recorder.abort(id);
              return { id, tokens, step };
            });
            await rig.recorder.ended(submitted.map(({ id }) => id));
            for (const { id, tokens, step } of submitted) {
              const { tokens: said, finish } = rig.recorder.record(id);
              const whole = FakeModel.continuation(tokens, step.maxTokens);
              if (finish !== "cancelled") assert.equal(finish, "length");
              assert.deepEqual(said, finish === "cancelled" ? whole.slice(0, said.length) : whole);
            }
          }
        });
      },
    ),
    { numRuns: 60 },
  );
});
