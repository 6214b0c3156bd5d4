import assert from "node:assert/strict";
import { test } from "node:test";
import type { WorkerRole } from "../../src/protocol/index.ts";
import { SeededRandom } from "../../src/std/index.ts";
import type { PlannedFault } from "./faults.ts";
import { failureReport } from "./report.ts";
import { runSeed, type RunPlan } from "./simulation.ts";
import { planWorkload } from "./workload.ts";

/**
 * Bugs that the simulator found, each as a scene of its own: the seed still draws the requests, but the cluster and the
 * faults are written down, so that a change of what seeds draw does not take the scene away. The seed that found the bug
 * is in docs/design/simulator.md.
 */
interface Scene {
  readonly name: string;
  readonly cluster: Partial<RunPlan["cluster"]>;
  readonly faults: readonly PlannedFault[];
  /** Several, where the order of things matters. */
  readonly seeds: readonly number[];
  /** An error code that no client may see. */
  readonly never?: string;
}

/** Scenes say themselves when they have roles or tiers. */
function plain(cluster: RunPlan["cluster"]): RunPlan["cluster"] {
  return { ...cluster, roles: undefined, tiers: undefined };
}

function withPrefill(workers: readonly WorkerRole[]): Pick<RunPlan["cluster"], "roles"> {
  return { roles: { workers, handoff: { memoryBytes: 16_384, leaseMs: 3_000, pullTimeoutMs: 1_500 } } };
}

const SCENES: readonly Scene[] = [
  {
    name: "a worker whose connection was reset answers though both others died meanwhile",
    cluster: { workers: 3, frontends: 1, eventLossShare: 0 },
    faults: [
      { kind: "kill worker", atMs: 600, forMs: 0, seat: 0 },
      { kind: "kill worker", atMs: 600, forMs: 0, seat: 1 },
      { kind: "reset connection", atMs: 700, forMs: 0 },
    ],
    seeds: [13, 16, 17, 23],
  },
  {
    name: "a frontend that starts while a dead worker stands in discovery serves the others at once",
    cluster: { workers: 4, frontends: 2, eventLossShare: 0 },
    faults: [
      { kind: "power off worker", atMs: 100, forMs: 0, seat: 0 },
      { kind: "power off worker", atMs: 110, forMs: 0, seat: 1 },
      { kind: "power off worker", atMs: 120, forMs: 0, seat: 2 },
      { kind: "kill frontend", atMs: 200, forMs: 0, seat: 0 },
    ],
    seeds: [1, 2, 3, 4, 5, 6],
  },
  {
    name: "an engine's error and the clean end of its stream make one migration, not two that both answer",
    cluster: { workers: 3, frontends: 1 },
    faults: [
      { kind: "engine dies", atMs: 300, forMs: 0, seat: 0 },
      { kind: "engine dies", atMs: 900, forMs: 0, seat: 1 },
    ],
    seeds: [1, 2, 3, 4],
  },
  {
    name: "a publisher that leaves while its last event is lost harms no subscription in memory",
    cluster: { workers: 3, frontends: 2, eventLossShare: 0.3 },
    faults: [
      { kind: "drain worker", atMs: 300, forMs: 0, seat: 0 },
      { kind: "drain worker", atMs: 600, forMs: 0, seat: 1 },
    ],
    seeds: [1, 2, 3, 4],
  },
  {
    name: "discovery out of reach for longer than a lease costs nobody an answer",
    cluster: { workers: 3, frontends: 2 },
    faults: [{ kind: "discovery down", atMs: 50, forMs: 30_000 }],
    seeds: [1, 2, 3],
  },
  {
    name: "the only worker, cut off from discovery for longer than its lease, goes on serving those it has a connection to",
    cluster: { workers: 1, frontends: 2 },
    faults: [{ kind: "discovery unreachable", atMs: 50, forMs: 30_000, seat: 0 }],
    seeds: [1, 2, 3, 4],
    never: "no_workers",
  },
  {
    name: "a request that the well worker is too full for and the next one too dead is told that they are full",
    cluster: { workers: 2, frontends: 1, maxQueuedRequests: 0 },
    faults: [{ kind: "power off worker", atMs: 300, forMs: 0, seat: 0 }],
    seeds: [1, 2, 3, 4, 5],
    never: "worker_unreachable",
  },
  {
    name: "a worker that changes its role while discovery goes out of reach is known again afterwards",
    cluster: { workers: 3, frontends: 2, ...withPrefill(["prefill", "decode", "agg"]) },
    faults: [
      { kind: "change role", atMs: 500, forMs: 0, seat: 2 },
      { kind: "discovery down", atMs: 505, forMs: 3_000 },
    ],
    seeds: [1, 2, 3],
  },
];

