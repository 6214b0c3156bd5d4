import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import test from "node:test";
import type { DynamoError } from "../../errors/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import type { LlamaEngineConfig } from "../index.ts";
import { engineBattery } from "../engine.battery.ts";
import { EngineRecorder, aRequest, replayKvEvents, type StreamRecord } from "../engine.recorder.ts";
import { LlamaEngine } from "./llama-engine.ts";

/** The engine on the real SmolLM2-135M-Instruct. Prompts are token ids, so that no tokenizer is needed here. */
const MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf";
const MODEL_PATH =
  process.env["DYN_TEST_MODEL"] ??
  path.join(process.env["DYN_MODEL_DIR"] ?? path.join(os.homedir(), ".cache", "dynamo-ts", "models"), MODEL_FILE);
const skip = existsSync(MODEL_PATH) ? false : `no model at ${MODEL_PATH}: set DYN_TEST_MODEL`;

const CONFIG: LlamaEngineConfig = {
  kind: "llama",
  modelPath: MODEL_PATH,
  contextLength: 512,
  kvCacheTokens: 4096,
  maxSequences: 16,
  maxBatchedTokens: 256,
  blockSizeTokens: 16,
  // One, because the test runner has several files running.
  threads: 1,
};
const END_OF_TURN = 2;
const FRANCE = 4649;
const PARIS = 7042;
// " Spain", " Italy", " Japan" and so on: one token each.
const COUNTRIES = [7476, 7158, 3085, 3275, 4521, 6054, 4004, 5647, 3089, 4754, 10040, 8050, 12452, 11011, 3996, 7597];

/** The chat `What is the capital of <country>?`, after a turn about each of the countries before the last. */
function aChat(...countries: number[]): Uint32Array {
  const ids: number[] = [];
  countries.forEach((country, i) => {
    ids.push(1, 4093, 198, 1780, 314, 260, 3575, 282, country, 47, END_OF_TURN, 198, 1, 520, 9531, 198);
    if (i < countries.length - 1) ids.push(504, 3575, 282, country, 314, PARIS, 30, END_OF_TURN, 198);
  });
  return Uint32Array.from(ids);
}

/** Any number of tokens, words of the vocabulary picked by arithmetic: for tests that do not look at the text. */
function aPrompt(length: number, salt = 0): Uint32Array {
  return Uint32Array.from({ length }, (_, i) => 300 + ((i * 37 + salt * 101 + ((i * i) % 7) * 11) % 4000));
}

/** A greedy request with its probabilities. */
function aTextRequest(prompt: Uint32Array, maxTokens: number): ReturnType<typeof aRequest> {
  return aRequest(prompt, { stop: { maxTokens }, output: { topLogprobs: 4 } });
}

/**
 * The same text and the same probabilities, to the bit, whatever was computed beside it, cached, or computed in other
 * pieces (README.md, "The same text"; one compute thread).
 */
function sameText(a: StreamRecord, b: StreamRecord): void {
  assert.deepEqual(a.tokens, b.tokens);
  assert.deepEqual(a.logprobs, b.logprobs);
}

async function withEngine(
  overrides: Partial<LlamaEngineConfig>,
  body: (recorder: EngineRecorder, engine: LlamaEngine) => Promise<void>,
): Promise<void> {
  const engine = new LlamaEngine({ ...CONFIG, ...overrides });
  const recorder = new EngineRecorder(engine);
  try {
    await recorder.start();
    await body(recorder, engine);
    assert.equal(recorder.fatal, undefined);
  } finally {
    await recorder.stop();
  }
  recorder.check();
}

void test("llama: the capital of France is Paris", { skip }, () =>
  withEngine({}, async (recorder) => {
    const answer = await recorder.run(
      aRequest(aChat(FRANCE), { stop: { maxTokens: 40, stopTokenIds: [END_OF_TURN] } }),
    );
    assert.equal(answer.finish, "stop");
    assert(answer.tokens.includes(PARIS), `the answer was ${answer.tokens.join(" ")}`);
  }),
);

void test("llama: 16 streams at once say what each says alone", { skip }, () =>
  withEngine({}, async (recorder, engine) => {
    const ids = COUNTRIES.map((country) => recorder.submit(aTextRequest(aChat(country), 16)));
    await recorder.ended(ids);
    assert(engine.load().steps < 40, "they ran together");
    for (const [i, country] of COUNTRIES.slice(0, 8).entries()) {
      await engine.clearBlocks();
      const alone = await recorder.run(aTextRequest(aChat(country), 16));
      sameText(recorder.record(ids[i]!), alone);
    }
  }),
);

void test("llama: a prompt seen before comes from the cache and gives the same text", { skip }, () =>
  withEngine({}, async (recorder) => {
    const prompt = aChat(...COUNTRIES.slice(0, 4));
    const cold = await recorder.run(aTextRequest(prompt, 12));
    const warm = await recorder.run(aTextRequest(prompt, 12));
    // 91 tokens: 5 blocks of 16 and a rest.
    assert.equal(cold.first?.cachedTokens, 0);
    assert.equal(warm.first?.cachedTokens, 80);
    sameText(warm, cold);
    // The next turn finds the answer's blocks, too: 102 of the 103 tokens so far were computed.
    const next = Uint32Array.from([...prompt, ...cold.tokens, ...aChat(FRANCE)]);
    const turn = await recorder.run(aTextRequest(next, 1));
    assert.equal(turn.first?.cachedTokens, 96);
  }),
);

