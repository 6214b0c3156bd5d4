import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { join } from "node:path";
import { test } from "node:test";
import { promisify } from "node:util";
import { slopePer100k } from "./soak.ts";

test("soak: a short run ends without a failure and with as many handles as it began with", async () => {
  const env = { ...process.env, SOAK_REQUESTS: "2000" };
  const { stdout } = await promisify(execFile)(process.execPath, [join(import.meta.dirname, "soak.ts")], { env });
  assert.match(stdout, /^2\d{3} requests in /m);
  assert.match(stdout, /^frontend +\d/m);
  for (const [, from, to] of stdout.matchAll(/(\d+) \/ (\d+)\s*$/gm)) assert.ok(Number(to) <= Number(from) + 1, stdout);
});

test("soak: the slope is per 100,000 requests, whatever the distances", () => {
  assert.equal(slopePer100k([[0, 5], [100, 5], [900, 5]]), 0); // prettier-ignore
  assert.ok(Math.abs(slopePer100k([[0, 0], [1_000, 10], [3_000, 30]]) - 1_000) < 1e-9); // prettier-ignore
  assert.equal(slopePer100k([[7, 7]]), 0);
});
