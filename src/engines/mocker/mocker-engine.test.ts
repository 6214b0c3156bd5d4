import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { DynamoError } from "../../errors/index.ts";
import { polynomialDecodeMs, polynomialPrefillMs } from "../../perf-model/index.ts";
import { ManualClock } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import type { MockerEngineConfig } from "../config.ts";
import { engineBattery } from "../engine.battery.ts";
import { EngineRecorder, aRequest, replayKvEvents } from "../engine.recorder.ts";
import { MockerEngine, mockerConfig } from "./index.ts";

const SMALL: Partial<MockerEngineConfig> = {
  contextLength: 256,
  maxSequences: 8,
  maxBatchedTokens: 64,
  blockSizeTokens: 4,
  totalBlocks: 200,
  speedupRatio: 0,
};

function aPrompt(length: number): Uint32Array {
  return Uint32Array.from({ length }, (_, i) => (i * 7 + 3) % 251);
}

const VARIANTS: Record<string, Partial<MockerEngineConfig>> = {
  "vllm style": {},
  "sglang style": { engineType: "sglang", blockSizeTokens: 4 },
  "trtllm style, in real time, fast": { engineType: "trtllm", speedupRatio: 50 },
  "two data-parallel ranks of one sequence order": { dataParallelSize: 1, preemptionMode: "fifo", maxBatchedTokens: 16 },
};

for (const [name, overrides] of Object.entries(VARIANTS)) {
  engineBattery(`mocker, ${name}`, () =>
    Promise.resolve({
      engine: new MockerEngine(mockerConfig({ ...SMALL, ...overrides }), { maxWaitingRequests: 50 }),
      promptTokenIds: aPrompt,
      stopTokenId: 255,
      supportsExport: true,
      maxWaitingRequests: 50,
    }),
  );
}
