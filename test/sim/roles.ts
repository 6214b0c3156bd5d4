import type { WorkerRole } from "../../src/protocol/index.ts";
import type { SplitMode } from "../../src/router/index.ts";
import { SeededRandom } from "../../src/std/index.ts";
import type { HandoffConfig } from "../../src/worker/index.ts";
import { ROLE_FAULT_KINDS, planFaults, type FaultKind } from "./faults.ts";
import type { RunPlan } from "./simulation.ts";
import { Draw } from "./workload.ts";

/**
 * Prefill apart from decode: each fifth seed has workers of both roles, which hand blocks over on the simulated transfer
 * plane (`transfers.ts`), and faults that strike at a point of a handoff instead of at a time (`role-faults.ts`).
 */
export interface RolesShape {
  /** By seat; seats beyond decode. */
  readonly workers: readonly WorkerRole[];
  readonly handoff: Omit<HandoffConfig, "transfer">;
}

const EACH_SEED = 5;
const WITH_ROLES = 3;
const MOCK_BLOCK_BYTES = 64;
/** The claim of a decode worker that is dead: its deadline and what the product adds. */
export const CLAIMS_END_MS = 12_000;
const HANDOFF_TIMEOUT_MS = 1_000;

/** Every fifth seed; the others are what they were without roles. */
export function withRoles(plan: RunPlan, seed: number, kinds: readonly FaultKind[] | undefined): RunPlan {
  if (seed % EACH_SEED !== WITH_ROLES) return plan;
  const random = new SeededRandom(seed ^ 0x501e5);
  const draw = new Draw(random);
  const workers = Math.max(2, plan.cluster.workers);
  const others = Array.from({ length: workers - 2 }, () => draw.pick(["prefill", "decode", "decode", "agg"] as const));
  const roles: RolesShape = {
    workers: ["prefill", "decode", ...others],
    handoff: {
      memoryBytes: MOCK_BLOCK_BYTES * draw.pick([8, 256, 256]),
      leaseMs: 3_000,
      pullTimeoutMs: 1_500,
    },
  };
  const disagg: SplitMode = draw.pick(["always", "always", "auto"]);
  const count = plan.faults.length === 0 ? 0 : draw.int(1, 3);
  const struck = planFaults(count, plan.workload.spanMs, kinds ?? ROLE_FAULT_KINDS, random);
  return {
    ...plan,
    cluster: {
      ...plan.cluster,
      workers,
      roles,
      fabric: { ...plan.cluster.fabric, cardBytesPerMs: MOCK_BLOCK_BYTES / draw.pick([0.05, 0.5, 5]) },
      frontend: { ...plan.cluster.frontend, disagg, handoffTimeoutMs: HANDOFF_TIMEOUT_MS },
    },
    faults: [...plan.faults.slice(0, 3), ...struck].toSorted((a, b) => a.atMs - b.atMs),
  };
}
