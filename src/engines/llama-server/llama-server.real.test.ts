import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { engineTokenizer } from "../../cli/text-engine-config.ts";
import { samplesOf } from "../../cli/vllm-config.ts";
import { Detokenizer } from "../../frontend/postprocess/index.ts";
import { loadTokenizer, type Tokenizer } from "../../frontend/preprocess/index.ts";
import { artifactFromPath, vocabularySizeOf } from "../../model/index.ts";
import { silentLogger } from "../../observability/index.ts";
import { systemClock } from "../../std/index.ts";
import { REAL_LLAMA_MODEL, REAL_LLAMA_SERVER, whyNoLlamaServer } from "../../../test/helpers/real-llama-server.ts";
import type { LlamaServerEngineConfig } from "../config.ts";
import { engineBattery } from "../engine.battery.ts";
import { EngineRecorder, aRequest } from "../engine.recorder.ts";
import { EngineHttp, type ForeignEngine } from "../foreign/index.ts";
import { createLlamaServerEngine } from "./llama-server-engine.ts";

/** A real llama.cpp server with the real SmolLM2, started by the engine and attached to. */
const skip = whyNoLlamaServer();
const LIMIT = { skip, timeout: 120_000 };
const OPTIONS = { clock: systemClock, logger: silentLogger };

async function config(slotFolder: string, more: Partial<LlamaServerEngineConfig> = {}): Promise<LlamaServerEngineConfig> {
  const artifact = artifactFromPath(REAL_LLAMA_MODEL!);
  const tokenizer = await loadTokenizer(artifact);
  return {
    kind: "llama-server",
    modelPath: REAL_LLAMA_MODEL!,
    tokenizer: engineTokenizer(tokenizer, vocabularySizeOf(artifact)),
    tokenizerSamples: samplesOf(tokenizer),
    vocabularySize: vocabularySizeOf(artifact),
    startTimeoutMs: 60_000,
    maxSequences: 4,
    maxBatchedTokens: 0,
    contextLength: 512,
    blockSizeTokens: 0,
    metricsIntervalMs: 100,
    launch: {
      command: [REAL_LLAMA_SERVER!],
      args: ["--threads", "1", "--slot-save-path", slotFolder, "--cache-ram", "0"],
      env: {},
      port: 0,
    },
    ...more,
  };
} // prettier-ignore

function promptOf(length: number): Uint32Array {
  return Uint32Array.from({ length }, (_, i) => 500 + ((i * 37) % 3_000));
}

if (skip === false) {
  let folder = "";
  before(() => void (folder = mkdtempSync(join(tmpdir(), "llama-server-slots-"))));
  after(() => rmSync(folder, { recursive: true, force: true }));
  // One server for all: a start costs a second of a core.
  let shared: ForeignEngine | undefined;
  let url = "";
  before(async () => {
    shared = await createLlamaServerEngine(await config(folder), OPTIONS);
    const recorder = new EngineRecorder(shared);
    await recorder.start();
    url = String(shared.describe()["url"]);
  });
  after(() => shared?.stop());
  engineBattery("llama.cpp's server (real)", async () => {
    const { launch: _launch, ...attached } = await config(folder);
    return {
      // As a fresh server's: nothing in its slots.
      engine: await cleared(await createLlamaServerEngine({ ...attached, url }, OPTIONS), url),
      promptTokenIds: promptOf,
      supportsExport: false,
      resumesExactly: ["greedy"],
      refuses: ["min-tokens", "prompt-logprobs", "namespaces"],
      reusesPartsOfBlocks: true,
    };
  });
}

/** What it keeps of former sequences in RAM (`--cache-ram`) is not erased with its slots, which is why it has none here. */
async function cleared(engine: ForeignEngine, url: string): Promise<ForeignEngine> {
  const http = new EngineHttp({ url });
  for (let slot = 0; slot < 4; slot++) {
    await http.ask("POST", `/slots/${slot}?action=erase`, { body: "{}", timeoutMs: 10_000 });
  }
  await http.close();
  return engine;
}

