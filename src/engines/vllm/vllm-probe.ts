import { DynamoError } from "../../errors/index.ts";
import { parsePrometheus, sumOf, type EngineFacts, type EngineHttp, type TokenizerSample } from "../foreign/index.ts";
import type { VllmRoute } from "./vllm-request.ts";
import type { VllmConnectorKind } from "./vllm-transfer.ts";
import { checkVllmVersion, generateStreams } from "./vllm-versions.ts";

/**
 * What a vLLM server is and can do, asked of itself rather than concluded from its version where it can be: routes from its
 * OpenAPI document, sizes from `/v1/models` and the metrics, and one request of one token for what shows only in an answer.
 * Refuses, with the reason and the fix, what could not work.
 */
export interface VllmProbeOptions {
  readonly http: EngineHttp;
  readonly signal: AbortSignal;
  readonly engineModel?: string | undefined;
  /** Said by the user or by the command line the server was started with; 0 = neither. */
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  /** 0 = whatever the engine has. */
  readonly blockSizeTokens: number;
  readonly vocabularySize: number;
  readonly tokenizerSamples?: readonly TokenizerSample[] | undefined;
  /** It is to hand blocks over by this connector. */
  readonly kvTransfer?: VllmConnectorKind | undefined;
}

export interface VllmFacts extends EngineFacts {
  readonly route: VllmRoute;
  readonly takesPriority: boolean;
  /** Undefined = it does not say. */
  readonly hasPrefixCache: boolean | undefined;
}

const ASK_MS = 10_000;
/** The first request of a server may compile kernels. */
const FIRST_ANSWER_MS = 300_000;
/** vLLM's own default on most devices. */
const DEFAULT_MAX_SEQUENCES = 256;
const DEFAULT_MAX_BATCHED_TOKENS = 8_192;
const METRICS = new Set(["vllm:cache_config_info", "vllm:num_requests_running", "process_start_time_seconds"]);

export async function probeVllm(options: VllmProbeOptions): Promise<VllmFacts> {
  const { http, signal } = options;
  const version = (await askJson<{ version?: string }>(http, "/version", signal)).version ?? "unknown";
  const parsed = checkVllmVersion(version);
  const model = await servedModel(options);
  const cache = await cacheConfig(options);
  const paths = await openApiPaths(http, signal);
  const hasGenerate = paths === undefined ? generateStreams(parsed) : paths.has("/inference/v1/generate");
  const route: VllmRoute = hasGenerate && generateStreams(parsed) ? "generate" : "completions";
  await checkTokenizer(options, model.id, paths);
  const first = await firstAnswer(options, model.id, route);
  if (options.kvTransfer !== undefined) await checkTransfer(options, options.kvTransfer, model.id, route);
  const server = await serverInfo(http, signal, paths);
  const maxSequences = options.maxSequences || server.maxSequences || DEFAULT_MAX_SEQUENCES;
  const notes = [
    `version ${version}, tokens over ${route === "generate" ? "/inference/v1/generate" : "/v1/completions"}`,
  ];
  if (!first.reportsCached) {
    notes.push("it does not say how much of a prompt came from its cache; --enable-prompt-tokens-details makes it");
  }
  if (!first.takesPriority) notes.push("priorities are not passed on; it needs --scheduling-policy priority");
  return {
    engineVersion: version,
    servedModel: model.id,
    contextLength: model.contextLength,
    blockSizeTokens: cache.blockSizeTokens,
    totalBlocks: cache.totalBlocks,
    maxSequences,
    maxBatchedTokens: Math.max(
      maxSequences,
      options.maxBatchedTokens || server.maxBatchedTokens || DEFAULT_MAX_BATCHED_TOKENS,
    ),
    dataParallelSize: cache.ranks,
    life: cache.life,
    reportsCachedTokens: first.reportsCached,
    answerForms: true,
    notes,
    route,
    takesPriority: first.takesPriority,
    hasPrefixCache: cache.hasPrefixCache,
    blockHashAlgorithm: cache.hashAlgorithm,
  };
}

async function servedModel({
  http,
  signal,
  engineModel,
}: VllmProbeOptions): Promise<{ readonly id: string; readonly contextLength: number }> {
  const { data = [] } = await askJson<{ data?: { id: string; max_model_len?: number; parent?: string | null }[] }>(
    http,
    "/v1/models",
    signal,
  );
  // Adapters are listed beside the model they belong to.
  const models = data.filter(({ parent }) => parent === undefined || parent === null);
  const model = engineModel === undefined ? models[0] : models.find(({ id }) => id === engineModel);
  if (model === undefined) {
    const there = models.map(({ id }) => id).join(", ") || "none";
    throw new DynamoError(
      "invalid-config",
      `the vLLM server at ${http.url} does not serve ${engineModel}; it has ${there}: name one with --engine-model`,
    );
  }
  if (typeof model.max_model_len !== "number") throw broken(http, "/v1/models", "no max_model_len");
  return { id: model.id, contextLength: model.max_model_len };
}

