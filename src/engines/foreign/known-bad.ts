import { parseVersion, isBefore } from "./version-number.ts";
import { flagJson, flagValue, hasFlag } from "./engine-flags.ts";

/**
 * Combinations of an engine's version, model, flags and machine that are known not to work, or to work worse than anybody
 * would expect, as data: what happens, why, and which flag is the way out. `dynamo doctor --engine vllm` and a worker's start
 * look at all of them, so that a person reads one sentence instead of a stack trace, or of nothing at all. The table in
 * `docs/engines/known-bad.md` is held against this list by a test. Where the entries come from is said with each.
 */
export interface Situation {
  readonly engine: "vllm";
  /** Undefined = not known: what would be refused is a warning then. */
  readonly version: string | undefined;
  /** All of the engine's command line; of a server that runs already, what of it is known. */
  readonly args: readonly string[];
  /** Undefined for a server that runs already. */
  readonly env: Readonly<Record<string, string | undefined>> | undefined;
  /** Undefined = its files are not here. */
  readonly model: ModelFacts | undefined;
  readonly machine: MachineFacts;
  /** The worker wants the engine's own KV events. */
  readonly wantsKvEvents: boolean;
  /** What the worker was told; 0 = whatever the engine has. */
  readonly blockSizeTokens: number;
  /** Undefined until it answers. */
  readonly server?: { readonly blockSizeTokens: number; readonly hasPrefixCache: boolean | undefined };
}

export interface ModelFacts {
  /** `config.json`; of multimodal models the part about the text. */
  readonly config: Readonly<Record<string, unknown>>;
  /** Sum of the safetensors files. */
  readonly weightBytes: number;
}

export interface MachineFacts {
  readonly gpus: readonly GpuFacts[];
  readonly freeMemoryBytes: number;
}

export interface GpuFacts {
  readonly name: string;
  /** Major and minor: 9, 0 of an H100. */
  readonly computeCapability: readonly [number, number];
  readonly totalBytes: number;
  readonly freeBytes: number;
}

export interface KnownBad {
  readonly id: string;
  readonly engine: "vllm";
  /** First version with it, and the first without. */
  readonly versions: { readonly from?: string; readonly before?: string };
  readonly effect: "refuse" | "warn";
  readonly what: string;
  readonly why: string;
  /** What to do, the flag named. */
  readonly fix: string;
  readonly applies: (situation: Situation) => boolean;
}

export interface KnownBadFinding {
  readonly id: string;
  readonly effect: "refuse" | "warn";
  readonly text: string;
  readonly fix: string;
}

/** All entries that apply. */
export function knownBad(situation: Situation): KnownBadFinding[] {
  return KNOWN_BAD
    .filter(({ engine, versions, applies }) => engine === situation.engine && isInRange(situation.version, versions) && applies(situation))
    .map((entry) => ({ id: entry.id, effect: effectOf(entry, situation), text: `${entry.what}: ${entry.why}`, fix: entry.fix }));
} // prettier-ignore

/** What only some versions refuse is a warning while the version is not known. */
function effectOf({ effect, versions: { from, before } }: KnownBad, { version }: Situation): KnownBad["effect"] {
  const isSure = (from === undefined && before === undefined) || isVersionKnown(version);
  return isSure ? effect : "warn";
}

function isVersionKnown(version: string | undefined): boolean {
  return version !== undefined && parseVersion(version) !== undefined;
}

/** A version that nobody knows could be any. */
function isInRange(text: string | undefined, { from, before }: KnownBad["versions"]): boolean {
  const version = text === undefined ? undefined : parseVersion(text);
  if (version === undefined) return true;
  return (from === undefined || !isBefore(version, parseVersion(from)!)) && (before === undefined || isBefore(version, parseVersion(before)!));
} // prettier-ignore

export function versionRange({ from, before }: KnownBad["versions"]): string {
  if (from === undefined && before === undefined) return "all";
  if (before === undefined) return `from ${from}`;
  return from === undefined ? `before ${before}` : `${from} to before ${before}`;
}

// ---- What the entries ask ----

