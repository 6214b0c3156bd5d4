import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { test } from "node:test";
import { LlamaEngine } from "../../engines/llama/llama-engine.ts";
import type { LlamaEngineConfig } from "../../engines/index.ts";
import { EngineRecorder, aRequest, type StreamRecord } from "../../engines/engine.recorder.ts";
import { Metrics, silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { BUCKET, startS3Server } from "../../transfer/s3/fixtures/s3-server.ts";
import type { KvTiersConfig } from "./tier-config.ts";
import { withTiers } from "./with-tiers.ts";

/** The tiers under the real SmolLM2-135M-Instruct: text from every tier beside text that was computed. */
const MODEL_PATH =
  process.env["DYN_TEST_MODEL"] ??
  path.join(
    process.env["DYN_MODEL_DIR"] ?? path.join(os.homedir(), ".cache", "dynamo-ts", "models"),
    "SmolLM2-135M-Instruct.Q4_1.gguf",
  );
const skip = existsSync(MODEL_PATH) ? false : `no model at ${MODEL_PATH}: set DYN_TEST_MODEL`;

const CONFIG: LlamaEngineConfig = {
  kind: "llama",
  modelPath: MODEL_PATH,
  contextLength: 512,
  kvCacheTokens: 1024,
  maxSequences: 4,
  maxBatchedTokens: 256,
  blockSizeTokens: 16,
  threads: 1,
};

class Rig {
  readonly metrics = new Metrics();
  readonly inner = new LlamaEngine(CONFIG);
  readonly recorder: EngineRecorder;

  constructor(config: KvTiersConfig) {
    const { engine } = withTiers({
      engine: this.inner,
      modelPath: MODEL_PATH,
      config,
      metrics: this.metrics,
      clock: systemClock,
      logger: silentLogger,
    });
    this.recorder = new EngineRecorder(engine);
  }

  say(salt: number): Promise<StreamRecord> {
    return this.recorder.run(aRequest(aPrompt(salt), { stop: { maxTokens: 12 }, output: { topLogprobs: 4 } }));
  }

  async value(name: string): Promise<number> {
    const line = (await this.metrics.render()).split("\n").find((one) => one.startsWith(`${name} `));
    return Number(line?.split(" ").at(-1) ?? 0);
  }

  /** Resolves when a counter has got there; blocks go down in the background. */
  async reaches(name: string, count: number): Promise<void> {
    const deadline = performance.now() + 30_000;
    while ((await this.value(name)) < count) {
      assert(performance.now() < deadline, `${name} reaches ${count}`);
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
}

/** 200 tokens: 12 whole blocks before the last one. */
function aPrompt(salt: number): Uint32Array {
  return Uint32Array.from({ length: 200 }, (_, i) => 300 + ((i * 37 + salt * 101 + ((i * i) % 7) * 11) % 4000));
}

/** Blocks come back bit for bit, and what is computed on them does not depend on where they lie (engines/llama/README.md). */
function sameText(a: StreamRecord, b: StreamRecord): void {
  assert.deepEqual(a.tokens, b.tokens);
  assert.deepEqual(a.logprobs, b.logprobs);
}

void test("tiers, llama: text from host memory is that of the engine's own cache", { skip }, async () => {
  const rig = new Rig({ hostBytes: 100e6 });
  await rig.recorder.start();
  try {
    const cold = await rig.say(1);
    const fromDevice = await rig.say(1);
    assert.equal(fromDevice.first?.cachedTokens, 192);
    await rig.reaches("kvbm_offload_blocks_d2h", 13);
    await rig.inner.clearBlocks();
    const fromHost = await rig.say(1);
    assert.equal(fromHost.first?.cachedTokens, 192);
    assert.equal(await rig.value("kvbm_onboard_blocks_h2d"), 12);
    sameText(fromDevice, fromHost);
    sameText(cold, fromHost);
  } finally {
    await rig.recorder.stop();
  }
  rig.recorder.check();
});

/** One life of an engine with these tiers. */
async function life<T>(config: KvTiersConfig, body: (rig: Rig) => Promise<T>): Promise<T> {
  const rig = new Rig(config);
  await rig.recorder.start();
  let result: T;
  try {
    result = await body(rig);
  } finally {
    await rig.recorder.stop();
  }
  rig.recorder.check();
  return result;
}

async function survivesRestart(config: KvTiersConfig, down: string, up: string): Promise<void> {
  const [cold, fromDevice] = await life(config, async (rig) => {
    const texts = [await rig.say(2), await rig.say(2)] as const;
    await rig.reaches(down, 12);
    return texts;
  });
  await life(config, async (rig) => {
    // Time for the listing of an object store, which goes on beside the first requests.
    await rig.say(3);
    const restored = await rig.say(2);
    assert.equal(restored.first?.cachedTokens, 192);
    assert.equal(await rig.value(up), 12);
    sameText(fromDevice, restored);
    sameText(cold, restored);
  });
}

async function withFolder(body: (folder: string) => Promise<void>): Promise<void> {
  const folder = await mkdtemp(path.join(os.tmpdir(), "dynamo-tiers-"));
  try {
    await body(folder);
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

void test("tiers, llama: a restarted worker finds its blocks on disk", { skip }, () =>
  withFolder((folder) =>
    survivesRestart(
      { hostBytes: 0, disk: { bytes: 100e6, folder } },
      "kvbm_offload_blocks_h2d",
      "kvbm_onboard_blocks_d2d",
    ),
  ),
);

void test("tiers, llama: a restarted worker finds its blocks in the bucket", { skip }, async () => {
  const server = await startS3Server();
  try {
    const store = { kind: "s3", bucket: BUCKET, s3: server.options } as const;
    await survivesRestart(
      { hostBytes: 100e6, object: { store } },
      "kvbm_offload_blocks_d2o",
      "kvbm_onboard_blocks_o2d",
    );
  } finally {
    await server.close();
  }
});