async function cacheConfig({ http, signal, blockSizeTokens: wanted }: VllmProbeOptions): Promise<{
  readonly blockSizeTokens: number;
  readonly totalBlocks: number;
  readonly ranks: number;
  readonly hasPrefixCache: boolean | undefined;
  readonly hashAlgorithm: string | undefined;
  readonly life: number | undefined;
}> {
  const { text } = await ask(http, "GET", "/metrics", signal);
  const samples = parsePrometheus(text, METRICS);
  const config = samples.find(({ name }) => name === "vllm:cache_config_info")?.labels;
  const blockSizeTokens = Number(config?.["block_size"]);
  const totalBlocks = Number(config?.["num_gpu_blocks"]);
  if (!Number.isInteger(blockSizeTokens) || !Number.isInteger(totalBlocks)) {
    throw new DynamoError(
      "invalid-config",
      `the vLLM server at ${http.url} does not tell its KV blocks in /metrics (vllm:cache_config_info); leave --disable-log-stats out`,
    );
  }
  if (wanted !== 0 && wanted !== blockSizeTokens) {
    throw new DynamoError(
      "invalid-config",
      `--kv-cache-block-size: the vLLM server at ${http.url} has KV blocks of ${blockSizeTokens} tokens, not ${wanted}; leave it out, or start the server with --block-size ${wanted}`,
    );
  }
  const prefixCache = config?.["enable_prefix_caching"];
  const ranks = new Set(samples.filter(({ name }) => name === "vllm:num_requests_running").map(({ labels }) => labels["engine"])); // prettier-ignore
  return {
    blockSizeTokens,
    totalBlocks,
    ranks: Math.max(1, ranks.size),
    hashAlgorithm: config?.["prefix_caching_hash_algo"],
    hasPrefixCache: prefixCache === undefined ? undefined : prefixCache !== "False",
    life: sumOf(samples, "process_start_time_seconds"),
  };
}

/** Undefined where the document is switched off. */
async function openApiPaths(http: EngineHttp, signal: AbortSignal): Promise<ReadonlySet<string> | undefined> {
  const { status, text } = await ask(http, "GET", "/openapi.json", signal);
  if (status !== 200) return undefined;
  try {
    return new Set(Object.keys((JSON.parse(text) as { paths?: Record<string, unknown> }).paths ?? {}));
  } catch {
    return undefined;
  }
}

/** Every prompt is tokenized on this side: one other token, and answers are quietly worse and nothing is found in the cache. */
async function checkTokenizer(
  { http, signal, tokenizerSamples = [] }: VllmProbeOptions,
  model: string,
  paths: ReadonlySet<string> | undefined,
): Promise<void> {
  if (paths !== undefined && !paths.has("/tokenize")) return;
  for (const { text, tokenIds } of tokenizerSamples) {
    const body = JSON.stringify({ model, prompt: text, add_special_tokens: false });
    const answer = await ask(http, "POST", "/tokenize", signal, body);
    // A server without a tokenizer (--skip-tokenizer-init) takes any.
    if (answer.status === 404 || answer.status === 501) return;
    if (answer.status !== 200) throw broken(http, "/tokenize", `status ${answer.status}: ${answer.text.slice(0, 200)}`);
    const { tokens } = parseJson<{ tokens?: number[] }>(http, "/tokenize", answer.text);
    if (tokens !== undefined && tokens.length === tokenIds.length && tokens.every((id, i) => id === tokenIds[i])) continue;
    throw new DynamoError(
      "invalid-config",
      `the tokenizer of --model is another than that of the vLLM server at ${http.url}: ${JSON.stringify(text)} is ${shown(tokenIds)} here and ${shown(tokens ?? [])} there; give the folder of the model that the server runs (${model}) as --model`,
    );
  } // prettier-ignore
}

function shown(ids: readonly number[]): string {
  return `[${ids.slice(0, 12).join(", ")}${ids.length > 12 ? ", ..." : ""}]`;
}

/** One token, for what shows only in an answer. A prompt of one token leaves no block behind. */
async function firstAnswer(
  { http, signal }: VllmProbeOptions,
  model: string,
  route: VllmRoute,
): Promise<{ readonly reportsCached: boolean; readonly takesPriority: boolean }> {
  const answer = await generateOne(http, signal, model, route, -1);
  if (answer.status === 200) return { reportsCached: tellsCached(answer.text), takesPriority: true };
  const plain = answer.status === 400 ? await generateOne(http, signal, model, route, 0) : answer;
  if (plain.status === 200) return { reportsCached: tellsCached(plain.text), takesPriority: false };
  throw broken(http, "the first request", `status ${plain.status}: ${plain.text.slice(0, 500)}`);
}

