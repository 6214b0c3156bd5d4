import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import OpenAI from "openai";
import { until } from "../helpers/in-process-cluster.ts";
import { startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";
import { REAL_VLLM, REAL_VLLM_ARGS, REAL_VLLM_ENV, REAL_VLLM_MODEL, whyNoVllm } from "../helpers/real-vllm.ts";

/**
 * `dynamo local --engine vllm --prefill 1 --decode 1` with two real vLLM servers that move KV blocks over NIXL, and the real
 * SmolLM2. A busy machine of two cores takes up to half a minute for one handoff; the times here are limits, no claims.
 */
const MESSAGES = (question: string) => [
  { role: "user" as const, content: `${"Facts about countries and their cities. ".repeat(12)}${question}` },
];

describe("vLLM over NIXL, two real servers", { skip: whyNoVllm(true), timeout: 600_000 }, () => {
  let cluster: ProcessCluster;
  let client: OpenAI;
  const model = "smollm2";

  before(async () => {
    const flags = ["--engine=vllm", `--engine-command=${REAL_VLLM}`, `--model=${REAL_VLLM_MODEL}`, `--model-name=${model}`, "--prefill=1", "--decode=1", "--disagg=always", "--handoff-timeout-secs=90", "--kv-cache-block-size=32"]; // prettier-ignore
    const args = ["--dtype=bfloat16", "--max-model-len=1024", "--kv-cache-memory-bytes=128M", ...REAL_VLLM_ARGS];
    cluster = await startProcessCluster([...flags, "--", ...args], { ...REAL_VLLM_ENV, UCX_TLS: "tcp,self" }, 240_000);
    // The decode worker alone makes a model listed.
    const joined = (mode: string): boolean => new RegExp(`worker joined .*mode=${mode}`).test(cluster.output());
    await until(() => joined("prefill") && joined("decode"), "both workers to join", 240_000);
    client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
  });
  after(async () => {
    assert.equal(await cluster.stop("SIGINT"), 0, cluster.output());
  });

  test("greedy text is that of one server, and the decode server has the prompt from the other one", async () => {
    const messages = MESSAGES("What is the capital of France?");
    const body = { model, messages, max_tokens: 16, temperature: 0 };
    const answer = await client.chat.completions.create(body, { headers: { "x-request-id": "split" } });
    const response = await fetch(`${cluster.baseUrl}/v1/route/explain/split`);
    const { disaggregation } = (await response.json()) as {
      disaggregation: { fallback: string | null; handoff: { pull: { outcome: string; backend: string; pulled_blocks: number } } }[];
    }; // prettier-ignore
    const [split] = disaggregation;
    assert.equal(split!.fallback, null, JSON.stringify(split));
    assert.equal(split!.handoff.pull.outcome, "pulled");
    assert.equal(split!.handoff.pull.backend, "nixl-pull");
    const servers = await Promise.all(engineUrls(cluster.output()).map((url) => serverOf(url)));
    assert.equal(servers.length, 2);
    const decode = servers.find(({ external }) => external > 0);
    assert.ok(decode !== undefined, "one of the servers took blocks of the other");
    // The first token went out, and is the last one of the prompt there.
    assert.equal(decode.external, answer.usage!.prompt_tokens + 1);
    assert.ok(decode.bytes > 0, `${decode.bytes} bytes over NIXL`);
    // The same by one server alone: the decode server, asked past us, its cache emptied first.
    await fetch(`${decode.url}/reset_prefix_cache`, { method: "POST" });
    const alone = await new OpenAI({ baseURL: `${decode.url}/v1`, apiKey: "none" }).chat.completions.create(body);
    assert.equal(answer.choices[0]!.message.content, alone.choices[0]!.message.content);
  });
});

/** Of the servers that were started, from their command lines in the log. */
function engineUrls(output: string): string[] {
  const urls = [...output.matchAll(/ serve [^\n]*?--host 127\.0\.0\.1 --port (\d+)/g)].map(
    ([, port]) => `http://127.0.0.1:${port}`,
  );
  return [...new Set(urls)];
}

async function serverOf(url: string): Promise<{ url: string; external: number; bytes: number }> {
  const text = await (await fetch(`${url}/metrics`)).text();
  const sum = (pattern: RegExp): number =>
    [...text.matchAll(pattern)].reduce((total, [, value]) => total + Number(value), 0);
  return {
    url,
    external: sum(/^vllm:prompt_tokens_by_source_total\{[^}]*source="external_kv_transfer"[^}]*\} (\S+)$/gm),
    bytes: sum(/^vllm:nixl_bytes_transferred_sum\{[^}]*\} (\S+)$/gm),
  };
}
