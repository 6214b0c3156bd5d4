import { basename } from "node:path";
import type { LlamaServerEngineConfig } from "../config.ts";
import { FIRST_ANSWER_MS, type EngineFacts, type EngineQuestions } from "../foreign/index.ts";

/**
 * What a llama.cpp server is, asked of itself: sizes and build from `/props`, the vocabulary from `/v1/models`, its tokens by
 * `/tokenize`, one request of one token for what shows only in an answer. Refuses, with the reason and the fix, what could
 * not work.
 */
export type LoadSource = "metrics" | "slots" | "health";

export interface LlamaServerFacts extends EngineFacts {
  readonly loadSource: LoadSource;
  /** By name: the adapter's file without its ending. */
  readonly loraIds: ReadonlyMap<string, number>;
}

/** Its KV cache has no blocks: this is how finely we remember what is in a slot. */
const DEFAULT_BLOCK_SIZE = 16;
/** llama.cpp's own default batch. */
const DEFAULT_MAX_BATCHED_TOKENS = 2_048;

interface Props {
  readonly total_slots?: number;
  readonly model_path?: string;
  readonly model_alias?: string;
  readonly build_info?: string;
  readonly default_generation_settings?: { readonly n_ctx?: number };
}

export async function probeLlamaServer(ask: EngineQuestions, config: LlamaServerEngineConfig): Promise<LlamaServerFacts> {
  const props = await ask.json<Props>("/props");
  const slots = props.total_slots;
  const contextLength = props.default_generation_settings?.n_ctx;
  if (!isCount(slots) || !isCount(contextLength)) {
    throw ask.broken("/props", "no total_slots or n_ctx; the router mode of llama-server serves several models: attach to the server of one");
  }
  const servedModel = await checkModel(ask, config, props);
  await ask.checkTokenizer(config.tokenizerSamples ?? [], props.model_path ?? servedModel, async (text) => {
    const answer = await ask.post("/tokenize", { content: text, add_special: false, parse_special: true });
    return answer.status === 200 ? ask.parse<{ tokens?: number[] }>("/tokenize", answer.text).tokens : undefined;
  });
  await checkAnswer(ask);
  const loadSource = await findLoad(ask);
  const loraIds = await adapters(ask);
  const blockSizeTokens = config.blockSizeTokens || DEFAULT_BLOCK_SIZE;
  const version = props.build_info ?? "unknown";
  return {
    engineVersion: version,
    servedModel,
    contextLength,
    blockSizeTokens,
    totalBlocks: slots * Math.floor(contextLength / blockSizeTokens),
    maxSequences: slots,
    maxBatchedTokens: Math.max(slots, config.maxBatchedTokens || DEFAULT_MAX_BATCHED_TOKENS),
    dataParallelSize: 1,
    reportsCachedTokens: true,
    answerForms: true,
    lacks: ["prompt-logprobs", "cache-namespaces", "min-tokens"],
    life: undefined,
    notes: [
      `build ${version}, ${slots} slots of ${contextLength} tokens`,
      "KV routing by a record of what went into its slots: the card says estimated",
      ...(loadSource === "metrics" ? [] : [`its load is read from /${loadSource}; --metrics tells more`]),
      ...(loraIds.size === 0 ? [] : [`adapters: ${[...loraIds.keys()].join(", ")}`]),
    ],
    loadSource,
    loraIds,
  };
} // prettier-ignore

function isCount(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) > 0;
}

async function checkModel(ask: EngineQuestions, config: LlamaServerEngineConfig, props: Props): Promise<string> {
  type Models = { readonly data?: readonly { readonly id: string; readonly meta?: { readonly n_vocab?: number } | null }[] };
  const model = (await ask.json<Models>("/v1/models")).data?.[0];
  const name = props.model_alias ?? model?.id ?? "";
  const { engineModel, tokenizer } = config;
  if (engineModel !== undefined && ![name, model?.id, props.model_path].includes(engineModel)) {
    throw ask.refused(`serves ${name}, not ${engineModel}; correct --engine-model or leave it out`);
  }
  const rows = model?.meta?.n_vocab;
  if (rows !== undefined && rows < tokenizer.vocabularySize) {
    throw ask.refused(`has a model of ${rows} tokens, and the tokenizer of --model has ${tokenizer.vocabularySize}; give the model that the server runs (${props.model_path ?? name}) as --model`);
  }
  return name;
} // prettier-ignore

/** Versions before 2025 do not tell token ids. */
async function checkAnswer(ask: EngineQuestions): Promise<void> {
  const body = { prompt: [1], n_predict: 1, temperature: 0, return_tokens: true, ignore_eos: true, cache_prompt: false };
  const { status, text } = await ask.post("/completion", body, FIRST_ANSWER_MS);
  if (status !== 200) throw ask.broken("the first request", `status ${status}: ${text.slice(0, 300)}`);
  const { tokens } = ask.parse<{ tokens?: unknown }>("/completion", text);
  if (Array.isArray(tokens) && tokens.length > 0) return;
  throw ask.refused("does not say its answers in token ids (return_tokens); install one from 2025 or later, or use --engine openai, which takes text");
} // prettier-ignore

async function findLoad(ask: EngineQuestions): Promise<LoadSource> {
  for (const source of ["metrics", "slots"] as const) {
    if ((await ask.get(`/${source}`)).status === 200) return source;
  }
  return "health";
}

async function adapters(ask: EngineQuestions): Promise<ReadonlyMap<string, number>> {
  const { status, text } = await ask.get("/lora-adapters");
  const list = status === 200 ? ask.parse<{ id: number; path: string }[]>("/lora-adapters", text) : [];
  return new Map(list.map(({ id, path }) => [basename(path).replace(/\.gguf$/, ""), id]));
}
