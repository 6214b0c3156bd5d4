import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import OpenAI from "openai";
import type { SglangEngineConfig } from "../../src/engines/index.ts";
import { FakeSglang, type FakeSglangOptions } from "../../src/engines/sglang/fixtures/fake-sglang.ts";
import { byteArtifact } from "../../src/model/index.ts";
import { startInProcessCluster, until, type InProcessCluster } from "../helpers/in-process-cluster.ts";

/** Prefill and decode on SGLang servers of their own, by the official client through the frontend. Fake servers. */
const FAKE: FakeSglangOptions = { contextLength: 2_048, blockSize: 16, totalBlocks: 512, maxSequences: 8 };
const PROMPT = "a prompt that is long enough for some blocks of sixteen tokens each, one byte a token. ".repeat(3);

let root: string;
let modelPath: string;
before(() => {
  root = mkdtempSync(join(tmpdir(), "sglang-disagg-"));
  modelPath = join(root, "bytes-model");
  const { tokenizerJson, chatTemplate } = byteArtifact();
  mkdirSync(modelPath);
  writeFileSync(join(modelPath, "tokenizer.json"), JSON.stringify(tokenizerJson));
  const config = { bos_token: "<|endoftext|>", eos_token: "<|im_end|>", chat_template: chatTemplate };
  writeFileSync(join(modelPath, "tokenizer_config.json"), JSON.stringify(config));
});
after(() => rmSync(root, { recursive: true, force: true }));

interface Cluster {
  readonly cluster: InProcessCluster;
  readonly client: OpenAI;
  readonly fakes: readonly FakeSglang[];
}

async function withServers(
  roles: readonly ("agg" | "prefill" | "decode")[],
  body: (cluster: Cluster) => Promise<void>,
  fakeOptions: FakeSglangOptions = {},
): Promise<void> {
  const isSplit = roles.length > 1;
  const cluster = await startInProcessCluster({
    workers: 0,
    frontend: { disagg: isSplit ? "always" : "never", namespace: "dynamo" },
    worker: { modelName: "bytes" },
  });
  const fakes: FakeSglang[] = [];
  try {
    for (const role of roles) {
      const fake = new FakeSglang({ ...FAKE, ...fakeOptions, disaggregation: role === "agg" ? "null" : role, bootstrapPort: 9_002 }); // prettier-ignore
      fakes.push(fake);
      const engine: SglangEngineConfig = {
        kind: "sglang",
        url: await fake.listen(),
        role,
        modelPath,
        vocabularySize: 4_096,
        startTimeoutMs: 10_000,
        kvEvents: false,
        metricsIntervalMs: 20,
        maxSequences: 8,
        maxBatchedTokens: 512,
        contextLength: 0,
        blockSizeTokens: 0,
      };
      await cluster.addWorker({ engine, role });
    }
    await cluster.settled(roles.length);
    const client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
    await body({ cluster, client, fakes });
    const isQuiet = (): boolean => fakes.every((fake) => fake.runningCount + fake.waitingCount === 0);
    await until(() => Promise.resolve(isQuiet()), "all requests to be over");
  } finally {
    await cluster.stop();
    for (const fake of fakes) await fake.close();
  }
}

const BODY = { model: "bytes", prompt: PROMPT, max_tokens: 12, temperature: 0, ignore_eos: true };

describe("SGLang split over two servers, through the frontend (fake servers)", { timeout: 60_000 }, () => {
  test("the answer is what one server gives, whole and streamed; both servers had the request, under one room", async () => {
    let wanted = "";
    await withServers(["agg"], async ({ client }) => {
      wanted = (await client.completions.create(BODY)).choices[0]!.text;
    });
    await withServers(["prefill", "decode"], async ({ client, fakes: [prefill, decode] }) => {
      const answer = await client.completions.create(BODY);
      assert.equal(answer.choices[0]!.text, wanted);
      assert.equal(answer.usage?.completion_tokens, 12);
      let text = "";
      const stream = await client.completions.create({ ...BODY, stream: true });
      for await (const chunk of stream) text += chunk.choices[0]?.text ?? "";
      assert.equal(text, wanted);
      assert.deepEqual([prefill!.requests.length, decode!.requests.length], [2, 2]);
      const rooms = [prefill, decode].map((fake) => fake!.requests.map(({ body }) => body.bootstrap_room));
      assert.deepEqual(rooms[0], rooms[1]);
      assert.notEqual(rooms[0]![0], rooms[0]![1]);
    });
  });

  test("several at once, each in its own room and with its own answer", async () => {
    const ask = (client: OpenAI): Promise<string[]> =>
      Promise.all(
        Array.from({ length: 6 }, async (_, i) => {
          const answer = await client.completions.create({ ...BODY, prompt: `${PROMPT} ${i}`, max_tokens: 40 });
          return answer.choices[0]!.text;
        }),
      );
    let wanted: string[] = [];
    await withServers(["agg"], async ({ client }) => void (wanted = await ask(client)));
    await withServers(["prefill", "decode"], async ({ client, fakes: [, decode] }) => {
      assert.deepEqual(await ask(client), wanted);
      assert.equal(new Set(decode!.requests.map(({ body }) => body.bootstrap_room)).size, 6);
    });
  });

  test("a client that leaves ends both legs", () =>
    withServers(
      ["prefill", "decode"],
      async ({ client, fakes: [, decode] }) => {
        const stream = await client.completions.create({ ...BODY, max_tokens: 1_000, stream: true });
        let count = 0;
        for await (const _ of stream) if (++count === 3) break;
        await until(() => Promise.resolve(decode!.aborted === 1 && decode!.runningCount === 0), "its end there");
      },
      { stepMs: 5 },
    ));
});
