import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import OpenAI from "openai";
import { byteConfig } from "../../src/engines/openai/fixtures/openai-config.ts";
import { ruleToken } from "../../src/engines/foreign/fixtures/fake-server.ts";
import { fakeLlamaConfig } from "../../src/engines/llama-server/fixtures/fake-llama-config.ts";
import { FakeLlamaServer } from "../../src/engines/llama-server/fixtures/fake-llama-server.ts";
import { FakeOpenAi } from "../../src/engines/openai/fixtures/fake-openai.ts";
import { FakeVllm } from "../../src/engines/vllm/fixtures/fake-vllm.ts";
import type { WorkerConfig } from "../../src/worker/index.ts";
import { writeBytesModel } from "../helpers/bytes-model.ts";
import { startInProcessCluster, until, type InProcessCluster } from "../helpers/in-process-cluster.ts";

/**
 * Different engines under one model name: a vLLM server, a llama.cpp server and one with the OpenAI API (all fakes, which
 * compute the same answers), and workers that do not belong to them.
 */
const LIMIT = { timeout: 60_000 };
const MODEL = "fleet";
const letter = (tokens: readonly number[]): number => 97 + ruleToken(tokens, 0, 26);

interface Health {
  readonly instances: readonly { readonly instance_id: string; readonly problem?: string }[];
}

const healthOf = async (baseUrl: string): Promise<Health> =>
  (await (await fetch(`${baseUrl}/health`)).json()) as Health;
const problemsOf = async (baseUrl: string): Promise<string[]> =>
  (await healthOf(baseUrl)).instances.flatMap(({ problem }) => (problem === undefined ? [] : [problem]));

