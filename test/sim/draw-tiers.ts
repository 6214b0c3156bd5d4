import { SeededRandom } from "../../src/std/index.ts";
import { TIER_FAULT_KINDS, planFaults, type FaultKind } from "./faults.ts";
import type { RunPlan } from "./simulation.ts";
import type { TiersShape } from "./tiers.ts";
import { Draw, planWorkload } from "./workload.ts";

const ENTRY_BYTES = 128;
/** Some meet a request only when they last, or when it has blocks there. */
const OFTEN: readonly FaultKind[] = [...TIER_FAULT_KINDS, "disk hangs", "disk hangs", "store hangs", "store corrupts"];

/** Each tenth seed, and half of those with roles. */
export function withTiers(plan: RunPlan, seed: number, kinds: readonly FaultKind[] | undefined): RunPlan {
  if (seed % 10 !== 6 && seed % 10 !== 3) return plan;
  const random = new SeededRandom(seed ^ 0x71e25);
  const draw = new Draw(random);
  const tiers: TiersShape = {
    hostBlocks: draw.pick([16, 32, 128]),
    diskBlocks: draw.pick([0, 64, 256]),
    diskBytesPerMs: ENTRY_BYTES / draw.pick([0.02, 0.2, 2]),
    hasStore: draw.chance(0.6),
    minSights: draw.pick([1, 1, 2]),
  };
  const count = plan.faults.length === 0 ? 0 : draw.int(1, 4);
  // More prompts than the caches hold, that begin alike: blocks fall out and are asked for again.
  const workload = { ...plan.workload, prefixes: { count: 6, least: 100, most: 300 } };
  const struck = planFaults(count, plan.workload.spanMs, kinds ?? OFTEN, random);
  return {
    ...plan,
    workload,
    calls: planWorkload(workload, random),
    cluster: {
      ...plan.cluster,
      tiers,
      fabric: { ...plan.cluster.fabric, storeBytesPerMs: ENTRY_BYTES / draw.pick([0.2, 2]) },
      // Small caches, so that blocks fall out of them.
      engine: { ...plan.cluster.engine, dataParallelSize: 1, totalBlocks: draw.pick([40, 48, 64]) },
    },
    faults: [...plan.faults.slice(0, 4), ...struck].toSorted((a, b) => a.atMs - b.atMs),
  };
}
