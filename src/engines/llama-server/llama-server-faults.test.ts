import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, describe, test } from "node:test";
import { engineTokenizer } from "../../cli/text-engine-config.ts";
import { loadTokenizer } from "../../frontend/preprocess/index.ts";
import { byteArtifact, vocabularySizeOf } from "../../model/index.ts";
import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import { writeTinyLlama } from "../../../test/helpers/tiny-llama.ts";
import type { LlamaServerEngineConfig } from "../config.ts";
import { aRequest, replayKvEvents } from "../engine.recorder.ts";
import { isAlive, until, withEngine } from "../foreign/fixtures/engine-watcher.ts";
import type { ForeignEngine } from "../foreign/index.ts";
import { fakeLlamaConfig } from "./fixtures/fake-llama-config.ts";
import { FakeLlamaServer, type FakeLlamaServerOptions } from "./fixtures/fake-llama-server.ts";
import { createLlamaServerEngine } from "./llama-server-engine.ts";

const LIMIT = { timeout: 60_000 };
const OPTIONS = { clock: systemClock, logger: silentLogger };
const promptOf = (length: number, from = 100): Uint32Array =>
  Uint32Array.from({ length }, (_, i) => from + ((i * 37) % 3_000));

interface Setup {
  readonly fake?: FakeLlamaServerOptions;
  readonly config?: Partial<LlamaServerEngineConfig>;
}

async function attached(
  { fake: options, config }: Setup,
  body: (place: {
    readonly fake: () => FakeLlamaServer;
    readonly url: string;
    readonly make: () => Promise<ForeignEngine>;
    readonly restart: (options?: FakeLlamaServerOptions) => Promise<void>;
  }) => Promise<void>,
): Promise<void> {
  const make = (more: FakeLlamaServerOptions = {}): FakeLlamaServer =>
    new FakeLlamaServer({ vocabularySize: 4_096, ...options, ...more });
  let fake = make();
  const url = await fake.listen();
  const restart = async (more?: FakeLlamaServerOptions): Promise<void> => {
    await fake.close();
    fake = make(more);
    await fake.listen(Number(new URL(url).port));
  };
  try {
    await body({
      fake: () => fake,
      url,
      make: () => createLlamaServerEngine(fakeLlamaConfig(url, { metricsIntervalMs: 20, ...config }), OPTIONS),
      restart,
    });
  } finally {
    await fake.close();
  }
}