describe("mixed fleet", LIMIT, () => {
  let root: string;
  let modelPath: string;
  let vllm: FakeVllm;
  let llama: FakeLlamaServer;
  let upstream: FakeOpenAi;
  let cluster: InProcessCluster;
  let client: OpenAI;
  const engines: WorkerConfig["engine"][] = [];

  before(async () => {
    root = mkdtempSync(join(tmpdir(), "mixed-fleet-"));
    modelPath = writeBytesModel(join(root, "bytes"));
    const tokenize = (text: string): number[] => [...Buffer.from(text)];
    vllm = new FakeVllm({ contextLength: 1_024, blockSize: 16, vocabularySize: 259, stepMs: 4, nextToken: letter, tokenize });
    llama = new FakeLlamaServer({ contextLength: 1_024, vocabularySize: 259, stepMs: 4, nextToken: letter, tokenize, pieceOf: (token) => Buffer.of(token) });
    upstream = new FakeOpenAi({ contextLength: 1_024, stepMs: 1 });
    const bytes = await byteConfig(await upstream.listen(), { modelPath, contextLength: 1_024 });
    const sizes = { modelPath, vocabularySize: 259, startTimeoutMs: 10_000, maxSequences: 0, maxBatchedTokens: 0, contextLength: 0, blockSizeTokens: 0, metricsIntervalMs: 50 };
    engines.push(
      { kind: "vllm", url: await vllm.listen(), kvEvents: false, ...sizes },
      fakeLlamaConfig(await llama.listen(), { ...sizes, tokenizer: bytes.tokenizer }),
      bytes,
    );
    cluster = await startInProcessCluster({ workers: 0, worker: { modelName: MODEL }, frontend: { routerMode: "round-robin" } });
    client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
    for (const engine of engines.slice(0, 2)) await cluster.addWorker({ engine });
    await cluster.settled(2);
  }); // prettier-ignore
  after(async () => {
    await cluster.stop();
    await Promise.all([vllm.close(), llama.close(), upstream.close()]);
    rmSync(root, { recursive: true, force: true });
  });

  const ask = (i: number, more: object = {}) =>
    client.completions.create({ model: MODEL, prompt: `Question ${i}`, max_tokens: 12, temperature: 0, ...more });

  test("both engines answer under one name, with the same text", async () => {
    const [toVllm, toLlama] = [vllm.requests.length, llama.bodies.length];
    const answers = await Promise.all([1, 1, 1, 1].map((i) => ask(i)));
    assert.equal(new Set(answers.map(({ choices }) => choices[0]!.text)).size, 1);
    assert.deepEqual([vllm.requests.length - toVllm, llama.bodies.length - toLlama], [2, 2]);
  });

  test("what one engine cannot do goes to the other", async () => {
    const [toVllm, toLlama] = [vllm.requests.length, llama.bodies.length];
    for (let i = 0; i < 4; i++) await ask(i, { nvext: { cache_salt: "tenant" } });
    assert.deepEqual([vllm.requests.length - toVllm, llama.bodies.length - toLlama], [4, 0]);
  });

  test("an answer goes on with the other engine when its own dies, to the letter", async () => {
    const whole = (await ask(7, { max_tokens: 120 })).choices[0]!.text;
    const running = [7, 7].map((i) => ask(i, { max_tokens: 120 }));
    const { steps } = vllm;
    await until(
      () => vllm.steps > steps + 10 && vllm.runningCount + llama.runningCount === 2,
      "both to be on their way",
    );
    vllm.breakConnections();
    for (const answer of await Promise.all(running)) {
      assert.equal(answer.choices[0]!.text, whole);
      assert.equal(answer.usage?.completion_tokens, 120);
    }
  });

  test("a server that answers in text joins; the usage of its answers says that it is estimated", async () => {
    const worker = await cluster.addWorker({ engine: engines[2]! });
    await cluster.settled(3);
    const answers = await Promise.all([1, 2, 3, 4, 5, 6].map((i) => ask(i)));
    const estimated = answers.filter(({ usage }) => (usage as { estimated?: boolean }).estimated === true);
    assert.ok(estimated.length >= 1 && estimated.length < 6, `${estimated.length} of 6`);
    for (const { usage } of answers) assert.equal(usage?.completion_tokens, 12);
    const withLogprobs = await Promise.all([1, 2, 3, 4].map((i) => ask(i, { logprobs: 2 })));
    for (const { choices } of withLogprobs) assert.equal(choices[0]!.logprobs?.token_logprobs?.length, 12);
    await worker.drain(1_000);
    await cluster.settled(2);
  });

  test("another template is left out with the reason, the same on every frontend, and wins when most have it", async () => {
    const template = join(root, "other.jinja");
    writeFileSync(template, "{% for message in messages %}{{ message['content'] }}{% endfor %}");
    const second = await cluster.addFrontend();
    const other = { engine: { kind: "echo", contextLength: 1_024, maxSequences: 8, blockSizeTokens: 16, stepMs: 0, modelPath }, chatTemplatePath: template } as const; // prettier-ignore
    const strangers = [await cluster.addWorker(other)];
    for (const { baseUrl } of [cluster, second]) {
      await until(async () => (await problemsOf(baseUrl)).length === 1, "the stranger to be left out");
      assert.match((await problemsOf(baseUrl))[0]!, /its tokenizer or chat template .* is another than that of most/);
      assert.match(await (await fetch(`${baseUrl}/metrics`)).text(), /dynamo_frontend_model_excluded_workers\{model="fleet"\} 1/);
    } // prettier-ignore
    assert.match((await ask(1)).choices[0]!.text, /^[a-z]{12}$/);

    strangers.push(await cluster.addWorker(other), await cluster.addWorker(other));
    for (const { baseUrl } of [cluster, second]) {
      await until(async () => (await problemsOf(baseUrl)).length === 2, "the old kind to be left out");
    }
    // Echoes, from a model that was loaded anew.
    await until(async () => (await ask(1).catch(() => undefined))?.choices[0]!.text === "Question 1Qu", "an echo");

    for (const stranger of strangers.slice(1)) await stranger.drain(1_000);
    for (const { baseUrl } of [cluster, second]) {
      await until(async () => (await problemsOf(baseUrl)).length === 1, "the first kind to be back");
    }
    await until(async () => /^[a-z]{12}$/.test((await ask(1).catch(() => undefined))?.choices[0]!.text ?? ""), "an answer of it"); // prettier-ignore
    await strangers[0]!.drain(1_000);
    await until(async () => (await problemsOf(cluster.baseUrl)).length === 0, "nobody left out");
  });

  test("a shorter context and other KV blocks are left out with the fix; a longer context joins", async () => {
    const engine = {
      kind: "echo",
      contextLength: 512,
      maxSequences: 8,
      blockSizeTokens: 16,
      stepMs: 0,
      modelPath,
    } as const;
    const short = await cluster.addWorker({ engine });
    const blocks = await cluster.addWorker({ engine: { ...engine, contextLength: 1_024, blockSizeTokens: 32 } });
    const long = await cluster.addWorker({ engine: { ...engine, contextLength: 4_096 } });
    await cluster.settled(3);
    await until(async () => (await problemsOf(cluster.baseUrl)).length === 2, "two left out");
    const problems = (await problemsOf(cluster.baseUrl)).toSorted();
    assert.match(problems[0]!, /its KV blocks have 32 tokens, .* 16; start it with --kv-cache-block-size=16/);
    assert.match(problems[1]!, /its context of 512 tokens is shorter than the model's 1024/);
    const { data } = await client.models.list();
    assert.equal((data[0] as unknown as { max_model_len: number }).max_model_len, 1_024);
    await Promise.all([short, blocks, long].map((worker) => worker.drain(1_000)));
  });
});
