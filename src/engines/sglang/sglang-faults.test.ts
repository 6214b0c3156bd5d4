import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import type { SglangEngineConfig } from "../config.ts";
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
import { FAKE_EOS, FakeSglang, type FakeSglangOptions, type SglangBody } from "./fixtures/fake-sglang.ts";
import { createSglangEngine } from "./sglang-engine.ts";

/** SGLang servers, running already and started: what a worker beside one notices, and what it sends. Over the fake server. */
const LIMIT = { timeout: 60_000 };
const SCRATCH = mkdtempSync(join(tmpdir(), "sglang-faults-"));
after(() => rmSync(SCRATCH, { recursive: true, force: true }));

const BASE: SglangEngineConfig = {
  kind: "sglang",
  vocabularySize: 4_096,
  startTimeoutMs: 10_000,
  kvEvents: true,
  maxSequences: 8,
  maxBatchedTokens: 512,
  contextLength: 0,
  blockSizeTokens: 0,
};

const ATTACHED: AttachedUnderTest<FakeSglang, FakeSglangOptions> = {
  fake: (options) => new FakeSglang(options),
  create: (url, kvEvents, overrides) =>
    createSglangEngine(
      { ...BASE, url, ...(kvEvents === undefined ? {} : { kvEventsConfig: JSON.stringify(kvEvents) }), ...overrides },
      OPTIONS,
    ),
  otherClient: (prompt, tokens) => ({
    path: "/generate",
    body: { input_ids: prompt, stream: true, sampling_params: { max_new_tokens: tokens, temperature: 0, ignore_eos: true } }, // prettier-ignore
  }),
  replays: true,
  refusals: [
    [{ version: "0.5.5" }, {}, /is of version 0\.5\.5, which is too old: 0\.5\.6 is the first/],
    [{}, { engineModel: "other" }, /does not serve other; it has tiny: name one with --engine-model/],
    [{}, { blockSizeTokens: 32 }, /pages of 16 tokens, not 32 .*start the server with --page-size 32/],
    [{ blockSize: 1 }, {}, /pages of one token, too small .* start it with --page-size 16.*--no-engine-kv-events/],
    [{ apiKey: "secret" }, {}, /wants a key.*DYN_ENGINE_API_KEY/],
    [{ prefixCaching: false }, {}, /has no prefix cache/],
    [{ metrics: false }, {}, /does not tell its metrics; start it with --enable-metrics/],
    [{}, { tokenizerSamples: [{ text: "abc", tokenIds: [9] }] }, /the tokenizer of --model is another/],
  ],
};

attachedBattery("SGLang", ATTACHED);