/** Names of all connectors that the engine is given. */
function connectorsOf({ args }: Situation): string[] {
  const names = (config: unknown): string[] => {
    if (typeof config !== "object" || config === null) return [];
    const { kv_connector: name, kv_connector_extra_config: extra } = config as Record<string, unknown>;
    const inner = (extra as { connectors?: unknown } | undefined)?.connectors;
    return [...(typeof name === "string" ? [name] : []), ...(Array.isArray(inner) ? inner.flatMap(names) : [])];
  };
  return names(flagJson(args, "--kv-transfer-config"));
}

function usesNixl(situation: Situation): boolean {
  return connectorsOf(situation).some((name) => name.startsWith("Nixl"));
}

const RECURRENT_TYPES =
  /mamba|jamba|bamba|nemotron_h|falcon_h1|zamba|granitemoehybrid|plamo2|qwen3_next|kimi_linear|minimax_text|lfm2/i;

/** Some layers keep a state instead of keys and values. */
function isRecurrent({ model }: Situation): boolean {
  if (model === undefined) return false;
  const { config } = model;
  const kinds = [config["layer_types"], config["layers_block_type"], config["attn_type_list"]].flatMap((list) => (Array.isArray(list) ? list.map(String) : []));
  if (kinds.some((kind) => /mamba|linear|ssm|recurrent/i.test(kind))) return true;
  const pattern = config["hybrid_override_pattern"];
  if (typeof pattern === "string" && pattern.includes("M")) return true;
  return RECURRENT_TYPES.test(textIn(model, "model_type"));
} // prettier-ignore

/** Several kinds of KV cache in one model, recurrent or sliding windows. */
function isHybrid(situation: Situation): boolean {
  const types = situation.model?.config["layer_types"];
  return isRecurrent(situation) || (Array.isArray(types) && new Set(types).size > 1);
}

function isMamba1({ model }: Situation): boolean {
  return /^(?:mamba|falcon_mamba|jamba)$/.test(textIn(model, "model_type"));
}

/** Keys and values as one latent vector, as DeepSeek has it. */
function hasLatentAttention({ model }: Situation): boolean {
  return typeof model?.config["kv_lora_rank"] === "number";
}

function usesFp8Kv({ args, model }: Situation): boolean {
  const asked = flagValue(args, "--kv-cache-dtype");
  if (asked !== undefined && asked !== "auto") return asked.startsWith("fp8");
  const quantization = model?.config["quantization_config"] as Record<string, unknown> | undefined;
  const scheme = quantization?.["kv_cache_scheme"] as Record<string, unknown> | undefined;
  return quantization?.["kv_cache_quant_algo"] === "FP8" || (scheme?.["type"] === "float" && scheme["num_bits"] === 8);
}

function isBlackwell({ machine }: Situation): boolean {
  return machine.gpus.some(({ computeCapability: [major] }) => major >= 10 && major < 13);
}

function hasNoPrefixCache({ args, server }: Situation): boolean {
  if (server?.hasPrefixCache !== undefined) return !server.hasPrefixCache;
  return hasFlag(args, "--no-enable-prefix-caching") || flagValue(args, "--enable-prefix-caching") === "False";
}

/** Of the command line or of the server; undefined = the engine's default. */
function engineBlockSize({ args, server }: Situation): number | undefined {
  const text = flagValue(args, "--block-size");
  return server?.blockSizeTokens ?? (text === undefined ? undefined : Number(text));
}

function ranksOf({ args }: Situation): number {
  return Number(flagValue(args, "--data-parallel-size") ?? flagValue(args, "-dp") ?? 1);
}

function kvEventsConfig({ args }: Situation): Record<string, unknown> {
  return flagJson(args, "--kv-events-config") ?? {};
}

function isCpu({ version, machine, env }: Situation): boolean {
  return version?.includes("+cpu") === true || (machine.gpus.length === 0 && Object.keys(env ?? {}).some((name) => name.startsWith("VLLM_CPU_")));
} // prettier-ignore

// ---- Memory ----

