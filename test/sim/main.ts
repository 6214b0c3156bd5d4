import { fork, type ChildProcess } from "node:child_process";
import { parseArgs } from "node:util";
import { Marks } from "./marks.ts";
import { failureReport } from "./report.ts";
import { runSeed } from "./simulation.ts";

/**
 * `npm run sim -- --seed=N --runs=M --jobs=J --lines=L`: runs the seeds N to N+M-1, in J processes. One run prints its
 * log's last L lines; many print the failures and, each minute, the seed from which a broken-off command can go on. Ends
 * with 1 when a run failed.
 */
const { values } = parseArgs({
  options: {
    seed: { type: "string", default: "1" },
    runs: { type: "string", default: "1" },
    jobs: { type: "string", default: "1" },
    lines: { type: "string", default: "60" },
    /** Of a job: run each `step`-th seed. */
    step: { type: "string", default: "1" },
  },
});

function whole(name: "seed" | "runs" | "jobs" | "lines" | "step", least: number): number {
  const value = Number(values[name]);
  if (Number.isInteger(value) && value >= least) return value;
  process.stderr.write(`--${name}: expected a whole number of at least ${least}, got ${values[name]}\n`);
  process.exit(2);
}

const seed = whole("seed", 0);
const runs = whole("runs", 1);
const jobs = whole("jobs", 1);
const lines = whole("lines", 1);
const step = whole("step", 1);
const PROGRESS_MS = 60_000;

async function runSeeds(): Promise<number> {
  const startMs = performance.now();
  const marks = new Marks();
  let lastMs = startMs;
  let failures = 0;
  let done = 0;
  let steps = 0;
  for (let current = seed; current < seed + runs; current += step) {
    const result = await runSeed({ seed: current, keepLines: lines });
    done++;
    steps += result.steps;
    marks.add(result.marks);
    if (result.violations.length > 0) {
      failures++;
      console.log(failureReport(result, lines));
    } else if (runs === 1) {
      for (const line of result.lastLines) console.log(line);
      console.log(
        `seed ${current}: hash ${result.hash}, ${result.virtualMs.toFixed(0)} virtual ms, ${result.steps} steps`,
      );
      console.log(
        `faults ${JSON.stringify(Object.fromEntries(result.faults))}, outcomes ${JSON.stringify(Object.fromEntries(result.outcomes))}`,
      );
    }
    if (performance.now() - lastMs > PROGRESS_MS) {
      lastMs = performance.now();
      console.log(`${done} runs, ${failures} failed; go on with --seed=${current + step}`);
    }
  }
  const ms = performance.now() - startMs;
  console.log(
    `${done} runs, ${failures} failed, ${(ms / done).toFixed(1)} ms and ${(steps / done).toFixed(0)} steps a run`,
  );
  if (done > 1) console.log(`marks never reached: ${marks.missing().join("; ") || "none"}`);
  return failures;
}

function runJob(job: number): Promise<number> {
  const own = [`--seed=${seed + job}`, `--runs=${runs - job}`, `--step=${jobs}`, `--lines=${lines}`];
  const child: ChildProcess = fork(import.meta.filename, own);
  return new Promise((resolve) => child.on("exit", (code) => resolve(code ?? 1)));
}

const failed =
  jobs === 1
    ? await runSeeds()
    : (await Promise.all(Array.from({ length: jobs }, (_, job) => runJob(job)))).reduce((a, b) => a + b, 0);
process.exitCode = failed > 0 ? 1 : 0;
