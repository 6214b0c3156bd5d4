import assert from "node:assert/strict";
import { mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import type OpenAI from "openai";
import { LoopEngine } from "../../src/engines/llama/fixtures/loop-engine.ts";
import type { DecisionExplanation } from "../../src/router/index.ts";
import { blocksOfPackKey } from "../../src/kvbm/tiers/pack-key.ts";
import type { KvTiersConfig, RunningWorker } from "../../src/worker/index.ts";
import { startInProcessCluster, until, type InProcessCluster } from "../helpers/in-process-cluster.ts";

/** Workers with the real engine loop on the fake model, and what a client and an operator ask. */
class TiersRig {
  readonly cluster: InProcessCluster;
  readonly engines: LoopEngine[] = [];
  #requestId = "";

  constructor(cluster: InProcessCluster) {
    this.cluster = cluster;
  }

  async addWorker(kvTiers: KvTiersConfig): Promise<RunningWorker> {
    const makeEngine = (): Promise<LoopEngine> => {
      const engine = new LoopEngine({ totalBlocks: 24, blockSizeTokens: 16, vocabularySize: 512 });
      this.engines.push(engine);
      return Promise.resolve(engine);
    };
    return this.cluster.addWorker({ kvTiers }, { makeEngine });
  }

  async preview(prompt: string): Promise<DecisionExplanation> {
    const answer = (await (await this.#post("/v1/route", { prompt })).json()) as { decisions: DecisionExplanation[] };
    return answer.decisions[0]!;
  }

  /** Of the newest answer. */
  async restored(): Promise<NonNullable<DecisionExplanation["actual"]>["restored"]> {
    const answer = await fetch(`${this.cluster.baseUrl}/v1/route/explain/${this.#requestId}`);
    const { decisions } = (await answer.json()) as { decisions: DecisionExplanation[] };
    return decisions.at(-1)!.actual!.restored;
  }

  async complete(prompt: string): Promise<{ text: string; cachedTokens: number }> {
    const answer = await this.#post("/v1/completions", { prompt, max_tokens: 4, temperature: 0 });
    this.#requestId = answer.headers.get("x-request-id") ?? "";
    assert.equal(answer.status, 200, await answer.clone().text());
    const { usage, choices } = (await answer.json()) as OpenAI.Completion;
    return { text: choices[0]!.text, cachedTokens: usage!.prompt_tokens_details?.cached_tokens ?? 0 };
  }

  #post(path: string, body: object): Promise<Response> {
    return fetch(this.cluster.baseUrl + path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "echo", ...body }),
    });
  }
}

async function withRig(body: (rig: TiersRig) => Promise<void>): Promise<void> {
  const cluster = await startInProcessCluster({ workers: 0, frontend: { routerMode: "kv" } });
  try {
    await body(new TiersRig(cluster));
  } finally {
    await cluster.stop();
  }
}

const PROMPT = "what was said before is not computed again ".repeat(4);
const BLOCKS = Math.floor((PROMPT.length - 1) / 16);

test("KV tiers: the router credits blocks in a worker's host memory, explains it, and the client is told", () =>
  withRig(async (rig) => {
    for (let i = 0; i < 2; i++) await rig.addWorker({ hostBytes: 1 << 20 });
    await rig.cluster.settled(2);
    const cold = await rig.complete(PROMPT);
    assert.equal(cold.cachedTokens, 0);
    assert.equal(await rig.restored(), null);
    const { engines } = rig;
    await until(() => engines.some((engine) => engine.copiedOutBlocks >= BLOCKS), "the blocks to be in host memory");
    for (const engine of engines) await engine.clearBlocks();
    const inHost = async (): Promise<boolean> => {
      const { candidates } = await rig.preview(PROMPT);
      return (
        candidates.every((one) => one.overlap_blocks.device === 0) &&
        candidates.some((one) => one.overlap_blocks.host >= BLOCKS)
      );
    };
    await until(inHost, "the router to hear that the blocks are in host memory alone");
    const { candidates, worker } = await rig.preview(PROMPT);
    const holder = candidates.find((one) => one.overlap_blocks.host >= BLOCKS);
    assert.equal(worker.instance_id, holder?.instance_id, "the worker with the blocks in host memory is chosen");
    const restored = await rig.complete(PROMPT);
    assert.equal(restored.cachedTokens, BLOCKS * 16);
    assert.equal(restored.text, cold.text);
    const { ms, ...blocks } = (await rig.restored())!;
    assert.deepEqual(blocks, { host_blocks: BLOCKS, disk_blocks: 0, object_blocks: 0 });
    assert.ok(ms > 0, `${ms} ms`);
  }));

test("KV tiers: a worker that comes later is credited with what it finds in the store, and restores it", async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "dynamo-kv-store-"));
  t.after(() => rm(folder, { recursive: true, force: true }));
  const kvTiers: KvTiersConfig = { hostBytes: 1 << 20, object: { store: { kind: "folder", folder } } };
  await withRig(async (rig) => {
    const first = await rig.addWorker(kvTiers);
    await rig.cluster.settled(1);
    const cold = await rig.complete(PROMPT);
    const isStored = async (): Promise<boolean> => {
      const names = (await readdir(folder, { recursive: true })).filter((name) => /\/[0-9a-f.]+$/.test(name));
      return names.flatMap((name) => blocksOfPackKey(name.split("/").at(-1)!) ?? []).length >= BLOCKS;
    };
    await until(isStored, "the blocks to be in the store");
    await first.stop();
    const second = await rig.addWorker(kvTiers);
    await rig.cluster.settled(1);
    const shared = async (): Promise<number> =>
      (await rig.preview(PROMPT)).candidates.find((one) => one.instance_id === second.instanceId)?.overlap_blocks
        .shared ?? 0;
    await until(async () => (await shared()) >= BLOCKS, "the router to hear what the worker found in the store");
    const { candidates, predicted } = await rig.preview(PROMPT);
    assert.equal(predicted.cached_blocks, BLOCKS);
    assert.equal(candidates[0]!.cost.credit, Math.round(0.1 * (await shared()) * 1_000) / 1_000);
    const restored = await rig.complete(PROMPT);
    assert.deepEqual(restored, { text: cold.text, cachedTokens: BLOCKS * 16 });
    assert.equal((await rig.restored())?.object_blocks, BLOCKS);
  });
});