describe("llama.cpp server that runs already", () => {
  const refused = async (setup: Setup, why: RegExp): Promise<void> =>
    attached(setup, async ({ make }) => {
      const engine = await make();
      await assert.rejects(engine.start({ onStep() {}, onKvEvents() {}, onFatal() {} }, new AbortController().signal), why);
      await engine.stop();
    }); // prettier-ignore

  test("what cannot work is refused with the reason and the fix", LIMIT, async () => {
    const other = { tokenizerSamples: [{ text: "Hi", tokenIds: [1, 2, 3] }] };
    await refused({ config: other }, /tokenizer of --model is another.*\[1, 2, 3\] here/);
    await refused({ fake: { apiKey: "secret" } }, /wants a key \(status 401 for \/props\); set DYN_ENGINE_API_KEY/);
    await refused({ fake: { isOld: true } }, /does not say its answers in token ids \(return_tokens\)/);
    await refused({ config: { engineModel: "other" } }, /serves smollm2, not other; correct --engine-model/);
    await refused({ fake: { vocabularySize: 300 } }, /a model of 300 tokens, and the tokenizer of --model has 4096/);
    const nobody = await createLlamaServerEngine(fakeLlamaConfig("http://127.0.0.1:9"), OPTIONS);
    await assert.rejects(
      nobody.start({ onStep() {}, onKvEvents() {}, onFatal() {} }, new AbortController().signal),
      /no llama-server answers at http:\/\/127\.0\.0\.1:9; start it first/,
    );
    await nobody.stop();
  });

  test("it loads its model: waited for", LIMIT, () =>
    attached({}, async ({ fake, make }) => {
      fake().isLoading = true;
      setTimeout(() => (fake().isLoading = false), 300);
      await withEngine(make(), async (watcher) => {
        assert.equal((await watcher.run(aRequest(promptOf(5), { stop: { maxTokens: 2 } }))).tokens.length, 2);
      });
    }),
  );

  test("everything a request says reaches the engine, in its words, and none of its own defaults remains", LIMIT, () =>
    attached({ config: { apiKey: "secret" }, fake: { apiKey: "secret", loras: ["/models/terse.gguf"] } }, async ({ fake, make }) => {
      await withEngine(make(), async (watcher) => {
        const sampling = { temperature: 0.7, topP: 0.9, topK: 40, minP: 0.1, presencePenalty: 0.5, frequencyPenalty: 0.25, repetitionPenalty: 1.1, seed: 7, logitBias: [[5, -100]] as const }; // prettier-ignore
        const form = { kind: "json-schema", schema: { type: "object" } } as const;
        await watcher.run({ ...aRequest(promptOf(3), { sampling, stop: { maxTokens: 2, ignoreEos: true }, output: { topLogprobs: 3 } }), answerForm: form, loraName: "terse" }); // prettier-ignore
        assert.deepEqual(fake().bodies.at(-1), {
          prompt: [...promptOf(3)],
          stream: true,
          return_tokens: true,
          cache_prompt: true,
          n_predict: 2,
          temperature: 0.7,
          top_k: 40,
          top_p: 0.9,
          min_p: 0.1,
          samplers: ["penalties", "temperature", "top_k", "top_p", "min_p"],
          seed: 7,
          repeat_last_n: -1,
          repeat_penalty: 1.1,
          presence_penalty: 0.5,
          frequency_penalty: 0.25,
          logit_bias: [[5, -100]],
          ignore_eos: true,
          n_probs: 3,
          json_schema: { type: "object" },
          lora: [{ id: 0, scale: 1 }],
        });
        await watcher.run(aRequest(promptOf(3), { stop: { maxTokens: 1 } }));
        const { top_k: topK, min_p: minP, temperature } = fake().bodies.at(-1)!;
        assert.deepEqual([topK, minP, temperature], [0, 0, 0]);
        const unknown = await watcher.run({ ...aRequest(promptOf(3)), loraName: "absent" });
        assert.equal(unknown.error?.reason, "model-not-found");
      });
    }),
  ); // prettier-ignore

  test("characters in pieces: the ids that the server leaves out are found again", LIMIT, async () => {
    const artifact = byteArtifact();
    const tokenizer = engineTokenizer(await loadTokenizer(artifact), vocabularySizeOf(artifact));
    const bytes = Buffer.from("a🎉é, 你好!\u{1F44D}\u{1F3FD} \xa0z", "utf8");
    const fake = { vocabularySize: 259, pieceOf: (token: number) => tokenizer.tokenBytes(token), nextToken: (_: readonly number[], i: number) => bytes[i]! }; // prettier-ignore
    await attached({ fake, config: { tokenizer, vocabularySize: 259 } }, async ({ make }) => {
      await withEngine(make(), async (watcher) => {
        const stop = { maxTokens: bytes.length };
        const { tokens, logprobs } = await watcher.run(aRequest(Uint32Array.of(65), { stop, output: { topLogprobs: 0 } }));
        assert.equal(Buffer.from(tokens).toString("utf8"), bytes.toString("utf8"));
        assert.equal(logprobs.length, tokens.length);
      });
    }); // prettier-ignore
  });

  test("what its slots hold: the last sequence of each, told as KV events and found again", LIMIT, () =>
    attached({ fake: { slots: 2 } }, async ({ make }) => {
      await withEngine(make(), async (watcher, info, engine) => {
        assert.equal(info.kvEvents, "estimated");
        const held = async (prompt: Uint32Array): Promise<number> =>
          engine.countBlocks(hashBlocks(prompt, 16, blockHashSeed()).sequenceHashes);
        const [a, b, c] = [promptOf(48), promptOf(48, 101), promptOf(48, 102)];
        const stop = { maxTokens: 1 };
        for (const prompt of [a, b]) await watcher.run(aRequest(prompt, { stop }));
        assert.deepEqual([await held(a), await held(b)], [3, 3]);
        const warm = await watcher.run(aRequest(Uint32Array.from([...a, 9]), { stop: { maxTokens: 2 } }));
        assert.equal(warm.first?.cachedTokens, 48);
        // Into the slot that was idle for longer: that of b.
        await watcher.run(aRequest(c, { stop }));
        assert.deepEqual([await held(a), await held(b), await held(c)], [3, 0, 3]);
        assert.equal(replayKvEvents(watcher.kvEvents).size, 6);
      });
    }),
  );

  test("killed in mid-stream and restarted behind the worker: ends, is away, comes back with nothing cached", LIMIT, () =>
    attached({ fake: { stepMs: 5 } }, async ({ make, restart }) => {
      await withEngine(make(), async (watcher) => {
        const before = await watcher.run(aRequest(promptOf(40), { stop: { maxTokens: 3 } }));
        const id = watcher.submit(aRequest(promptOf(20), { stop: { maxTokens: 400 } }));
        await watcher.until(() => watcher.record(id).tokens.length > 0, "a token");
        await restart();
        await watcher.ended([id]);
        assert.equal(watcher.record(id).error?.reason, "engine-stopped");
        await until(() => watcher.back.length === 1, "the way back");
        assert.equal(replayKvEvents(watcher.kvEvents).size, 0);
        const again = await watcher.run(aRequest(promptOf(40), { stop: { maxTokens: 3 } }));
        assert.deepEqual([again.tokens, again.first?.cachedTokens], [before.tokens, 0]);
      });
    }),
  ); // prettier-ignore

  test("a restart between two looks shows in its counters", LIMIT, () =>
    attached({}, async ({ fake, make }) => {
      await withEngine(make(), async (watcher) => {
        await watcher.run(aRequest(promptOf(40), { stop: { maxTokens: 3 } }));
        const { decodes } = fake();
        const engine = watcher.engine as ForeignEngine;
        const scrapes = (): number => (engine.describe()["metrics"] as { scrapes: number }).scrapes;
        const from = scrapes();
        await until(() => scrapes() > from + 1, "a scrape");
        assert.ok(decodes > 1);
        // As that of another process at the same port.
        Object.assign(fake(), { decodes: -1_000 });
        await until(() => watcher.back.length === 1, "the way back");
        assert.match(watcher.away[0]!.publicMessage, /was restarted by somebody/);
      });
    }),
  );

  test("it hangs: its requests end, and it is back when it answers", LIMIT, () =>
    attached({ config: { hangTimeoutMs: 200 } }, async ({ fake, make }) => {
      await withEngine(make(), async (watcher) => {
        fake().isHung = true;
        const id = watcher.submit(aRequest(promptOf(20)));
        await watcher.ended([id]);
        assert.match(watcher.record(id).error!.publicMessage, /hangs: no answer to anything/);
        fake().isHung = false;
        await until(() => watcher.back.length === 1, "the way back");
      });
    }),
  );

  test("an abort closes the connection, and the slot is free a step later", LIMIT, () =>
    attached({ fake: { stepMs: 2 } }, async ({ fake, make }) => {
      await withEngine(make(), async (watcher) => {
        const id = watcher.submit(aRequest(promptOf(20), { stop: { maxTokens: 400 } }));
        await watcher.until(() => watcher.record(id).tokens.length > 2, "tokens");
        watcher.abort(id);
        await until(() => fake().runningCount === 0, "a free slot");
        assert.equal(fake().aborted, 1);
      });
    }),
  );
});

