import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { after, before, describe, test } from "node:test";
import OpenAI from "openai";
import { FakeOpenAi } from "../../src/engines/openai/fixtures/fake-openai.ts";
import { writeBytesModel } from "../helpers/bytes-model.ts";
import { until } from "../helpers/in-process-cluster.ts";
import { startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";
import { REAL_LLAMA_MODEL, REAL_LLAMA_SERVER, whyNoLlamaServer } from "../helpers/real-llama-server.ts";

/** `dynamo local` beside llama.cpp's server, fake and real, and beside a server with the OpenAI API, by the official client. */
const LIMIT = { timeout: 120_000 };
const FAKE = resolve(import.meta.dirname, "../../src/engines/llama-server/fixtures/fake-llama-server-main.ts");

function clientOf(cluster: ProcessCluster): OpenAI {
  return new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
}

describe("dynamo local --engine llama-server (fake server)", LIMIT, () => {
  let root: string;
  let cluster: ProcessCluster;
  let client: OpenAI;
  const model = "bytes";
  before(async () => {
    root = mkdtempSync(join(tmpdir(), "llama-server-e2e-"));
    cluster = await startProcessCluster(
      [
        "--engine=llama-server",
        `--engine-command=${process.execPath} ${FAKE}`,
        `--model=${writeBytesModel(join(root, "model"))}`,
        `--model-name=${model}`,
        "--workers=2",
        "--max-num-seqs=8",
        "--context-length=1024",
        "--engine-metrics-interval-secs=0.1",
      ],
      { FAKE_LLAMA_STEP_MS: "4" },
    );
    client = clientOf(cluster);
  });
  after(async () => {
    assert.equal(await cluster.stop("SIGINT"), 0, cluster.output());
    rmSync(root, { recursive: true, force: true });
  });

  test("answers, tells what it is, and shares prefixes on one worker by the record of its slots", async () => {
    const shared = "A prefix that all of these questions share. ".repeat(4);
    let cached = 0;
    for (let i = 0; i < 6; i++) {
      const body = { model, prompt: `${shared}${i}`, max_tokens: 5, temperature: 0, ignore_eos: true };
      const answer = await client.completions.create(body);
      assert.equal(answer.usage?.completion_tokens, 5);
      cached += answer.usage.prompt_tokens_details?.cached_tokens ?? 0;
    }
    assert.ok(cached >= 5 * 160, `${cached} tokens from the cache`);
    assert.match(cluster.output(), /build b0-unknown, 8 slots of 1024 tokens/);
    assert.match(cluster.output(), /llama-server serves/);
  });

  test("a server killed in mid-stream: the answers go on with the other worker, whole", async () => {
    const ask = async (i: number): Promise<string> => {
      const body = { model, prompt: `Tell me story ${i}`, max_tokens: 200, temperature: 0, ignore_eos: true };
      const answer = await client.completions.create(body);
      assert.equal(answer.usage?.completion_tokens, 200);
      return answer.choices[0]!.text;
    };
    const wanted = await Promise.all([0, 1, 2, 3].map((i) => ask(i)));
    const isEngine = (pid: number): boolean => readFileSync(`/proc/${pid}/cmdline`, "latin1").split("\0")[1] === FAKE;
    const engines = (): number[] => cluster.pids("fake-llama-server-main").filter(isEngine);
    assert.equal(engines().length, 2);
    const running = Promise.all([0, 1, 2, 3].map((i) => ask(i)));
    const metrics = async (): Promise<string> => (await fetch(`${cluster.baseUrl}/metrics`)).text();
    await until(async () => /dynamo_frontend_inflight_requests\{model="bytes"\} 4/.test(await metrics()), "all to run");
    process.kill(engines()[0]!, "SIGKILL");
    assert.deepEqual(await running, wanted);
    await until(() => /llama-server is back/.test(cluster.output()), "the engine", 30_000);
  });

  test("what it cannot do is refused with the reason", async () => {
    const body = { model, prompt: "Hi", max_tokens: 2, nvext: { cache_salt: "tenant" } };
    await assert.rejects(client.completions.create(body as never), /cannot keep caches apart/);
  });
});

describe("dynamo local --engine llama-server (real server)", { skip: whyNoLlamaServer(), timeout: 240_000 }, () => {
  let cluster: ProcessCluster;
  let client: OpenAI;
  const model = "smollm2";
  before(async () => {
    cluster = await startProcessCluster(
      [
        "--engine=llama-server",
        `--engine-command=${REAL_LLAMA_SERVER}`,
        `--model=${REAL_LLAMA_MODEL}`,
        `--model-name=${model}`,
        "--max-num-seqs=4",
        "--context-length=1024",
        "--",
        "--threads=1",
      ],
      {},
      120_000,
    );
    client = clientOf(cluster);
  });
  after(async () => {
    assert.equal(await cluster.stop("SIGINT"), 0, cluster.output());
  });

  const france = [{ role: "user" as const, content: "What is the capital of France?" }];

  test("chat, whole and streamed: the capital of France; logprobs", async () => {
    const body = { model, messages: france, max_tokens: 24, temperature: 0 };
    const whole = await client.chat.completions.create(body);
    assert.match(whole.choices[0]!.message.content!, /Paris/);
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) {
      text += chunk.choices[0]?.delta.content ?? "";
    }
    assert.equal(text, whole.choices[0]!.message.content);
    const scored = await client.chat.completions.create({ ...body, max_tokens: 4, logprobs: true, top_logprobs: 2 });
    for (const { logprob, token, top_logprobs: top } of scored.choices[0]!.logprobs!.content!) {
      assert.deepEqual([top[0]!.token, top[0]!.logprob], [token, logprob]);
    }
  });

  test("pictures in several tokens come whole", async () => {
    const prompt = "🎉".repeat(10);
    const answer = await client.completions.create({ model, prompt, max_tokens: 12, temperature: 0 });
    assert.equal(answer.choices[0]!.text, "🎉🎉🎉🎉");
    assert.equal(answer.usage?.completion_tokens, 12);
  });

  test("ten at once over four slots", async () => {
    const answers = await Promise.all(
      Array.from({ length: 10 }, (_, i) =>
        client.completions.create({ model, prompt: `The number ${i} is`, max_tokens: 6, temperature: 0 }),
      ),
    );
    for (const { choices } of answers) assert.notEqual(choices[0]!.text, "");
  });
});

