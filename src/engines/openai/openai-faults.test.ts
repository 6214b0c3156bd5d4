import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import type { OpenAiEngineConfig } from "../config.ts";
import type { EngineInfo } from "../base.ts";
import { aRequest } from "../engine.recorder.ts";
import { until, withEngine, type EngineWatcher } from "../foreign/fixtures/engine-watcher.ts";
import type { ForeignEngine } from "../foreign/index.ts";
import { FakeLlamaServer } from "../llama-server/fixtures/fake-llama-server.ts";
import { FakeOpenAi, type FakeOpenAiOptions } from "./fixtures/fake-openai.ts";
import { byteConfig } from "./fixtures/openai-config.ts";
import { createOpenAiEngine } from "./openai-engine.ts";

/** What servers with the OpenAI API do to whoever asks them. */
const LIMIT = { timeout: 60_000 };
const OPTIONS = { clock: systemClock, logger: silentLogger };
const bytesOf = (text: string): Uint32Array => Uint32Array.from(Buffer.from(text));
const SINK = { onStep() {}, onKvEvents() {}, onFatal() {} };

interface Place {
  readonly fake: FakeOpenAi;
  readonly watcher: EngineWatcher;
  readonly info: EngineInfo;
  readonly engine: ForeignEngine;
  readonly restart: () => Promise<void>;
}

async function withUpstream(
  options: FakeOpenAiOptions,
  more: Partial<OpenAiEngineConfig>,
  body: (place: Place) => Promise<void>,
): Promise<void> {
  let fake = new FakeOpenAi(options);
  const url = await fake.listen();
  const restart = async (): Promise<void> => {
    await fake.close();
    fake = new FakeOpenAi(options);
    await fake.listen(Number(new URL(url).port));
  };
  try {
    const engine = createOpenAiEngine(await byteConfig(`${url}${more.url ?? ""}`, { ...more, url: `${url}${more.url ?? ""}` }), OPTIONS);
    await withEngine(engine, (watcher, info) => body({ fake, watcher, info, engine, restart }));
  } finally {
    await fake.close();
  }
} // prettier-ignore

async function refused(options: FakeOpenAiOptions, why: RegExp, more: Partial<OpenAiEngineConfig> = {}): Promise<void> {
  const fake = new FakeOpenAi(options);
  const url = await fake.listen();
  const engine = createOpenAiEngine(await byteConfig(url, more), OPTIONS);
  try {
    await assert.rejects(engine.start(SINK, new AbortController().signal), why);
  } finally {
    await engine.stop();
    await fake.close();
  }
}

const textOf = (tokens: readonly number[]): string => Buffer.from(tokens).toString("utf8");

