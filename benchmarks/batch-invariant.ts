import { existsSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import { LlamaContext } from "../src/engines/llama/llama-context.ts";
import { machineLine, median, table } from "./harness.ts";

/**
 * What `--batch-invariant on` costs beside `off`, in bare steps of 512 tokens: CPU time, which other load on the machine
 * changes less than it does elapsed time, of prompts and of decode steps; rounds alternate. And what it costs to move a
 * cached chain of 62 blocks, so that its cells lie in order with those that follow.
 *
 * Environment: DYN_TEST_MODEL a GGUF file, BENCH_ROUNDS, BENCH_LENGTHS prompt lengths, at most 4,000.
 */
const MODEL =
  process.env["DYN_TEST_MODEL"] ?? join(homedir(), ".cache/dynamo-ts/models/SmolLM2-135M-Instruct.Q4_1.gguf");
const ROUNDS = Number(process.env["BENCH_ROUNDS"] ?? 3);
const STEP_TOKENS = 512;
const LENGTHS = (process.env["BENCH_LENGTHS"] ?? "128,512,1000,2000").split(",").map(Number);
const DECODES = 16;
const BLOCK_TOKENS = 16;
const CHAIN_BLOCKS = 62;
const SEQUENCE = 0;
const SCRATCH = 1;
const OTHER = 2;

const open = (batchInvariant: boolean): LlamaContext =>
  new LlamaContext({
    modelPath: MODEL,
    cells: 4_096,
    maxBatchedTokens: STEP_TOKENS,
    maxLogitRows: 8,
    sequenceIds: 8,
    threads: 1,
    batchInvariant,
  });

/** CPU milliseconds of computing positions [from, to), `step` at a time. */
function compute(model: LlamaContext, from: number, to: number, step: number): number {
  const { batch } = model;
  const before = process.cpuUsage();
  for (let start = from; start < to; start += step) {
    const count = Math.min(step, to - start);
    for (let i = 0; i < count; i++) {
      const at = start + i;
      batch.tokenIds[i] = 300 + ((at * 37 + ((at * at) % 7) * 11) % 4_000);
      batch.positions[i] = at;
      batch.sequenceIds[i] = SEQUENCE;
      batch.wantsLogits[i] = i === count - 1 ? 1 : 0;
    }
    model.decode(count);
  }
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1_000;
}

interface Round {
  readonly prefill: number;
  readonly decode: number;
}

function round(model: LlamaContext, length: number): Round {
  model.clearCells();
  const prefill = compute(model, 0, length, STEP_TOKENS);
  return { prefill, decode: compute(model, length, length + DECODES, 1) / DECODES };
}

function compare(on: LlamaContext, off: LlamaContext, length: number): Record<string, string | number> {
  const rounds = Array.from({ length: ROUNDS }, (_, i) => {
    if (i % 2 === 0) return { on: round(on, length), off: round(off, length) };
    const first = round(off, length);
    return { on: round(on, length), off: first };
  });
  return {
    "prompt tokens": length,
    "on, ms": median(rounds.map((one) => one.on.prefill)),
    "off, ms": median(rounds.map((one) => one.off.prefill)),
    "on / off": median(rounds.map((one) => one.on.prefill / one.off.prefill)).toFixed(2),
    "decode step on, ms": median(rounds.map((one) => one.on.decode)),
    "decode step off, ms": median(rounds.map((one) => one.off.decode)),
  };
}

/** Milliseconds to move a chain block by block, as the block cache does. */
function move(model: LlamaContext): number {
  model.clearCells();
  compute(model, 0, CHAIN_BLOCKS * BLOCK_TOKENS, STEP_TOKENS);
  const bytes = new Uint8Array(model.stateBytes(SEQUENCE));
  const startMs = performance.now();
  for (let start = 0; start < CHAIN_BLOCKS * BLOCK_TOKENS; start += BLOCK_TOKENS) {
    const end = start + BLOCK_TOKENS;
    model.copyCells(SEQUENCE, SCRATCH, start, end);
    const length = model.exportState(SCRATCH, bytes);
    model.removeCells(SCRATCH, start, end);
    model.retireCells(SEQUENCE, start, end);
    model.importState(SCRATCH, bytes.subarray(0, length));
    model.copyCells(SCRATCH, OTHER, start, end);
    model.removeCells(SCRATCH, start, end);
  }
  return performance.now() - startMs;
}

export function run(): void {
  console.log(machineLine());
  if (!existsSync(MODEL)) {
    console.log(`batch-invariant: skipped, no model at ${MODEL} (npx dynamo model pull)`);
    return;
  }
  const [on, off] = [open(true), open(false)];
  try {
    round(on, 64);
    round(off, 64);
    // Each as it comes: the long ones take minutes.
    for (const length of LENGTHS) console.log(table([compare(on, off, length)]));
    const moves = Array.from({ length: ROUNDS }, () => move(on));
    console.log(`a chain of ${CHAIN_BLOCKS} blocks moved: ${median(moves).toFixed(1)} ms`);
  } finally {
    on.close();
    off.close();
  }
}

if (import.meta.main) run();
