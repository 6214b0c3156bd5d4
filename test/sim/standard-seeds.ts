import assert from "node:assert/strict";
import { test } from "node:test";
import { Marks } from "./marks.ts";
import { failureReport } from "./report.ts";
import { runSeed } from "./simulation.ts";

/** Tests in parts of this many seeds, so that the time limit of a test is one for hangs on a busy machine too. */
const PART = 250;

/** The standard seeds are 1 to 1,000, in two files so that two cores share them; each half reaches every mark. */
export function testSeeds(first: number, last: number): void {
  const marks = new Marks();
  for (let from = first; from <= last; from += PART) {
    const to = Math.min(last, from + PART - 1);
    test(`simulator: seeds ${from} to ${to} hold every invariant`, async () => {
      for (let seed = from; seed <= to; seed++) {
        const result = await runSeed({ seed });
        marks.add(result.marks);
        assert.equal(result.violations.length, 0, failureReport(result));
      }
    });
  }
  test(`simulator: seeds ${first} to ${last} reach every fault path`, () => {
    assert.deepEqual(marks.missing(), [], "these were never reached");
  });
}
