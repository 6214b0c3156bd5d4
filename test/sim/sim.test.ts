import assert from "node:assert/strict";
import { test } from "node:test";
import { Marks } from "./marks.ts";
import { failureReport } from "./report.ts";
import { runSeed } from "./simulation.ts";

/** The standard seeds. docs/design/simulator.md tells what a run is and what is checked. */
const SEEDS = 1_000;
const PART = 250;
const REPEATED = 20;

const marks = new Marks();

// In parts, so that the time limit of a test is one for hangs on a busy machine too.
for (let first = 1; first <= SEEDS; first += PART) {
  const last = first + PART - 1;
  test(`simulator: the standard seeds ${first} to ${last} hold every invariant`, async () => {
    for (let seed = first; seed <= last; seed++) {
      const result = await runSeed({ seed });
      marks.add(result.marks);
      assert.equal(result.violations.length, 0, failureReport(result));
    }
  });
}

test("simulator: the standard seeds reach every fault path", () => {
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
