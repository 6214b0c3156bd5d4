import type { SglangEngineConfig } from "../config.ts";
import { EngineQuestions, isBeforeVersion, type EngineHttp } from "../foreign/index.ts";
import type { SglangFacts } from "./sglang-request.ts";
import { DEFAULT_PAGE_SIZE } from "./sglang-launch.ts";

/**
 * What an SGLang server is, by its own word: `/server_info` holds all of its arguments and what came of them. Refuses, with
 * the reason and the fix, what could not work.
 */
interface ServerInfo {
  readonly version?: string;
  readonly served_model_name?: string;
  readonly model_path?: string;
  readonly page_size?: number | null;
  readonly max_total_num_tokens?: number;
  readonly max_req_input_len?: number;
  readonly max_running_requests?: number | null;
  readonly max_prefill_tokens?: number | null;
  readonly dp_size?: number;
  readonly disable_radix_cache?: boolean;
  readonly skip_tokenizer_init?: boolean;
  readonly is_embedding?: boolean;
  readonly grammar_backend?: string | null;
  readonly enable_priority_scheduling?: boolean;
  readonly schedule_low_priority_values_first?: boolean;
  readonly incremental_streaming_output?: boolean;
  readonly stream_output?: boolean;
  readonly enable_deterministic_inference?: boolean;
  readonly disaggregation_mode?: string;
  readonly disaggregation_bootstrap_port?: number;
  readonly internal_states?: readonly { readonly effective_max_running_requests_per_dp?: number }[];
}

/** Before it, KV events named a block by its tokens alone, wherever it stood: two blocks under one name. */
const OLDEST = [0, 5, 6];
const DEFAULT_BOOTSTRAP_PORT = 8_998;
const DEFAULT_MAX_SEQUENCES = 256;
const DEFAULT_MAX_BATCHED_TOKENS = 16_384;

export interface SglangProbeOptions {
  readonly config: SglangEngineConfig;
  readonly http: EngineHttp;
  readonly signal: AbortSignal;
  readonly wantsKvEvents: boolean;
}

/** What the server was started for must be what its worker is for. */
function checkRole(questions: EngineQuestions, info: ServerInfo, { role = "agg" }: SglangEngineConfig): void {
  const there = info.disaggregation_mode ?? "null";
  const here = role === "agg" ? "null" : role;
  if (there === here) return;
  throw questions.refused(
    there === "null"
      ? `was started for whole requests; start it with --disaggregation-mode ${role}, or this worker without`
      : `was started with --disaggregation-mode ${there}; start this worker with the same`,
  );
}

export async function probeSglang(options: SglangProbeOptions): Promise<SglangFacts> {
  const { config, wantsKvEvents } = options;
  const questions = new EngineQuestions("SGLang", options.http, options.signal);
  const info = await questions.json<ServerInfo>("/server_info", "/get_server_info");
  const version = info.version ?? "unknown";
  if (isBeforeVersion(version, OLDEST)) {
    throw questions.refused(
      `is of version ${version}, which is too old: ${OLDEST.join(".")} is the first whose KV events can be told apart; install a newer one`,
    );
  }
  checkRole(questions, info, config);
  if (info.is_embedding === true) throw questions.refused("serves embeddings (--is-embedding), not answers");
  const model = await servedModel(questions, config);
  const pageSize = pageSizeOf(questions, info, config, wantsKvEvents);
  const totalTokens = numberOf(questions, info, "max_total_num_tokens");
  const loadPath = await loadPathOf(questions);
  const hasTokenizer = info.skip_tokenizer_init !== true;
  if (hasTokenizer) await checkTokenizer(questions, config, model.id);
  const maxSequences =
    info.internal_states?.[0]?.effective_max_running_requests_per_dp || config.maxSequences || info.max_running_requests || DEFAULT_MAX_SEQUENCES;
  const isIncremental = info.incremental_streaming_output ?? info.stream_output ?? false;
  const notes = [`version ${version}, tokens over /generate`];
  if (!isIncremental) notes.push("each piece of an answer repeats all tokens before it; --incremental-streaming-output spares that");
  if (info.enable_priority_scheduling !== true) notes.push("priorities are not passed on; it needs --enable-priority-scheduling");
  if (info.enable_deterministic_inference !== true) notes.push("seeds are taken for a hint; it needs --enable-deterministic-inference to keep them");
  if (info.page_size === 1) notes.push(`its pages are of one token; what it has cached is guessed in blocks of ${pageSize}`);
  return {
    engineVersion: version,
    servedModel: model.id,
    // It keeps some tokens at the end of the context to itself.
    contextLength: Math.min(model.contextLength, numberOf(questions, info, "max_req_input_len") + 1),
    blockSizeTokens: pageSize,
    totalBlocks: Math.floor(totalTokens / pageSize),
    maxSequences,
    maxBatchedTokens: Math.max(maxSequences, config.maxBatchedTokens || info.max_prefill_tokens || DEFAULT_MAX_BATCHED_TOKENS),
    dataParallelSize: Math.max(1, info.dp_size ?? 1),
    life: undefined,
    reportsCachedTokens: true,
    answerForms: hasTokenizer && info.grammar_backend !== "none",
    ...(hasTokenizer ? {} : { lacks: ["min-tokens"] }),
    notes,
    isIncremental,
    prioritySign: info.enable_priority_scheduling !== true ? 0 : info.schedule_low_priority_values_first === true ? -1 : 1,
    hasTokenizer,
    loadPath,
    bootstrapPort: info.disaggregation_bootstrap_port ?? DEFAULT_BOOTSTRAP_PORT,
  };
} // prettier-ignore

