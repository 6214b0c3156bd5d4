import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import type { DynamoError } from "../../errors/index.ts";
import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { vllmNoneHash } from "../../engine-events/vllm-block-hash.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import type { EngineInfo } from "../base.ts";
import type { VllmEngineConfig } from "../config.ts";
import { EngineRecorder, aRequest, replayKvEvents } from "../engine.recorder.ts";
import { claimFreePorts, type ForeignEngine, type PortClaim } from "../foreign/index.ts";
import { FakeVllm, type FakeVllmOptions } from "./fixtures/fake-vllm.ts";
import { createVllmEngine } from "./vllm-engine.ts";

/** vLLM servers that run already: what a worker beside one notices, and what it sends. Over the fake server. */
const LIMIT = { timeout: 60_000 };
const FAKE: FakeVllmOptions = { contextLength: 512, blockSize: 16, totalBlocks: 320, maxSequences: 8 };

const promptOf = (length: number, from = 100): Uint32Array =>
  Uint32Array.from({ length }, (_, i) => from + ((i * 37) % 3_000));

const OPTIONS = { clock: systemClock, logger: silentLogger };
const MINIMAL: VllmEngineConfig = {
  kind: "vllm",
  vocabularySize: 4_096,
  startTimeoutMs: 5_000,
  kvEvents: true,
  maxSequences: 0,
  maxBatchedTokens: 0,
  contextLength: 0,
  blockSizeTokens: 0,
};

class Watcher extends EngineRecorder {
  readonly away: DynamoError[] = [];
  readonly back: EngineInfo[] = [];
  onUnavailable(error: DynamoError): void {
    this.away.push(error);
  }
  onAvailable(info: EngineInfo): void {
    this.back.push(info);
  }
}

interface Place {
  fake: FakeVllm;
  readonly url: string;
  readonly engine: ForeignEngine;
  readonly watcher: Watcher;
  readonly info: EngineInfo;
  /** Ends the server and starts another at the same addresses. */
  restart(options?: FakeVllmOptions): Promise<void>;
}

