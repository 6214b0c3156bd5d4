import assert from "node:assert/strict";
import { test } from "node:test";
import { describe, runChaos } from "./run-chaos.ts";

/** The short run of `npm run chaos`; minutes of it, and with the real model, by that command. */
const SEED = 20_251;

test("chaos: mock workers and frontends as processes, faults one after another, and every request ends as it must", async (t) => {
  const lines: string[] = [];
  const report = await runChaos({
    seed: SEED,
    durationMs: 9_000,
    meanGapMs: 600,
    maxOutageMs: 2_500,
    onLine: (line) => lines.push(line),
  }).catch((thrown: unknown) => {
    throw new Error(`the run broke off:\n${lines.slice(-60).join("\n")}`, { cause: thrown });
  });
  const text = describe(report);
  t.diagnostic(text);
  assert.deepEqual(report.violations, [], `${lines.join("\n")}\n${text}\nagain: npm run chaos -- --seed=${SEED}`);
  assert.ok(report.outcomes.ok >= 100, text);
  const kinds = Object.values(report.faults).filter((count) => count > 0).length;
  assert.ok(
    kinds >= 4,
    `only ${kinds} kinds of fault came
${text}`,
  );
});
