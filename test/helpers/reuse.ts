import assert from "node:assert/strict";
import type OpenAI from "openai";
import type { DecisionExplanation } from "../../src/router/index.ts";
import { until } from "./in-process-cluster.ts";

/**
 * Sends completions one after the other and compares, for each, the reuse that the router predicted with what the engine
 * reported. Between two requests it waits for the blocks that the last one left to be in the router's index: engines that are
 * processes of their own tell them a moment after their answer. Returns the tokens that were reused.
 */
export interface ReuseOptions {
  readonly client: OpenAI;
  readonly baseUrl: string;
  readonly model: string;
  readonly prompts: readonly string[];
  readonly blockSizeTokens: number;
}

export async function checkPredictedReuse({
  client,
  baseUrl,
  model,
  prompts,
  blockSizeTokens,
}: ReuseOptions): Promise<number> {
  let reused = 0;
  for (const [i, prompt] of prompts.entries()) {
    const before = await indexedBlocks(baseUrl, model);
    const id = `reuse-${i}`;
    const body = { model, prompt, max_tokens: 2, temperature: 0 };
    const { usage } = await client.completions.create(body, { headers: { "x-request-id": id } });
    const cached = usage!.prompt_tokens_details!.cached_tokens!;
    const answer = await fetch(`${baseUrl}/v1/route/explain/${id}`);
    const decision = ((await answer.json()) as { decisions: DecisionExplanation[] }).decisions[0]!;
    assert.equal(decision.policy, "kv");
    assert.equal(decision.predicted.cached_tokens, cached, `request ${i}: ${JSON.stringify(decision)}`);
    reused += cached;
    const left = Math.floor(usage!.prompt_tokens / blockSizeTokens) - cached / blockSizeTokens;
    await until(
      async () => (await indexedBlocks(baseUrl, model)) >= before + Math.max(0, left),
      `the blocks of request ${i}`,
    );
  }
  return reused;
}

/** Memberships of ranks in the index, over all workers. */
async function indexedBlocks(baseUrl: string, model: string): Promise<number> {
  const page = await (await fetch(`${baseUrl}/metrics`)).text();
  const line = page.split("\n").find((one) => one.startsWith(`dynamo_kvindexer_memberships{model="${model}"}`));
  return line === undefined ? 0 : Number(line.split(" ").at(-1));
}
