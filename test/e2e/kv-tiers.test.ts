import assert from "node:assert/strict";
import { test } from "node:test";
import type OpenAI from "openai";
import { LoopEngine } from "../../src/engines/llama/fixtures/loop-engine.ts";
import type { DecisionExplanation } from "../../src/router/index.ts";
import { startInProcessCluster, until } from "../helpers/in-process-cluster.ts";

test("KV tiers: the router credits blocks in a worker's host memory, explains it, and the client is told", async () => {
  const cluster = await startInProcessCluster({ workers: 0, frontend: { routerMode: "kv" } });
  const engines: LoopEngine[] = [];
  const makeEngine = (): Promise<LoopEngine> => {
    const engine = new LoopEngine({ totalBlocks: 24, blockSizeTokens: 16, vocabularySize: 512 });
    engines.push(engine);
    return Promise.resolve(engine);
  };
  const post = (path: string, body: object): Promise<Response> =>
    fetch(cluster.baseUrl + path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "echo", ...body }),
    });
  const preview = async (prompt: string): Promise<DecisionExplanation> =>
    ((await (await post("/v1/route", { prompt })).json()) as { decisions: DecisionExplanation[] }).decisions[0]!;
  const complete = async (prompt: string): Promise<{ text: string; cachedTokens: number }> => {
    const answer = await post("/v1/completions", { prompt, max_tokens: 4, temperature: 0 });
    assert.equal(answer.status, 200, await answer.clone().text());
    const { usage, choices } = (await answer.json()) as OpenAI.Completion;
    return { text: choices[0]!.text, cachedTokens: usage!.prompt_tokens_details?.cached_tokens ?? 0 };
  };
  try {
    for (let i = 0; i < 2; i++) await cluster.addWorker({ kvTiers: { hostBytes: 1 << 20 } }, { makeEngine });
    await cluster.settled(2);
    const prompt = "what was said before is not computed again ".repeat(4);
    const cold = await complete(prompt);
    assert.equal(cold.cachedTokens, 0);
    const blocks = Math.floor((prompt.length - 1) / 16);
    await until(() => engines.some((engine) => engine.copiedOutBlocks >= blocks), "the blocks to be in host memory");
    for (const engine of engines) await engine.clearBlocks();
    const inHost = async (): Promise<boolean> => {
      const { candidates } = await preview(prompt);
      return (
        candidates.every((one) => one.overlap_blocks.device === 0) &&
        candidates.some((one) => one.overlap_blocks.host >= blocks)
      );
    };
    await until(inHost, "the router to hear that the blocks are in host memory alone");
    const { candidates, worker } = await preview(prompt);
    const holder = candidates.find((one) => one.overlap_blocks.host >= blocks);
    assert.equal(worker.instance_id, holder?.instance_id, "the worker with the blocks in host memory is chosen");
    const restored = await complete(prompt);
    assert.equal(restored.cachedTokens, blocks * 16);
    assert.equal(restored.text, cold.text);
  } finally {
    await cluster.stop();
  }
});
