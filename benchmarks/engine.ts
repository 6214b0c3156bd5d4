import { existsSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { LlamaContext, MAX_SEQUENCE_IDS } from "../src/engines/llama/llama-context.ts";
import { LlamaEngine } from "../src/engines/llama/llama-engine.ts";
import { argmax } from "../src/engines/llama/logit-kernels.ts";
import type { EngineInfo, EngineSink, LlamaEngineConfig } from "../src/engines/index.ts";
import { EngineOutput, GREEDY, decodeEngineOutput, forEachStepEntry } from "../src/protocol/index.ts";

/**
 * The embedded llama engine against a bare loop over libllama in the same run: same model file, threads, batch and
 * greedy choice. Rounds alternate and the median of the rounds' ratios counts, so that other load on the machine falls
 * on both. Then the first token of a 1,000-token prompt, cold and from the prefix cache.
 *
 * Environment: `DYN_TEST_MODEL` a GGUF file, `BENCH_THREADS` compute threads (default: half the cores), `BENCH_ROUNDS`.
 */
const MODEL =
  process.env["DYN_TEST_MODEL"] ??
  path.join(
    process.env["DYN_MODEL_DIR"] ?? path.join(os.homedir(), ".cache", "dynamo-ts", "models"),
    "SmolLM2-135M-Instruct.Q4_1.gguf",
  );
const THREADS = Number(process.env["BENCH_THREADS"] ?? Math.max(1, Math.floor(os.availableParallelism() / 2)));
const ROUNDS = Number(process.env["BENCH_ROUNDS"] ?? 5);
const PROMPT_TOKENS = 16;
const GENERATED_TOKENS = 48;
const LONG_PROMPT_TOKENS = 1000;

const CONFIG: LlamaEngineConfig = {
  kind: "llama",
  modelPath: MODEL,
  contextLength: 2048,
  kvCacheTokens: 8192,
  maxSequences: 64,
  maxBatchedTokens: 512,
  blockSizeTokens: 16,
  threads: THREADS,
};

export async function run(): Promise<void> {
  if (!existsSync(MODEL)) {
    console.log(`engine: skipped, no model at ${MODEL} (set DYN_TEST_MODEL)`);
    return;
  }
  const engine = new TimedEngine();
  const info = await engine.start();
  const bare = new LlamaContext({
    modelPath: MODEL,
    cells: CONFIG.kvCacheTokens,
    maxBatchedTokens: CONFIG.maxBatchedTokens,
    maxLogitRows: MAX_SEQUENCE_IDS,
    sequenceIds: MAX_SEQUENCE_IDS,
    threads: THREADS,
    batchInvariant: true,
  });
  const cpu = os.cpus()[0]?.model ?? "unknown processor";
  console.log(
    `engine: ${cpu} x ${os.availableParallelism()}, Node ${process.versions.node}, libllama ${info.engineVersion}`,
  );
  console.log(`command: node benchmarks/engine.ts (${path.basename(MODEL)}, ${THREADS} threads, ${ROUNDS} rounds)`);
  for (const streams of [1, 16]) {
    // One round each to warm caches up.
    bareDecode(bare, streams);
    await engine.decode(streams, 0);
    const rounds: { bare: number; engine: number }[] = [];
    for (let round = 1; round <= ROUNDS; round++) {
      rounds.push({ bare: bareDecode(bare, streams), engine: await engine.decode(streams, round) });
    }
    const [ofBare, ofEngine] = [median(rounds.map((r) => r.bare)), median(rounds.map((r) => r.engine))];
    const ratio = median(rounds.map((r) => r.engine / r.bare));
    console.log(
      `decode, ${String(streams).padStart(2)} streams: bare ${ofBare.toFixed(0)} tok/s, engine ${ofEngine.toFixed(0)} tok/s, ` +
        `engine/bare ${(100 * ratio).toFixed(1)} % (aim 90 %)`,
    );
  }
  const firstTokens: { coldMs: number; cachedMs: number }[] = [];
  for (let round = 0; round < Math.min(ROUNDS, 3); round++) firstTokens.push(await engine.firstToken(round));
  const cold = median(firstTokens.map((r) => r.coldMs));
  const cached = median(firstTokens.map((r) => r.cachedMs));
  const gain = median(firstTokens.map((r) => r.coldMs / r.cachedMs));
  console.log(
    `first token, ${LONG_PROMPT_TOKENS} tokens: cold ${cold.toFixed(0)} ms, cached ${cached.toFixed(1)} ms, ` +
      `${gain.toFixed(1)} times sooner (aim 25)`,
  );
  bare.close();
  await engine.stop();
}

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1] ?? NaN;
}