describe("dynamo local --engine openai (a real llama.cpp server, as any other server)", { skip: whyNoLlamaServer(), timeout: 240_000 }, () => {
  test("the text of its own API, token ids in, text out; what the usage says of it", async () => {
    const engine = await startProcessCluster(
      ["--engine=llama-server", `--engine-command=${REAL_LLAMA_SERVER}`, `--model=${REAL_LLAMA_MODEL}`, "--model-name=inner", "--max-num-seqs=2", "--context-length=512", "--", "--threads=1", "--alias=inner"],
      {},
      120_000,
    );
    try {
      const command = /--port (\d+) --metrics/;
      await until(() => command.test(engine.output()), "the command line of the server");
      const port = command.exec(engine.output())![1]!;
      const cluster = await startProcessCluster(
        ["--engine=openai", `--engine-url=http://127.0.0.1:${port}`, `--model=${REAL_LLAMA_MODEL}`, "--model-name=outer"]);
      try {
        const told = /prompts as token ids, answers as text: tokens of answers are estimated; its tokenizer is ours/;
        await until(() => told.test(cluster.output()), "what it found out at the start");
        const direct = new OpenAI({ baseURL: `http://127.0.0.1:${port}/v1`, apiKey: "none" });
        const body = { prompt: "é🎉 é🎉 é🎉 é🎉 é🎉 é🎉 é🎉 é🎉", max_tokens: 24, temperature: 0, top_p: 1 };
        // Streamed, as it is asked for: whole, the server shows a character that the limit cuts as U+FFFD.
        let wanted = "";
        const stream = await direct.completions.create({ ...body, model: "inner", stream: true, stream_options: { include_usage: true } });
        let promptTokens = 0;
        for await (const { choices, usage } of stream) {
          wanted += choices[0]?.text ?? "";
          promptTokens = usage?.prompt_tokens ?? promptTokens;
        }
        const got = await clientOf(cluster).completions.create({ ...body, model: "outer" });
        assert.equal(got.choices[0]!.text, wanted);
        assert.equal((got.usage as { estimated?: boolean }).estimated, true);
        assert.equal(got.usage?.prompt_tokens, promptTokens);
      } finally {
        assert.equal(await cluster.stop("SIGINT"), 0, cluster.output());
      }
    } finally {
      assert.equal(await engine.stop("SIGINT"), 0, engine.output());
    }
  });
}); // prettier-ignore

describe("dynamo local --engine openai (fake server)", LIMIT, () => {
  let upstream: FakeOpenAi;
  let cluster: ProcessCluster;
  before(async () => {
    upstream = new FakeOpenAi({ basePath: "/openai/v1", header: ["api-key", "secret"], isOdd: true, maxRunning: 2 });
    const url = `${await upstream.listen()}/openai/v1`;
    cluster = await startProcessCluster(
      [
        "--engine=openai",
        `--engine-url=${url}`,
        "--engine-tokenizer=bytes",
        "--model-name=any",
        "--context-length=2048",
      ],
      { DYN_ENGINE_HEADERS: '{"api-key":"secret"}' },
    );
  });
  after(async () => {
    assert.equal(await cluster.stop("SIGINT"), 0, cluster.output());
    await upstream.close();
  });

  test("its text, streamed and whole; the key is nowhere in what is printed", async () => {
    const client = clientOf(cluster);
    const body = { model: "any", prompt: "Hello", max_tokens: 7, temperature: 0 };
    const whole = await client.completions.create(body);
    assert.match(whole.choices[0]!.text, /^[a-z]{7}$/);
    assert.equal(whole.choices[0]!.finish_reason, "length");
    assert.equal((whole.usage as { estimated?: boolean }).estimated, true);
    let text = "";
    for await (const chunk of await client.completions.create({ ...body, stream: true })) text += chunk.choices[0]?.text ?? ""; // prettier-ignore
    assert.equal(text, whole.choices[0]!.text);
    assert.doesNotMatch(cluster.output(), /secret/);
  });

  test("it takes no more now: told, with its Retry-After", async () => {
    for (let i = 0; i < 4; i++) upstream.failures.push([429, '{"error":"slow down"}', { "retry-after": "7" }]);
    const answer = await fetch(`${cluster.baseUrl}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "any", prompt: "Hi", max_tokens: 2 }),
    });
    upstream.failures.length = 0;
    assert.equal(answer.status, 529);
    assert.equal(answer.headers.get("retry-after"), "7");
  });

  test("logprobs and forms are refused with the reason", async () => {
    const client = clientOf(cluster);
    await assert.rejects(client.completions.create({ model: "any", prompt: "Hi", logprobs: 1 }), /tells none/);
    const form = { model: "any", messages: [{ role: "user" as const, content: "Hi" }], response_format: { type: "json_object" as const } }; // prettier-ignore
    await assert.rejects(client.chat.completions.create(form), /serves only/);
  });
});
