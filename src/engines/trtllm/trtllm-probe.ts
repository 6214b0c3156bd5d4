import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { TrtllmEngineConfig } from "../config.ts";
import {
  EngineQuestions,
  FIRST_ANSWER_MS,
  isBeforeVersion,
  type EngineHttp,
  type PolledKvFeed,
} from "../foreign/index.ts";
import type { TrtllmFacts } from "./trtllm-request.ts";

/**
 * What a `trtllm-serve` is. It tells little of itself: its context length comes from the model's files or the user, the size
 * of its blocks from the first events or statistics. So a request of some tokens is made, and what follows is looked at.
 */
export interface TrtllmProbeOptions {
  readonly config: TrtllmEngineConfig;
  readonly http: EngineHttp;
  readonly signal: AbortSignal;
  /** Events that are fetched; undefined = they are pushed, or not wanted. */
  readonly polled: PolledKvFeed | undefined;
  readonly wantsKvEvents: boolean;
}

/** First with token ids in the answers of `/v1/completions` (`detokenize` off). */
const OLDEST = [1, 0, 0];
/** First with a priority in its requests. */
const WITH_PRIORITY = [1, 3, 0];
const DEFAULT_TOKENS_PER_BLOCK = 32;
const DEFAULT_MAX_SEQUENCES = 256;
const DEFAULT_MAX_BATCHED_TOKENS = 8_192;
/** Two blocks of the largest usual size, and one token. */
const LONG_PROMPT = 257;

export async function probeTrtllm(options: TrtllmProbeOptions): Promise<TrtllmFacts> {
  const { config, http, signal, polled } = options;
  const questions = new EngineQuestions("TensorRT-LLM", http, signal);
  const version = (await questions.json<{ version?: string }>("/version")).version ?? "unknown";
  if (isBeforeVersion(version, OLDEST)) {
    throw questions.refused(
      `is of version ${version}, which is too old: ${OLDEST.join(".")} is the first that says its answers in token ids; install a newer one, or have its text with --engine openai`,
    );
  }
  const model = await servedModel(questions, config);
  const tokenizer = await checkTokenizer(questions, config, model.id);
  await answered(questions, model.id, 1);
  if (polled !== undefined) await checkEvents(options, questions, model.id, polled);
  const seen = polled?.seen;
  const stats = await statsOf(questions);
  const blockSizeTokens = blockSizeOf(questions, config, stats?.tokensPerBlock || seen?.blockSizeTokens);
  const prometheus = await questions.get("/prometheus/metrics");
  const maxSequences = config.maxSequences || DEFAULT_MAX_SEQUENCES;
  const contextLength = config.contextLength || model.contextLength || contextOf(config.modelPath);
  if (contextLength === 0) {
    throw questions.refused("does not tell its longest sequence; say what it was started with (--max_seq_len) as --context-length"); // prettier-ignore
  }
  const totalBlocks = seen?.blocks || stats?.maxBlocks || 0;
  const answerForms = await takesForms(questions, model.id);
  const notes = [`version ${version}, tokens over /v1/completions without detokenization`];
  if (tokenizer === "untold") notes.push("its tokenizer could not be compared: it has no route for that; a wrong --model is not noticed");
  if (stats === undefined) notes.push("it tells no statistics, so other clients' load is not seen; enable_iter_perf_stats makes it");
  if (!answerForms) notes.push("it holds no answer to a form; guided_decoding_backend makes it");
  return {
    engineVersion: version,
    servedModel: model.id,
    contextLength,
    blockSizeTokens,
    totalBlocks: totalBlocks || Math.ceil((maxSequences * contextLength) / blockSizeTokens),
    maxSequences,
    maxBatchedTokens: Math.max(maxSequences, config.maxBatchedTokens || DEFAULT_MAX_BATCHED_TOKENS),
    dataParallelSize: 1,
    reportsCachedTokens: true,
    answerForms,
    lacks: ["prompt-logprobs", "cache-namespaces"],
    life: undefined,
    notes,
    takesPriority: !isBeforeVersion(version, WITH_PRIORITY),
    metricsPath: prometheus.status === 200 ? "/prometheus/metrics" : "/metrics",
  };
} // prettier-ignore

function requestOf(model: string, tokens: number): object {
  return {
    model,
    prompt: Array.from({ length: tokens }, (_, i) => 1 + (i % 7)),
    max_tokens: 1,
    temperature: 0,
    ignore_eos: true,
    detokenize: false,
  };
}

async function takesForms(questions: EngineQuestions, model: string): Promise<boolean> {
  const body = { ...requestOf(model, 1), response_format: { type: "json_object" } };
  return (await questions.post("/v1/completions", body, FIRST_ANSWER_MS)).status === 200;
}

