import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { DynamoError } from "../../errors/index.ts";
import { polynomialDecodeMs, polynomialPrefillMs } from "../../perf-model/index.ts";
import { ManualClock } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import type { MockerEngineConfig } from "../config.ts";
import { engineBattery } from "../engine.battery.ts";
import { EngineRecorder, aRequest, replayKvEvents } from "../engine.recorder.ts";
import { MOCK_BLOCK_BYTES, MockerEngine, mockerConfig, type BlockLink } from "./index.ts";

const SMALL: Partial<MockerEngineConfig> = {
  contextLength: 256,
  maxSequences: 8,
  maxBatchedTokens: 64,
  blockSizeTokens: 4,
  totalBlocks: 200,
  speedupRatio: 0,
};

function aPrompt(length: number): Uint32Array {
  return Uint32Array.from({ length }, (_, i) => (i * 7 + 3) % 251);
}

const VARIANTS: Record<string, Partial<MockerEngineConfig>> = {
  "vllm style": {},
  "sglang style": { engineType: "sglang", blockSizeTokens: 4 },
  "trtllm style, in real time, fast": { engineType: "trtllm", speedupRatio: 50 },
  "oldest preempted, small budget": { preemptionMode: "fifo", maxBatchedTokens: 16 },
};

for (const [name, overrides] of Object.entries(VARIANTS)) {
  engineBattery(`mocker, ${name}`, () =>
    Promise.resolve({
      engine: new MockerEngine(mockerConfig({ ...SMALL, ...overrides }), { maxWaitingRequests: 50 }),
      promptTokenIds: aPrompt,
      stopTokenId: 255,
      supportsExport: true,
      maxWaitingRequests: 50,
    }),
  );
}

async function withEngine(
  engine: MockerEngine,
  body: (recorder: EngineRecorder) => Promise<void>,
): Promise<EngineRecorder> {
  const recorder = new EngineRecorder(engine);
  await recorder.start();
  try {
    await body(recorder);
  } finally {
    await recorder.stop();
  }
  recorder.check();
  return recorder;
}

test("mocker engine: on a manual clock a request takes exactly its predicted time", async () => {
  const clock = new ManualClock();
  const config = mockerConfig({ maxSequences: 4, vocabularySize: 49_152 });
  await withEngine(new MockerEngine(config, { clock }), async (recorder) => {
    const streamId = recorder.submit(aRequest(aPrompt(1_000), { stop: { maxTokens: 2 } }));
    const hasPass = (): boolean => clock.pendingTimerCount === 1;
    await turnsUntil(hasPass);
    clock.advance(polynomialPrefillMs(1_000) - 0.01);
    assert.equal(recorder.record(streamId).tokens.length, 0);
    clock.advance(0.02);
    assert.equal(recorder.record(streamId).tokens.length, 1);
    clock.advance(polynomialDecodeMs(16 / 16_384));
    await recorder.ended([streamId]);
    const { first } = recorder.record(streamId);
    assert.equal(first?.queueMs, 0);
    assert.ok(Math.abs(first.prefillMs - polynomialPrefillMs(1_000)) < 0.05);
  });
});

test("mocker engine: late timers do not slow it down, it keeps its timeline", async () => {
  const clock = new ManualClock();
  // Passes of a little over 5.74 ms, looked at only every 8 ms.
  const config = mockerConfig({ maxSequences: 4, blockSizeTokens: 4 });
  await withEngine(new MockerEngine(config, { clock }), async (recorder) => {
    const streamId = recorder.submit(aRequest(aPrompt(1), { stop: { maxTokens: 1_000 } }));
    await turnsUntil(() => clock.pendingTimerCount === 1);
    clock.advance(20);
    const before = recorder.record(streamId).tokens.length;
    for (let i = 0; i < 100; i++) {
      clock.advance(8);
      await turnsUntil(() => clock.pendingTimerCount === 1);
    }
    const tokens = recorder.record(streamId).tokens.length - before;
    assert.ok(tokens >= 130 && tokens <= 140, `800 ms are 137 to 139 passes, got ${tokens}`);
  });
});