void test(
  "llama: an abort in the middle of a prefill ends it within a step and keeps what was computed",
  { skip },
  () =>
    withEngine({ maxBatchedTokens: 32 }, async (recorder, engine) => {
      const id = recorder.submit(aRequest(aPrompt(300)));
      await recorder.until(() => recorder.kvEvents.length > 0, "the first chunk");
      const before = engine.load().steps;
      recorder.abort(id);
      await recorder.ended([id]);
      assert.equal(recorder.record(id).finish, "cancelled");
      assert(engine.load().steps - before <= 2, "no step after the one that was running");
      const { activeBlocks, cachedBlocks } = engine.load();
      assert.equal(activeBlocks, 0);
      assert.equal(cachedBlocks, replayKvEvents(recorder.kvEvents).size);
      const again = await recorder.run(aRequest(aPrompt(300), { stop: { maxTokens: 1 } }));
      assert.equal(again.first?.cachedTokens, cachedBlocks * 16);
    }),
);

void test("llama: with a cache too small for all, streams are preempted and still say the right thing", { skip }, () =>
  withEngine({ kvCacheTokens: 256, contextLength: 128, maxSequences: 8 }, async (recorder, engine) => {
    const prompts = COUNTRIES.slice(0, 8).map((country) => aChat(country));
    const ids = prompts.map((prompt) => recorder.submit(aTextRequest(prompt, 28)));
    await recorder.ended(ids);
    const { preemptions, activeBlocks, cachedBlocks } = engine.load();
    assert(preemptions > 0, "the test is about preemption");
    assert.equal(activeBlocks, 0);
    assert.equal(cachedBlocks, replayKvEvents(recorder.kvEvents).size);
    for (const [i, prompt] of prompts.slice(0, 4).entries()) {
      sameText(recorder.record(ids[i]!), await recorder.run(aTextRequest(prompt, 28)));
    }
  }),
);

void test("llama: blocks exported from one engine continue in another with the same text", { skip }, () =>
  withEngine({}, (source, sourceEngine) =>
    withEngine({}, async (target, targetEngine) => {
      const prompt = aChat(...COUNTRIES.slice(0, 4));
      const here = await source.run(aTextRequest(prompt, 16));
      // Holes in the target's memory, so that a block's cells lie apart.
      const fill = [1, 2, 3].map((salt) => target.submit(aRequest(aPrompt(40, salt), { stop: { maxTokens: 5 } })));
      await target.ended(fill);
      await targetEngine.clearBlocks();
      const { sequenceHashes } = hashBlocks(prompt, 16, blockHashSeed());
      const blocks = await sourceEngine.exportBlocks(sequenceHashes);
      assert.equal(blocks.data.length, 5 * blocks.blockBytes);
      assert.equal(await targetEngine.importBlocks({ ...blocks, tokenIds: prompt.subarray(0, 80) }), 5);
      const there = await target.run(aTextRequest(prompt, 16));
      assert.equal(there.first?.cachedTokens, 80);
      sameText(there, here);
    }),
  ),
);

void test("llama: imported bytes that are no block are refused and the engine lives on", { skip }, () =>
  withEngine({}, async (recorder, engine) => {
    const tokenIds = aPrompt(32);
    const { sequenceHashes } = hashBlocks(tokenIds, 16, blockHashSeed());
    const { blockBytes } = await engine.exportBlocks(sequenceHashes);
    for (const byte of [0, 1, 0x7f, 0xff]) {
      const data = new Uint8Array(2 * blockBytes).fill(byte);
      assert.equal(await engine.importBlocks({ sequenceHashes, blockBytes, data, tokenIds }), 0);
    }
    const answer = await recorder.run(aRequest(tokenIds, { stop: { maxTokens: 2 } }));
    assert.equal(answer.first?.cachedTokens, 0);
    assert.equal(answer.tokens.length, 2);
  }),
);

void test("llama: an idle engine takes no CPU time and answers at once when called", { skip }, () =>
  withEngine({}, async (_recorder, engine) => {
    await engine.clearBlocks();
    const before = process.cpuUsage();
    await new Promise((resolve) => setTimeout(resolve, 500));
    const { user, system } = process.cpuUsage(before);
    assert(user + system < 100_000, `${(user + system) / 1000} ms of CPU time in 500 ms`);
    const roundTrips: number[] = [];
    for (let i = 0; i < 21; i++) {
      const startedAt = performance.now();
      await engine.clearBlocks();
      roundTrips.push(performance.now() - startedAt);
    }
    const median = roundTrips.toSorted((a, b) => a - b)[10]!;
    // 0.15 ms on a free machine.
    assert(median < 20, `${median} ms from call to answer`);
  }),
);

void test("llama: a sleeping engine does not keep the process from ending", { skip }, async () => {
  const program = path.join(import.meta.dirname, "fixtures", "exit-while-idle.ts");
  const child = spawn(process.execPath, [program, MODEL_PATH], { stdio: "inherit", timeout: 60_000 });
  const [code, signal] = (await once(child, "exit")) as [number | null, string | null];
  assert.deepEqual([code, signal], [0, null]);
});

void test("llama: a file that is no model is refused with what the library says", async () => {
  const engine = new LlamaEngine({ ...CONFIG, modelPath: path.join(os.tmpdir(), "there-is-no-such.gguf") });
  const recorder = new EngineRecorder(engine);
  await assert.rejects(recorder.start(), (error: DynamoError) => {
    assert.equal(error.reason, "model-file-invalid");
    assert.match(error.diagnostic ?? "", /there-is-no-such/);
    return true;
  });
  await recorder.stop();
});

if (skip === false) {
  engineBattery("llama", () =>
    Promise.resolve({
      engine: new LlamaEngine({ ...CONFIG, contextLength: 256, kvCacheTokens: 2048, maxSequences: 8 }),
      promptTokenIds: (length: number) => aPrompt(length),
      stopTokenId: END_OF_TURN,
      supportsExport: true,
    }),
  );
}
