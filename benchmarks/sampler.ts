import { NaiveSampler, naiveLogprob } from "../src/engines/llama/naive-sampler.ts";
import { Sampler, promptLogprob } from "../src/engines/llama/sampler.ts";
import { GREEDY, type SamplingOptions } from "../src/protocol/index.ts";
import { SeededRandom } from "../src/std/index.ts";
import { median, table } from "./harness.ts";

/**
 * One token from a row of 49,152 logits, per kind of sampling, beside the naive sampler. Rows are made: `peaked` has one
 * clear favourite and a far tail, as a model mostly gives; `flat` is the worst case, a bell with thousands of candidates.
 */
const VOCABULARY_SIZE = 49_152;
const TOKENS_PER_ROUND = 16;
const ROUNDS = 40;

const LOGPROBS = "20 logprobs";
const KINDS: Readonly<Record<string, Partial<SamplingOptions>>> = {
  greedy: {},
  temperature: { temperature: 1 },
  "temperature, frequency penalty": { temperature: 1, frequencyPenalty: 0.5 },
  "top-k 40": { temperature: 0.7, topK: 40 },
  "top-p 0.95": { temperature: 0.7, topP: 0.95 },
  "min-p 0.05": { temperature: 1, minP: 0.05 },
  "top-k, top-p and min-p": { temperature: 0.8, topK: 40, topP: 0.95, minP: 0.05 },
};

function aBell(random: SeededRandom): number {
  let sum = 0;
  for (let i = 0; i < 6; i++) sum += random.nextFloat();
  return (sum - 3) * 4;
}

function rowOf(shape: "peaked" | "flat", random: SeededRandom): Float32Array {
  const row = Float32Array.from({ length: VOCABULARY_SIZE }, () => aBell(random));
  if (shape === "peaked") for (let i = 0; i < 20; i++) row[(i * 2_417) % VOCABULARY_SIZE] = 24 - i / 2;
  return row;
}

/** Kinds of work on one row: what is measured, and the naive way to do it. */
function workOf(kind: string, logits: Float32Array): readonly [fast: () => unknown, naive: () => unknown] {
  const options = { vocabularySize: VOCABULARY_SIZE, promptTokenIds: new Uint32Array(0), seed: 1 };
  if (kind === LOGPROBS) return [() => promptLogprob(logits, 5, 20), () => naiveLogprob(logits, 5, 20)];
  const sampling = { ...GREEDY, ...KINDS[kind] };
  const sampler = new Sampler(sampling, options);
  const naive = new NaiveSampler(sampling, options);
  return [() => sampler.accept(sampler.sample(logits)), () => naive.sample(logits)];
}

function medianUs(sample: () => unknown, rounds: number, tokensPerRound: number): number {
  const times: number[] = [];
  for (let round = 0; round < rounds; round++) {
    const startMs = performance.now();
    for (let i = 0; i < tokensPerRound; i++) sample();
    times.push(((performance.now() - startMs) / tokensPerRound) * 1_000);
  }
  return median(times);
}

export async function run(): Promise<void> {
  const rows = [...Object.keys(KINDS), LOGPROBS].map((kind) => {
    const cells: Record<string, string | number> = { work: kind };
    for (const shape of ["peaked", "flat"] as const) {
      const [fast, naive] = workOf(kind, rowOf(shape, new SeededRandom(1)));
      const us = medianUs(fast, ROUNDS, TOKENS_PER_ROUND);
      cells[`${shape}: us per token`] = us;
      cells[`${shape}: times naive`] = Math.round(medianUs(naive, 3, 1) / us);
    }
    return cells;
  });
  console.log(table(rows, 0));
  await Promise.resolve();
}

if (import.meta.main) await run();