async function servedModel(
  questions: EngineQuestions,
  { engineModel }: SglangEngineConfig,
): Promise<{ readonly id: string; readonly contextLength: number }> {
  const { data = [] } = await questions.json<{ data?: { id: string; max_model_len?: number; parent?: string | null }[] }>("/v1/models"); // prettier-ignore
  // Adapters are listed beside the model they belong to.
  const models = data.filter(({ parent }) => parent === undefined || parent === null);
  const model = engineModel === undefined ? models[0] : models.find(({ id }) => id === engineModel);
  if (model === undefined) {
    const there = models.map(({ id }) => id).join(", ") || "none";
    throw questions.refused(`does not serve ${engineModel}; it has ${there}: name one with --engine-model`);
  }
  if (typeof model.max_model_len !== "number") throw questions.broken("/v1/models", "no max_model_len");
  return { id: model.id, contextLength: model.max_model_len };
}

function pageSizeOf(
  questions: EngineQuestions,
  info: ServerInfo,
  { blockSizeTokens: wanted }: SglangEngineConfig,
  wantsKvEvents: boolean,
): number {
  const pageSize = numberOf(questions, info, "page_size");
  if (wantsKvEvents && info.disable_radix_cache === true) {
    throw questions.refused(
      "has no prefix cache (--disable-radix-cache), so there are no KV events; start it with one, or this worker with --no-engine-kv-events",
    );
  }
  if (pageSize === 1) {
    if (!wantsKvEvents) return wanted || DEFAULT_PAGE_SIZE;
    throw questions.refused(
      `has pages of one token, too small for routing by KV blocks; start it with --page-size ${wanted || DEFAULT_PAGE_SIZE}, or this worker with --no-engine-kv-events`,
    );
  }
  if (wanted !== 0 && wanted !== pageSize) {
    throw questions.refused(
      `has pages of ${pageSize} tokens, not ${wanted} (--kv-cache-block-size); leave that out, or start the server with --page-size ${wanted}`,
    );
  }
  return pageSize;
}

function numberOf(questions: EngineQuestions, info: ServerInfo, field: "page_size" | "max_total_num_tokens" | "max_req_input_len"): number {
  const value = info[field];
  if (typeof value === "number" && Number.isInteger(value) && value > 0) return value;
  throw questions.broken("/server_info", `no ${field}`);
} // prettier-ignore

/** Where its load is told as it is now: the gauges of the metrics stand still for half a minute once it is idle. */
async function loadPathOf(questions: EngineQuestions): Promise<string> {
  const metrics = await questions.get("/metrics");
  if (metrics.status !== 200) {
    throw questions.refused("does not tell its metrics; start it with --enable-metrics");
  }
  for (const path of ["/v1/loads?include=core", "/get_load"]) {
    if ((await questions.get(path)).status === 200) return path;
  }
  throw questions.broken("/v1/loads", "neither it nor /get_load answers");
}

async function checkTokenizer(
  questions: EngineQuestions,
  { tokenizerSamples = [] }: SglangEngineConfig,
  model: string,
): Promise<void> {
  await questions.checkTokenizer(tokenizerSamples, model, async (prompt) => {
    // Before 0.5.4 or so the route was not there.
    const { status, text } = await questions.post("/tokenize", { model, prompt, add_special_tokens: false });
    if (status === 404) return undefined;
    if (status !== 200) throw questions.broken("/tokenize", `status ${status}: ${text.slice(0, 200)}`);
    return questions.parse<{ tokens?: number[] }>("/tokenize", text).tokens ?? [];
  });
}
