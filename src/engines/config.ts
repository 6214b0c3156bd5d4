import type { EngineTokenizer, ForeignEngineConfig } from "./foreign/foreign-config.ts";

/** Which engine to load and how; `cli/` fills it from flags, environment and file, `loadEngine` takes it. */
export type EngineConfig =
  | LlamaEngineConfig
  | EchoEngineConfig
  | MockerEngineConfig
  | VllmEngineConfig
  | SglangEngineConfig
  | TrtllmEngineConfig
  | LlamaServerEngineConfig
  | OpenAiEngineConfig;

/** llama.cpp's server: `url` of one that runs already, or `launch` for one of this worker's. */
export interface LlamaServerEngineConfig extends ForeignEngineConfig {
  readonly kind: "llama-server";
  readonly tokenizer: EngineTokenizer;
}

/** Any server with the OpenAI API; `url` is where it runs, with the path its API is under (none = `/v1`). */
export interface OpenAiEngineConfig extends ForeignEngineConfig {
  readonly kind: "openai";
  readonly tokenizer: EngineTokenizer;
  /** With every request. */
  readonly headers?: Readonly<Record<string, string>>;
  /** Where its load is, if it tells it. */
  readonly metrics?: EngineMetricsMap;
}

/** Which families of a Prometheus page say what. */
export interface EngineMetricsMap {
  /** @default "/metrics" */
  readonly path?: string;
  readonly running?: string;
  readonly waiting?: string;
  /** 0 to 1. */
  readonly kvUsage?: string;
  /** Families that are passed on. @default none */
  readonly prefix?: string;
}

/** A vLLM server: `url` of one that runs already, or `launch` for one of this worker's. */
export interface VllmEngineConfig extends ForeignEngineConfig {
  readonly kind: "vllm";
  /** Take its KV events where there are any. */
  readonly kvEvents: boolean;
  /** JSON, vLLM's `--kv-events-config`: of a server that runs already, where its events are. */
  readonly kvEventsConfig?: string;
  /** Ids of known-bad combinations (`docs/engines/known-bad.md`) that are started all the same. */
  readonly acceptKnownBad?: readonly string[];
  /** Of disaggregated serving. @default "agg" */
  readonly role?: "agg" | "prefill" | "decode";
  /** JSON, vLLM's `--kv-transfer-config`, or a connector's name; of a server that runs already, what it was started with. */
  readonly kvTransferConfig?: string;
  /** Pause of NIXL's polling thread in a server that is started, microseconds; 0 = as NIXL has it: none. @default 500 */
  readonly nixlPauseUs?: number;
}

/** An SGLang server: `url` of one that runs already, or `launch` for one of this worker's. */
export interface SglangEngineConfig extends ForeignEngineConfig {
  readonly kind: "sglang";
  readonly kvEvents: boolean;
  /** JSON, SGLang's `--kv-events-config`. */
  readonly kvEventsConfig?: string;
  /** Of disaggregated serving. @default "agg" */
  readonly role?: "agg" | "prefill" | "decode";
  /** SGLang's `--disaggregation-transfer-backend`. @default "mooncake" */
  readonly kvTransferConfig?: string;
}

/** A `trtllm-serve` of TensorRT-LLM: `url` of one that runs already, or `launch` for one of this worker's. */
export interface TrtllmEngineConfig extends ForeignEngineConfig {
  readonly kind: "trtllm";
  readonly kvEvents: boolean;
  /** JSON, `kv_cache_config.kv_events_config` of the server: events are pushed. @default they are fetched */
  readonly kvEventsConfig?: string;
  /** Of disaggregated serving. @default "agg" */
  readonly role?: "agg" | "prefill" | "decode";
  /** `cache_transceiver_config.backend` of a server that is started. @default "DEFAULT" */
  readonly kvTransferConfig?: string;
}

export interface LlamaEngineConfig {
  readonly kind: "llama";
  /** A GGUF file. */
  readonly modelPath: string;
  /** Longest sequence; 0 = what the model was trained for. */
  readonly contextLength: number;
  /** Tokens the KV cache holds for all sequences together; rounded down to blocks. */
  readonly kvCacheTokens: number;
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly blockSizeTokens: number;
  /** Compute threads. Over all workers of a machine never more than its cores. */
  readonly threads: number;
  /**
   * A text does not depend on what else is computed beside it, on the cache, or on how its prompt was cut. Costs prefill
   * speed. @default true
   */
  readonly batchInvariant?: boolean;
}

/** Answers with the prompt's own tokens, over and over, at once: for measuring and testing everything but an engine. */
export interface EchoEngineConfig {
  readonly kind: "echo";
  readonly contextLength: number;
  readonly maxSequences: number;
  readonly blockSizeTokens: number;
  /** Pause between two steps, 0 = the next loop turn. */
  readonly stepMs: number;
  /** A model file whose tokenizer to use; undefined = bytes as tokens. */
  readonly modelPath?: string;
}

/**
 * Schedules like a real engine and takes as long as one, but computes nothing: for load, routing and fault tests without
 * a GPU. Bounds are checked by the engine. `mockerConfig` (engines/mocker) fills in the defaults, which are Dynamo's.
 * Sizes are those of one data-parallel rank.
 */
export interface MockerEngineConfig {
  readonly kind: "mocker";
  readonly engineType: "vllm" | "sglang" | "trtllm";
  readonly role: "agg" | "prefill" | "decode";
  readonly contextLength: number;
  readonly blockSizeTokens: number;
  readonly totalBlocks: number;
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly prefixCaching: boolean;
  readonly chunkedPrefill: boolean;
  readonly preemptionMode: "lifo" | "fifo";
  /** Share of the blocks that admissions leave free. */
  readonly watermark: number;
  /** Divides all times; 0 = no time passes: a token per stream and loop turn. */
  readonly speedupRatio: number;
  readonly decodeSpeedupRatio: number;
  /** How long `start` takes. */
  readonly startupTimeMs: number;
  readonly dataParallelSize: number;
  readonly kvBytesPerToken: number;
  /** Of the link into a decode rank; 0 = transfers take no time. */
  readonly kvTransferBandwidthBytesPerSecond: number;
  readonly kvTransferTimingMode: "full_prompt" | "destination_missing";
  readonly sglang: {
    readonly schedulePolicy: "fifo" | "lpm";
    readonly maxPrefillTokens: number;
    readonly chunkedPrefillSize: number;
    readonly clipMaxNewTokens: number;
    readonly scheduleConservativeness: number;
  };
  /** Up to 512: answers are letters as bytes. */
  readonly vocabularySize: number;
  /** Answers begin with a reasoning span; undefined = none. */
  readonly reasoning?: { readonly startTokenId: number; readonly endTokenId: number; readonly thinkingRatio: number };
  /** Measured times (perf-model's profile, JSON or CSV); undefined = the default polynomials. */
  readonly profilePath?: string;
  /** A model file whose tokenizer to use; undefined = bytes as tokens. */
  readonly modelPath?: string;
}
