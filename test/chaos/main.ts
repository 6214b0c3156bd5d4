import { parseArgs } from "node:util";
import { describe, runChaos } from "./run-chaos.ts";

/** `npm run chaos -- --minutes=N --seed=N [--model PATH] [--workers=N] [--frontends=N] [--verbose]` */
const { values } = parseArgs({
  options: {
    minutes: { type: "string", default: "2" },
    seed: { type: "string" },
    model: { type: "string" },
    workers: { type: "string", default: "3" },
    frontends: { type: "string", default: "2" },
    concurrency: { type: "string" },
    verbose: { type: "boolean", default: false },
  },
});

function positive(name: string, text: string): number {
  const value = Number(text);
  if (!(value > 0)) throw new TypeError(`--${name}: expected a number above 0, got ${text}`);
  return value;
}

const seed = values.seed === undefined ? Math.floor(Math.random() * 2 ** 31) : positive("seed", values.seed);
console.error(`npm run chaos -- --seed=${seed} --minutes=${values.minutes}`);
const brokenOff = new AbortController();
for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => brokenOff.abort());
const report = await runChaos({
  seed,
  durationMs: positive("minutes", values.minutes) * 60_000,
  workers: positive("workers", values.workers),
  frontends: positive("frontends", values.frontends),
  ...(values.model === undefined ? {} : { modelPath: values.model }),
  ...(values.concurrency === undefined ? {} : { concurrency: positive("concurrency", values.concurrency) }),
  maxOutageMs: 15_000,
  onLine: (line) => console.error(line),
  verbose: values.verbose,
  signal: brokenOff.signal,
});
console.log(describe(report));
// At once: what was broken off may still wait for answers.
process.exit(report.violations.length === 0 ? 0 : 1);
