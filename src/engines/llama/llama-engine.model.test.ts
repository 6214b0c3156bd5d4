import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import test from "node:test";
import { DynamoError } from "../../errors/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import type { LlamaEngineConfig } from "../index.ts";
import { engineBattery } from "../engine.battery.ts";
import { EngineRecorder, aRequest, replayKvEvents } from "../engine.recorder.ts";
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
const PARIS = 7042;
/** `<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n` */
const CAPITAL_OF_FRANCE = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198];

/** Different text-like prompts: words of the vocabulary, picked by arithmetic. */
function aPrompt(length: number, salt = 0): Uint32Array {
  return Uint32Array.from({ length }, (_, i) => 300 + ((i * 37 + salt * 101 + ((i * i) % 7) * 11) % 4000));
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
    const prompt = Uint32Array.from(CAPITAL_OF_FRANCE);
    const answer = await recorder.run(aRequest(prompt, { stop: { maxTokens: 40, stopTokenIds: [END_OF_TURN] } }));
    assert.equal(answer.finish, "stop");
    assert(answer.tokens.includes(PARIS), `the answer was ${answer.tokens.join(" ")}`);
  }),
);

void test("llama: 16 streams at once say what each says alone", { skip }, () =>
  withEngine({}, async (recorder, engine) => {
    const request = (i: number): ReturnType<typeof aRequest> => aRequest(aPrompt(12 + i, i), { stop: { maxTokens: 16 } });
    const ids = Array.from({ length: 16 }, (_, i) => recorder.submit(request(i)));
    await recorder.ended(ids);
    let identical = 0;
    for (const [i, id] of ids.entries()) {
      await engine.clearBlocks();
      const alone = await recorder.run(request(i));
      const together = recorder.record(id).tokens;
      // The kernels add in another order for another batch, so near ties may fall otherwise: the start must agree.
      assert.deepEqual(together.slice(0, 4), alone.tokens.slice(0, 4), `stream ${i}`);
      if (together.join() === alone.tokens.join()) identical++;
    }
    assert(identical >= 14, `${identical} of 16 streams were identical over 16 tokens`);
  }),
);

void test("llama: a prompt seen before comes from the cache and gives the same text", { skip }, () =>
  withEngine({}, async (recorder) => {
    const cold = await recorder.run(aRequest(aPrompt(100), { stop: { maxTokens: 12 } }));
    const warm = await recorder.run(aRequest(aPrompt(100), { stop: { maxTokens: 12 } }));
    assert.equal(cold.first?.cachedTokens, 0);
    assert.equal(warm.first?.cachedTokens, 96);
    assert.deepEqual(warm.tokens, cold.tokens);
    // Another turn on top of the answer, of which the last token was never computed.
    const next = Uint32Array.from([...aPrompt(100), ...cold.tokens, 1, 2, 3]);
    const turn = await recorder.run(aRequest(next, { stop: { maxTokens: 1 } }));
    assert.equal(turn.first?.cachedTokens, 96);
  }),
);

void test("llama: an abort in the middle of a prefill ends it within a step and keeps what was computed", { skip }, () =>
  withEngine({ maxBatchedTokens: 32 }, async (recorder, engine) => {
    const id = recorder.submit(aRequest(aPrompt(500)));
    await recorder.until(() => recorder.kvEvents.length > 0, "the first chunk");
    const before = engine.load().steps;
    recorder.abort(id);
    await recorder.ended([id]);
    assert.equal(recorder.record(id).finish, "cancelled");
    assert(engine.load().steps - before <= 2, "no step after the one that was running");
    const { activeBlocks, cachedBlocks } = engine.load();
    assert.equal(activeBlocks, 0);
    assert.equal(cachedBlocks, replayKvEvents(recorder.kvEvents).size);
    const again = await recorder.run(aRequest(aPrompt(500), { stop: { maxTokens: 1 } }));
    assert.equal(again.first?.cachedTokens, cachedBlocks * 16);
  }),
);

void test("llama: with a cache too small for all, streams are preempted and still say the right thing", { skip }, () =>
  withEngine({ kvCacheTokens: 256, contextLength: 128, maxSequences: 8 }, async (recorder, engine) => {
    const ids = Array.from({ length: 8 }, (_, i) => recorder.submit(aRequest(aPrompt(20, i), { stop: { maxTokens: 40 } })));
    await recorder.ended(ids);
    assert(engine.load().preemptions > 0, "the test is about preemption");
    const load = engine.load();
    assert.equal(load.activeBlocks, 0);
    assert.equal(load.cachedBlocks, replayKvEvents(recorder.kvEvents).size);
    for (const [i, id] of ids.entries()) {
      const alone = await recorder.run(aRequest(aPrompt(20, i), { stop: { maxTokens: 40 } }));
      assert.equal(recorder.record(id).tokens.length, 40);
      assert.deepEqual(recorder.record(id).tokens.slice(0, 4), alone.tokens.slice(0, 4), `stream ${i}`);
    }
  }),
);

void test("llama: blocks exported from one engine continue in another with the same text", { skip }, () =>
  withEngine({}, (source, sourceEngine) =>
    withEngine({}, async (target, targetEngine) => {
      const prompt = aPrompt(101, 3);
      const here = await source.run(aRequest(prompt, { stop: { maxTokens: 16 } }));
      // Holes in the target's memory, so that a block's cells lie apart.
      const fill = [1, 2, 3].map((salt) => target.submit(aRequest(aPrompt(40, 20 + salt), { stop: { maxTokens: 5 } })));
      await target.ended(fill);
      await targetEngine.clearBlocks();
      const { sequenceHashes } = hashBlocks(prompt, 16, blockHashSeed());
      const blocks = await sourceEngine.exportBlocks(sequenceHashes);
      assert.equal(blocks.data.length, 6 * blocks.blockBytes);
      assert.equal(await targetEngine.importBlocks({ ...blocks, tokenIds: prompt.subarray(0, 96) }), 6);
      const there = await target.run(aRequest(prompt, { stop: { maxTokens: 16 } }));
      assert.equal(there.first?.cachedTokens, 96);
      assert.deepEqual(there.tokens, here.tokens);
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
