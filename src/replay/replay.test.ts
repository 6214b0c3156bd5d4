import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { polynomialDecodeMs, polynomialPrefillMs } from "../perf-model/index.ts";
import { ROUTING_POLICIES } from "../router/index.ts";
import { readTrace, renderReports, runReplay, syntheticTrace, type ReplayOptions, type ReplayReport, type Trace } from "./index.ts"; // prettier-ignore
import { LogHistogram } from "./log-histogram.ts";

const FIXTURE = join(import.meta.dirname, "fixtures", "mooncake-conversation-200.jsonl");
const kv: ReplayOptions = { policy: ROUTING_POLICIES.kv, workers: 4 };
const roundRobin: ReplayOptions = { policy: ROUTING_POLICIES["round-robin"], workers: 4 };

function sumOf(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0);
}

/** What must hold for any run. */
function checkReport(report: ReplayReport, trace: Trace): void {
  const refused = sumOf(Object.values(report.refused));
  assert.equal(report.finished + refused, report.requests, "every request ends once");
  assert.equal(report.eventsNotApplied, 0, "the index follows every event");
  assert.equal(sumOf(report.perWorker.map(({ requests }) => requests)), report.finished);
  assert.equal(sumOf(report.perWorker.map(({ computedTokens }) => computedTokens)), report.promptTokens - report.cachedTokens); // prettier-ignore
  if (refused === 0) assert.equal(report.outputTokens, sumOf(trace.sessions.flatMap(({ turns }) => turns.map(({ outputTokens }) => outputTokens)))); // prettier-ignore
  assert.ok(report.perWorker.every(({ busy }) => busy >= 0 && busy <= 1 + 1e-9));
}

test("replay: one request takes exactly what the model of the hardware says", async () => {
  const trace = syntheticTrace({ sessions: 1, inputTokens: 1_000, outputTokens: 3, intervalMs: 0 });
  const report = await runReplay(trace, { ...kv, workers: 1 });
  const decodeMs = polynomialDecodeMs(16 / 16_384);
  assert.equal(report.ttftMs.max, polynomialPrefillMs(1_000));
  assert.ok(Math.abs(report.e2eMs.max - polynomialPrefillMs(1_000) - 2 * decodeMs) < 1e-9);
  assert.ok(Math.abs(report.itlMs.p50 / decodeMs - 1) < 0.01);
  assert.deepEqual([report.promptTokens, report.outputTokens, report.cachedTokens], [1_000, 3, 0]);
});

test("replay: the same trace, options and seed give the same report, for every policy", async () => {
  const trace = await readTrace(FIXTURE, { maxRows: 60 });
  for (const [name, policy] of Object.entries(ROUTING_POLICIES)) {
    if (name === "direct") continue;
    const options = { policy, workers: 3, seed: 5, smearMs: 3_000 };
    const [first, second] = [await runReplay(trace, options), await runReplay(trace, options)];
    assert.equal(JSON.stringify(first), JSON.stringify(second), name);
    checkReport(first, trace);
  }
  const [a, b] = [await runReplay(trace, { ...kv, seed: 1, smearMs: 3_000 }), await runReplay(trace, { ...kv, seed: 2, smearMs: 3_000 })]; // prettier-ignore
  assert.notEqual(JSON.stringify(a), JSON.stringify(b));
});

test("replay: on shared prefixes kv routing reuses more and answers sooner than round-robin", async () => {
  const trace = syntheticTrace({ sessions: 300, inputTokens: 4_000, outputTokens: 20, intervalMs: 60, sharedPrefixRatio: 0.8, groups: 40 }); // prettier-ignore
  const [ours, theirs] = [await runReplay(trace, kv), await runReplay(trace, roundRobin)];
  for (const report of [ours, theirs]) checkReport(report, trace);
  assert.ok(ours.hitRate > 1.2 * theirs.hitRate, `${ours.hitRate} beside ${theirs.hitRate}`);
  assert.ok(ours.ttftMs.mean < theirs.ttftMs.mean, `${ours.ttftMs.mean} beside ${theirs.ttftMs.mean}`);
  assert.ok(ours.overlapAgreement! > 0.9);
  assert.equal(theirs.overlapAgreement, undefined);
});

test("replay: a later turn finds what was said before in the cache, answer included", async () => {
  const trace = syntheticTrace({ sessions: 20, inputTokens: 1_024, outputTokens: 64, intervalMs: 500, turns: 3, turnTokens: 64, turnDelayMs: 100 }); // prettier-ignore
  const report = await runReplay(trace, { ...kv, workers: 1 });
  checkReport(report, trace);
  assert.equal(report.requests, 60);
  // The last token of an answer is never computed, so its block is not full: 1,024 and 63, then 1,152 and 63.
  assert.equal(report.cachedTokens, 20 * (1_024 + 1_152));
});

test("replay: closed loop keeps so many sessions going, and no more", async () => {
  const trace = syntheticTrace({ sessions: 40, inputTokens: 500, outputTokens: 10, intervalMs: 0 });
  const one = await runReplay(trace, { ...kv, workers: 1, arrivals: { kind: "concurrency", sessions: 1 } });
  checkReport(one, trace);
  assert.ok(one.ttftMs.max - one.ttftMs.p50 < 1e-6, "alone, every request takes the same");
  assert.ok(Math.abs(one.simulatedMs - 40 * one.e2eMs.mean) < 1, "one after the other");
  const all = await runReplay(trace, { ...kv, workers: 1, arrivals: { kind: "concurrency", sessions: 40 } });
  assert.ok(all.simulatedMs < one.simulatedMs / 4, "together they batch");
});

