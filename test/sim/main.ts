import { parseArgs } from "node:util";
import { runSeed, type RunResult } from "./simulation.ts";

const { values } = parseArgs({
  options: {
    seed: { type: "string", default: "1" },
    runs: { type: "string", default: "1" },
    lines: { type: "string", default: "60" },
  },
});

const first = Number(values.seed);
const runs = Number(values.runs);
const startMs = performance.now();
let steps = 0;
let failures = 0;
for (let seed = first; seed < first + runs; seed++) {
  const result: RunResult = await runSeed({ seed, keepLines: Number(values.lines) });
  steps += result.steps;
  if (runs === 1) {
    for (const line of result.lastLines) console.log(line);
    console.log(
      `hash ${result.hash}, ${result.steps} steps, ${result.virtualMs.toFixed(0)} ms`,
      Object.fromEntries(result.outcomes),
      Object.fromEntries(result.faults),
    );
  }
  if (result.violations.length > 0) {
    failures++;
    console.log(`seed ${seed}: ${result.violations.length} violations`);
    for (const violation of result.violations.slice(0, 8)) console.log(`  ${violation}`);
  }
}
const seconds = (performance.now() - startMs) / 1_000;
console.log(
  `${runs} runs, ${failures} failed, ${((seconds * 1000) / runs).toFixed(1)} ms a run, ${(steps / runs).toFixed(0)} steps a run`,
);
