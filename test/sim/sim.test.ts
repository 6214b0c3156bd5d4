import assert from "node:assert/strict";
import { test } from "node:test";
import { Marks } from "./marks.ts";
import { failureReport } from "./report.ts";
import { runSeed } from "./simulation.ts";

/** The standard seeds. docs/design/simulator.md tells what a run is and what is checked. */
const SEEDS = 1_000;
const REPEATED = 20;

test("simulator: the standard seeds hold every invariant and reach every fault path", async () => {
  const marks = new Marks();
  for (let seed = 1; seed <= SEEDS; seed++) {
    const result = await runSeed({ seed });
    marks.add(result.marks);
    assert.equal(result.violations.length, 0, failureReport(result));
  }
  assert.deepEqual(marks.missing(), [], "these were never reached");
});

test("simulator: a seed gives the same run again, line by line", async () => {
  for (let seed = 1; seed <= REPEATED; seed++) {
    const first = await runSeed({ seed });
    const again = await runSeed({ seed });
    assert.deepEqual(
      { hash: again.hash, steps: again.steps },
      { hash: first.hash, steps: first.steps },
      `seed ${seed}`,
    );
  }
});