test("replay: faster arrivals shorten the run and lengthen the wait", async () => {
  const trace = await readTrace(FIXTURE);
  const slow = await runReplay(trace, roundRobin);
  const fast = await runReplay(trace, { ...roundRobin, arrivals: { kind: "schedule", speedup: 20 } });
  for (const report of [slow, fast]) checkReport(report, trace);
  assert.ok(fast.simulatedMs < slow.simulatedMs);
  assert.ok(fast.ttftMs.mean > slow.ttftMs.mean);
});

test("replay: with a queue threshold requests wait in the router, and all are served", async () => {
  const trace = syntheticTrace({ sessions: 60, inputTokens: 8_000, outputTokens: 5, intervalMs: 10 });
  const report = await runReplay(trace, { ...kv, workers: 2, router: { queueThreshold: 1 } });
  checkReport(report, trace);
  assert.equal(report.finished, 60);
  assert.ok(report.routerQueueMs.max > 0);
});

test("replay: what the router refuses and what does not fit the context is counted by its reason", async () => {
  const trace = syntheticTrace({ sessions: 20, inputTokens: 4_000, outputTokens: 5, intervalMs: 0 });
  const tooLong = await runReplay(trace, { ...kv, engine: { contextLength: 1_000 } });
  assert.deepEqual([tooLong.finished, tooLong.refused], [0, { "context-length": 20 }]);
  const full = await runReplay(trace, { ...kv, workers: 1, router: { queueThreshold: 0, queueLimit: 3 } });
  checkReport(full, trace);
  assert.equal(full.refused["too-many-requests"], 20 - full.finished);
  assert.ok(full.finished >= 4 && full.finished < 20);
});

test("replay: data-parallel ranks, small caches and all engine types keep the books", async () => {
  const trace = await readTrace(FIXTURE, { maxRows: 40 });
  const engines: ReplayOptions["engine"][] = [
    { dataParallelSize: 2 },
    // Barely more than the longest request: eviction and preemption all the time.
    { totalBlocks: 2_048, preemptionMode: "fifo" },
    { engineType: "sglang", blockSizeTokens: 16, totalBlocks: 16_384 },
    { engineType: "trtllm", totalBlocks: 2_048 },
    { role: "decode", kvTransferTimingMode: "destination_missing" },
  ];
  for (const engine of engines) {
    const report = await runReplay(trace, { ...kv, workers: 2, engine: engine!, arrivals: { kind: "schedule", speedup: 20 } }); // prettier-ignore
    checkReport(report, trace);
    assert.equal(report.finished, 40);
  }
});

test("replay: options out of their range are named together, and a signal ends a run", async () => {
  const trace = syntheticTrace({ sessions: 5, inputTokens: 10, outputTokens: 5, intervalMs: 0 });
  const bad = runReplay(trace, { ...kv, workers: 0, arrivals: { kind: "schedule", speedup: 0 } });
  await assert.rejects(bad, (error) => error instanceof DynamoError && /workers.*\n.*speedup/.test(error.message));
  await assert.rejects(runReplay(trace, { ...kv, signal: AbortSignal.abort() }), { reason: "cancelled" });
});

test("replay: the table has a column per report", async () => {
  const trace = syntheticTrace({ sessions: 5, inputTokens: 100, outputTokens: 5, intervalMs: 0 });
  const table = renderReports([await runReplay(trace, kv), await runReplay(trace, roundRobin)]);
  const lines = table.trimEnd().split("\n");
  assert.match(lines[0]!, /^\s+kv\s+round-robin$/);
  assert.match(table, /^requests finished\s+5 of 5\s+5 of 5$/m);
  assert.match(table, /^router's guess was right\s+100.0 %\s+-$/m);
});

test("replay: the whole conversation trace runs on 16 workers within 20 seconds", async (context) => {
  const path = join(process.env.DYN_TRACES ?? "", "mooncake_fast25_conversation_trace.jsonl");
  if (process.env.DYN_TRACES === undefined || !existsSync(path)) {
    context.skip("DYN_TRACES does not name a folder with the trace");
    return;
  }
  const startMs = performance.now();
  const trace = await readTrace(path);
  const report = await runReplay(trace, { ...kv, workers: 16 });
  const seconds = (performance.now() - startMs) / 1_000;
  checkReport(report, trace);
  assert.equal(report.finished, 12_031);
  assert.ok(seconds < 20, `it took ${seconds.toFixed(1)} s`);
});

test("log histogram: quantiles are right within half a per cent", () => {
  fc.assert(
    fc.property(
      fc.array(fc.double({ min: 0.01, max: 1e6, noNaN: true }), { minLength: 1, maxLength: 200 }),
      (values) => {
        // prettier-ignore
        const histogram = new LogHistogram();
        for (const value of values) histogram.observe(value);
        const sorted = values.toSorted((a, b) => a - b);
        for (const share of [0, 0.5, 0.9, 1]) {
          const exact = sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)]!;
          assert.ok(Math.abs(histogram.quantile(share) / exact - 1) < 0.0051);
        }
        assert.equal(histogram.max, sorted.at(-1));
      },
    ),
  );
});