test("mocker engine: start takes the start-up time and can be cancelled or stopped in it", async () => {
  const clock = new ManualClock();
  const config = mockerConfig({ ...SMALL, startupTimeMs: 1_000 });
  const slow = new EngineRecorder(new MockerEngine(config, { clock }));
  const started = slow.start();
  await turnsUntil(() => clock.pendingTimerCount === 1);
  clock.advance(1_000);
  assert.equal((await started).engine, "mocker");
  await slow.stop();

  const cancel = new AbortController();
  const cancelled = new EngineRecorder(new MockerEngine(config, { clock })).start(cancel.signal);
  await turnsUntil(() => clock.pendingTimerCount === 1);
  cancel.abort();
  await assert.rejects(cancelled, { reason: "cancelled" });

  const stopped = new MockerEngine(config, { clock });
  const stoppedStart = new EngineRecorder(stopped).start();
  await turnsUntil(() => clock.pendingTimerCount === 1);
  await Promise.all([assert.rejects(stoppedStart, { reason: "cancelled" }), stopped.stop()]);
  assert.equal(clock.pendingTimerCount, 0);
});

test("mocker engine: a request that moves to another engine with its tokens goes on as if it had stayed", async () => {
  const prompt = aPrompt(30);
  const config = mockerConfig(SMALL);
  let whole: number[] = [];
  await withEngine(new MockerEngine(config), async (recorder) => {
    whole = (await recorder.run(aRequest(prompt, { stop: { maxTokens: 20 } }))).tokens;
  });
  await withEngine(new MockerEngine(config), async (recorder) => {
    const moved = Uint32Array.from([...prompt, ...whole.slice(0, 7)]);
    const { tokens } = await recorder.run(aRequest(moved, { stop: { maxTokens: 13 } }));
    assert.deepEqual(tokens, whole.slice(7));
  });
});

test("mocker engine: it tells the sizes of one rank, and the load of all", async () => {
  const engine = new MockerEngine(mockerConfig({ ...SMALL, dataParallelSize: 3 }));
  const recorder = new EngineRecorder(engine);
  try {
    const { totalBlocks, maxSequences, dataParallelSize } = await recorder.start();
    assert.deepEqual(
      { totalBlocks, maxSequences, dataParallelSize },
      { totalBlocks: 200, maxSequences: 8, dataParallelSize: 3 },
    );
    assert.equal(engine.load().totalBlocks, 600);
  } finally {
    await recorder.stop();
  }
});

test("mocker engine: data-parallel ranks share the work, and events say which rank they are of", async () => {
  const config = mockerConfig({ ...SMALL, dataParallelSize: 3 });
  const engine = new MockerEngine(config);
  const recorder = await withEngine(engine, async (running) => {
    const streamIds = [1, 2, 3].map((salt) => running.submit(aRequest(aPrompt(20).map((id) => id + salt))));
    assert.equal(engine.load().waitingRequests, 3);
    await running.ended(streamIds);
    assert.equal(engine.load().totalBlocks, 600);
    assert.equal(engine.load().generatedTokens, 24);
  });
  for (const rank of [0, 1, 2]) {
    const events = recorder.kvEvents.filter(({ dpRank }) => dpRank === rank);
    assert.ok(events.length > 0);
    replayKvEvents(events);
  }
});

test("mocker engine: an imported block that holds another one's bytes is refused", async () => {
  await withEngine(new MockerEngine(mockerConfig(SMALL)), async (recorder) => {
    const prompt = aPrompt(8);
    await recorder.run(aRequest(prompt));
    const exported = await recorder.engine.exportBlocks(hashBlocks(prompt, 4, blockHashSeed()).sequenceHashes);
    const swapped = Buffer.concat([exported.data.subarray(64), exported.data.subarray(0, 64)]);
    await assert.rejects(recorder.engine.importBlocks({ ...exported, data: swapped, tokenIds: prompt }), /block 0/);
    const truncated = exported.data.subarray(0, 100);
    await assert.rejects(recorder.engine.importBlocks({ ...exported, data: truncated, tokenIds: prompt }), /block 1/);
  });
});

