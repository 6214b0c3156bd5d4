import assert from "node:assert/strict";
import { test } from "node:test";
import { EMPTY_LOAD, parseLoadReport, type KvTierUse } from "./index.ts";

test("load report: the use of KV tiers is read with it; what is malformed is left out, the load is kept", () => {
  const disk: KvTierUse = {
    tier: "disk",
    usedBytes: 10,
    capacityBytes: 20,
    hitBlocks: 1,
    lookedUpBlocks: 2,
    restoredBlocks: 1,
    isDegraded: false,
  };
  const { capacityBytes: _, ...unbounded } = disk;
  const report = (kvTiers: unknown): ReturnType<typeof parseLoadReport> =>
    parseLoadReport(Buffer.from(JSON.stringify({ instanceId: "a", load: EMPTY_LOAD, kvTiers })));
  const good = [disk, { ...unbounded, tier: "object" }];
  assert.deepEqual(report(good), { instanceId: "a", load: EMPTY_LOAD, kvTiers: good });
  const bad: readonly unknown[] = [
    "disk",
    {},
    [null],
    [{ ...disk, tier: "tape" }],
    [{ ...disk, usedBytes: "10" }],
    [{ ...disk, capacityBytes: null }],
    [{ ...disk, isDegraded: 0 }],
    Array.from({ length: 4 }, () => disk),
  ];
  for (const kvTiers of bad) assert.deepEqual(report(kvTiers), { instanceId: "a", load: EMPTY_LOAD });
});
