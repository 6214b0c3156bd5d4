import assert from "node:assert/strict";
import { test } from "node:test";
import { SeededRandom } from "../../src/std/index.ts";
import { failureReport } from "./report.ts";
import { runSeed, type RunOptions, type RunResult } from "./simulation.ts";
import { planWorkload } from "./workload.ts";

/**
 * A hundred workers in virtual time: 40 that prefill and 60 that decode, each with host memory and a disk below its
 * engine's cache and one object store for all, contending for cards, buses, disks and the store. The code is that of a
 * real cluster from HTTP to blocks; engines, network and time are simulated. Everything that a run checks holds for it,
 * too: every token, every request once, no block or lease left, views equal to the truth.
 */
const PREFILL = 40;
const DECODE = 60;
const BLOCK_BYTES = 64;
/** A block of 16 tokens of Llama 3.1 8B has 2 MiB: 0.16 ms over a card of 100 Gbit/s. */
const CARD_MS_PER_BLOCK = 0.16;

function aHundredWorkers(seed: number, calls: number, cardMsPerBlock: number): RunOptions {
  return {
    seed,
    faults: [],
    change: (plan) => {
      const workload = {
        ...plan.workload,
        calls,
        spanMs: calls * 5,
        maxTokens: 24,
        contextLength: 1_024,
        oddShare: 0,
        prefixes: { count: 150, least: 200, most: 500 },
      };
      const limits = { ...plan.cluster.frontend.limits, requestTimeoutMs: 60_000, concurrentRequests: 1_024 };
      return {
        cluster: {
          ...plan.cluster,
          frontends: 2,
          workers: PREFILL + DECODE,
          engine: { ...plan.cluster.engine, totalBlocks: 48, maxSequences: 8, dataParallelSize: 1, startupTimeMs: 0 },
          maxQueuedRequests: 64,
          eventLossShare: 0,
          eventRepeatShare: 0,
          eventHoldShare: 0,
          frontend: {
            ...plan.cluster.frontend,
            routerMode: "kv",
            disagg: "always",
            handoffTimeoutMs: 5_000,
            stallLimitMs: 30_000,
            limits: { ...limits, queuedRequests: 1_024, responseBufferBytes: 1024 * 1024 },
          },
          roles: {
            workers: [...Array(PREFILL).fill("prefill"), ...Array(DECODE).fill("decode")],
            handoff: { memoryBytes: BLOCK_BYTES * 1_024, leaseMs: 3_000, pullTimeoutMs: 5_000 },
          },
          tiers: { hostBlocks: 32, diskBlocks: 48, diskBytesPerMs: 128 / 0.2, hasStore: true, minSights: 1 },
          fabric: {
            cardBytesPerMs: BLOCK_BYTES / cardMsPerBlock,
            busBytesPerMs: BLOCK_BYTES / 0.04,
            storeBytesPerMs: BLOCK_BYTES / 0.05,
          },
        },
        workload,
        calls: planWorkload(workload, new SeededRandom(seed)),
        faults: [],
      };
    },
  };
}

async function play(calls: number, cardMsPerBlock: number): Promise<RunResult> {
  const result = await runSeed(aHundredWorkers(7, calls, cardMsPerBlock));
  assert.equal(result.violations.length, 0, failureReport(result));
  return result;
}

test("simulator: a hundred workers split requests over contended links, in virtual time", async () => {
  const result = await play(300, CARD_MS_PER_BLOCK);
  const { transfers } = result;
  assert.ok(transfers.count >= 200, `${transfers.count} handoffs`);
  assert.ok(transfers.tookMs > transfers.aloneMs * 1.05, "transfers hold each other up");
  for (const mark of ["blocks handed over", "blocks restored from host memory", "blocks restored from disk"] as const) {
    assert.ok(result.marks.counts.has(mark), mark);
  }
  // A tenth of the bandwidth: what was alone takes ten times as long, and what waits for others more than that.
  const slow = await play(150, CARD_MS_PER_BLOCK * 10);
  const stretch = ({ aloneMs, tookMs }: RunResult["transfers"]): number => tookMs / aloneMs;
  assert.ok(stretch(slow.transfers) > stretch(transfers), "slower links are fuller");
});