function generateOne(http: EngineHttp, signal: AbortSignal, model: string, route: VllmRoute, priority: number) {
  const sampling = { max_tokens: 1, temperature: 0, ignore_eos: true };
  const common = { model, request_id: "dynamo-probe", ...(priority === 0 ? {} : { priority }) };
  const body =
    route === "generate"
      ? { ...common, token_ids: [1], sampling_params: sampling }
      : { ...common, prompt: [1], ...sampling, return_token_ids: true };
  const path = route === "generate" ? "/inference/v1/generate" : "/v1/completions";
  return ask(http, "POST", path, signal, JSON.stringify(body), FIRST_ANSWER_MS);
}

/** It keeps one block for that, until its lease is over. */
async function checkTransfer(
  { http, signal }: VllmProbeOptions,
  kind: VllmConnectorKind,
  model: string,
  route: VllmRoute,
): Promise<void> {
  if (kind === "example") return;
  const kv_transfer_params = { do_remote_decode: true, do_remote_prefill: false };
  const sampling = { max_tokens: 1, temperature: 0, ignore_eos: true };
  const common = { model, request_id: "dynamo-probe-transfer", kv_transfer_params };
  const body =
    route === "generate"
      ? { ...common, token_ids: [1], sampling_params: { ...sampling, extra_args: { kv_transfer_params } } }
      : { ...common, prompt: [1], ...sampling };
  const path = route === "generate" ? "/inference/v1/generate" : "/v1/completions";
  const { status, text } = await ask(http, "POST", path, signal, JSON.stringify(body), FIRST_ANSWER_MS);
  if (status !== 200) throw broken(http, "a prompt to hand over", `status ${status}: ${text.slice(0, 500)}`);
  const told = parseJson<{ kv_transfer_params?: { transfer_mode?: string } | null }>(http, path, text);
  const found = told.kv_transfer_params;
  if (found === undefined || found === null) {
    throw new DynamoError(
      "invalid-config",
      `the vLLM server at ${http.url} hands no blocks over; start it with --kv-transfer-config '{"kv_connector":"NixlConnector","kv_role":"kv_producer"}' (it needs the nixl package)`,
    );
  }
  const mode = found.transfer_mode ?? "pull";
  if (`nixl-${mode}` === kind) return;
  throw new DynamoError(
    "invalid-config",
    `--kv-transfer-config: the vLLM server at ${http.url} has NIXL's ${mode} connector, not ${kind}; say the same here`,
  );
}

function tellsCached(text: string): boolean {
  return /"cached_tokens":\d/.test(text);
}

/** In development mode the server tells its whole configuration. */
async function serverInfo(
  http: EngineHttp,
  signal: AbortSignal,
  paths: ReadonlySet<string> | undefined,
): Promise<{ readonly maxSequences: number; readonly maxBatchedTokens: number }> {
  const nothing = { maxSequences: 0, maxBatchedTokens: 0 };
  if (paths?.has("/server_info") !== true) return nothing;
  const { status, text } = await ask(http, "GET", "/server_info?config_format=json", signal);
  if (status !== 200) return nothing;
  try {
    const info = JSON.parse(text) as { vllm_config?: { scheduler_config?: Record<string, unknown> } };
    const scheduler = info.vllm_config?.scheduler_config ?? {};
    return {
      maxSequences: Number(scheduler["max_num_seqs"]) || 0,
      maxBatchedTokens: Number(scheduler["max_num_batched_tokens"]) || 0,
    };
  } catch {
    return nothing;
  }
}

function ask(
  http: EngineHttp,
  method: "GET" | "POST",
  path: string,
  signal: AbortSignal,
  body?: string,
  timeoutMs = ASK_MS,
) {
  return http.ask(method, path, { timeoutMs, signal, ...(body === undefined ? {} : { body }) });
}

async function askJson<T>(http: EngineHttp, path: string, signal: AbortSignal): Promise<T> {
  const { status, text } = await ask(http, "GET", path, signal);
  if (status === 401 || status === 403) {
    throw new DynamoError(
      "invalid-config",
      `the vLLM server at ${http.url} wants a key (status ${status} for ${path}); set DYN_ENGINE_API_KEY`,
    );
  }
  if (status !== 200) throw broken(http, path, `status ${status}`);
  return parseJson<T>(http, path, text);
}

function parseJson<T>(http: EngineHttp, path: string, text: string): T {
  try {
    return JSON.parse(text) as T;
  } catch {
    throw broken(http, path, "no JSON");
  }
}

function broken(http: EngineHttp, what: string, how: string): DynamoError {
  return new DynamoError(
    "invalid-config",
    `what answers at ${http.url} is no vLLM server that can be used: ${what}: ${how}`,
  );
}
