import assert from "node:assert/strict";
import { test } from "node:test";
import { simulate, type EngineSpeed, type Setup, type Workload } from "./fixtures/two-workers.ts";
import { PrefillRate } from "./prefill-rate.ts";

/** A small model on one core, and a larger one on a GPU; virtual time, so the same on every machine. */
const SPEEDS: Record<string, EngineSpeed> = {
  "a core": { stepMs: 15, msPerDecode: 5, msPerPromptToken: 2.5, maxBatchedTokens: 128 },
  "a core, long steps": { stepMs: 15, msPerDecode: 5, msPerPromptToken: 2.5, maxBatchedTokens: 512 },
  "a GPU": { stepMs: 20, msPerDecode: 0.2, msPerPromptToken: 0.05, maxBatchedTokens: 2_048 },
};
const LOADS: Record<string, Workload> = {
  short: { clients: 4, requests: 200, promptTokens: [40], outputTokens: 32 },
  long: { clients: 4, requests: 80, promptTokens: [300], outputTokens: 24 },
  mixed: { clients: 4, requests: 200, promptTokens: [40, 40, 300, 40, 40], outputTokens: 32 },
  "many short": { clients: 16, requests: 400, promptTokens: [40], outputTokens: 64 },
  "many mixed": { clients: 16, requests: 400, promptTokens: [40, 40, 900, 40, 40], outputTokens: 64 },
  "long answers": { clients: 8, requests: 100, promptTokens: [60], outputTokens: 300 },
  "very long": { clients: 8, requests: 100, promptTokens: [3_000], outputTokens: 100 },
};
/** Where the greedy choice is short of the goal: it misses that prompts come in bursts, and that a pool of its own would pay. */
const SHORT_OF_IT = new Set(["a core, long steps, many short", "a GPU, very long"]);
const GOAL = 0.95;
const FLOOR = 0.9;

function throughput(setup: Setup, workload: Workload, speed: EngineSpeed): number {
  const handoff = { setupMs: 15, msPerBlock: 0.5 };
  const runs = [1, 2, 3].map((seed) => simulate(setup, workload, { speed, handoff, seed }));
  return runs.reduce((sum, { tokensPerSecond }) => sum + tokensPerSecond, 0) / runs.length;
}

for (const [engine, speed] of Object.entries(SPEEDS)) {
  test(`auto on ${engine}: its throughput is that of the better of both, splitting each request or none`, () => {
    for (const [load, workload] of Object.entries(LOADS)) {
      const of = (setup: Setup): number => throughput(setup, workload, speed);
      const ratio = of("auto") / Math.max(of("aggregated"), of("always"));
      const least = SHORT_OF_IT.has(`${engine}, ${load}`) ? FLOOR : GOAL;
      assert.ok(ratio >= least, `${load}: ${ratio.toFixed(3)}`);
    }
  });
}

test("prefill rate: prompts of one step share its time, those of different workers do not", () => {
  const rate = new PrefillRate();
  assert.equal(rate.msPerToken, undefined);
  // Four prompts of 40 tokens in one step of 400 ms.
  const own = [0, 1, 2, 3].map(() => rate.add("a", 40, 400, 1_000));
  assert.deepEqual(own, [400, 0, 0, 0]);
  assert.equal(rate.add("b", 40, 100, 1_000), 100);
  // Began while the last one was still computed.
  assert.equal(rate.add("a", 40, 300, 1_100), 100);
  for (let i = 0; i < 60; i++) rate.add("a", 40, 100, 2_000 + i * 100);
  assert.ok(Math.abs(rate.msPerToken! - 2.5) < 0.01);
});