test("mocker engine: blocks go to host memory and come back, and who comes after them finds them", async () => {
  const prompt = aPrompt(30);
  const { sequenceHashes } = hashBlocks(prompt.subarray(0, 28), 4, blockHashSeed({ cacheNamespace: "" }));
  const slots = Int32Array.from({ length: 7 }, (_, i) => 6 - i);
  const moves: { readonly bytes: number; readonly arrive: () => void }[] = [];
  const host: BlockLink = {
    move: (bytes) => new Promise((arrive) => moves.push({ bytes, arrive })),
    stop: () => undefined,
  };
  const imports: BlockLink = { move: () => Promise.resolve(), stop: () => undefined };
  const engine = new MockerEngine(mockerConfig(SMALL), { links: { host, imports } });
  await withEngine(engine, async (recorder) => {
    const memory = new SharedArrayBuffer(7 * MOCK_BLOCK_BYTES);
    const { blockPort } = engine;
    blockPort.attach(memory);
    await recorder.run(aRequest(prompt));
    const copied = blockPort.copyOut(sequenceHashes, slots);
    moves.shift()!.arrive();
    assert.deepEqual([...(await copied)], [1, 1, 1, 1, 1, 1, 1]);
    await engine.clearBlocks();
    const blocks = { tokenIds: prompt.slice(0, 28), cacheNamespace: "", firstBlock: 0, slots };
    const taken = blockPort.copyIn(blocks);
    const { bytes, arrive } = moves.shift()!;
    assert.equal(bytes, 28 * mockerConfig(SMALL).kvBytesPerToken, "the time of the real bytes");
    const streamId = recorder.submit(aRequest(prompt));
    const left = recorder.submit(aRequest(prompt));
    assert.equal(engine.load().waitingRequests, 2, "they wait for the blocks");
    engine.abort(left);
    await turnsUntil(() => recorder.record(left).finish === "cancelled");
    assert.equal(recorder.record(streamId).tokens.length, 0);
    arrive();
    assert.equal(await taken, 7);
    await turnsUntil(() => recorder.record(streamId).finish !== undefined);
    assert.equal(recorder.record(streamId).first!.cachedTokens, 28);
    new Uint8Array(memory)[3 * MOCK_BLOCK_BYTES]! ^= 1;
    await engine.clearBlocks();
    const wrong = blockPort.copyIn(blocks);
    moves.shift()!.arrive();
    await assert.rejects(wrong, (thrown) => thrown instanceof DynamoError && thrown.reason === "malformed-frame");
  });
});

test("mocker engine: a measured profile replaces the polynomials", async () => {
  const folder = await mkdtemp(join(tmpdir(), "mocker-profile-"));
  try {
    const profilePath = join(folder, "profile.csv");
    const lines = ["phase,isl,active_kv_tokens,context_length,ms", "prefill,10,,,500", "decode,,0,0,70"];
    await writeFile(profilePath, lines.join("\n"));
    const clock = new ManualClock();
    const config = mockerConfig({ ...SMALL, speedupRatio: 1, profilePath });
    await withEngine(new MockerEngine(config, { clock }), async (recorder) => {
      const streamId = recorder.submit(aRequest(aPrompt(10), { stop: { maxTokens: 2 } }));
      await turnsUntil(() => clock.pendingTimerCount === 1);
      clock.advance(500);
      assert.equal(recorder.record(streamId).tokens.length, 1);
      clock.advance(70);
      await recorder.ended([streamId]);
    });
  } finally {
    await rm(folder, { recursive: true });
  }
});

test("mocker engine: what cannot be configured is refused at start, all at once", async () => {
  const start = (overrides: Partial<MockerEngineConfig>): Promise<unknown> =>
    new EngineRecorder(new MockerEngine(mockerConfig({ ...SMALL, ...overrides }))).start();
  const isNamed = (pattern: RegExp) => (error: unknown) =>
    error instanceof DynamoError && error.reason === "invalid-config" && pattern.test(error.message);
  await assert.rejects(start({ speedupRatio: -1, dataParallelSize: 0 }), isNamed(/speedup ratio.*\n.*parallel/));
  await assert.rejects(start({ totalBlocks: 0 }), isNamed(/KV blocks/));
  await assert.rejects(start({ profilePath: "/nowhere/profile.json" }), isNamed(/cannot be read/));
});

/** Lets the event loop turn until something is so. */
async function turnsUntil(isSo: () => boolean): Promise<void> {
  const deadlineMs = performance.now() + 5_000;
  while (!isSo()) {
    assert.ok(performance.now() < deadlineMs, "it came to be so in time");
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
}