function aPrompt(length: number, salt: number): Uint32Array {
  return Uint32Array.from({ length }, (_, i) => 300 + ((i * 37 + salt * 101 + ((i * i) % 7) * 11) % 4000));
}

/** Tokens per second of the shortest loop there is: one batch per step, greedy, all streams in lockstep. */
function bareDecode(context: LlamaContext, streams: number): number {
  const { batch } = context;
  context.clearCells();
  const next = new Int32Array(streams);
  for (let s = 0; s < streams; s++) {
    aPrompt(PROMPT_TOKENS, s).forEach((token, i) => put(i, token, i, s, i === PROMPT_TOKENS - 1));
    context.decode(PROMPT_TOKENS);
    next[s] = argmax(context.logits(PROMPT_TOKENS - 1));
  }
  const startedAt = performance.now();
  for (let step = 0; step < GENERATED_TOKENS; step++) {
    for (let s = 0; s < streams; s++) put(s, next[s]!, PROMPT_TOKENS + step, s, true);
    context.decode(streams);
    for (let s = 0; s < streams; s++) next[s] = argmax(context.logits(s));
  }
  return (streams * GENERATED_TOKENS * 1000) / (performance.now() - startedAt);

  function put(at: number, token: number, position: number, sequence: number, wantsLogits: boolean): void {
    batch.tokenIds[at] = token;
    batch.positions[at] = position;
    batch.sequenceIds[at] = sequence;
    batch.wantsLogits[at] = wantsLogits ? 1 : 0;
  }
}

/** The engine with a sink that notes when tokens come. */
class TimedEngine implements EngineSink {
  readonly #engine = new LlamaEngine(CONFIG);
  readonly #output = new EngineOutput();
  #streamCount = 0;
  #running = 0;
  #withoutToken = 0;
  #tokensSinceAll = 0;
  #allSince = 0;
  #done: () => void = () => {};

  start(): Promise<EngineInfo> {
    return this.#engine.start(this, new AbortController().signal);
  }

  stop(): Promise<void> {
    return this.#engine.stop();
  }

  /** Tokens per second from the step on in which the last of the streams got its first token. */
  async decode(streams: number, round: number): Promise<number> {
    // As empty as the bare loop's memory: cells in use cost attention time, whoever uses them.
    await this.#engine.clearBlocks();
    await this.#run(streams, PROMPT_TOKENS, GENERATED_TOKENS + 1, 1000 * round);
    return (this.#tokensSinceAll * 1000) / (performance.now() - this.#allSince);
  }

  async firstToken(round: number): Promise<{ coldMs: number; cachedMs: number }> {
    const times: number[] = [];
    await this.#engine.clearBlocks();
    for (let pass = 0; pass < 2; pass++) {
      const startedAt = performance.now();
      await this.#run(1, LONG_PROMPT_TOKENS, 1, round);
      times.push(performance.now() - startedAt);
    }
    return { coldMs: times[0]!, cachedMs: times[1]! };
  }

  #run(streams: number, promptTokens: number, maxTokens: number, salt: number): Promise<void> {
    this.#running = this.#withoutToken = streams;
    this.#tokensSinceAll = 0;
    for (let s = 0; s < streams; s++) {
      this.#engine.submit(this.#streamCount++, {
        requestId: "bench",
        model: "bench",
        tokenIds: aPrompt(promptTokens, salt + s),
        sampling: GREEDY,
        stop: { maxTokens, minTokens: 0, stopTokenIds: [], ignoreEos: true },
        output: { topLogprobs: -1, promptLogprobs: false },
        priority: 0,
        cacheNamespace: "",
      });
    }
    return new Promise((resolve) => (this.#done = resolve));
  }

  onStep(step: Uint8Array): void {
    const counts = this.#withoutToken === 0;
    forEachStepEntry(step, (_streamId, start, end) => {
      decodeEngineOutput(step, start, end, this.#output);
      if (counts) this.#tokensSinceAll += this.#output.tokenCount;
      if (this.#output.hasFirst) this.#withoutToken--;
      if (this.#output.finish !== undefined) this.#running--;
    });
    if (!counts && this.#withoutToken === 0) this.#allSince = performance.now();
    if (this.#running === 0) this.#done();
  }

  onKvEvents(): void {}

  onFatal(error: Error): void {
    throw error;
  }
}

if (import.meta.main) await run();
