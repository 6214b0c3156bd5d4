import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { join } from "node:path";
import { describe, test } from "node:test";
import { promisify } from "node:util";
import { failureText, targetOf, type FuzzTarget } from "./fuzzer.ts";
import { bytesTarget, smallerBytes } from "./mutate-bytes.ts";
import { smallerTree, textOf, treeOf } from "./mutate-json.ts";
import { TARGETS } from "./targets/index.ts";
import { Watchdog } from "./watchdog.ts";

/** A short run of every target: a fixed seed, and one that is new each time. `npm run fuzz` runs longer. */
const FIXED_SEED = 7;
const FRESH_SEED = Math.floor(Math.random() * 2 ** 31);
const SHARE_MS = 450;

describe(`fuzz, seeds ${FIXED_SEED} and ${FRESH_SEED}`, () => {
  for (const [name, make] of Object.entries(TARGETS)) {
    test(`fuzz: ${name}`, async () => {
      const target = await make();
      try {
        for (const seed of [FIXED_SEED, FRESH_SEED]) {
          const watchdog = new Watchdog(name, seed);
          const onCase = (index: number): void => watchdog.at(index);
          const report = await target.fuzz({ seed, durationMs: SHARE_MS, minCases: 30, onCase });
          await watchdog.close();
          assert.equal(failureText(report), "");
        }
      } finally {
        await target.close();
      }
    });
  }
});

test("fuzzer: finds a failure, makes its input small, and replays it by its number", async () => {
  const target = bytesTarget({
    name: "planted",
    about: "fails on two bytes in a row",
    corpus: [Buffer.alloc(100)],
    run(bytes) {
      if (bytes.includes(Buffer.of(0x80, 0x00))) throw new RangeError(`planted at ${bytes.indexOf(0x80)}`);
    },
  });
  const report = await target.fuzz({ seed: 3, cases: 20_000 });
  assert.match(report.failure?.message ?? "", /^RangeError: planted/);
  assert.match(report.failure?.input ?? "", /^2 bytes, Buffer\.from\("gAA=", "base64"\)/);
  const again = await target.fuzz({ seed: 3, onlyCase: report.failure!.caseIndex });
  assert.deepEqual(again.failure?.input, report.failure?.input);
});

test("fuzzer: a rejection that nobody handles and a case that takes too long are failures", async () => {
  const target = (run: () => void | Promise<void>): FuzzTarget<number> => ({
    name: "planted",
    about: "",
    generate: () => 0,
    run,
    smaller: () => [],
    show: String,
  });
  // In a process of its own: the test runner takes stray rejections for failures too.
  const { stdout } = await promisify(execFile)(process.execPath, [
    "--input-type=module",
    "--eval",
    `import { targetOf } from ${JSON.stringify(join(import.meta.dirname, "fuzzer.ts"))};
    const target = { name: "planted", generate: () => 0, smaller: () => [], show: String,
      run: () => void Promise.reject(new Error("nobody listens")) };
    const report = await targetOf(target).fuzz({ seed: 1, cases: 3 });
    console.log(report.failure.message);`,
  ]);
  assert.match(stdout, /reached the process.*nobody listens/);
  const slow = targetOf(
    target(() => {
      const before = process.threadCpuUsage();
      while (process.threadCpuUsage(before).user < 2_050_000);
    }),
  );
  assert.match((await slow.fuzz({ seed: 1, cases: 1 })).failure?.message ?? "", /longer than/);
});

test("fuzzer: smaller inputs are smaller", () => {
  for (const smaller of smallerBytes(Buffer.from([1, 2, 3, 4, 5]))) {
    assert.ok(smaller.length < 5 || [...smaller].filter((byte) => byte === 0).length === 1);
  }
  const tree = treeOf({ a: [1, { b: "text" }], c: null });
  for (const smaller of smallerTree(tree)) assert.ok(textOf(smaller).length < textOf(tree).length, textOf(smaller));
});
