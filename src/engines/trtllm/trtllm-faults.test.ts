import assert from "node:assert/strict";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import type { TrtllmEngineConfig } from "../config.ts";
import { aRequest, replayKvEvents } from "../engine.recorder.ts";
import {
  OPTIONS,
  attachedBattery,
  launchedBattery,
  promptOf,
  withAttached,
  type AttachedUnderTest,
} from "../foreign/faults.battery.ts";
import { until } from "../foreign/fixtures/engine-watcher.ts";
import { FakeTrtllm, type FakeTrtllmOptions, type TrtllmBody } from "./fixtures/fake-trtllm.ts";
import { createTrtllmEngine } from "./trtllm-engine.ts";

/** `trtllm-serve`, running already and started: what a worker beside one notices, and what it sends. Over the fake server. */
const LIMIT = { timeout: 60_000 };
const SCRATCH = mkdtempSync(join(tmpdir(), "trtllm-faults-"));
after(() => rmSync(SCRATCH, { recursive: true, force: true }));

const BASE: TrtllmEngineConfig = {
  kind: "trtllm",
  vocabularySize: 4_096,
  startTimeoutMs: 10_000,
  kvEvents: true,
  maxSequences: 8,
  maxBatchedTokens: 512,
  contextLength: 512,
  blockSizeTokens: 0,
};

/** Events are fetched: the addresses that the battery makes are of no use. */
const ATTACHED: AttachedUnderTest<FakeTrtllm, FakeTrtllmOptions> = {
  fake: ({ kvEvents, ...options }) => {
    void kvEvents;
    return new FakeTrtllm(options);
  },
  create: (url, kvEvents, overrides) =>
    createTrtllmEngine({ ...BASE, url, kvEvents: kvEvents !== undefined, ...overrides }, OPTIONS),
  otherClient: (prompt, tokens) => ({
    path: "/v1/completions",
    body: { model: "tiny", prompt, max_tokens: tokens, temperature: 0, ignore_eos: true, stream: true },
  }),
  replays: false,
  refusals: [
    [{ version: "0.21.0" }, {}, /is of version 0\.21\.0, which is too old: 1\.0\.0 is the first.*--engine openai/],
    [{}, { engineModel: "other" }, /does not serve other; it has tiny: name one with --engine-model/],
    [{}, { blockSizeTokens: 32 }, /KV blocks of 16 tokens, not 32 .*kv_cache_config\.tokens_per_block: 32/],
    [{ events: false }, {}, /gives no KV events; start it with kv_cache_config\.event_buffer_max_size.*--no-engine-kv-events/],
    [{}, { contextLength: 0 }, /does not tell its longest sequence; .*--context-length/],
    [{}, { tokenizerSamples: [{ text: "abc", tokenIds: [9] }] }, /the tokenizer of --model is another/],
  ],
}; // prettier-ignore

attachedBattery("TensorRT-LLM", ATTACHED);

