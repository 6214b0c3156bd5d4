import { DynamoError } from "../../errors/index.ts";
import type { OpenAiEngineConfig } from "../config.ts";
import { errorMessageOf, type EngineFacts, type EngineHttp, type TokenizerSample } from "../foreign/index.ts";

/**
 * What a server with the OpenAI API can do for us, found out by asking it, because the API does not say. From best to least:
 *
 *     tokens   prompts as token ids, answers with token ids: all is exact (vLLM, ...)
 *     ids      prompts as token ids, answers as text (llama.cpp, ...)
 *     text     both as text: any server with /completions, any tokenizer
 *
 * Token ids are sent only where the server's tokenizer was seen to agree with ours: by its `/tokenize` where it has one, else
 * by the number of prompt tokens that it counts for some texts. In the other two forms our tokens are a guess of the server's,
 * and said to be (`tokens: estimated`); the text is exact in all of them.
 */
export type OpenAiForm = "tokens" | "ids" | "text";

export interface OpenAiFacts extends EngineFacts {
  readonly form: OpenAiForm;
  /** It takes `stream_options`, and so tells its usage. */
  readonly tellsUsage: boolean;
  readonly basePath: string;
}

export interface OpenAiProbeOptions {
  readonly http: EngineHttp;
  readonly signal: AbortSignal;
  readonly config: OpenAiEngineConfig;
  /** `/v1` */
  readonly basePath: string;
}

const ASK_MS = 10_000;
const FIRST_ANSWER_MS = 300_000;
const DEFAULT_BLOCK_SIZE = 16;
const DEFAULT_CONTEXT_LENGTH = 8_192;
const DEFAULT_MAX_SEQUENCES = 64;
const DEFAULT_MAX_BATCHED_TOKENS = 8_192;
/** Texts whose tokens are counted where there is no `/tokenize`: each is a request that somebody may be billed for. */
const COUNTED_SAMPLES = 4;

interface Model {
  readonly id: string;
  readonly parent?: string | null;
  readonly [field: string]: unknown;
}

export async function probeOpenAi(options: OpenAiProbeOptions): Promise<OpenAiFacts> {
  const { config, basePath } = options;
  const model = await servedModel(options);
  const agrees = await tokenizerAgrees(options, model.id);
  const first = await firstAnswer(options, model.id, agrees !== "no");
  const told = contextLengthOf(model);
  const contextLength = config.contextLength || told || DEFAULT_CONTEXT_LENGTH;
  const maxSequences = config.maxSequences || DEFAULT_MAX_SEQUENCES;
  const blockSizeTokens = config.blockSizeTokens || DEFAULT_BLOCK_SIZE;
  return {
    engineVersion: "unknown",
    servedModel: model.id,
    contextLength,
    blockSizeTokens,
    totalBlocks: maxSequences * Math.max(1, Math.floor(contextLength / blockSizeTokens)),
    maxSequences,
    maxBatchedTokens: Math.max(maxSequences, config.maxBatchedTokens || DEFAULT_MAX_BATCHED_TOKENS),
    dataParallelSize: 1,
    reportsCachedTokens: first.reportsCached,
    // Nobody says whether it would be held to, and an answer without its form is worse than a refusal.
    answerForms: false,
    lacks: ["logprobs", "prompt-logprobs", "cache-namespaces", "min-tokens"],
    tokens: first.form === "tokens" ? "exact" : "estimated",
    life: undefined,
    notes: [
      `${FORM_TEXT[first.form]}${AGREES_TEXT[agrees]}`,
      ...(told === undefined && config.contextLength === 0
        ? [`it does not tell its context length: ${DEFAULT_CONTEXT_LENGTH} tokens are assumed; --context-length says it`]
        : []),
      ...(first.tellsUsage ? [] : ["it does not take stream_options: nothing is known of its usage"]),
    ],
    form: first.form,
    tellsUsage: first.tellsUsage,
    basePath,
  };
} // prettier-ignore

