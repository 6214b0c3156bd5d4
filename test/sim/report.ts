import type { RunResult } from "./simulation.ts";

/** What people need of a run that failed: the seed, what did not hold, the last of the log, how to see it again. */
export function failureReport(result: RunResult, lines = 40): string {
  return [
    `seed ${result.seed}: ${result.violations.length} violations`,
    ...result.violations.slice(0, 10).map((violation) => `  ! ${violation}`),
    `the last ${lines} lines of its log:`,
    ...result.lastLines.slice(-lines).map((line) => `    ${line.slice(0, 400)}`),
    `faults: ${JSON.stringify(Object.fromEntries(result.faults))}, outcomes: ${JSON.stringify(Object.fromEntries(result.outcomes))}`,
    `replay: npm run sim -- --seed=${result.seed}`,
  ].join("\n");
}
