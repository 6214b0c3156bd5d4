import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import OpenAI from "openai";
import { startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";
import { REAL_VLLM, REAL_VLLM_ARGS, REAL_VLLM_ENV, REAL_VLLM_MODEL, whyNoVllm } from "../helpers/real-vllm.ts";
import { checkPredictedReuse } from "../helpers/reuse.ts";

/** `dynamo local --engine vllm` with two real vLLM servers and the real SmolLM2, by the official client. */
const BLOCK = 32;
const FRANCE = [{ role: "user" as const, content: "What is the capital of France?" }];

describe("dynamo local --engine vllm (real servers)", { skip: whyNoVllm(true), timeout: 600_000 }, () => {
  let cluster: ProcessCluster;
  let client: OpenAI;
  const model = "smollm2";

  before(async () => {
    const flags = ["--engine=vllm", `--engine-command=${REAL_VLLM}`, `--model=${REAL_VLLM_MODEL}`, `--model-name=${model}`, "--workers=2", `--kv-cache-block-size=${BLOCK}`]; // prettier-ignore
    const args = ["--dtype=bfloat16", "--max-model-len=2048", "--kv-cache-memory-bytes=128M", ...REAL_VLLM_ARGS];
    cluster = await startProcessCluster([...flags, "--", ...args], REAL_VLLM_ENV, 240_000);
    client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
  });
  after(async () => {
    assert.equal(await cluster.stop("SIGINT"), 0, cluster.output());
  });

  test("chat, whole and streamed: the capital of France", async () => {
    const body = { model, messages: FRANCE, max_tokens: 24, temperature: 0 };
    const whole = await client.chat.completions.create(body);
    assert.match(whole.choices[0]!.message.content!, /Paris/);
    let text = "";
    const stream = await client.chat.completions.create({ ...body, stream: true });
    for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
    assert.equal(text, whole.choices[0]!.message.content);
  });

  test("several choices, seeds, logprobs, stop strings", async () => {
    const seeded = { model, messages: FRANCE, max_tokens: 8, temperature: 1, seed: 42, n: 3 };
    const first = await client.chat.completions.create(seeded);
    assert.equal(first.choices.length, 3);
    const second = await client.chat.completions.create(seeded);
    const texts = (answer: OpenAI.ChatCompletion): (string | null)[] =>
      answer.choices.map(({ message }) => message.content);
    assert.deepEqual(texts(second), texts(first));
    const body = { model, messages: FRANCE, max_tokens: 6, temperature: 0 };
    const withLogprobs = await client.chat.completions.create({ ...body, logprobs: true, top_logprobs: 3 });
    for (const { logprob, token, top_logprobs: top } of withLogprobs.choices[0]!.logprobs!.content!) {
      assert.equal(top.length, 3);
      assert.deepEqual([top[0]!.token, top[0]!.logprob], [token, logprob]);
    }
    const stopped = await client.chat.completions.create({ ...body, max_tokens: 24, stop: ["Paris"] });
    assert.equal(stopped.choices[0]!.finish_reason, "stop");
    assert.doesNotMatch(stopped.choices[0]!.message.content!, /Paris/);
  });

  test("200 requests with shared prefixes over two servers: predicted reuse is what the engines report", async () => {
    const prompts = Array.from({ length: 200 }, (_, i) => {
      const shared = `Document ${i % 8}. ${"The quick brown fox jumps over the lazy dog. ".repeat(4 + (i % 3))}`;
      return `${shared} Question ${i}: what does it jump over?`;
    });
    const reused = await checkPredictedReuse({
      client,
      baseUrl: cluster.baseUrl,
      model,
      prompts,
      blockSizeTokens: BLOCK,
    });
    assert.ok(reused > 200 * BLOCK, `${reused} tokens reused`);
  });
});