const FORM_TEXT: Readonly<Record<OpenAiForm, string>> = {
  tokens: "prompts and answers as token ids",
  ids: "prompts as token ids, answers as text: tokens of answers are estimated",
  text: "prompts and answers as text: tokens are estimated",
};

type Agreement = "said" | "counted" | "no";

const AGREES_TEXT: Readonly<Record<Agreement, string>> = {
  said: "; its tokenizer is ours (/tokenize)",
  counted: "; its tokenizer seems to be ours, by the tokens it counts",
  no: "; its tokenizer is not known to be ours",
};

/** Undefined for what may pass by itself. */
export function refusalOf(url: string, path: string, status: number): DynamoError | undefined {
  if (status === 401 || status === 403) {
    return new DynamoError(
      "invalid-config",
      `the server at ${url} refuses the key (status ${status} for ${path}); set DYN_ENGINE_API_KEY, or DYN_ENGINE_HEADERS for another kind of key`,
    );
  }
  if (status === 404 || status === 405 || status === 501) {
    return new DynamoError(
      "invalid-config",
      `what answers at ${url} has no ${path} (status ${status}); give the path its API is under: --engine-url ${url}/openai/v1`,
    );
  }
  return undefined;
}

async function servedModel(options: OpenAiProbeOptions): Promise<Model> {
  const { http, config, basePath } = options;
  const path = `${basePath}/models`;
  const { status, text } = await ask(options, "GET", path);
  if (status !== 200) throw refusalOf(http.url, path, status) ?? broken(http, path, status, text);
  let list: readonly Model[] | undefined;
  try {
    const body = JSON.parse(text) as { data?: unknown; models?: unknown } | readonly Model[];
    list = Array.isArray(body) ? body : ((body as { data?: readonly Model[] }).data ?? []);
  } catch {
    throw broken(http, path, status, "no JSON");
  }
  const models = list!.filter(({ parent }) => parent === undefined || parent === null);
  const { engineModel } = config;
  // Some list nothing, or not everything: a name that is given is believed.
  if (engineModel !== undefined) return models.find(({ id }) => id === engineModel) ?? { id: engineModel };
  if (models.length === 1) return models[0]!;
  const names = models.slice(0, 20).map(({ id }) => id).join(", ");
  throw new DynamoError(
    "invalid-config",
    `the server at ${http.url} has ${models.length === 0 ? "no models listed" : `${models.length} models (${names}${models.length > 20 ? ", ..." : ""})`}: name one with --engine-model`,
  );
} // prettier-ignore

/** Under the names that servers have for it. */
function contextLengthOf(model: Model): number | undefined {
  const meta = (typeof model["meta"] === "object" && model["meta"] !== null ? model["meta"] : {}) as Record<string, unknown>;
  const values = [model["max_model_len"], model["context_length"], model["context_window"], model["max_context_length"], meta["n_ctx"], meta["n_ctx_train"]];
  return values.find((value): value is number => Number.isInteger(value) && (value as number) > 0);
} // prettier-ignore

async function tokenizerAgrees(options: OpenAiProbeOptions, model: string): Promise<Agreement> {
  const samples = options.config.tokenizerSamples ?? [];
  if (samples.length === 0) return "no";
  return (await saidByTokenize(options, model, samples)) ?? (await countedByUsage(options, model, samples));
}

/** vLLM's and llama.cpp's `/tokenize`, which stand beside `/v1`; undefined where there is none. */
async function saidByTokenize(
  options: OpenAiProbeOptions,
  model: string,
  samples: readonly TokenizerSample[],
): Promise<Agreement | undefined> {
  const path = `${options.basePath.replace(/\/v1$/, "")}/tokenize`;
  for (const { text, tokenIds } of samples) {
    const body = { model, prompt: text, content: text, add_special_tokens: false, add_special: false };
    const answer = await ask(options, "POST", path, body);
    if (answer.status !== 200) return undefined;
    const tokens = parsed<{ tokens?: unknown }>(answer.text)?.tokens;
    if (!Array.isArray(tokens)) return undefined;
    if (tokens.length !== tokenIds.length || tokens.some((id, i) => id !== tokenIds[i])) return "no";
  }
  return "said";
}

