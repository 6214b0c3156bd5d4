import { existsSync } from "node:fs";
import { basename, resolve } from "node:path";
import type {
  EngineMetricsMap,
  EngineTokenizer,
  LlamaServerEngineConfig,
  OpenAiEngineConfig,
  TokenizerSample,
} from "../engines/index.ts";
import { DynamoError } from "../errors/index.ts";
import { loadTokenizer, type Tokenizer } from "../frontend/preprocess/index.ts";
import { artifactFromPath, byteArtifact, vocabularySizeOf, type StoredModel } from "../model/index.ts";
import type { OptionValues } from "./options.ts";
import type { ResolvedOptions } from "./resolve-options.ts";
import { milliseconds, openStore, wantedModel } from "./role-config.ts";
import { hubSnapshot, launchOf, samplesOf } from "./vllm-config.ts";

/**
 * Options as the configuration of workers beside llama.cpp's server and beside any server with the OpenAI API. Both get the
 * tokenizer itself: the first to find token ids that its server leaves out, the second to put text into tokens.
 */
export async function llamaServerConfig(
  resolved: ResolvedOptions,
  env: NodeJS.ProcessEnv,
): Promise<LlamaServerEngineConfig> {
  const { values } = resolved;
  const url = values["engine-url"];
  const model = await modelOfServer(values, env);
  if (model === undefined) {
    throw new DynamoError("invalid-config", "--engine-tokenizer: bytes are for --engine openai; give the model's GGUF file as --model"); // prettier-ignore
  }
  if (url === undefined && !existsSync(model.path)) {
    throw new DynamoError("model-unavailable", `--model: there is no file ${model.path}`);
  }
  const { tokenizer, samples } = await tokenizerOf(model.path);
  return {
    kind: "llama-server",
    ...common(resolved, model, tokenizer, samples),
    ...(url === undefined ? { launch: launchOf(resolved, "llama-server") } : { url }),
  };
}

export async function openAiConfig(resolved: ResolvedOptions, env: NodeJS.ProcessEnv): Promise<OpenAiEngineConfig> {
  const { values, engineArgs } = resolved;
  const url = values["engine-url"];
  if (url === undefined) {
    throw new DynamoError("invalid-config", "--engine-url: expected where the server runs, such as https://host/v1, got nothing; the openai engine is started by others"); // prettier-ignore
  }
  if (engineArgs.length > 0) {
    throw new DynamoError("invalid-config", `--: the openai engine is started by others, got ${engineArgs.join(" ")}`);
  }
  const model = await modelOfServer(values, env);
  const { tokenizer, samples } = await tokenizerOf(model?.path);
  const headers = jsonOption(values["engine-headers"], "DYN_ENGINE_HEADERS", checkHeaders);
  const metrics = jsonOption(values["engine-metrics-map"], "--engine-metrics-map", checkMetricsMap);
  return {
    kind: "openai",
    ...common(resolved, model, tokenizer, samples),
    url,
    ...(headers === undefined ? {} : { headers }),
    ...(metrics === undefined ? {} : { metrics }),
  };
}

/**
 * The file or folder whose tokenizer is that of the server's model; undefined where bytes are to do. A llama.cpp server that
 * runs on this machine says its file itself.
 */
export async function modelOfServer(values: OptionValues, env: NodeJS.ProcessEnv): Promise<StoredModel | undefined> {
  const { engine, model } = values;
  const url = values["engine-url"];
  const isBytes = engine === "openai" && values["engine-tokenizer"] === "bytes";
  if (isBytes) {
    if (model === undefined) return undefined;
    throw new DynamoError("invalid-config", "--engine-tokenizer: expected model or nothing beside --model, got bytes");
  }
  const store = openStore(values, env);
  if (model !== undefined || (engine === "llama-server" && url === undefined)) {
    const wanted = model ?? wantedModel(values)!;
    const hub = hubSnapshot(wanted, env);
    const stored = store.resolve(wanted) ?? (hub === undefined ? undefined : store.resolve(hub));
    if (stored !== undefined) return { ...stored, name: hub === stored.path ? wanted : stored.name };
    throw new DynamoError(
      "model-unavailable",
      `--model: there is no ${wanted} on this machine; run "dynamo model pull ${wanted}" first, or give the path of a GGUF file, or of a folder with a tokenizer.json`,
    );
  }
  const path = engine === "llama-server" ? await pathOfServed(url!, values["engine-api-key"]) : undefined;
  if (path !== undefined) return { name: nameOf(path), path, bytes: 0 };
  throw new DynamoError(
    "invalid-config",
    engine === "openai"
      ? "--model: expected the folder or the GGUF file of the model that the server has, for its tokenizer, got nothing; --engine-tokenizer=bytes does without, with tokens that are only estimated"
      : "--model: expected the GGUF file of the model that the server has, for its tokenizer, got nothing",
  );
}

function nameOf(path: string): string {
  return basename(path).replace(/\.gguf$/i, "");
}

