import { existsSync, readFileSync } from "node:fs";
import { homedir, tmpdir, userInfo } from "node:os";
import { join, resolve } from "node:path";
import {
  KNOWN_BAD,
  type SglangEngineConfig,
  type TokenizerSample,
  type TrtllmEngineConfig,
  type VllmEngineConfig,
} from "../engines/index.ts";
import { DynamoError } from "../errors/index.ts";
import { loadTokenizer, type Tokenizer } from "../frontend/preprocess/index.ts";
import { artifactFromPath, vocabularySizeOf, type TokenizerArtifact } from "../model/index.ts";
import type { EngineCommandName, OptionValues } from "./options.ts";
import type { ResolvedOptions } from "./resolve-options.ts";
import { milliseconds } from "./role-config.ts";
import { splitWords } from "./split-words.ts";

/**
 * Options as the configuration of a worker with vLLM, SGLang or TensorRT-LLM. The model must be a folder on this machine, because its tokenizer is used
 * here: prompts reach the engine as tokens. The texts it is compared by are put into tokens here, where tokenizers are known.
 */
export async function tokenEngineConfig(
  resolved: ResolvedOptions,
  env: NodeJS.ProcessEnv,
  kind: EngineCommandName,
): Promise<VllmEngineConfig | SglangEngineConfig | TrtllmEngineConfig> {
  const { values, sources } = resolved;
  const url = values["engine-url"];
  const modelPath = await modelFolder(values, env);
  const artifact = artifactFromPath(modelPath);
  const given = (name: "max-num-seqs" | "max-num-batched-tokens" | "kv-cache-block-size"): number =>
    sources[name] === "default" ? 0 : values[name];
  const [modelName, apiKey, kvEventsConfig] = [values["model-name"], values["engine-api-key"], values["kv-events-config"]];
  const kvTransferConfig = values["kv-transfer-config"];
  // A server of ours has the name that clients use, where its name can be chosen.
  const engineModel = values["engine-model"] ?? (url === undefined && kind !== "trtllm" ? modelName : undefined);
  return {
    kind,
    modelPath,
    vocabularySize: Math.max(vocabularySizeOf(artifact), rowsOf(modelPath)),
    ...(engineModel === undefined ? {} : { engineModel }),
    ...(apiKey === undefined ? {} : { apiKey }),
    ...(url === undefined ? { launch: launchOf(resolved, PROGRAMS[kind], kind) } : { url }),
    kvEvents: values["engine-kv-events"],
    ...(kvEventsConfig === undefined ? {} : { kvEventsConfig }),
    acceptKnownBad: acceptedIds(values["accept-known-bad"] ?? ""),
    role: values["disaggregation-mode"],
    ...(kvTransferConfig === undefined ? {} : { kvTransferConfig }),
    nixlPauseUs: values["nixl-poll-pause-us"],
    startTimeoutMs: milliseconds(values["engine-start-timeout-secs"]),
    hangTimeoutMs: milliseconds(values["engine-hang-timeout-secs"]),
    metricsIntervalMs: milliseconds(values["engine-metrics-interval-secs"]),
    maxSequences: given("max-num-seqs"),
    maxBatchedTokens: given("max-num-batched-tokens"),
    contextLength: values["context-length"],
    blockSizeTokens: given("kv-cache-block-size"),
    tokenizerSamples: await tokenizerSamples(artifact),
  };
} // prettier-ignore

const PROGRAMS = { vllm: "vllm", sglang: "python3 -m sglang.launch_server", trtllm: "trtllm-serve" };

function acceptedIds(list: string): string[] {
  const ids = list.split(",").map((id) => id.trim()).filter((id) => id !== "");
  const unknown = ids.filter((id) => !KNOWN_BAD.some((entry) => entry.id === id));
  if (unknown.length === 0) return ids;
  throw new DynamoError("invalid-config", `--accept-known-bad: expected ids from docs/engines/known-bad.md, got ${unknown.join(", ")}`);
} // prettier-ignore

/** Of an engine that is started; `program` is what it is called where nobody says otherwise. */
export function launchOf(
  { values, engineArgs }: ResolvedOptions,
  program: string,
  name = program,
): NonNullable<VllmEngineConfig["launch"]> {
  const command = splitWords(values["engine-command"] ?? program, "--engine-command");
  if (command.length === 0)
    throw new DynamoError("invalid-config", "--engine-command: expected a program, got nothing");
  return {
    command,
    args: [...splitWords(values["engine-args"] ?? "", "--engine-args"), ...engineArgs],
    env: {},
    port: values["engine-port"],
    logPath: resolve(values["engine-log-file"] ?? defaultLogPath(name)),
  };
}