const GPU_SHARE = 0.9;
/** Activations, captured graphs, the runtime: seldom less. */
const RUNTIME_BYTES = 1.5e9;
const CPU_RUNTIME_BYTES = 1.5e9;
const DTYPE_BYTES: Readonly<Record<string, number>> = {
  float32: 4,
  float: 4,
  bfloat16: 2,
  float16: 2,
  half: 2,
  auto: 2,
};

export interface MemoryNeed {
  readonly weightBytes: number;
  readonly runtimeBytes: number;
  /** KV of one sequence of the whole context; 0 = the model's file does not tell. */
  readonly kvBytesOfOne: number;
  readonly contextTokens: number;
  readonly availableBytes: number;
}

/** Per device. Undefined where nothing can be said: no weights here, no memory known. */
export function memoryNeed(situation: Situation): MemoryNeed | undefined {
  const { model, machine, args } = situation;
  if (model === undefined || model.weightBytes === 0) return undefined;
  const devices = Number(flagValue(args, "--tensor-parallel-size") ?? flagValue(args, "-tp") ?? 1) * Number(flagValue(args, "--pipeline-parallel-size") ?? flagValue(args, "-pp") ?? 1);
  const share = Number(flagValue(args, "--gpu-memory-utilization") ?? GPU_SHARE);
  const gpus = machine.gpus.toSorted((a, b) => b.freeBytes - a.freeBytes).slice(0, devices);
  const availableBytes = gpus.length === 0 ? machine.freeMemoryBytes : Math.min(...gpus.map(({ totalBytes, freeBytes }) => Math.min(freeBytes, share * totalBytes)));
  const offloaded = Number(flagValue(args, "--cpu-offload-gb") ?? 0) * 2 ** 30;
  const contextTokens = contextOf(situation);
  return {
    weightBytes: Math.max(0, model.weightBytes / devices - offloaded),
    runtimeBytes: gpus.length === 0 ? CPU_RUNTIME_BYTES : RUNTIME_BYTES,
    kvBytesOfOne: (kvBytesPerToken(situation) * contextTokens) / devices,
    contextTokens,
    availableBytes,
  };
} // prettier-ignore

function contextOf({ args, model }: Situation): number {
  const text = flagValue(args, "--max-model-len");
  const match = text === undefined ? null : /^(\d+(?:\.\d+)?)([kKmM]?)$/.exec(text);
  if (match !== null) return Number(match[1]) * { "": 1, k: 1_000, K: 1_024, m: 1e6, M: 2 ** 20 }[match[2] as "" | "k" | "K" | "m" | "M"];
  return numberIn(model, "max_position_embeddings");
} // prettier-ignore

function textIn(model: ModelFacts | undefined, name: string): string {
  const value = model?.config[name];
  return typeof value === "string" ? value : "";
}

function isText(value: unknown, pattern: RegExp): boolean {
  return typeof value === "string" && pattern.test(value);
}

function numberIn(model: ModelFacts | undefined, name: string): number {
  const value = model?.config[name];
  return typeof value === "number" ? value : 0;
}

/** Of a model whose layers are all alike; 0 for one whose file does not say, or with layers that keep a state. */
function kvBytesPerToken(situation: Situation): number {
  const { model, args } = situation;
  if (model === undefined || isRecurrent(situation)) return 0;
  const layers = numberIn(model, "num_hidden_layers");
  const asked = flagValue(args, "--dtype");
  const dtype = asked === undefined || asked === "auto" ? (textIn(model, "torch_dtype") || textIn(model, "dtype") || "auto") : asked;
  const bytes = usesFp8Kv(situation) ? 1 : (DTYPE_BYTES[dtype] ?? 2);
  if (hasLatentAttention(situation)) return layers * (numberIn(model, "kv_lora_rank") + numberIn(model, "qk_rope_head_dim")) * bytes;
  const heads = numberIn(model, "num_attention_heads");
  const kvHeads = numberIn(model, "num_key_value_heads") || heads;
  const headSize = numberIn(model, "head_dim") || (heads === 0 ? 0 : numberIn(model, "hidden_size") / heads);
  return 2 * layers * kvHeads * headSize * bytes;
} // prettier-ignore

