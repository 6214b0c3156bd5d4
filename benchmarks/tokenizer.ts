import { readFileSync } from "node:fs";
import { monitorEventLoopDelay } from "node:perf_hooks";
import { Tokenizer as Library } from "@huggingface/tokenizers";
import { Detokenizer } from "../src/frontend/postprocess/index.ts";
import { ChatTemplate, loadTokenizer, type Tokenizer } from "../src/frontend/preprocess/index.ts";
import type { TokenizerArtifact } from "../src/model/index.ts";
import { systemClock } from "../src/std/index.ts";
import { prose, stitchedTexts } from "../test/fixtures/corpus/mixed-corpus.ts";
import { modelArtifact, packageArtifact } from "../test/fixtures/corpus/tokenizer-artifacts.ts";
import { median } from "./harness.ts";

/**
 * Tokenizing, detokenizing and chat templates. Encoding is compared with `@huggingface/tokenizers` in the same process on
 * texts of 2,000 characters (our cache warm, as it is in a server after a second); best of several rounds.
 */
const RAW = { addSpecialTokens: false } as const;
const TEXT_CHARS = 2_000;

export async function run(): Promise<void> {
  const sources: [string, TokenizerArtifact | undefined][] = [
    ["qwen3", packageArtifact("qwen3")],
    ["llama3", packageArtifact("llama3")],
    ["smollm2", modelArtifact()],
  ];
  for (const [name, artifact] of sources) {
    if (artifact === undefined) {
      console.log(`${name}: no model file, left out (DYN_TEST_MODEL)`);
      continue;
    }
    const loadMs = await bestAsync(3, async () => void (await loadTokenizer(artifact)));
    const tokenizer = await loadTokenizer(artifact);
    const library = new Library({ ...artifact.tokenizerJson, post_processor: null }, {});
    console.log(`\n${name}: ${tokenizer.vocabularySize} tokens, loaded in ${loadMs.toFixed(0)} ms`);
    for (const [kind, text] of corpora()) compareEncoders(kind, pieces(text), tokenizer, library);
    measureDetokenizer(tokenizer);
    measureHostile(tokenizer);
    await measureSlices(tokenizer);
    await measureTextCache(artifact);
    measureTemplate(artifact);
  }
}

function corpora(): [string, string][] {
  const code = readFileSync(new URL("../node_modules/@huggingface/jinja/src/runtime.ts", import.meta.url), "utf8");
  return [
    ["English", prose(1, 200_000)],
    ["code", code],
    ["mixed", stitchedTexts(1, 60, 3_000).join("")],
  ];
}

function pieces(text: string): string[] {
  return Array.from({ length: Math.ceil(text.length / TEXT_CHARS) }, (_, index) =>
    text.slice(index * TEXT_CHARS, (index + 1) * TEXT_CHARS),
  );
}

function compareEncoders(kind: string, texts: readonly string[], tokenizer: Tokenizer, library: Library): void {
  let tokens = 0;
  for (const text of texts) tokens += tokenizer.encode(text, RAW).length;
  const ownMs = best(9, () => texts.forEach((text) => tokenizer.encode(text, RAW)));
  const libraryMs = best(2, () => texts.forEach((text) => library.encode(text, { add_special_tokens: false })));
  console.log(
    `  ${kind.padEnd(8)} own ${(tokens / ownMs / 1000).toFixed(1)} Mtok/s, library ${(tokens / libraryMs / 1000).toFixed(2)}, ` +
      `ratio ${(libraryMs / ownMs).toFixed(0)}`,
  );
}

function measureDetokenizer(tokenizer: Tokenizer): void {
  const parts: string[] = [];
  for (const [kind, text] of corpora()) {
    const ids = tokenizer.encode(text, RAW);
    const one = new Uint32Array(1);
    let length = 0;
    const ms = best(9, () => {
      const detokenizer = new Detokenizer(tokenizer, { skipSpecialTokens: true });
      for (let index = 0; index < ids.length; index++) {
        one[0] = ids[index] as number;
        length += detokenizer.push(one, 1).length;
      }
    });
    if (length === 0) throw new Error("nothing was detokenized");
    parts.push(`${kind} ${((ms * 1e6) / ids.length).toFixed(0)} ns`);
  }
  console.log(`  detokenizer, one token per push: ${parts.join(", ")}`);
}