let logs = 0;
launchedBattery({
  title: "SGLang",
  create: ({ env = {}, args = [], port = 0, command, overrides }) =>
    createSglangEngine(
      {
        ...BASE,
        modelPath: "/no/model/is/needed",
        engineModel: "tiny",
        contextLength: 512,
        blockSizeTokens: 16,
        metricsIntervalMs: 50,
        startTimeoutMs: 30_000,
        launch: {
          command: command ?? [process.execPath, join(import.meta.dirname, "fixtures/fake-sglang-main.ts")],
          args,
          env,
          port,
          logPath: join(SCRATCH, `${++logs}.log`),
        },
        ...overrides,
      },
      OPTIONS,
    ),
  oldVersion: "0.5.2",
  startLine: /The server is fired up and ready to roll/,
  metric: /^sglang:num_running_reqs\{/m,
  badArgs: [
    [
      ["--grpc-mode", "--disable-radix-cache", "--page-size", "1", "--dp", "x"],
      ["--grpc-mode", "--disable-radix-cache", "--page-size", "--dp"],
    ],
  ],
});

describe("SGLang: requests", () => {
  test("everything a request says reaches the engine, in its words", LIMIT, () =>
    withAttached(ATTACHED, {}, async ({ fake, watcher }) => {
      const request = {
        ...aRequest(promptOf(6), {
          sampling: { temperature: 0.5, topP: 0.9, topK: 40, minP: 0.1, presencePenalty: 0.25, frequencyPenalty: 0.5, repetitionPenalty: 1.5, seed: 7, logitBias: [[5, -3]] }, // prettier-ignore
          stop: { maxTokens: 9, minTokens: 4, stopTokenIds: [2, 3] },
          output: { topLogprobs: 2 },
          priority: 5,
          cacheNamespace: "tenant",
          resumedTokens: 2,
        }),
        requestId: "req-1",
        loraName: "sql",
        answerForm: { kind: "json-schema" as const, schema: { type: "object" } },
        resumedTokens: 0,
      };
      await watcher.run(request);
      const { path, body } = fake.requests.at(-1)!;
      assert.equal(path, "/generate");
      assert.match(body.rid!, /^req-1-[0-9a-f]{16}$/);
      const expected: SglangBody = {
        input_ids: [...request.tokenIds],
        rid: body.rid!,
        stream: true,
        return_logprob: true,
        top_logprobs_num: 2,
        logprob_start_len: -1,
        priority: 5,
        extra_key: "tenant",
        cache_salt: "tenant",
        lora_path: "sql",
        sampling_params: {
          max_new_tokens: 9,
          min_new_tokens: 4,
          temperature: 0.5,
          top_p: 0.9,
          top_k: 40,
          min_p: 0.1,
          presence_penalty: 0.25,
          frequency_penalty: 0.5,
          repetition_penalty: 1.5,
          sampling_seed: 7,
          logit_bias: { 5: -3 },
          ignore_eos: false,
          stop_token_ids: [2, 3],
          json_schema: '{"type":"object"}',
        } as SglangBody["sampling_params"] & object,
      };
      assert.deepEqual(body, expected);
    }),
  );

  test("priorities the other way round, or none, as the server was started", LIMIT, async () => {
    for (const [options, wanted] of [
      [{ lowFirst: true }, -5],
      [{ priorityScheduling: false }, undefined],
    ] as const) {
      await withAttached(ATTACHED, { fake: options }, async ({ fake, watcher }) => {
        await watcher.run(aRequest(promptOf(6), { priority: 5, stop: { maxTokens: 1 } }));
        assert.equal(fake.requests.at(-1)!.body.priority, wanted);
      });
    }
  });

  test("stop tokens of the client's own when the model's are to be ignored: watched for on this side", LIMIT, () =>
    withAttached(ATTACHED, {}, async ({ fake, watcher }) => {
      const free = await watcher.run(aRequest(promptOf(12), { stop: { maxTokens: 30 } }));
      const stopTokenId = free.tokens[3]!;
      const stop = { maxTokens: 30, stopTokenIds: [stopTokenId], ignoreEos: true };
      const stopped = await watcher.run(aRequest(promptOf(12), { stop }));
      assert.deepEqual(
        [stopped.tokens, stopped.finish],
        [free.tokens.slice(0, free.tokens.indexOf(stopTokenId)), "stop"],
      );
      assert.equal(fake.requests.at(-1)!.body.sampling_params?.ignore_eos, true);
      await until(() => fake.runningCount === 0, "the end there");
      assert.ok(!free.tokens.includes(FAKE_EOS), "the rule never came to it");
    }),
  );

  test(
    "an abort is said as well as done: the engine has nothing of the request a step later, not two seconds",
    LIMIT,
    () =>
      withAttached(ATTACHED, { fake: { stepMs: 5 } }, async ({ fake, watcher }) => {
        const request = { ...aRequest(promptOf(100), { stop: { maxTokens: 380 } }), requestId: "a" };
        const id = watcher.submit(request);
        const other = watcher.submit({ ...request, requestId: "ab" });
        await watcher.until(() => [id, other].every((one) => watcher.record(one).tokens.length >= 2), "two tokens");
        watcher.abort(id);
        const startedMs = performance.now();
        await until(() => fake.aborted === 1, "the word");
        assert.ok(performance.now() - startedMs < 1_500, "before the closed connection works");
        await until(() => fake.runningCount === 1, "the end of the one");
        // One whose id begins with the other's goes on.
        const { length } = watcher.record(other).tokens;
        await watcher.until(() => watcher.record(other).tokens.length > length + 3, "more of the other");
        assert.equal(watcher.record(id).finish, "cancelled");
        watcher.abort(other);
        await until(() => fake.caches[0]!.usedBlocks === 0, "its blocks");
      }),
  );

  test("a prompt just as long as the server takes is answered, one longer is refused here", LIMIT, () =>
    withAttached(ATTACHED, {}, async ({ fake, watcher, info }) => {
      assert.equal(info.contextLength, fake.maxRequestInput + 1);
      const most = aRequest(promptOf(fake.maxRequestInput), { stop: { maxTokens: 50 } });
      assert.deepEqual((await watcher.run(most)).tokens.length, 1);
      const { error } = await watcher.run(aRequest(promptOf(fake.maxRequestInput + 1)));
      assert.equal(error?.reason, "context-length");
    }),
  );

  test("refusals and ends by the scheduler are told as what they are", LIMIT, () =>
    withAttached(ATTACHED, { fake: { vocabularySize: 3_000 } }, async ({ watcher }) => {
      const { error } = await watcher.run(aRequest(Uint32Array.of(3_500)));
      assert.equal(error?.reason, "invalid-field");
      assert.match(error.publicMessage, /SGLang refused the request: The input_ids 3500 contains values greater/);
    }),
  );

  test("data-parallel ranks: a request goes to its rank, each rank's pages are its own", LIMIT, () =>
    withAttached(ATTACHED, { fake: { dataParallelSize: 2 } }, async ({ watcher, info, fake }) => {
      assert.equal(info.dataParallelSize, 2);
      for (const dpRank of [1, 0, 1]) {
        await watcher.run({ ...aRequest(promptOf(40), { stop: { maxTokens: 1 } }), dpRank });
        const { body } = fake.requests.at(-1)!;
        assert.deepEqual([body.routed_dp_rank, body.data_parallel_rank], [dpRank, dpRank]);
      }
      const stored = () => watcher.kvEvents.filter(({ type }) => type === "stored");
      await watcher.until(() => stored().length >= 2, "both ranks");
      assert.deepEqual(new Set(stored().map(({ dpRank }) => dpRank)), new Set([0, 1]));
    }),
  );

  test("namespaces: what the events say belongs to the one that asked, where they tell it", LIMIT, () =>
    withAttached(ATTACHED, {}, async ({ watcher, engine }) => {
      for (const cacheNamespace of ["one", "two", "one"]) {
        const before = replayKvEvents(watcher.kvEvents).size;
        const done = await watcher.run(aRequest(promptOf(40), { cacheNamespace, stop: { maxTokens: 1 } }));
        if (done.first!.cachedTokens === 0) {
          await watcher.until(() => replayKvEvents(watcher.kvEvents).size === before + 2, "its pages");
        }
      }
      assert.equal(engine.counts.unpredicted, 0);
    }),
  );

  test("pages of one token without events: guessed in blocks that fit", LIMIT, () =>
    withAttached(ATTACHED, { fake: { blockSize: 1, totalBlocks: 4_000 }, withoutEvents: true }, async ({ info }) => {
      assert.deepEqual([info.blockSizeTokens, info.totalBlocks, info.kvEvents], [16, 250, "estimated"]);
      await Promise.resolve();
    }),
  );

  test("a publisher that is not named publishes nothing: said at once", LIMIT, async () => {
    const config = { ...BASE, url: "http://127.0.0.1:1", kvEventsConfig: '{"endpoint":"tcp://*:5557"}' };
    await assert.rejects(createSglangEngine(config, OPTIONS), /--kv-events-config: SGLang publishes only with "publisher":"zmq"/); // prettier-ignore
  });
});