async function until(isDone: () => boolean, what: string): Promise<void> {
  const deadline = Date.now() + 30_000;
  while (!isDone()) {
    assert.ok(Date.now() < deadline, `${what} did not come in 30 s`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

interface Setup {
  readonly fake?: FakeVllmOptions;
  readonly config?: Partial<VllmEngineConfig>;
  readonly withoutEvents?: boolean;
  /** Batches that the server keeps for replay. */
  readonly bufferSteps?: number;
}

async function withServer(setup: Setup, body: (place: Place) => Promise<void>): Promise<void> {
  const ranks = setup.fake?.dataParallelSize ?? 1;
  const ports = await claimFreePorts("127.0.0.1", 2 * ranks + 1, Math.random);
  const kvEvents = {
    endpoint: `tcp://*:${ports.port}`,
    replay_endpoint: `tcp://127.0.0.1:${ports.port + ranks}`,
    topic: "kv",
    ...(setup.bufferSteps === undefined ? {} : { buffer_steps: setup.bufferSteps }),
  };
  const make = (options: FakeVllmOptions = {}): FakeVllm =>
    new FakeVllm({ ...FAKE, ...setup.fake, ...options, kvEvents });
  const listen = { port: ports.port + 2 * ranks };
  let fake = make();
  const url = await fake.listen(listen);
  const config: VllmEngineConfig = {
    kind: "vllm",
    url,
    vocabularySize: 4_096,
    startTimeoutMs: 10_000,
    kvEvents: true,
    ...(setup.withoutEvents === true ? {} : { kvEventsConfig: JSON.stringify(kvEvents) }),
    maxSequences: 8,
    maxBatchedTokens: 512,
    contextLength: 0,
    blockSizeTokens: 0,
    metricsIntervalMs: 20,
    ...setup.config,
  };
  const engine = await createVllmEngine(config, OPTIONS);
  const watcher = new Watcher(engine);
  try {
    const info = await watcher.start();
    await body({
      get fake() {
        return fake;
      },
      url,
      engine,
      watcher,
      info,
      restart: async (options) => {
        await fake.close();
        fake = make(options);
        await fake.listen(listen);
      },
    });
  } finally {
    await watcher.stop();
    await fake.close();
    ports.release();
  }
  watcher.check();
}

async function failsToStart(config: Partial<VllmEngineConfig>, pattern: RegExp): Promise<void> {
  const engine = await createVllmEngine({ ...MINIMAL, ...config }, OPTIONS);
  const watcher = new Watcher(engine);
  await assert.rejects(watcher.start(), pattern);
  await watcher.stop();
}

describe("vLLM that runs already: start", () => {
  test("nobody there: says what to start, or which flag to correct", LIMIT, async () => {
    const ports: PortClaim = await claimFreePorts("127.0.0.1", 1, Math.random);
    await failsToStart(
      { url: `http://127.0.0.1:${ports.port}` },
      /no vllm answers at .*; start it first, or correct --engine-url/,
    );
    ports.release();
    await assert.rejects(
      createVllmEngine({ ...MINIMAL, url: "localhost:8000" }, OPTIONS),
      /--engine-url: expected http:\/\/host:port or unix:/,
    );
  });

  test("what cannot work is refused with the reason and the fix", LIMIT, async () => {
    const cases: readonly (readonly [FakeVllmOptions, Partial<VllmEngineConfig>, RegExp])[] = [
      [{ version: "0.10.2" }, {}, /vLLM 0\.10\.2 is too old/],
      [{}, { engineModel: "other" }, /does not serve other; it has tiny: name one with --engine-model/],
      [
        {},
        { blockSizeTokens: 32 },
        /KV blocks of 16 tokens, not 32; leave it out, or start the server with --block-size 32/,
      ],
      [{ apiKey: "secret" }, {}, /wants a key.*DYN_ENGINE_API_KEY/],
      [
        { prefixCaching: false },
        { kvEventsConfig: '{"enable_kv_cache_events":true,"endpoint":"tcp://127.0.0.1:*"}' },
        /has no prefix cache/,
      ],
      [{}, { tokenizerSamples: [{ text: "abc", tokenIds: [9] }] }, /the tokenizer of --model is another/],
    ];
    for (const [options, config, pattern] of cases) {
      const fake = new FakeVllm({ ...FAKE, ...options });
      const url = await fake.listen();
      await failsToStart({ url, ...config }, pattern);
      await fake.close();
    }
  });

  test("two workers for one engine: the second is refused, and may have it when the first is gone", LIMIT, async () => {
    const fake = new FakeVllm(FAKE);
    const url = await fake.listen();
    const make = (): Promise<ForeignEngine> => createVllmEngine({ ...MINIMAL, url }, OPTIONS);
    const first = await make();
    await assert.rejects(make(), new RegExp(`process ${process.pid} is a worker of the engine at ${url} already`));
    await first.stop();
    await (await make()).stop();
    await fake.close();
  });

  test("over a unix socket, with a key", LIMIT, async () => {
    const folder = mkdtempSync(join(tmpdir(), "vllm-uds-"));
    const fake = new FakeVllm({ ...FAKE, apiKey: "secret" });
    const url = await fake.listen({ path: join(folder, "s") });
    const engine = await createVllmEngine({ ...MINIMAL, url, apiKey: "secret", kvEvents: false }, OPTIONS);
    const watcher = new Watcher(engine);
    const info = await watcher.start();
    assert.deepEqual([info.kvEvents, info.totalBlocks, info.maxSequences], ["estimated", 320, 256]);
    assert.equal((await watcher.run(aRequest(promptOf(5), { stop: { maxTokens: 2 } }))).tokens.length, 2);
    // Nobody tells its events: they are guessed.
    const prompt = promptOf(50);
    await watcher.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
    assert.equal(replayKvEvents(watcher.kvEvents).size, 3);
    assert.equal((await watcher.run(aRequest(prompt, { stop: { maxTokens: 1 } }))).first?.cachedTokens, 48);
    assert.equal(engine.counts.unpredicted, 0);
    await watcher.stop();
    await fake.close();
    rmSync(folder, { recursive: true });
  });
});

describe("vLLM that runs already: requests", () => {
  test("everything a request says reaches the engine, in its words", LIMIT, () =>
    withServer({}, async ({ fake, watcher }) => {
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
      };
      await watcher.run(request);
      const { path, headers, body } = fake.requests.at(-1)!;
      assert.equal(path, "/inference/v1/generate");
      assert.equal(headers["x-request-id"], "req-1");
      assert.deepEqual(body, {
        token_ids: [...request.tokenIds],
        request_id: "req-1",
        model: "tiny",
        cache_salt: "dynamo-cache-salt:tenant",
        priority: -5,
        stream: true,
        stream_options: { include_usage: true },
        sampling_params: {
          max_tokens: 7,
          min_tokens: 2,
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
          logprobs: 3,
        },
      });
    }),
  );

  test("a form for the answer and an adapter's name reach the engine; a formed answer is not resumed", LIMIT, () =>
    withServer({}, async ({ fake, watcher, info }) => {
      assert.equal(info.answerForms, true);
      const schema = { type: "object", properties: { a: { type: "integer" } } };
      const answerForm = { kind: "json-schema" as const, schema };
      await watcher.run({ ...aRequest(promptOf(6), { stop: { maxTokens: 1 } }), answerForm });
      assert.deepEqual((fake.requests.at(-1)!.body as unknown as { sampling_params: object }).sampling_params, {
        max_tokens: 1,
        temperature: 0,
        top_p: 1,
        ignore_eos: true,
        structured_outputs: { json: schema },
      });
      const resumed = await watcher.run({ ...aRequest(promptOf(6), { resumedTokens: 2 }), answerForm });
      assert.equal(resumed.error?.reason, "unsupported-operation");
      const adapted = await watcher.run({ ...aRequest(promptOf(6)), loraName: "sql" });
      assert.equal(fake.requests.at(-1)!.body.model, "sql");
      // This server has none of that name.
      assert.equal(adapted.error?.reason, "engine-failed");
    }),
  );

  test("an abort closes the connection, and the engine has nothing of the request a step later", LIMIT, () =>
    withServer({ fake: { stepMs: 5 } }, async ({ fake, watcher }) => {
      const id = watcher.submit(aRequest(promptOf(100), { stop: { maxTokens: 400 } }));
      await watcher.until(() => watcher.record(id).tokens.length >= 2, "two tokens");
      assert.ok(fake.caches[0]!.usedBlocks > 0);
      watcher.abort(id);
      await until(() => fake.aborted === 1, "the closed connection");
      const { steps } = fake;
      await until(() => fake.runningCount === 0, "the end of the request");
      assert.ok(fake.steps <= steps + 1);
      assert.equal(fake.caches[0]!.usedBlocks, 0);
      assert.equal(watcher.record(id).finish, "cancelled");
    }),
  );

  test("a token id that the engine would die of does not reach it", LIMIT, () =>
    withServer({}, async ({ fake, watcher }) => {
      const before = fake.requests.length;
      const { error } = await watcher.run(aRequest(Uint32Array.of(1, 4_096)));
      assert.equal(error?.reason, "invalid-field");
      assert.match(error.publicMessage, /token ids below 4096, got 4096/);
      assert.equal(fake.requests.length, before);
    }),
  );

  test("an error in the middle of a stream, a refusal and a broken connection are told as what they are", LIMIT, () =>
    withServer({ fake: { stepMs: 5, vocabularySize: 3_000 } }, async ({ fake, watcher, engine }) => {
      const refused = await watcher.run(aRequest(Uint32Array.of(3_500)));
      assert.equal(refused.error?.reason, "invalid-field");
      assert.match(refused.error.publicMessage, /vLLM refused the request: Token id 3500 is out of vocabulary/);
      const ids = [1, 2].map(() => watcher.submit(aRequest(promptOf(9), { stop: { maxTokens: 400 } })));
      await watcher.until(() => ids.every((id) => watcher.record(id).tokens.length > 0), "first tokens");
      fake.breakConnections();
      await watcher.ended(ids);
      for (const id of ids) assert.equal(watcher.record(id).error?.reason, "engine-stopped");
      // The server is well: only the connections were not.
      assert.equal((await watcher.run(aRequest(promptOf(9), { stop: { maxTokens: 2 } }))).tokens.length, 2);
      assert.equal(engine.describe()["state"], "up");
    }),
  );

  test("reuse: what is predicted with the first token is what the engine says in the end", LIMIT, () =>
    withServer({}, async ({ watcher, engine, fake }) => {
      for (let i = 0; i < 40; i++) {
        const prompt = Uint32Array.from([
          ...promptOf(16 * (1 + (i % 5))),
          ...promptOf(20 + (i % 3), 500 + 10 * (i % 4)),
        ]);
        const stored = fake.caches[0]!.cachedBlocks;
        await watcher.run(aRequest(prompt, { stop: { maxTokens: 2 } }));
        if (fake.caches[0]!.cachedBlocks === stored) continue;
        await watcher.until(() => replayKvEvents(watcher.kvEvents).size === fake.caches[0]!.cachedBlocks, "its blocks");
      }
      assert.equal(engine.counts.unpredicted, 0);
      assert.ok(engine.load().cachedPromptTokens > 1_000);
    }),
  );

  test("an engine that does not say what came from its cache: the prediction stands", LIMIT, () =>
    withServer({ fake: { promptTokensDetails: false } }, async ({ watcher }) => {
      const prompt = promptOf(50);
      await watcher.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size === 3, "the prompt's blocks");
      const warm = await watcher.run(aRequest(prompt, { stop: { maxTokens: 1 } }));
      assert.equal(warm.first?.cachedTokens, 48);
    }),
  );

  test("data-parallel ranks: a request goes to its rank, each rank's blocks are its own", LIMIT, () =>
    withServer({ fake: { dataParallelSize: 2 } }, async ({ watcher, info, fake }) => {
      assert.equal(info.dataParallelSize, 2);
      for (const dpRank of [1, 0, 1]) {
        await watcher.run({ ...aRequest(promptOf(40), { stop: { maxTokens: 1 } }), dpRank });
        assert.equal(fake.requests.at(-1)!.headers["x-data-parallel-rank"], String(dpRank));
      }
      await watcher.until(() => watcher.kvEvents.filter(({ type }) => type === "stored").length >= 2, "both ranks");
      assert.deepEqual(new Set(watcher.kvEvents.map(({ dpRank }) => dpRank)), new Set([0, 1]));
    }),
  );
});

describe("vLLM that runs already: faults", () => {
  test("its block hashes are held against ours while they come; another seed is counted, with the likely cause", LIMIT, () =>
    withServer({}, async ({ fake, engine, watcher }) => {
      const shown = (): unknown => (engine.describe()["kv_events"] as { block_hashes: unknown }).block_hashes;
      await watcher.run(aRequest(promptOf(50), { stop: { maxTokens: 1 } }));
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size === 3, "the prompt's blocks");
      assert.deepEqual(shown(), { state: "match", algorithm: "sha256_cbor", seed: "0", checked: 1, mismatches: 0 });
      assert.equal(engine.processState().hashMismatches, 0);
      fake.caches[0]!.noneHash = vllmNoneHash("sha256_cbor", "another");
      await watcher.run(aRequest(promptOf(50, 900), { stop: { maxTokens: 1 } }));
      await watcher.until(() => engine.processState().hashMismatches === 1, "the mismatch");
      const { state, cause, advice } = shown() as Record<string, string>;
      assert.deepEqual([state, cause], ["mismatch", "changed"]);
      assert.match(advice!, /PYTHONHASHSEED=0/);
      // Routing goes by our own hashes.
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size === 6, "all blocks");
    })); // prettier-ignore

  test("known not to work: refused when it is met, unless it is accepted by its id", LIMIT, async () => {
    const setup = { fake: { prefixCaching: false } };
    await assert.rejects(withServer(setup, () => Promise.resolve()), /vLLM 0\.29\.0: no KV events will come: .*--no-engine-kv-events.*--accept-known-bad prefix-cache-off-with-kv-events/); // prettier-ignore
    await withServer({ ...setup, config: { acceptKnownBad: ["prefix-cache-off-with-kv-events"] } }, ({ watcher }) =>
      watcher
        .run(aRequest(promptOf(9), { stop: { maxTokens: 1 } }))
        .then(({ tokens }) => assert.equal(tokens.length, 1)),
    );
  });

  test("restarted behind the worker: noticed, its blocks forgotten, back when it answers", LIMIT, () =>
    withServer({}, async (place) => {
      const { watcher, engine } = place;
      await watcher.run(aRequest(promptOf(50), { stop: { maxTokens: 1 } }));
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size === 3, "the prompt's blocks");
      await place.restart();
      await until(() => watcher.back.length === 1, "the way back");
      assert.equal(watcher.away.length, 1);
      assert.match(watcher.away[0]!.publicMessage, /is gone: nobody listens|was restarted by somebody/);
      assert.equal(replayKvEvents(watcher.kvEvents).size, 0);
      const again = await watcher.run(aRequest(promptOf(50), { stop: { maxTokens: 1 } }));
      assert.equal(again.first?.cachedTokens, 0);
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size === 3, "the prompt's blocks, again");
      const { sequenceHashes } = hashBlocks(promptOf(48), 16, blockHashSeed());
      assert.equal(await engine.countBlocks(sequenceHashes), 3);
    }),
  );

  test("restarted with another block size: the worker ends with the reason", LIMIT, () =>
    withServer({}, async (place) => {
      await place.restart({ blockSize: 32 });
      await until(() => place.watcher.fatal !== undefined, "the last word");
      assert.match(
        place.watcher.fatal!.publicMessage,
        /came back with another KV block size \(32, was 16\); start the worker again/,
      );
    }),
  );

  test(
    "hung: nothing answers while the port is open; its requests end, and it is back when it answers again",
    LIMIT,
    () =>
      withServer({ fake: { stepMs: 5 }, config: { hangTimeoutMs: 1_000 } }, async ({ fake, watcher }) => {
        const id = watcher.submit(aRequest(promptOf(9), { stop: { maxTokens: 400 } }));
        await watcher.until(() => watcher.record(id).tokens.length > 0, "a token");
        fake.isHung = true;
        await watcher.ended([id]);
        assert.match(watcher.record(id).error!.publicMessage, /the engine hangs: no answer to anything for/);
        fake.isHung = false;
        await until(() => watcher.back.length === 1, "the way back");
        assert.equal((await watcher.run(aRequest(promptOf(9), { stop: { maxTokens: 2 } }))).tokens.length, 2);
      }),
  );

  test("events lost on the way: replayed, nothing is missing and nothing too much", LIMIT, () =>
    withServer({}, async ({ fake, watcher }) => {
      await watcher.run(aRequest(promptOf(50), { stop: { maxTokens: 1 } }));
      fake.publishers[0]!.dropNext = 2;
      for (const from of [200, 300, 400]) await watcher.run(aRequest(promptOf(40, from), { stop: { maxTokens: 1 } }));
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size === fake.caches[0]!.cachedBlocks, "all blocks");
    }),
  );

  test("replay too old: what was known is forgotten, what comes after is known again, and it is told", LIMIT, () =>
    withServer({ bufferSteps: 1 }, async ({ fake, engine, watcher }) => {
      await watcher.run(aRequest(promptOf(50), { stop: { maxTokens: 1 } }));
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size === 3, "the prompt's blocks");
      fake.publishers[0]!.dropNext = 2;
      for (const from of [200, 300, 400]) await watcher.run(aRequest(promptOf(40, from), { stop: { maxTokens: 1 } }));
      const resets = (): unknown => (engine.describe()["kv_events"] as { ranks: { resets: object }[] }).ranks[0]!.resets;
      await until(() => (resets() as { lost?: number }).lost === 1, "the hole");
      // Only the newest: a block that was lost may be gone by now, and is never predicted.
      await watcher.until(() => replayKvEvents(watcher.kvEvents).size === 2, "the newest blocks");
      const { sequenceHashes } = hashBlocks(promptOf(48), 16, blockHashSeed());
      assert.equal(await engine.countBlocks(sequenceHashes), 0);
    })); // prettier-ignore

  test("what is removed for want of room is told", LIMIT, () =>
    withServer({ fake: { totalBlocks: 40 } }, async ({ fake, watcher }) => {
      for (let i = 0; i < 12; i++) await watcher.run(aRequest(promptOf(80, 100 + 60 * i), { stop: { maxTokens: 20 } }));
      await watcher.until(
        () => replayKvEvents(watcher.kvEvents).size === fake.caches[0]!.cachedBlocks,
        "the last state",
      );
      assert.ok(watcher.kvEvents.some(({ type }) => type === "removed"));
    }),
  );

  test("metrics: load of others is seen, and nothing is concluded from a scrape that is old", LIMIT, () =>
    withServer(
      { fake: { stepMs: 20 }, config: { metricsMaxAgeMs: 150, hangTimeoutMs: 60_000 } },
      async ({ fake, url, engine }) => {
        const body = JSON.stringify({
          token_ids: [...promptOf(200)],
          sampling_params: { max_tokens: 300, temperature: 0 },
          stream: true,
        });
        const others = new AbortController();
        const answer = await fetch(`${url}/inference/v1/generate`, { method: "POST", body, signal: others.signal });
        await until(() => engine.load().runningRequests === 1, "the request of somebody else");
        await until(() => engine.load().activeBlocks >= 13, "its blocks");
        fake.isHung = true;
        await until(() => (engine.describe()["metrics"] as { stale: boolean }).stale, "the word that it is stale");
        assert.deepEqual([engine.load().runningRequests, engine.load().activeBlocks], [0, 0]);
        assert.equal(engine.ownMetrics(), "");
        others.abort();
        await answer.body?.cancel().catch(() => undefined);
      },
    ),
  );
});