/** A fresh server has told of its cache; at one whose events were fetched before, a long prompt leaves blocks to tell of. */
async function checkEvents({ http, signal }: TrtllmProbeOptions, questions: EngineQuestions, model: string, polled: PolledKvFeed): Promise<void> {
  await polled.fetch(http, signal);
  if (polled.seen.lastId >= 0) return;
  await answered(questions, model, LONG_PROMPT);
  for (let tries = 0; tries < 5 && polled.seen.lastId < 0; tries++) await polled.fetch(http, signal);
  if (polled.seen.lastId >= 0) return;
  throw questions.refused(
    "gives no KV events; start it with kv_cache_config.event_buffer_max_size (and enable_block_reuse) in its options file, see that nobody else fetches them, or start this worker with --no-engine-kv-events",
  );
} // prettier-ignore

async function answered(questions: EngineQuestions, model: string, tokens: number): Promise<void> {
  const { status, text } = await questions.post("/v1/completions", requestOf(model, tokens), FIRST_ANSWER_MS);
  if (status !== 200) throw questions.broken("the first request", `status ${status}: ${text.slice(0, 500)}`);
  if (!/"token_ids":\s*\[/.test(text)) throw questions.broken("the first request", "an answer without token ids");
}

interface IterationStats {
  readonly kvCacheStats?: { readonly tokensPerBlock?: number; readonly maxNumBlocks?: number } | null;
}

async function statsOf(
  questions: EngineQuestions,
): Promise<{ readonly tokensPerBlock: number; readonly maxBlocks: number } | undefined> {
  const { status, text } = await questions.get("/metrics");
  if (status !== 200) return undefined;
  const newest = questions.parse<IterationStats[]>("/metrics", text).at(-1)?.kvCacheStats;
  if (newest === undefined || newest === null) return undefined;
  return { tokensPerBlock: newest.tokensPerBlock ?? 0, maxBlocks: newest.maxNumBlocks ?? 0 };
}

function blockSizeOf(questions: EngineQuestions, { blockSizeTokens: wanted }: TrtllmEngineConfig, seen = 0): number {
  if (seen === 0) return wanted || DEFAULT_TOKENS_PER_BLOCK;
  if (wanted !== 0 && wanted !== seen) {
    throw questions.refused(
      `has KV blocks of ${seen} tokens, not ${wanted} (--kv-cache-block-size); leave that out, or start it with kv_cache_config.tokens_per_block: ${wanted}`,
    );
  }
  return seen;
}

async function servedModel(
  questions: EngineQuestions,
  { engineModel }: TrtllmEngineConfig,
): Promise<{ readonly id: string; readonly contextLength: number }> {
  const { data: models = [] } = await questions.json<{ data?: { id: string; max_model_len?: number }[] }>("/v1/models");
  const model = engineModel === undefined ? models[0] : models.find(({ id }) => id === engineModel);
  if (model === undefined) {
    const there = models.map(({ id }) => id).join(", ") || "none";
    throw questions.refused(`does not serve ${engineModel}; it has ${there}: name one with --engine-model`);
  }
  return { id: model.id, contextLength: model.max_model_len ?? 0 };
}

/** The server's own default: what the model was made for. */
function contextOf(modelPath: string | undefined): number {
  if (modelPath === undefined) return 0;
  try {
    const config = JSON.parse(readFileSync(join(modelPath, "config.json"), "utf8")) as Record<string, unknown>;
    const text = (config["text_config"] ?? config) as { max_position_embeddings?: unknown };
    return typeof text.max_position_embeddings === "number" ? text.max_position_embeddings : 0;
  } catch {
    return 0;
  }
}

function checkTokenizer(
  questions: EngineQuestions,
  { tokenizerSamples = [] }: TrtllmEngineConfig,
  model: string,
): Promise<"same" | "untold"> {
  return questions.checkTokenizer(tokenizerSamples, model, async (prompt) => {
    const { status, text } = await questions.post("/_internal/tokenize", { prompt });
    if (status === 404 || status === 405) return undefined;
    if (status !== 200) throw questions.broken("/_internal/tokenize", `status ${status}: ${text.slice(0, 200)}`);
    const tokens = questions.parse<{ tokens?: number[] }>("/_internal/tokenize", text).tokens ?? [];
    const wanted = tokenizerSamples.find((sample) => sample.text === prompt)?.tokenIds ?? [];
    // It puts the model's begin and end tokens around.
    return withoutFrame(tokens, wanted);
  });
}

function withoutFrame(tokens: readonly number[], wanted: readonly number[]): readonly number[] {
  for (const [before, after] of [[0, 0], [1, 0], [0, 1], [1, 1]] as const) {
    const inner = tokens.slice(before, tokens.length - after);
    if (inner.length === wanted.length && inner.every((id, i) => id === wanted[i])) return inner;
  }
  return tokens;
} // prettier-ignore