/** Models that put a begin token in front count it for every text. */
async function countedByUsage(
  options: OpenAiProbeOptions,
  model: string,
  samples: readonly TokenizerSample[],
): Promise<Agreement> {
  // Those with the most tokens: where tokenizers differ at all, they differ there.
  const longest = samples.toSorted((a, b) => b.tokenIds.length - a.tokenIds.length).slice(0, COUNTED_SAMPLES);
  const extra = new Set<number>();
  for (const { text, tokenIds } of longest) {
    const body = { model, prompt: text, max_tokens: 1, temperature: 0 };
    const answer = await ask(options, "POST", `${options.basePath}/completions`, body, FIRST_ANSWER_MS);
    const counted = parsed<{ usage?: { prompt_tokens?: unknown } | null }>(answer.text)?.usage?.prompt_tokens;
    if (answer.status !== 200 || typeof counted !== "number") return "no";
    extra.add(counted - tokenIds.length);
  }
  const [more] = [...extra];
  return extra.size === 1 && (more === 0 || more === 1) ? "counted" : "no";
}

interface First {
  readonly form: OpenAiForm;
  readonly tellsUsage: boolean;
  readonly reportsCached: boolean;
}

/** One token, asked for in the best form first: strict servers refuse fields that they do not know. */
async function firstAnswer(options: OpenAiProbeOptions, model: string, trusts: boolean): Promise<First> {
  const { http, config, basePath } = options;
  const sample = config.tokenizerSamples?.[0];
  const usage = { stream_options: { include_usage: true } };
  const ids = sample === undefined || !trusts ? [] : [sample.tokenIds];
  const tries: readonly Record<string, unknown>[] = [
    ...ids.flatMap((prompt) => [{ prompt, ...usage, return_token_ids: true }, { prompt, ...usage }]),
    { prompt: "Hello", ...usage },
    { prompt: "Hello" },
  ];
  const path = `${basePath}/completions`;
  let last = { status: 0, text: "" };
  for (const fields of tries) {
    const body = { model, max_tokens: 1, temperature: 0, stream: true, ...fields };
    last = await ask(options, "POST", path, body, FIRST_ANSWER_MS);
    if (last.status === 200 && !/^\s*(?:data:\s*)?\{"error"/.test(last.text)) {
      const form = !Array.isArray(fields["prompt"]) ? "text" : /"token_ids":\s*\[\d/.test(last.text) ? "tokens" : "ids";
      return { form, tellsUsage: "stream_options" in fields, reportsCached: /"cached_tokens":\s*\d/.test(last.text) };
    }
    if (last.status !== 200 && last.status !== 400 && last.status !== 422) break;
  }
  if (last.status === 404 || last.status === 405 || last.status === 501) {
    throw new DynamoError(
      "invalid-config",
      `the server at ${http.url} has no ${path} (status ${last.status}): it takes messages only, and a worker has tokens, not messages; ask it directly, or use the server's own engine if it is one of ours`,
    );
  }
  throw refusalOf(http.url, path, last.status) ?? broken(http, path, last.status, last.text);
} // prettier-ignore

function ask(options: OpenAiProbeOptions, method: "GET" | "POST", path: string, body?: object, timeoutMs = ASK_MS) {
  const { http, signal } = options;
  return http.ask(method, path, { timeoutMs, signal, ...(body === undefined ? {} : { body: JSON.stringify(body) }) });
}

function parsed<T>(text: string): T | undefined {
  try {
    return JSON.parse(text) as T;
  } catch {
    return undefined;
  }
}

function broken(http: EngineHttp, path: string, status: number, text: string): DynamoError {
  return new DynamoError(
    "invalid-config",
    `what answers at ${http.url} is no server with the OpenAI API that can be used: ${path}: status ${status}: ${errorMessageOf(text).slice(0, 300)}`,
  );
}