function defaultLogPath(name: string): string {
  return join(tmpdir(), `dynamo-ts-engines-${userInfo().uid}`, "logs", `${name}-${process.pid}.log`);
}

/** A folder with a tokenizer: named, in the cache of the Hugging Face hub, or where an engine on this machine has it. */
export async function modelFolder(values: OptionValues, env: NodeJS.ProcessEnv): Promise<string> {
  const { model } = values;
  const url = values["engine-url"];
  if (model === undefined) {
    const root = url === undefined ? undefined : await rootOfServed(url, values["engine-model"], values["engine-api-key"]);
    if (root !== undefined && existsSync(join(root, "tokenizer.json"))) return root;
    throw new DynamoError(
      "invalid-config",
      "--model: expected the folder of the model that the engine serves (config.json, tokenizer.json, weights), got nothing",
    );
  }
  for (const folder of [resolve(model), hubSnapshot(model, env)]) {
    if (folder !== undefined && existsSync(join(folder, "tokenizer.json"))) return folder;
  }
  if (existsSync(model) && url === undefined) {
    throw new DynamoError(
      "invalid-config",
      `--model: ${values.engine} takes a folder with config.json, tokenizer.json and safetensors files, and ${model} has no tokenizer.json; GGUF files are for --engine llama`,
    );
  }
  throw new DynamoError(
    "model-unavailable",
    `--model: there is no folder ${model} with a tokenizer.json, and it is not in the hub's cache; download it first (hf download ${model}), or give a path`,
  );
} // prettier-ignore

/** `owner/name` as the hub's own tools keep it. */
export function hubSnapshot(model: string, env: NodeJS.ProcessEnv): string | undefined {
  if (!/^[\w.-]+\/[\w.-]+$/.test(model)) return undefined;
  const cache = env.HF_HUB_CACHE ?? join(env.HF_HOME ?? join(env.HOME ?? homedir(), ".cache", "huggingface"), "hub");
  const folder = join(cache, `models--${model.replace("/", "--")}`);
  try {
    return join(folder, "snapshots", readFileSync(join(folder, "refs", "main"), "utf8").trim());
  } catch {
    return undefined;
  }
}

async function rootOfServed(url: string, name: string | undefined, apiKey: string | undefined): Promise<string | undefined> {
  const { EngineHttp } = await import("../engines/foreign/index.ts");
  const http = new EngineHttp({ url, ...(apiKey === undefined ? {} : { apiKey }) });
  try {
    const { text } = await http.ask("GET", "/v1/models", { timeoutMs: 10_000 });
    const { data = [] } = JSON.parse(text) as { data?: { id: string; root?: string }[] };
    return data.find(({ id }) => name === undefined || id === name)?.root;
  } catch {
    // The engine's start says it better.
    return undefined;
  } finally {
    await http.close();
  }
} // prettier-ignore

/** Token ids the model itself has: more than its tokenizer where the embedding was rounded up. 0 = its file does not say. */
function rowsOf(folder: string): number {
  try {
    const config = JSON.parse(readFileSync(join(folder, "config.json"), "utf8")) as Record<string, unknown>;
    const text = (config["text_config"] ?? config) as { vocab_size?: unknown };
    return typeof text.vocab_size === "number" ? text.vocab_size : 0;
  } catch {
    return 0;
  }
}

/** Where tokenizers differ: digits, spaces and line ends in rows, case, scripts, marks, pictures, code. */
const SAMPLES: readonly string[] = [
  "Hello, world!",
  "The year 2026 has 365 days, 8760 hours and 31536000 seconds.",
  "  two spaces, a tab\tand\n\n  new lines\r\n   ",
  "don't I'll WE'VE they'd",
  "def f(x):\n    return {k: v**2 for k, v in x.items() if v != 0}  # ok",
  "Grüße aus Köln, déjà vu, naïve café",
  "Привет, мир. שלום עולם. مرحبا بالعالم",
  "你好，世界。こんにちは世界。안녕하세요 세계",
  "👍🏽 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u212b",
  "https://example.com/a?b=c&d=%20#e user@example.org",
  "x".repeat(40),
  "0.1 + 0.2 = 0.30000000000000004",
];

async function tokenizerSamples(artifact: TokenizerArtifact): Promise<TokenizerSample[]> {
  return samplesOf(await loadTokenizer(artifact));
}

export function samplesOf(tokenizer: Tokenizer): TokenizerSample[] {
  return SAMPLES.map((text) => ({ text, tokenIds: [...tokenizer.encode(text, { addSpecialTokens: false })] }));
}
