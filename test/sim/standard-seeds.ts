import assert from "node:assert/strict";
import { test } from "node:test";
import { Marks } from "./marks.ts";
import { failureReport } from "./report.ts";
import { runSeed } from "./simulation.ts";

/** The standard seeds are 1 to 1,000, in two files so that two cores share them; each half reaches every mark. */
export function testSeeds(first: number, last: number): void {
  test(`simulator: seeds ${first} to ${last} hold every invariant and reach every fault path`, async () => {
    const marks = new Marks();
    for (let seed = first; seed <= last; seed++) {
      const result = await runSeed({ seed });
      marks.add(result.marks);
      assert.equal(result.violations.length, 0, failureReport(result));
    }
    assert.deepEqual(marks.missing(), [], "these were never reached");
  });
}
