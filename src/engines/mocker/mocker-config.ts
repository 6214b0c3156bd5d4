import { DynamoError } from "../../errors/index.ts";
import type { TimingModel } from "../../perf-model/index.ts";
import type { MockerEngineConfig } from "../config.ts";
import { DEFAULT_SGLANG, DEFAULT_TRANSFER, type SchedulerConfig } from "./scheduler-config.ts";

/** A whole configuration from what differs from the defaults, which are those of Dynamo's mocker. */
export function mockerConfig(overrides: Partial<Omit<MockerEngineConfig, "kind">> = {}): MockerEngineConfig {
  const engineType = overrides.engineType ?? "vllm";
  return {
    kind: "mocker",
    engineType,
    role: "agg",
    contextLength: 131_072,
    // SGLang's pages hold one token.
    blockSizeTokens: engineType === "sglang" ? 1 : 64,
    totalBlocks: 16_384,
    maxSequences: 256,
    maxBatchedTokens: 8_192,
    prefixCaching: true,
    chunkedPrefill: true,
    preemptionMode: "lifo",
    watermark: 0.01,
    speedupRatio: 1,
    decodeSpeedupRatio: 1,
    startupTimeMs: 0,
    dataParallelSize: 1,
    kvBytesPerToken: DEFAULT_TRANSFER.kvBytesPerToken,
    kvTransferBandwidthBytesPerSecond: DEFAULT_TRANSFER.bandwidthBytesPerSecond,
    kvTransferTimingMode: DEFAULT_TRANSFER.timingMode,
    sglang: DEFAULT_SGLANG,
    vocabularySize: 256,
    ...overrides,
  };
}

/** The part of one rank. */
export function schedulerConfig(config: MockerEngineConfig, dpRank: number, timing: TimingModel): SchedulerConfig {
  return {
    engineType: config.engineType,
    dpRank,
    role: config.role,
    contextLength: config.contextLength,
    blockSizeTokens: config.blockSizeTokens,
    totalBlocks: config.totalBlocks,
    maxSequences: config.maxSequences,
    maxBatchedTokens: config.maxBatchedTokens,
    prefixCaching: config.prefixCaching,
    chunkedPrefill: config.chunkedPrefill,
    preemptionMode: config.preemptionMode,
    watermark: config.watermark,
    timing,
    transfer: {
      kvBytesPerToken: config.kvBytesPerToken,
      bandwidthBytesPerSecond: config.kvTransferBandwidthBytesPerSecond,
      timingMode: config.kvTransferTimingMode,
    },
    sglang: config.sglang,
  };
}

/** What the scheduler does not check itself; `invalid-config`. */
export function checkMockerConfig(config: MockerEngineConfig): void {
  const problems: string[] = [];
  const atLeastZero = { "speedup ratio": config.speedupRatio, "decode speedup ratio": config.decodeSpeedupRatio, "startup time": config.startupTimeMs }; // prettier-ignore
  for (const [name, value] of Object.entries(atLeastZero)) {
    if (!(Number.isFinite(value) && value >= 0)) problems.push(`${name}: expected at least 0, got ${value}`);
  }
  if (!Number.isInteger(config.dataParallelSize) || config.dataParallelSize < 1 || config.dataParallelSize > 1_024) {
    problems.push(`data parallel size: expected a whole number from 1 to 1024, got ${config.dataParallelSize}`);
  }
  if (!Number.isInteger(config.vocabularySize) || config.vocabularySize < 128) {
    problems.push(`vocabulary size: expected a whole number of at least 128, got ${config.vocabularySize}`);
  }
  const { reasoning } = config;
  if (reasoning !== undefined) {
    if (!(reasoning.thinkingRatio >= 0 && reasoning.thinkingRatio <= 1)) {
      problems.push(`thinking ratio: expected a share from 0 to 1, got ${reasoning.thinkingRatio}`);
    }
    if (reasoning.startTokenId === reasoning.endTokenId) problems.push("reasoning: start and end token are the same");
  }
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
}
