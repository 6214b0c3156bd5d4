import { readFile } from "node:fs/promises";
import type { MockerEngineConfig } from "../engines/index.ts";
import { DynamoError } from "../errors/index.ts";

/**
 * `--extra-engine-args` and `--reasoning` of the mocker: JSON with Dynamo's names. Unknown fields and wrong types are all
 * reported together, as `invalid-config`. Bounds are the engine's own business.
 */
type Overrides = { -readonly [Key in keyof Omit<MockerEngineConfig, "kind">]?: MockerEngineConfig[Key] };

interface ArgSpec {
  readonly key: Exclude<keyof Overrides, "sglang" | "reasoning">;
  readonly type: "number" | "boolean" | "string";
  /** Of a number: from Dynamo's unit to ours. */
  readonly scale?: number;
  readonly choices?: readonly string[];
}

const ARGS: Readonly<Record<string, ArgSpec>> = {
  engine_type: { key: "engineType", type: "string", choices: ["vllm", "sglang", "trtllm"] },
  num_gpu_blocks: { key: "totalBlocks", type: "number" },
  block_size: { key: "blockSizeTokens", type: "number" },
  max_model_len: { key: "contextLength", type: "number" },
  max_num_seqs: { key: "maxSequences", type: "number" },
  max_num_batched_tokens: { key: "maxBatchedTokens", type: "number" },
  enable_prefix_caching: { key: "prefixCaching", type: "boolean" },
  enable_chunked_prefill: { key: "chunkedPrefill", type: "boolean" },
  speedup_ratio: { key: "speedupRatio", type: "number" },
  decode_speedup_ratio: { key: "decodeSpeedupRatio", type: "number" },
  dp_size: { key: "dataParallelSize", type: "number" },
  startup_time: { key: "startupTimeMs", type: "number", scale: 1_000 },
  watermark: { key: "watermark", type: "number" },
  planner_profile_data: { key: "profilePath", type: "string" },
  kv_bytes_per_token: { key: "kvBytesPerToken", type: "number" },
  kv_transfer_bandwidth: { key: "kvTransferBandwidthBytesPerSecond", type: "number", scale: 1e9 },
  kv_transfer_timing_mode: { key: "kvTransferTimingMode", type: "string", choices: ["full_prompt", "destination_missing"] }, // prettier-ignore
  preemption_mode: { key: "preemptionMode", type: "string", choices: ["lifo", "fifo"] },
};

export async function readEngineArgs(path: string): Promise<Overrides> {
  const text = await readFile(path, "utf8").catch((cause: unknown) => {
    throw new DynamoError("invalid-config", `--extra-engine-args: ${path} cannot be read`, { cause });
  });
  const fields = objectOf(text, `--extra-engine-args: ${path}`);
  const problems: string[] = [];
  const overrides: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(fields)) {
    if (name === "reasoning") {
      overrides.reasoning = parseReasoning(value, `${path}: reasoning`);
      continue;
    }
    const spec = Object.hasOwn(ARGS, name) ? ARGS[name] : undefined;
    if (spec === undefined) problems.push(`${path}: ${name}: no such engine argument`);
    else if (typeof value !== spec.type)
      problems.push(`${path}: ${name}: expected a ${spec.type}, got ${JSON.stringify(value)}`); // prettier-ignore
    else if (spec.choices !== undefined && !spec.choices.includes(value as string)) {
      problems.push(`${path}: ${name}: expected ${spec.choices.join(" or ")}, got ${JSON.stringify(value)}`);
    } else overrides[spec.key] = spec.scale === undefined ? value : (value as number) * spec.scale;
  }
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
  return overrides as Overrides;
}

export function parseReasoningFlag(text: string): NonNullable<MockerEngineConfig["reasoning"]> {
  return parseReasoning(objectOf(text, "--reasoning"), "--reasoning");
}

function parseReasoning(value: unknown, where: string): NonNullable<MockerEngineConfig["reasoning"]> {
  const fields = (typeof value === "object" && value !== null ? value : {}) as Record<string, unknown>;
  const { start_thinking_token_id: startTokenId, end_thinking_token_id: endTokenId, thinking_ratio: thinkingRatio } = fields; // prettier-ignore
  const isId = (id: unknown): id is number => Number.isInteger(id) && (id as number) >= 0;
  if (
    !isId(startTokenId) ||
    !isId(endTokenId) ||
    typeof thinkingRatio !== "number" ||
    Object.keys(fields).length !== 3
  ) {
    throw new DynamoError(
      "invalid-config",
      `${where}: expected start_thinking_token_id, end_thinking_token_id (token ids) and thinking_ratio (0 to 1)`,
    );
  }
  return { startTokenId, endTokenId, thinkingRatio };
}

function objectOf(text: string, where: string): Record<string, unknown> {
  try {
    const value = JSON.parse(text) as unknown;
    if (typeof value === "object" && value !== null && !Array.isArray(value)) return value as Record<string, unknown>;
  } catch {
    // Told below.
  }
  throw new DynamoError("invalid-config", `${where}: expected a JSON object`);
}
