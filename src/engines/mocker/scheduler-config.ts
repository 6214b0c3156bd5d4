import { DynamoError } from "../../errors/index.ts";
import type { TimingModel } from "../../perf-model/index.ts";

/** What one scheduler, a data-parallel rank of an engine, needs to know. Names and defaults are those of Dynamo's mocker. */
export interface SchedulerConfig {
  /** vllm: chunks and decodes share a pass. sglang: prefill passes go before decode passes. trtllm: vllm without preemption. */
  readonly engineType: "vllm" | "sglang" | "trtllm";
  readonly dpRank: number;
  readonly role: "agg" | "prefill" | "decode";
  /** Longest sequence; never more than the cache holds. */
  readonly contextLength: number;
  readonly blockSizeTokens: number;
  readonly totalBlocks: number;
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly prefixCaching: boolean;
  readonly chunkedPrefill: boolean;
  /** Which running sequence loses its blocks when they run out: the newest or the oldest. */
  readonly preemptionMode: "lifo" | "fifo";
  /** Share of the blocks that admissions leave free, so that running sequences can grow. */
  readonly watermark: number;
  readonly timing: TimingModel;
  readonly transfer: TransferConfig;
  readonly sglang: SglangConfig;
}

/** How the prompt's KV cache gets to a decode worker. */
export interface TransferConfig {
  readonly kvBytesPerToken: number;
  /** Shared by all transfers into this rank; 0 = they take no time. */
  readonly bandwidthBytesPerSecond: number;
  /** Charge the whole prompt, or only the blocks that are not cached here. */
  readonly timingMode: "full_prompt" | "destination_missing";
}

export interface SglangConfig {
  readonly schedulePolicy: "fifo" | "lpm";
  /** New prompt tokens of one prefill pass. */
  readonly maxPrefillTokens: number;
  /** A pass takes at most so many tokens of a prompt. */
  readonly chunkedPrefillSize: number;
  /** Output that admission reserves room for, per request at most. */
  readonly clipMaxNewTokens: number;
  /** Scales the share of that output it expects; higher admits less. */
  readonly scheduleConservativeness: number;
}

export const DEFAULT_SGLANG: SglangConfig = {
  schedulePolicy: "fifo",
  maxPrefillTokens: 16_384,
  chunkedPrefillSize: 8_192,
  clipMaxNewTokens: 4_096,
  scheduleConservativeness: 1,
};

/** Layers x 2 x KV heads x head size x bytes: Llama 3.1 8B in 16 bits. */
export const DEFAULT_KV_BYTES_PER_TOKEN = 32 * 2 * 8 * 128 * 2;
export const DEFAULT_TRANSFER: TransferConfig = {
  kvBytesPerToken: DEFAULT_KV_BYTES_PER_TOKEN,
  bandwidthBytesPerSecond: 64e9,
  timingMode: "full_prompt",
};

/** Every bound that is not kept, in one `invalid-config`. */
export function checkSchedulerConfig(config: SchedulerConfig): void {
  const problems: string[] = [];
  const count = (name: string, value: number, max: number): void => {
    if (!Number.isInteger(value) || value < 1 || value > max) {
      problems.push(`${name}: expected a whole number from 1 to ${max}, got ${value}`);
    }
  };
  count("context length", config.contextLength, 16_777_216);
  count("block size", config.blockSizeTokens, 65_536);
  // Four arrays of 16 M entries are 400 MB; a rack's worth of blocks is less.
  count("KV blocks", config.totalBlocks, 16_777_216);
  count("sequences", config.maxSequences, 65_536);
  count("batched tokens", config.maxBatchedTokens, 16_777_216);
  count("sglang prefill tokens", config.sglang.maxPrefillTokens, 16_777_216);
  count("sglang chunk", config.sglang.chunkedPrefillSize, 16_777_216);
  if (config.maxBatchedTokens < config.maxSequences) {
    problems.push(
      `batched tokens: expected at least one for each of ${config.maxSequences} sequences, got ${config.maxBatchedTokens}`,
    );
  }
  if (!(config.watermark >= 0 && config.watermark < 1)) {
    problems.push(`watermark: expected a share from 0 to below 1, got ${config.watermark}`);
  }
  for (const [name, value] of [
    ["KV bytes per token", config.transfer.kvBytesPerToken],
    ["transfer bandwidth", config.transfer.bandwidthBytesPerSecond],
    ["sglang conservativeness", config.sglang.scheduleConservativeness],
  ] as const) {
    if (!(Number.isFinite(value) && value >= 0)) problems.push(`${name}: expected at least 0, got ${value}`);
  }
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
}