function measureHostile(tokenizer: Tokenizer): void {
  const random = Array.from({ length: 100_000 }, (_, index) =>
    String.fromCharCode(97 + (((index * index * 7919) >>> 5) % 26)),
  );
  const han = Array.from({ length: 100_000 }, (_, index) =>
    String.fromCharCode(0x4e00 + (((index * index * 7919) >>> 5) % 20_000)),
  );
  const texts: [string, string][] = [
    ["equal letters", "a".repeat(100_000)],
    ["spaces", " ".repeat(100_000)],
    ["random letters", random.join("")],
    ["random Han", han.join("")],
  ];
  const parts = texts.map(([kind, text]) => `${kind} ${best(3, () => tokenizer.encode(text, RAW)).toFixed(0)}`);
  console.log(`  100,000 hostile characters, ms: ${parts.join(", ")}`);
}

async function measureSlices(tokenizer: Tokenizer): Promise<void> {
  for (const [kind, text] of [
    ["1 MB of English", prose(9, 1_000_000)],
    ["1 MB of one letter", "a".repeat(1_000_000)],
  ] as const) {
    const delay = monitorEventLoopDelay({ resolution: 1 });
    delay.enable();
    const started = performance.now();
    const ids = await tokenizer.encodeSliced(text, RAW);
    const ms = performance.now() - started;
    delay.disable();
    console.log(
      `  in slices: ${kind}, ${ids.length} tokens in ${ms.toFixed(0)} ms, event loop late by at most ${(delay.max / 1e6).toFixed(1)} ms`,
    );
  }
}

/** Prompts of 288,000 characters that come again, or share their first 230,000: with the text cache and without. */
async function measureTextCache(artifact: TokenizerArtifact): Promise<void> {
  const shared = prose(21, 230_000);
  const ends = Array.from({ length: 12 }, (_, index) => prose(100 + index, 58_000));
  const repeated = ends.slice(0, 4).map((end) => shared + end);
  const parts: string[] = [];
  for (const cacheBytes of [0, 64 * 1024 * 1024]) {
    const tokenizer = await loadTokenizer(artifact, systemClock, cacheBytes);
    for (let round = 0; round < 3; round++) repeated.forEach((text) => tokenizer.encode(text, RAW));
    const againMs = best(15, () => repeated.forEach((text) => tokenizer.encode(text, RAW))) / repeated.length;
    const newEnds = ends.slice(4).map((end) => shared + end);
    const times = newEnds.map((text) => best(1, () => tokenizer.encode(text, RAW)));
    parts.push(`${cacheBytes === 0 ? "without" : "with"} ${againMs.toFixed(2)} / ${median(times).toFixed(2)}`);
  }
  console.log(`  text cache, ms for 288,000 characters, all known / 230,000 known: ${parts.join(", ")}`);
}

function measureTemplate({ chatTemplate, bosToken, eosToken }: TokenizerArtifact): void {
  if (chatTemplate === undefined) return;
  const template = new ChatTemplate(chatTemplate, { bosToken, eosToken });
  const parts = [1, 8].map((count) => {
    const messages = Array.from({ length: count }, (_, index) => ({
      role: index % 2 === 0 ? "user" : "assistant",
      content: prose(index, 500),
    }));
    const ms = best(30, () => {
      for (let round = 0; round < 50; round++) template.render({ messages, addGenerationPrompt: true, args: {} });
    });
    return `${count} message${count === 1 ? "" : "s"} ${((ms * 1000) / 50).toFixed(1)} us`;
  });
  console.log(`  chat template: ${parts.join(", ")}`);
}

function best(rounds: number, work: () => unknown): number {
  let bestMs = Infinity;
  for (let round = 0; round < rounds; round++) {
    const started = performance.now();
    work();
    bestMs = Math.min(bestMs, performance.now() - started);
  }
  return bestMs;
}

async function bestAsync(rounds: number, work: () => Promise<void>): Promise<number> {
  let bestMs = Infinity;
  for (let round = 0; round < rounds; round++) {
    const started = performance.now();
    await work();
    bestMs = Math.min(bestMs, performance.now() - started);
  }
  return bestMs;
}

if (import.meta.main) await run();