let logs = 0;
launchedBattery({
  title: "TensorRT-LLM",
  create: ({ env = {}, args = [], port = 0, command, overrides }) =>
    createTrtllmEngine(
      {
        ...BASE,
        modelPath: "/no/model/is/needed",
        blockSizeTokens: 16,
        metricsIntervalMs: 50,
        startTimeoutMs: 30_000,
        launch: {
          command: command ?? [process.execPath, join(import.meta.dirname, "fixtures/fake-trtllm-main.ts")],
          args,
          env,
          port,
          logPath: join(SCRATCH, `${++logs}.log`),
        },
        ...overrides,
      },
      OPTIONS,
    ),
  oldVersion: "0.20.0",
  startLine: /Application startup complete/,
  metric: /^trtllm_request_success_total\{/m,
  badArgs: [[["--grpc", "--port", "x"], ["--grpc", "--port"]]],
}); // prettier-ignore

describe("TensorRT-LLM: requests", () => {
  test("everything a request says reaches the engine, in its words", LIMIT, () =>
    withAttached(ATTACHED, {}, async ({ fake, watcher }) => {
      const request = {
        ...aRequest(promptOf(6), {
          sampling: { temperature: 0.5, topP: 0.9, topK: 40, minP: 0.1, presencePenalty: 0.25, frequencyPenalty: 0.5, repetitionPenalty: 1.5, seed: 7, logitBias: [[5, -3]] }, // prettier-ignore
          stop: { maxTokens: 9, minTokens: 4, stopTokenIds: [2, 3] },
          output: { topLogprobs: 0 },
          priority: 1,
        }),
        answerForm: { kind: "json-schema" as const, schema: { type: "object" } },
      };
      await watcher.run(request);
      const expected = {
        prompt: [...request.tokenIds],
        model: "tiny",
        max_tokens: 9,
        min_tokens: 4,
        temperature: 0.5,
        top_p: 0.9,
        top_k: 40,
        min_p: 0.1,
        presence_penalty: 0.25,
        frequency_penalty: 0.5,
        repetition_penalty: 1.5,
        seed: 7,
        logit_bias: { 5: -3 },
        ignore_eos: true,
        stop_token_ids: [2, 3],
        logprobs: 1,
        response_format: { type: "json_schema", json_schema: { type: "object" } },
        priority: 0.75,
        detokenize: false,
        add_special_tokens: false,
        stream: true,
        stream_options: { include_usage: true },
      };
      assert.deepEqual(fake.requests.at(-1)!.body, expected as TrtllmBody);
    }),
  );

  test("fields of later versions are not sent to an older one, which would refuse the request", LIMIT, () =>
    withAttached(ATTACHED, { fake: { version: "1.1.0" } }, async ({ fake, watcher }) => {
      const done = await watcher.run(aRequest(promptOf(6), { priority: 9, stop: { maxTokens: 2 } }));
      assert.equal(done.finish, "length");
      assert.equal(fake.requests.at(-1)!.body.priority, undefined);
    }),
  );

  test("an abort: over here at once, there within the second in which it looks", LIMIT, () =>
    withAttached(ATTACHED, { fake: { stepMs: 5 } }, async ({ fake, watcher }) => {
      const id = watcher.submit(aRequest(promptOf(100), { stop: { maxTokens: 400 } }));
      await watcher.until(() => watcher.record(id).tokens.length >= 2, "two tokens");
      watcher.abort(id);
      await watcher.ended([id]);
      assert.deepEqual([watcher.record(id).finish, fake.aborted], ["cancelled", 0]);
      await until(() => fake.aborted === 1 && fake.runningCount === 0, "the end there");
    }),
  );

  test("events: another life of the server, and numbers that are missing, are noticed", LIMIT, () =>
    withAttached(ATTACHED, {}, async ({ fake, watcher, engine, url }) => {
      await watcher.run(aRequest(promptOf(50), { stop: { maxTokens: 1 } }));
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size === 3, "the prompt's blocks");
      // Somebody else takes some, now or when the worker asked just before: then it has them all.
      const lost = (): number => (engine.describe()["kv_events"] as { lost: number }).lost;
      for (let i = 0; lost() === 0; i++) {
        assert.ok(i < 500, "an event is taken away in the end");
        await Promise.all([
          watcher.run(aRequest(promptOf(40, 200 + 3 * i), { stop: { maxTokens: 1 } })),
          fetch(`${url}/kv_cache_events`, { method: "POST" }).then((answer) => answer.text()),
        ]);
        await fetch(`${url}/kv_cache_events`, { method: "POST" }).then((answer) => answer.text());
        await watcher.run(aRequest(promptOf(40, 201 + 3 * i), { stop: { maxTokens: 1 } }));
      }
      await until(() => watcher.kvEvents.some(({ type }) => type === "cleared"), "the word that it begins again");
      assert.ok(replayKvEvents(watcher.kvEvents).size < fake.caches[0]!.cachedBlocks, "less is known than is there");
    }),
  );

  test("a server of ours gets its options in a file, which goes with it", LIMIT, async () => {
    const config = {
      ...BASE,
      modelPath: "/m",
      launch: { command: [process.execPath, join(import.meta.dirname, "fixtures/fake-trtllm-main.ts")], args: [], env: {}, port: 0 }, // prettier-ignore
    };
    const engine = await createTrtllmEngine(config, OPTIONS);
    const port = new URL(engine.describe()["url"] as string).port;
    const path = join(tmpdir(), `dynamo-ts-trtllm-${process.getuid!()}-${port}.yaml`);
    assert.ok(existsSync(path));
    await engine.stop();
    assert.ok(!existsSync(path));
  });
});
