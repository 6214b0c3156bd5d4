import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { DynamoError } from "../errors/index.ts";
import { parseReasoningFlag, readEngineArgs } from "./mocker-engine-args.ts";

async function read(content: string): Promise<unknown> {
  const folder = await mkdtemp(join(tmpdir(), "mocker-args-"));
  try {
    await writeFile(join(folder, "args.json"), content);
    return await readEngineArgs(join(folder, "args.json"));
  } finally {
    await rm(folder, { recursive: true });
  }
}

const isInvalid = (pattern: RegExp) => (error: unknown) =>
  error instanceof DynamoError && error.reason === "invalid-config" && pattern.test(error.message);

test("mocker arguments: Dynamo's names become ours, in our units", async () => {
  const args = { num_gpu_blocks: 100, block_size: 8, engine_type: "sglang", startup_time: 1.5, kv_transfer_bandwidth: 2, enable_prefix_caching: false, reasoning: { start_thinking_token_id: 1, end_thinking_token_id: 2, thinking_ratio: 0.5 } }; // prettier-ignore
  assert.deepEqual(await read(JSON.stringify(args)), {
    totalBlocks: 100,
    blockSizeTokens: 8,
    engineType: "sglang",
    startupTimeMs: 1_500,
    kvTransferBandwidthBytesPerSecond: 2e9,
    prefixCaching: false,
    reasoning: { startTokenId: 1, endTokenId: 2, thinkingRatio: 0.5 },
  });
});

test("mocker arguments: every mistake is named, together", async () => {
  const wrong = { num_gpu_block: 1, block_size: "8", preemption_mode: "random", __proto__x: 1 };
  await assert.rejects(
    read(JSON.stringify(wrong)),
    isInvalid(/num_gpu_block: no such[^]*block_size: expected a number, got "8"[^]*preemption_mode: expected lifo or fifo[^]*__proto__x: no such/), // prettier-ignore
  );
  await assert.rejects(read("[1]"), isInvalid(/expected a JSON object/));
  await assert.rejects(readEngineArgs("/nowhere/args.json"), isInvalid(/cannot be read/));
  assert.throws(() => parseReasoningFlag('{"thinking_ratio": 1}'), isInvalid(/--reasoning: expected start_thinking/));
  assert.throws(() => parseReasoningFlag("yes"), isInvalid(/--reasoning: expected a JSON object/));
});