describe("OpenAI upstream", () => {
  test("a start that cannot work says why and what to do", LIMIT, async () => {
    await refused({ apiKey: "secret" }, /refuses the key \(status 401 for \/v1\/models\); set DYN_ENGINE_API_KEY/);
    await refused({ basePath: "/openai/v1" }, /has no \/v1\/models \(status 404\); give the path its API is under/);
    await refused({ models: ["a", "b"] }, /has 2 models \(a, b\): name one with --engine-model/);
    await refused({ models: [] }, /no models listed: name one with --engine-model/);
    await refused({ hasCompletions: false }, /has no \/v1\/completions \(status 404\): it takes messages only/);
    assert.throws(() => createOpenAiEngine({ kind: "openai", url: "ftp://x" } as OpenAiEngineConfig, OPTIONS), /--engine-url: expected http/); // prettier-ignore
  });

  test("a base path, a key, headers of one's own, one model of several, its context length", LIMIT, () =>
    withUpstream(
      {
        basePath: "/openai/v1",
        apiKey: "secret",
        header: ["X-Tenant", "blue"],
        models: ["a", "b"],
        contextLength: 300,
      },
      { url: "/openai/v1/", apiKey: "secret", headers: { "X-Tenant": "blue" }, engineModel: "b", contextLength: 0 },
      async ({ fake, watcher, info }) => {
        assert.deepEqual([info.contextLength, info.tokens, info.kvEvents], [300, "estimated", "estimated"]);
        const { tokens, finish } = await watcher.run(aRequest(bytesOf("Hello"), { stop: { maxTokens: 3 } }));
        assert.deepEqual([tokens.length, finish], [3, "length"]);
        assert.equal(fake.bodies.at(-1)?.model, "b");
        assert.equal(fake.bodies.at(-1)?.prompt, "Hello");
        const long = await watcher.run(aRequest(bytesOf("x".repeat(301))));
        assert.equal(long.error?.reason, "context-length");
      },
    ),
  );

  test("token ids where the tokenizers agree by the tokens it counts, text where they do not", LIMIT, async () => {
    await withUpstream({ takesIds: true }, {}, async ({ fake, watcher }) => {
      await watcher.run(aRequest(bytesOf("Hello"), { stop: { maxTokens: 1 } }));
      assert.deepEqual(fake.bodies.at(-1)?.prompt, [...Buffer.from("Hello")]);
    });
    const others = [{ text: "Hello, world!", tokenIds: [1, 2, 3, 4] }];
    await withUpstream({ takesIds: true }, { tokenizerSamples: others }, async ({ fake, watcher }) => {
      await watcher.run(aRequest(bytesOf("Hello"), { stop: { maxTokens: 1 } }));
      assert.equal(fake.bodies.at(-1)?.prompt, "Hello");
    });
  });

  test("the text comes whole, to the byte, however it is cut; special tokens in it stay text", LIMIT, async () => {
    const pieces = ["\ud83c", "\udf89 né", "<|im", "_end|>", "", " 你", "好\r\n\u0000", "<|im_start|>user", "\ud83c"];
    await withUpstream({ pieces, isOdd: true }, {}, async ({ watcher }) => {
      const { tokens, finish } = await watcher.run(aRequest(bytesOf("Hi"), { stop: { maxTokens: 100 } }));
      assert.equal(textOf(tokens), "🎉 né<|im_end|> 你好\r\n\u0000<|im_start|>user\ufffd");
      assert.equal(finish, "stop");
    });
  });

  test("its tokens are not ours: none of its text is lost to our count of them", LIMIT, () =>
    withUpstream({ pieces: ["a long piece", " and another", " and more", " and more"] }, {}, async ({ watcher }) => {
      const { tokens, finish } = await watcher.run(aRequest(bytesOf("Hi"), { stop: { maxTokens: 3 } }));
      assert.deepEqual([textOf(tokens), finish], ["a long piece and another and more", "length"]);
    }),
  );

  test("ends in the words of other servers, and without a word", LIMIT, async () => {
    await withUpstream({ finishReasons: ["eos_token", "max_tokens"] }, {}, async ({ watcher }) => {
      assert.equal((await watcher.run(aRequest(bytesOf("Hi"), { stop: { maxTokens: 3 } }))).finish, "length");
    });
    await withUpstream({ saysWhy: false }, {}, async ({ watcher }) => {
      assert.equal((await watcher.run(aRequest(bytesOf("Hi"), { stop: { maxTokens: 3 } }))).finish, "stop");
    });
    await withUpstream({ finishReasons: ["stop", "content_filter"] }, {}, async ({ watcher }) => {
      const { error } = await watcher.run(aRequest(bytesOf("Hi"), { stop: { maxTokens: 3 } }));
      assert.match(error!.publicMessage, /ended the request with content_filter/);
    });
  });

  test("full, refused, broken, gone: each is told as what it is", LIMIT, () =>
    withUpstream({}, {}, async ({ fake, watcher }) => {
      const told = async (status: number, body: string, headers: Record<string, string> = {}) => {
        fake.failures.push([status, body, headers]);
        return (await watcher.run(aRequest(bytesOf("Hi")))).error!;
      };
      const full = await told(429, '{"error":"slow down"}', { "retry-after": "3" });
      assert.deepEqual([full.reason, full.retryAfterMs], ["worker-full", 3_000]);
      assert.equal((await told(503, "")).reason, "worker-full");
      const bad = await told(400, '{"error":{"message":"temperature is too hot\\nsecond line"}}');
      assert.deepEqual([bad.reason, bad.publicMessage], ["invalid-field", "the server refused the request: temperature is too hot"]); // prettier-ignore
      assert.equal((await told(400, '{"error":{"code":"context_length_exceeded","message":"long"}}')).reason, "context-length"); // prettier-ignore
      assert.equal((await told(502, "<html>Bad gateway</html>")).reason, "engine-stopped");
      assert.match((await told(401, "{}")).publicMessage, /refuses the key/);
      assert.equal((await told(500, "Traceback")).reason, "engine-failed");
      assert.equal((await told(200, 'data: {"error":{"message":"overloaded","code":503}}\n\n')).reason, "worker-full");
      assert.equal((await told(200, "data: {nonsense\n\n")).reason, "malformed-frame");
      assert.equal((await told(200, 'data: {"choices":[{"text":"a"}]}\n\n')).reason, "engine-stopped");
      assert.equal((await watcher.run(aRequest(bytesOf("Hi")))).finish, "length");
    }),
  );

  test("more at once than it takes: those beyond are told so, with when to come again", LIMIT, () =>
    withUpstream({ maxRunning: 2, stepMs: 2 }, {}, async ({ watcher }) => {
      const ids = [1, 2, 3].map((i) => watcher.submit(aRequest(bytesOf(`Hi ${i}`), { stop: { maxTokens: 30 } })));
      await watcher.ended(ids);
      const errors = ids.map((id) => watcher.record(id).error);
      assert.deepEqual(
        errors.flatMap((error) => error?.reason ?? []),
        ["worker-full"],
      );
      assert.equal(errors.find((error) => error !== undefined)?.retryAfterMs, 3_000);
    }),
  );

  test("killed in mid-stream and restarted: ends, is away, comes back", LIMIT, () =>
    withUpstream({ stepMs: 5 }, { metricsIntervalMs: 20 }, async ({ watcher, restart }) => {
      const id = watcher.submit(aRequest(bytesOf("Hi"), { stop: { maxTokens: 400 } }));
      await watcher.until(() => watcher.record(id).tokens.length > 0, "a token");
      await restart();
      await watcher.ended([id]);
      assert.equal(watcher.record(id).error?.reason, "engine-stopped");
      // Whether its absence was seen at all depends on how quick it was.
      await until(() => watcher.back.length === watcher.away.length, "the way back");
      assert.equal((await watcher.run(aRequest(bytesOf("Hi"), { stop: { maxTokens: 2 } }))).tokens.length, 2);
    }),
  );

  test("it hangs: its requests end, and it is back when it answers", LIMIT, () =>
    withUpstream({}, { hangTimeoutMs: 200, metricsIntervalMs: 20 }, async ({ fake, watcher }) => {
      fake.isHung = true;
      const id = watcher.submit(aRequest(bytesOf("Hi")));
      await watcher.ended([id]);
      assert.match(watcher.record(id).error!.publicMessage, /hangs: no answer to anything/);
      fake.isHung = false;
      await until(() => watcher.back.length === 1, "the way back");
    }),
  );

  test("an abort closes the connection", LIMIT, () =>
    withUpstream({ stepMs: 2 }, {}, async ({ fake, watcher }) => {
      const id = watcher.submit(aRequest(bytesOf("Hi"), { stop: { maxTokens: 400 } }));
      await watcher.until(() => watcher.record(id).tokens.length > 0, "a token");
      watcher.abort(id);
      await until(() => fake.running === 0 && fake.aborted === 1, "the end of it there");
    }),
  );

  test("its load, where a Prometheus page of its own has it; other families stay there", LIMIT, () =>
    withUpstream(
      { metrics: true, stepMs: 5 },
      {
        metrics: { path: "/load", running: "my_running", waiting: "my_waiting", prefix: "my_r" },
        metricsIntervalMs: 20,
      },
      async ({ engine }) => {
        await until(() => engine.load().waitingRequests === 2, "two that wait there");
        assert.equal(engine.ownMetrics(), '# TYPE my_running gauge\nmy_running{pool="a"} 0\n');
      },
    ),
  );

  test("cached tokens as it tells them, where it does", LIMIT, async () => {
    const bytes = { vocabularySize: 259, tokenize: (text: string) => [...Buffer.from(text)], pieceOf: (token: number) => Buffer.of(token), nextToken: () => 97 }; // prettier-ignore
    const fake = new FakeLlamaServer(bytes);
    const url = await fake.listen();
    try {
      const engine = createOpenAiEngine(await byteConfig(url), OPTIONS);
      await withEngine(engine, async (watcher) => {
        const prompt = bytesOf("The quick brown fox jumps over the lazy dog");
        await watcher.run(aRequest(prompt, { stop: { maxTokens: 2 } }));
        await watcher.run(aRequest(prompt, { stop: { maxTokens: 2 } }));
        assert.equal(engine.load().cachedPromptTokens, prompt.length - 1);
      });
    } finally {
      await fake.close();
    }
  });
});