const SCRATCH = mkdtempSync(join(tmpdir(), "llama-server-test-"));
after(() => rmSync(SCRATCH, { recursive: true, force: true }));

describe("llama.cpp server of ours", () => {
  const FAKE = [process.execPath, join(import.meta.dirname, "fixtures/fake-llama-server-main.ts")];
  const folder = join(SCRATCH, "model");
  let logs = 0;

  const launched = async (
    env: Record<string, string> = {},
    more: Partial<LlamaServerEngineConfig> = {},
    command: readonly string[] = FAKE,
    args: readonly string[] = [],
  ): Promise<ForeignEngine> => {
    const { url: _url, ...config } = fakeLlamaConfig("");
    const artifact = byteArtifact();
    writeTinyLlama(folder);
    return createLlamaServerEngine(
      {
        ...config,
        modelPath: folder,
        tokenizer: engineTokenizer(await loadTokenizer(artifact), vocabularySizeOf(artifact)),
        vocabularySize: 259,
        maxSequences: 3,
        contextLength: 256,
        metricsIntervalMs: 20,
        launch: { command, args, env, port: 0, logPath: join(SCRATCH, `${++logs}.log`) },
        ...more,
      },
      OPTIONS,
    );
  };
  const bytesOf = (text: string): Uint32Array => Uint32Array.from(Buffer.from(text));
  const signal = new AbortController().signal;
  const sink = { onStep() {}, onKvEvents() {}, onFatal() {} };

  test("start: sizes go to its command line; its key does not; stop leaves nothing", LIMIT, async () => {
    let pid = 0;
    await withEngine(launched({}, { apiKey: "secret" }), async (watcher, info, engine) => {
      assert.deepEqual([info.maxSequences, info.contextLength, info.engine], [3, 256, "llama-server"]);
      const server = engine.describe()["server"] as { pid: number; log_path: string };
      pid = server.pid;
      const words = readFileSync(`/proc/${pid}/cmdline`, "latin1").split("\0");
      assert.deepEqual(words.slice(words.indexOf("--ctx-size"), words.indexOf("--ctx-size") + 4), ["--ctx-size", "768", "--parallel", "3"]); // prettier-ignore
      assert.ok(!words.includes("secret"));
      assert.match(readFileSync(server.log_path, "utf8"), /n_slots = 3, n_ctx_slot = 256/);
      assert.equal((await watcher.run(aRequest(bytesOf("Hello"), { stop: { maxTokens: 4, ignoreEos: true } }))).tokens.length, 4); // prettier-ignore
    });
    assert.equal(isAlive(pid), false);
  });

  test("killed while answers run: they end, it is started again, and answers", LIMIT, () =>
    withEngine(launched({ FAKE_LLAMA_STEP_MS: "5" }), async (watcher, _info, engine) => {
      const id = watcher.submit(aRequest(bytesOf("Tell me"), { stop: { maxTokens: 200, ignoreEos: true } }));
      await watcher.until(() => watcher.record(id).tokens.length > 0, "a token");
      process.kill((engine.describe()["server"] as { pid: number }).pid, "SIGKILL");
      await watcher.ended([id]);
      assert.equal(watcher.record(id).error?.reason, "engine-stopped");
      await until(() => watcher.back.length === 1, "the way back");
      assert.equal((await watcher.run(aRequest(bytesOf("Again"), { stop: { maxTokens: 2, ignoreEos: true } }))).tokens.length, 2); // prettier-ignore
    }),
  );

  test("slow start, no start, no program, a flag that cannot work: each says what to do", LIMIT, async () => {
    await withEngine(launched({ FAKE_LLAMA_START_MS: "600" }), async (_watcher, info) => {
      assert.equal(info.maxSequences, 3);
    });
    const slow = await launched({ FAKE_LLAMA_START_MS: "60000" }, { startTimeoutMs: 800 });
    await assert.rejects(slow.start(sink, signal), /did not serve within 0\.8 s; raise --engine-start-timeout-secs[\s\S]*loading model/); // prettier-ignore
    await slow.stop();
    const broken = await launched({ FAKE_LLAMA_FAIL: "failed to allocate 9.5 GiB" });
    await assert.rejects(broken.start(sink, signal), /before it served[\s\S]*failed to allocate 9\.5 GiB/);
    await broken.stop();
    const missing = await launched({}, {}, ["/no/such/llama-server"]);
    await assert.rejects(missing.start(sink, signal), /say where it is with --engine-command/);
    await missing.stop();
    await assert.rejects(launched({}, {}, FAKE, ["--embeddings"]), /--embeddings: the worker wants answers/);
  });

  test("comes back no more after a crash: given up after three starts, with its last lines", LIMIT, async () => {
    const file = join(SCRATCH, "fails");
    const engine = await launched({ FAKE_LLAMA_FAIL_FILE: file });
    await withEngine(engine, async (watcher) => {
      writeFileSync(file, "the disk is gone");
      process.kill((engine.describe()["server"] as { pid: number }).pid, "SIGKILL");
      await until(() => watcher.fatal !== undefined, "the end");
      assert.match(watcher.fatal!.publicMessage, /the disk is gone/);
    });
  });
});
