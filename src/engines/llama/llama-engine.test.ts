import assert from "node:assert/strict";
import test from "node:test";
import { DynamoError } from "../../errors/index.ts";
import { EngineRecorder, aRequest } from "../engine.recorder.ts";
import type { LlamaEngineConfig } from "../index.ts";
import { probeLibllama } from "./libllama.ts";
import { LlamaEngine } from "./llama-engine.ts";

/** The engine's main side and the library, without a model. */
const CONFIG: LlamaEngineConfig = {
  kind: "llama",
  modelPath: "none.gguf",
  contextLength: 100,
  kvCacheTokens: 160,
  maxSequences: 4,
  maxBatchedTokens: 64,
  blockSizeTokens: 16,
  threads: 1,
};
const DYING_THREAD = new URL("./fixtures/dying-thread.ts", import.meta.url);

/** Without a thread program the library has to be there. */
function librarySkip(): string | false {
  try {
    probeLibllama();
    return false;
  } catch (error) {
    return error instanceof DynamoError ? (error.diagnostic ?? error.message) : String(error);
  }
}

test("libllama: the library of this platform loads and has the layout we expect", { skip: librarySkip() }, () => {
  const { version, path } = probeLibllama();
  assert.match(version, /^\d+\.\d+/);
  assert.match(path, /llama/);
});

for (const [streamId, how] of [
  [1, "of an exception"],
  [7, "by exiting"],
] as const) {
  test(`llama engine: a thread that dies ${how} ends its streams with engine-stopped, then is reported`, async () => {
    const engine = new LlamaEngine(CONFIG, { threadUrl: DYING_THREAD });
    const recorder = new EngineRecorder(engine);
    await recorder.start();
    recorder.streams.set(streamId, {
      tokens: [],
      first: undefined,
      firstAtStep: 0,
      finishedAtStep: 0,
      finish: undefined,
      error: undefined,
      logprobs: [],
      promptLogprobs: undefined,
    });
    engine.submit(streamId, aRequest(Uint32Array.of(1, 2)));
    const call = engine.clearBlocks();
    const drained = engine.drain();
    await assert.rejects(call, { reason: "engine-stopped" });
    await recorder.until(() => recorder.fatal !== undefined, "the report of the death");
    assert.equal(recorder.record(streamId).error?.reason, "engine-stopped");
    assert.equal(recorder.fatal?.reason, "engine-failed");
    await drained;
    assert.throws(() => engine.submit(9, aRequest(Uint32Array.of(1))), { reason: "engine-stopped" });
    await assert.rejects(engine.exportBlocks(new Uint32Array(0)), { reason: "engine-stopped" });
    assert.equal(engine.load().waitingRequests, 0);
    await recorder.stop();
    recorder.check();
  });
}

test("llama engine: stop while it starts rejects the start and leaves no thread", async () => {
  const engine = new LlamaEngine(CONFIG);
  const recorder = new EngineRecorder(engine);
  const started = recorder.start();
  const refused = assert.rejects(started, { reason: "engine-stopped" });
  await recorder.stop();
  await refused;
});

test("llama engine: a cancelled start rejects at once", async () => {
  const engine = new LlamaEngine(CONFIG);
  const recorder = new EngineRecorder(engine);
  const controller = new AbortController();
  const refused = assert.rejects(recorder.start(controller.signal), { reason: "cancelled" });
  controller.abort();
  await refused;
  await recorder.stop();
});

test("llama engine: all wrong settings are told together", () => {
  assert.throws(
    () => new LlamaEngine({ ...CONFIG, threads: 0, maxSequences: 500, maxBatchedTokens: 499 }),
    (error: DynamoError) => {
      assert.equal(error.reason, "invalid-config");
      assert.match(error.message, /threads: .*maxSequences: .*maxBatchedTokens: /);
      return true;
    },
  );
});