for (const { name, cluster, faults, seeds, never } of SCENES) {
  test(`simulator: ${name}`, async () => {
    for (const seed of seeds) {
      const result = await runSeed({
        seed,
        change: (plan) => {
          return { ...plan, cluster: { ...plain(plan.cluster), maxQueuedRequests: 64, ...cluster }, faults };
        },
      });
      assert.equal(result.violations.length, 0, failureReport(result));
      const codes = [...result.outcomes.keys()].map((outcome) => outcome.split(" ").at(-1));
      assert.ok(never === undefined || !codes.includes(never), failureReport(result));
      const planned = new Set(faults.map(({ kind }) => kind));
      assert.deepEqual(new Set(result.faults.keys()), planned, "the faults of the scene happened");
    }
  });
}

test("simulator: an answer longer than a stream's window goes on as its client reads, on the only worker", async () => {
  for (const seed of [1, 2, 3]) {
    const result = await runSeed({
      seed,
      change: (plan) => {
        const workload = { ...plan.workload, calls: 5, maxTokens: 3_000, contextLength: 4_096, oddShare: 0 };
        const engine = { ...plan.cluster.engine, contextLength: 4_096, totalBlocks: 1_024, speedupRatio: 8 };
        const limits = { ...plan.cluster.frontend.limits, requestTimeoutMs: 60_000 };
        const frontend = { ...plan.cluster.frontend, limits, stallLimitMs: 1_500 };
        return {
          cluster: { ...plain(plan.cluster), engine, frontend, workers: 1, frontends: 1 },
          workload,
          calls: planWorkload(workload, new SeededRandom(seed)),
          faults: [],
        };
      },
    });
    assert.equal(result.violations.length, 0, failureReport(result));
  }
});

test("simulator: the last events of a worker, lost with their replays, are in the index all the same", async () => {
  for (const seed of [1, 2, 3, 4]) {
    const result = await runSeed({
      seed,
      change: (plan) => {
        // All is quiet for seconds before the losses end: no later event tells of the gap.
        const workload = { ...plan.workload, spanMs: 6_000 };
        const calls = planWorkload({ ...workload, spanMs: 1_000, oddShare: 0 }, new SeededRandom(seed));
        const frontend = { ...plan.cluster.frontend, routerMode: "kv" };
        return { cluster: { ...plain(plan.cluster), frontend, eventLossShare: 0.7 }, workload, calls, faults: [] };
      },
    });
    assert.equal(result.violations.length, 0, failureReport(result));
  }
});

test("simulator: streams of one frontend put back for want of memory, while another's go on, stay with the worker", async () => {
  for (const seed of [1, 2, 3, 4, 5, 6]) {
    const result = await runSeed({
      seed,
      change: (plan) => {
        const workload = { ...plan.workload, calls: 40, spanMs: 1_000, oddShare: 0 };
        const engine = { ...plan.cluster.engine, totalBlocks: 40, speedupRatio: 1 };
        const limits = { ...plan.cluster.frontend.limits, requestTimeoutMs: 120_000 };
        const frontend = { ...plan.cluster.frontend, limits, stallLimitMs: 1_500 };
        return {
          cluster: {
            ...plain(plan.cluster),
            engine,
            frontend,
            workers: 1,
            frontends: 3,
            maxQueuedRequests: 64,
            eventLossShare: 0,
          },
          workload,
          calls: planWorkload(workload, new SeededRandom(seed)),
          faults: [],
        };
      },
    });
    assert.equal(result.violations.length, 0, failureReport(result));
  }
});

/** Found by chance, and too rare for a scene: good for as long as the seed draws what it drew then. */
const SEEDS: readonly (readonly [number, string])[] = [
  [415693, "the one worker that decodes is asked again though a connection to it was reset while it was being made"],
  [421, "usage ends with the token that completes a stop string, also when a pause brought many tokens at once"],
];

for (const [seed, name] of SEEDS) {
  test(`simulator, seed ${seed}: ${name}`, async () => {
    const result = await runSeed({ seed });
    assert.equal(result.violations.length, 0, failureReport(result));
  });
}