/** Its model file, when it is on this machine too. */
async function pathOfServed(url: string, apiKey: string | undefined): Promise<string | undefined> {
  const { EngineHttp } = await import("../engines/foreign/index.ts");
  const http = new EngineHttp({ url, ...(apiKey === undefined ? {} : { apiKey }) });
  try {
    const { text } = await http.ask("GET", "/props", { timeoutMs: 10_000 });
    const { model_path: path } = JSON.parse(text) as { model_path?: string };
    return path !== undefined && existsSync(path) ? resolve(path) : undefined;
  } catch {
    // The engine's start says it better.
    return undefined;
  } finally {
    await http.close();
  }
}

async function tokenizerOf(
  path: string | undefined,
): Promise<{ readonly tokenizer: EngineTokenizer; readonly samples: readonly TokenizerSample[] }> {
  const artifact = path === undefined ? byteArtifact() : artifactFromPath(path);
  const tokenizer = await loadTokenizer(artifact);
  // Bytes are no server's tokenizer: there is nothing to compare.
  const samples = path === undefined ? [] : samplesOf(tokenizer);
  return { tokenizer: engineTokenizer(tokenizer, vocabularySizeOf(artifact)), samples };
}

export function engineTokenizer(tokenizer: Tokenizer, vocabularySize: number): EngineTokenizer {
  return {
    vocabularySize,
    stripsLeadingSpace: tokenizer.stripsLeadingSpace,
    encode: (text) => tokenizer.encode(text, { addSpecialTokens: false }),
    tokenBytes: (id) => tokenizer.tokenBytes(id),
    isSpecial: (id) => tokenizer.isSpecial(id),
  };
}

function common(
  { values, sources }: ResolvedOptions,
  model: StoredModel | undefined,
  tokenizer: EngineTokenizer,
  tokenizerSamples: readonly TokenizerSample[],
) {
  const given = (name: "max-num-seqs" | "max-num-batched-tokens" | "kv-cache-block-size"): number =>
    sources[name] === "default" ? 0 : values[name];
  const [engineModel, apiKey] = [values["engine-model"], values["engine-api-key"]];
  const interval = sources["engine-metrics-interval-secs"] === "default" ? undefined : values["engine-metrics-interval-secs"];
  return {
    ...(model === undefined ? {} : { modelPath: model.path, modelName: model.name }),
    ...(engineModel === undefined ? {} : { engineModel }),
    ...(apiKey === undefined ? {} : { apiKey }),
    vocabularySize: tokenizer.vocabularySize,
    tokenizer,
    tokenizerSamples,
    startTimeoutMs: milliseconds(values["engine-start-timeout-secs"]),
    hangTimeoutMs: milliseconds(values["engine-hang-timeout-secs"]),
    ...(interval === undefined ? {} : { metricsIntervalMs: milliseconds(interval) }),
    maxSequences: given("max-num-seqs"),
    maxBatchedTokens: given("max-num-batched-tokens"),
    contextLength: values["context-length"],
    blockSizeTokens: given("kv-cache-block-size"),
  };
} // prettier-ignore

function jsonOption<T>(text: string | undefined, name: string, check: (value: Record<string, unknown>) => T | string): T | undefined {
  if (text === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    // Below. A secret is not shown.
  }
  const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
  const checked = isObject ? check(value as Record<string, unknown>) : "expected a JSON object";
  if (typeof checked === "string") throw new DynamoError("invalid-config", `${name}: ${checked}`);
  return checked;
} // prettier-ignore

/** Those that say how a request is framed are not the user's. */
const OWN_HEADERS = new Set(["host", "content-length", "content-type", "connection", "transfer-encoding", "accept"]);

function checkHeaders(value: Record<string, unknown>): Readonly<Record<string, string>> | string {
  for (const [name, text] of Object.entries(value)) {
    if (!/^[\w!#$%&'*+.^`|~-]+$/.test(name) || OWN_HEADERS.has(name.toLowerCase())) return `${name} is no header that can be set`; // prettier-ignore
    if (typeof text !== "string" || /[^\t\x20-\x7e\x80-\xff]/.test(text)) return `expected a text for ${name}`;
  }
  return value as Readonly<Record<string, string>>;
}

const MAP_FIELDS = [
  "path",
  "running",
  "waiting",
  "kvUsage",
  "prefix",
] as const satisfies readonly (keyof EngineMetricsMap)[];

function checkMetricsMap(value: Record<string, unknown>): EngineMetricsMap | string {
  for (const [name, text] of Object.entries(value)) {
    if (!(MAP_FIELDS as readonly string[]).includes(name)) return `expected ${MAP_FIELDS.join(", ")}, got ${name}`;
    if (typeof text !== "string" || text === "") return `expected a text for ${name}`;
  }
  const { path } = value;
  return path === undefined || (path as string).startsWith("/") ? value : `expected a path that begins with /, got ${path as string}`;
} // prettier-ignore
