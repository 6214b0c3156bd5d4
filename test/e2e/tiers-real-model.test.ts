import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test, type TestContext } from "node:test";
import { PROMPT_SET_SIZE, allowedPartings, partOf, promptSet } from "../../src/engines/engine.prompts.ts";
import { EngineRecorder, aRequest, type StreamRecord } from "../../src/engines/engine.recorder.ts";
import { LlamaEngine } from "../../src/engines/llama/llama-engine.ts";
import { Metrics, silentLogger } from "../../src/observability/index.ts";
import { systemClock } from "../../src/std/index.ts";
import { BUCKET, startS3Server } from "../../src/transfer/s3/fixtures/s3-server.ts";
import type { KvTiersConfig } from "../../src/worker/tiers/index.ts";
import { withTiers } from "../../src/worker/tiers/with-tiers.ts";
import { PartingList, type GreedyToken } from "../helpers/greedy.ts";
import { until } from "../helpers/in-process-cluster.ts";

/**
 * SmolLM2 over KV tiers: greedy text is that of an empty, idle engine, whatever came from where. The engine's own cache is
 * much smaller than the prompts together, so that each of them lost its blocks to others before it comes again, and cells
 * are used over and over. By default a few prompts; `DYN_TEST_TIER_PROMPTS=50` takes the whole set, to be run with
 * `npm test -- test/e2e/tiers-real-model.test.ts --test-timeout=3600000`, or a part of it with `DYN_TEST_PROMPT_PART=1/3`.
 */
const MODEL = process.env["DYN_TEST_MODEL"];
const PROMPTS = Number(process.env["DYN_TEST_TIER_PROMPTS"] ?? 5);
const isWhole = PROMPTS >= PROMPT_SET_SIZE;
const SET = partOf(promptSet(PROMPTS, isWhole ? Infinity : 200), process.env["DYN_TEST_PROMPT_PART"]);
const MAX_TOKENS = 24;
/** Room for the longest prompt and little more. */
const CACHE_TOKENS = Math.max(320, ...SET.map(({ length }) => length + 64));

class Life {
  readonly #metrics = new Metrics();
  readonly recorder: EngineRecorder;

  constructor(tiers: KvTiersConfig, cacheTokens = CACHE_TOKENS) {
    const inner = new LlamaEngine({
      kind: "llama",
      modelPath: MODEL!,
      contextLength: cacheTokens,
      kvCacheTokens: cacheTokens,
      maxSequences: 4,
      maxBatchedTokens: 256,
      blockSizeTokens: 16,
      threads: 1,
    });
    const services = { metrics: this.#metrics, clock: systemClock, logger: silentLogger };
    const { engine } = withTiers({ engine: inner, modelPath: MODEL!, config: tiers, ...services });
    this.recorder = new EngineRecorder(engine);
  }

  static async of(tiers: KvTiersConfig, body: (life: Life) => Promise<void>, cacheTokens?: number): Promise<void> {
    const life = new Life(tiers, cacheTokens);
    await life.recorder.start();
    try {
      await body(life);
    } finally {
      await life.recorder.stop();
    }
    life.recorder.check();
  }

  async answer(prompt: Uint32Array): Promise<GreedyToken[]> {
    const request = aRequest(prompt, { stop: { maxTokens: MAX_TOKENS }, output: { topLogprobs: 4 } });
    return greedyTokens(await this.recorder.run(request));
  }

  async value(name: string): Promise<number> {
    const line = (await this.#metrics.render()).split("\n").find((one) => one.startsWith(`${name} `));
    return Number(line?.split(" ").at(-1) ?? 0);
  }

  /** Resolves when all blocks are there; they go down in the background. */
  reaches(name: string, count: number): Promise<void> {
    return until(async () => (await this.value(name)) >= count, `${name} of ${count}`, 60_000);
  }
}

function greedyTokens({ tokens, logprobs }: StreamRecord): GreedyToken[] {
  return tokens.map((token, i) => {
    const { topIds, topLogprobs } = logprobs[i]!;
    const top = [...topIds].map((id, k) => ({ token: String(id), logprob: topLogprobs[k]! }));
    return { token: String(token), logprob: top.find((one) => one.token === String(token))!.logprob, top };
  });
}

const blocksBelow = SET.reduce((sum, { length }) => sum + Math.floor(length / 16), 0);

describe(
  "tiers with the real model: greedy text is that of an empty, idle engine",
  { skip: MODEL === undefined ? "no test model (DYN_TEST_MODEL)" : false },
  () => {
    test("from the device, the host, the disk and the store", async (context: TestContext) => {
      const folder = await mkdtemp(join(tmpdir(), "dynamo-tier-texts-"));
      const server = await startS3Server();
      const references: GreedyToken[][] = [];
      const compare = async (path: string, life: Life): Promise<void> => {
        const partings = new PartingList(path);
        for (const [i, prompt] of SET.entries()) {
          partings.add(prompt.length, await life.answer(prompt), references[i]!);
        }
        partings.check(allowedPartings(SET.length), (line) => context.diagnostic(line));
      };
      const disk = { bytes: 1e9, folder, minSights: 1 };
      const store = { kind: "s3", bucket: BUCKET, s3: server.options } as const;
      try {
        await Life.of({ hostBytes: 1e9, disk, object: { store } }, async (life) => {
          const again = new PartingList("aggregated, device hits");
          for (const prompt of SET) {
            const cold = await life.answer(prompt);
            references.push(cold);
            again.add(prompt.length, await life.answer(prompt), cold);
          }
          again.check(allowedPartings(SET.length), (line) => context.diagnostic(line));
          await compare("from the host", life);
          const restored = await life.value("kvbm_onboard_blocks_h2d");
          assert.ok(restored > blocksBelow / 2, `${restored} of ${blocksBelow} blocks came from the host`);
          await life.reaches("kvbm_offload_blocks_h2d", blocksBelow);
          await life.reaches("kvbm_offload_blocks_d2o", blocksBelow);
        });
        await Life.of({ hostBytes: 0, disk }, async (life) => {
          await compare("from the disk, after a restart", life);
          const restored = await life.value("kvbm_onboard_blocks_d2d");
          assert.ok(restored > blocksBelow / 2, `${restored} of ${blocksBelow} blocks came from the disk`);
        });
        await Life.of({ hostBytes: 100e6, object: { store } }, async (life) => {
          // Its listing goes on beside the first requests.
          await life.answer(Uint32Array.of(500, 501, 502));
          await compare("from the store, after a restart", life);
          const restored = await life.value("kvbm_onboard_blocks_o2d");
          assert.ok(restored > 0, "blocks came from the store");
        });
        // The reference's own life had a full cache: the same in an empty one.
        const partings = new PartingList("each in an empty engine");
        const few = isWhole ? SET.filter((_, i) => i % 10 === 9) : SET.slice(-2);
        for (const prompt of few) {
          await Life.of(
            { hostBytes: 1e6 },
            async (life) => partings.add(prompt.length, await life.answer(prompt), references[SET.indexOf(prompt)]!),
            CACHE_TOKENS * 2,
          );
        }
        partings.check(0, (line) => context.diagnostic(line));
      } finally {
        await server.close();
        await rm(folder, { recursive: true, force: true });
      }
    });
  },
);