function hasNoRoomForWeights(situation: Situation): boolean {
  const need = memoryNeed(situation);
  // What is quantized while it is loaded needs less than its files.
  const shrinks = flagValue(situation.args, "--quantization") !== undefined && situation.model?.config["quantization_config"] === undefined;
  return need !== undefined && !shrinks && need.weightBytes + need.runtimeBytes > need.availableBytes;
} // prettier-ignore

function hasNoRoomForOneSequence(situation: Situation): boolean {
  const need = memoryNeed(situation);
  if (need === undefined || hasNoRoomForWeights(situation)) return false;
  return need.weightBytes + need.runtimeBytes + need.kvBytesOfOne > need.availableBytes;
}

const has =
  (name: string) =>
  (situation: Situation): boolean =>
    connectorsOf(situation).includes(name);

export const KNOWN_BAD: readonly KnownBad[] = [
  {
    id: "hybrid-kv-with-nixl",
    engine: "vllm",
    versions: { before: "0.18" },
    effect: "refuse",
    what: "a model with Mamba layers or several kinds of attention cannot be split over NIXL",
    why: "this version's NIXL connector switches the hybrid KV cache manager off",
    fix: "leave --disaggregation-mode and --kv-transfer-config out (aggregated serving), or install vLLM 0.18 or later",
    applies: (situation) => usesNixl(situation) && isHybrid(situation),
  },
  {
    id: "mamba1-with-nixl",
    engine: "vllm",
    versions: { from: "0.18", before: "0.24" },
    effect: "refuse",
    what: "a Mamba 1 model cannot be split over NIXL",
    why: "its state's layout came to the connector later than that of Mamba 2",
    fix: "leave --disaggregation-mode and --kv-transfer-config out (aggregated serving), or install vLLM 0.24 or later",
    applies: (situation) => usesNixl(situation) && isMamba1(situation),
  },
  {
    id: "latent-attention-with-state-over-nixl",
    engine: "vllm",
    versions: { from: "0.18", before: "0.27" },
    effect: "refuse",
    what: "a model with latent attention and recurrent layers cannot be split over NIXL",
    why: "the connector took the two together only later",
    fix: "leave --disaggregation-mode and --kv-transfer-config out (aggregated serving), or install vLLM 0.27 or later",
    applies: (situation) => usesNixl(situation) && isRecurrent(situation) && hasLatentAttention(situation),
  },
  {
    id: "fp8-kv-with-nixl",
    engine: "vllm",
    versions: { before: "0.18" },
    effect: "refuse",
    what: "an FP8 KV cache crashes the engine when it is split over NIXL",
    why: "NIXL wants the HND layout, and FP8 attention in it gets queries of another type",
    fix: "give the engine --kv-cache-dtype auto with a bf16 checkpoint, or leave --kv-transfer-config out",
    applies: (situation) => usesNixl(situation) && usesFp8Kv(situation),
  },
  {
    id: "fp8-kv-with-nixl-unproven",
    engine: "vllm",
    versions: { from: "0.18" },
    effect: "warn",
    what: "an FP8 KV cache over NIXL crashed earlier versions",
    why: "the HND layout that NIXL wants did not go with FP8 attention, and nobody has told yet in which version it does",
    fix: "should it crash: give the engine --kv-cache-dtype auto with a bf16 checkpoint",
    applies: (situation) => usesNixl(situation) && usesFp8Kv(situation),
  },
  {
    id: "flashinfer-autotune-on-blackwell",
    engine: "vllm",
    versions: {},
    effect: "warn",
    what: "the engine may crash while it starts on this GPU",
    why: "FlashInfer's autotuner was seen to segfault on Blackwell (compute capability 10)",
    fix: "should it crash: give the engine --no-enable-flashinfer-autotune, which costs a few per cent",
    applies: (situation) => isBlackwell(situation) && !hasFlag(situation.args, "--no-enable-flashinfer-autotune"),
  },
  {
    id: "prefix-cache-off-with-kv-events",
    engine: "vllm",
    versions: {},
    effect: "refuse",
    what: "no KV events will come",
    why: "the engine has no prefix cache (--no-enable-prefix-caching), and the worker waits for its events",
    fix: "take --no-enable-prefix-caching from the engine, or give the worker --no-engine-kv-events",
    applies: (situation) => situation.wantsKvEvents && hasNoPrefixCache(situation),
  },
  {
    id: "prefix-cache-off-with-kv-routing",
    engine: "vllm",
    versions: {},
    effect: "warn",
    what: "KV-aware routing will count on a cache that is not there",
    why: "the engine has no prefix cache (--no-enable-prefix-caching), and without events the worker guesses what it has",
    fix: "take --no-enable-prefix-caching from the engine, or route without it (--router-mode least-loaded)",
    applies: (situation) => !situation.wantsKvEvents && hasNoPrefixCache(situation),
  },
  {
    id: "kv-events-of-recurrent-model",
    engine: "vllm",
    versions: { before: "0.18" },
    effect: "refuse",
    what: "the engine does not start with KV events for a model with Mamba layers",
    why: "this version takes the two for contradictory",
    fix: "give the worker --no-engine-kv-events and the engine --no-enable-prefix-caching, or install vLLM 0.18 or later",
    applies: (situation) => situation.wantsKvEvents && isRecurrent(situation),
  },
  {
    id: "block-size-mismatch",
    engine: "vllm",
    versions: {},
    effect: "refuse",
    what: "the engine has KV blocks of another size than the worker was told",
    why: "every lookup of a prefix would miss, silently",
    fix: "leave --kv-cache-block-size out, or give the engine the same --block-size",
    applies: (situation) => situation.blockSizeTokens !== 0 && engineBlockSize(situation) !== undefined && engineBlockSize(situation) !== situation.blockSizeTokens,
  },
  {
    id: "hash-seed-not-shared",
    engine: "vllm",
    versions: { before: "0.28" },
    effect: "warn",
    what: "block hashes differ from one server to the next",
    why: "without PYTHONHASHSEED the first hash of a chain is random in each process; routing here does not need them equal, tiers and transfers by hash do",
    fix: "set PYTHONHASHSEED=0 in the environment of every server",
    applies: ({ env }) => env !== undefined && env["PYTHONHASHSEED"] === undefined,
  },
  {
    id: "hash-seed-not-shared-xxhash",
    engine: "vllm",
    versions: { from: "0.28" },
    effect: "warn",
    what: "block hashes differ from one server to the next",
    why: "without PYTHONHASHSEED the first hash of a chain is random in each process, with xxhash in new versions too",
    fix: "set PYTHONHASHSEED=0 in the environment of every server, or give them --prefix-caching-hash-algo sha256_cbor",
    applies: ({ env, args }) => env !== undefined && env["PYTHONHASHSEED"] === undefined && flagValue(args, "--prefix-caching-hash-algo")?.startsWith("xxhash") === true,
  },
  {
    id: "weights-do-not-fit",
    engine: "vllm",
    versions: {},
    effect: "refuse",
    what: "the model's weights do not fit",
    why: "their files and what the runtime itself needs are more than the memory that is free",
    fix: "give the engine more devices (--tensor-parallel-size), a quantized checkpoint, or --cpu-offload-gb; or free some memory",
    applies: hasNoRoomForWeights,
  },
  {
    id: "too-little-memory-after-weights",
    engine: "vllm",
    versions: {},
    effect: "warn",
    what: "what is left beside the weights is less than the KV cache of one sequence of the whole context",
    why: "the engine refuses to start, or the context is cut to what fits",
    fix: "give the engine a smaller --max-model-len, more devices (--tensor-parallel-size), or --kv-cache-dtype fp8",
    applies: hasNoRoomForOneSequence,
  },
  {
    id: "connector-renamed",
    engine: "vllm",
    versions: { from: "0.13" },
    effect: "refuse",
    what: "SharedStorageConnector is not there",
    why: "it has another name since December 2025",
    fix: 'write "kv_connector":"ExampleConnector" in --kv-transfer-config',
    applies: has("SharedStorageConnector"),
  },
  {
    id: "connector-removed",
    engine: "vllm",
    versions: { from: "0.24" },
    effect: "refuse",
    what: "P2pNcclConnector is not there",
    why: "it was removed in June 2026",
    fix: 'write "kv_connector":"NixlConnector" in --kv-transfer-config',
    applies: has("P2pNcclConnector"),
  },
  {
    id: "push-connector-too-new",
    engine: "vllm",
    versions: { before: "0.24" },
    effect: "refuse",
    what: "NixlPushConnector is not there",
    why: "this version is older than it",
    fix: 'write "kv_connector":"NixlConnector" in --kv-transfer-config, or install vLLM 0.24 or later',
    applies: has("NixlPushConnector"),
  },
  {
    id: "offloading-on-cpu",
    engine: "vllm",
    versions: {},
    effect: "refuse",
    what: "OffloadingConnector does not work with a server on CPU",
    why: "it copies between a GPU and the host",
    fix: "leave --kv-offloading-size and the connector out",
    applies: (situation) => isCpu(situation) && (has("OffloadingConnector")(situation) || hasFlag(situation.args, "--kv-offloading-size")),
  },
  {
    id: "example-connector-prompt-lengths",
    engine: "vllm",
    versions: {},
    effect: "warn",
    what: "ExampleConnector ends the decode server at some prompt lengths",
    why: "a prompt of a multiple of the block size and one more, whose beginning was stored before, makes it look for a folder that is not there (seen in 0.29)",
    fix: 'it is for tests; write "kv_connector":"NixlConnector" in --kv-transfer-config',
    applies: has("ExampleConnector"),
  },
  {
    id: "lmcache-with-hybrid-model",
    engine: "vllm",
    versions: {},
    effect: "warn",
    what: "LMCache does not know models with several kinds of KV cache",
    why: "it needs the hybrid KV cache manager off",
    fix: "give the engine --disable-hybrid-kv-cache-manager",
    applies: (situation) => connectorsOf(situation).some((name) => name.startsWith("LMCache")) && isHybrid(situation) && !hasFlag(situation.args, "--disable-hybrid-kv-cache-manager"),
  },
  {
    id: "ipc-events-with-ranks",
    engine: "vllm",
    versions: {},
    effect: "refuse",
    what: "KV events over ipc:// do not work with several data-parallel ranks",
    why: "the engine counts a port up for each rank, and a path has none",
    fix: "give a tcp:// endpoint in --kv-events-config",
    applies: (situation) => ranksOf(situation) > 1 && isText(kvEventsConfig(situation)["endpoint"], /^ipc:/),
  },
  {
    id: "kv-events-without-replay",
    engine: "vllm",
    versions: {},
    effect: "warn",
    what: "a lost KV event cannot be fetched again",
    why: "without a replay endpoint the engine keeps none, so each loss costs all that is known of its cache, and a worker that starts later knows nothing of what was there",
    fix: 'add "replay_endpoint":"tcp://*:5558" to --kv-events-config',
    applies: (situation) => situation.wantsKvEvents && kvEventsConfig(situation)["enable_kv_cache_events"] === true && typeof kvEventsConfig(situation)["replay_endpoint"] !== "string",
  },
  {
    id: "compiling-on-cpu",
    engine: "vllm",
    versions: {},
    effect: "warn",
    what: "the first requests of a server on CPU stop all others for many seconds",
    why: "sampling and logprobs are compiled at their first use (6 to 18 s seen in 0.29)",
    fix: "set TORCHDYNAMO_DISABLE=1 in its environment",
    applies: (situation) => isCpu(situation) && situation.env !== undefined && situation.env["TORCHDYNAMO_DISABLE"] !== "1",
  },
  {
    id: "experts-without-groups",
    engine: "vllm",
    versions: { before: "0.16" },
    effect: "warn",
    what: "the fused kernel for experts crashes on this model",
    why: "its configuration has n_group 0, which versions up to 0.14 divided by",
    fix: "install vLLM 0.16 or later",
    applies: ({ model }) => model?.config["n_group"] === 0,
  },
]; // prettier-ignore