describe("llama.cpp's server (real)", () => {
  let folder: string;
  let engine: ForeignEngine;
  let recorder: EngineRecorder;
  let tokenizer: Tokenizer;
  before(async () => {
    if (skip !== false) return;
    folder = mkdtempSync(join(tmpdir(), "llama-server-slots-"));
    tokenizer = await loadTokenizer(artifactFromPath(REAL_LLAMA_MODEL!));
    engine = await createLlamaServerEngine(await config(folder), OPTIONS);
    recorder = new EngineRecorder(engine);
    const info = await recorder.start();
    assert.deepEqual([info.maxSequences, info.contextLength, info.vocabularySize], [4, 512, 49_152]);
    assert.deepEqual([info.kvEvents, info.tokens], ["estimated", undefined]);
  });
  after(async () => {
    if (skip !== false) return;
    await recorder.stop();
    rmSync(folder, { recursive: true, force: true });
  });
  const encode = (text: string): Uint32Array => tokenizer.encode(text, { addSpecialTokens: false });
  const textOf = (tokens: readonly number[]): string => {
    const detokenizer = new Detokenizer(tokenizer, { skipSpecialTokens: true });
    return detokenizer.push(Uint32Array.from(tokens), tokens.length) + detokenizer.flush();
  };

  test("the capital of France", LIMIT, async () => {
    const prompt = encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n");
    const { tokens, finish } = await recorder.run(aRequest(prompt, { stop: { maxTokens: 40, stopTokenIds: [2] } }));
    assert.match(textOf(tokens), /Paris/);
    assert.equal(finish, "stop");
  });

  test(
    "characters in several tokens: every token comes, although the server tells the last id only",
    LIMIT,
    async () => {
      const poppers = encode("🎉".repeat(8));
      const { tokens } = await recorder.run(aRequest(poppers, { stop: { maxTokens: 12 } }));
      assert.deepEqual(tokens, [...encode("🎉".repeat(4))]);
      assert.equal(textOf(tokens), "🎉🎉🎉🎉");
      const http = new EngineHttp({ url: String(engine.describe()["url"]) });
      for (const text of ["é你好🎉 é你好🎉 é你好🎉 é你好🎉 é", "Emoji: 😀 😃 😄 😁 😆", "日本語の文章です。日本語の"]) {
        const prompt = encode(text);
        const answer = await recorder.run(aRequest(prompt, { stop: { maxTokens: 30, stopTokenIds: [2] } }));
        // Whole answers have all ids.
        const body = {
          prompt: [...prompt],
          n_predict: 30,
          temperature: 0,
          top_k: 0,
          top_p: 1,
          min_p: 0,
          return_tokens: true,
        };
        const whole = await http.ask("POST", "/completion", { body: JSON.stringify(body), timeoutMs: 60_000 });
        const wanted = (JSON.parse(whole.text) as { tokens: number[] }).tokens.filter((id) => id !== 2);
        // A character that the limit cuts is not told at all.
        assert.ok(answer.tokens.length >= wanted.length - 3, `${answer.tokens.length} of ${wanted.length} tokens`);
        assert.deepEqual(answer.tokens, wanted.slice(0, answer.tokens.length));
      }
      await http.close();
    },
  );

  test("a form for the answer is held", LIMIT, async () => {
    const schema = {
      type: "object",
      properties: { a: { enum: [1, 2] } },
      required: ["a"],
      additionalProperties: false,
    };
    const prompt = encode("<|im_start|>user\nGive me JSON<|im_end|>\n<|im_start|>assistant\n");
    const request = { ...aRequest(prompt, { stop: { maxTokens: 100, stopTokenIds: [2] } }), answerForm: { kind: "json-schema", schema } as const }; // prettier-ignore
    const { tokens } = await recorder.run(request);
    // The grammar may leave blanks without end to a model of this size.
    assert.match(textOf(tokens), /^\s*\{\s*"a"\s*:\s*[12]\s*\}?|^\s*\{?\s*"?a?"?\s*:?\s*$/);
  });

  test("an abort frees the slot", LIMIT, async () => {
    const http = new EngineHttp({ url: String(engine.describe()["url"]) });
    const id = recorder.submit(aRequest(promptOf(20), { stop: { maxTokens: 400 } }));
    await recorder.until(() => recorder.record(id).tokens.length > 2, "tokens");
    recorder.abort(id);
    await recorder.ended([id]);
    for (;;) {
      const { text } = await http.ask("GET", "/metrics", { timeoutMs: 5_000 });
      if (/^llamacpp:requests_processing 0$/m.test(text)) break;
    }
    await http.close();
    assert.equal(recorder.record(id).finish, "cancelled");
    assert.ok(recorder.record(id).tokens.length < 400);
  });

  test("more requests than slots wait for their turn", LIMIT, async () => {
    const ids = Array.from({ length: 9 }, (_, i) => recorder.submit(aRequest(promptOf(10 + i), { stop: { maxTokens: 8 } })));
    await recorder.ended(ids);
    for (const id of ids) assert.equal(recorder.record(id).tokens.length, 8);
  }); // prettier-ignore
});
