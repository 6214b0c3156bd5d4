import assert from "node:assert/strict";
import { test } from "node:test";
import { runSeed } from "./simulation.ts";

const REPEATED = 20;

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
