import { loadCap } from "./balance.ts";
import { requestLoad, type RoutingPolicy, type WorkerCandidate } from "./base.ts";
import { overlapOf } from "../scheduling/cost.ts";
import { lowest } from "./select.ts";

/**
 * The longest cached prefix wins as long as its worker is not saturated:
 *
 *   saturated = requests >= its sequences, or prefill backlog >= one batch, or blocks in use >= 90 %, or at the bound on
 *               imbalance
 *
 * Among equal prefixes the lowest cost; when all are saturated, the lowest cost of all. Reuses more than `kv` when
 * prompts share long prefixes and workers have room; waits longer near saturation.
 */
export const stayUntilSaturatedPolicy: RoutingPolicy = {
  name: "stay-until-saturated",
  usesOverlap: true,
  choose(snapshot) {
    const { candidates, columns, random } = snapshot;
    const cap = loadCap(snapshot);
    let best = -1;
    let bestOverlap = -1;
    let bestCost = Infinity;
    let ties = 0;
    for (let i = 0; i < columns.count; i++) {
      const candidate = candidates[i]!;
      if (requestLoad(candidate) >= cap) continue;
      if (isSaturated(candidate, columns.prefillTokens[i]!, columns.decodeBlocks[i]!)) continue;
      const overlap = overlapOf(columns, i);
      const cost = columns.cost[i]!;
      if (overlap > bestOverlap || (overlap === bestOverlap && cost < bestCost)) {
        best = i;
        bestOverlap = overlap;
        bestCost = cost;
        ties = 1;
      } else if (overlap === bestOverlap && cost === bestCost) {
        ties++;
        if (random.nextFloat() * ties < 1) best = i;
      }
    }
    if (best >= 0) return { index: best, reason: "longest cached prefix with room" };
    return { index: lowest(columns.cost, columns.count, random), reason: "all saturated: lowest cost" };
  },
};

const FULL_SHARE = 0.9;

function isSaturated(candidate: WorkerCandidate, prefillTokens: number, blocks: number): boolean {
  const { maxSequences, maxBatchedTokens, totalBlocks } = candidate.capacity;
  if (maxSequences > 0 && candidate.activeRequests >= maxSequences) return true;
  if (maxBatchedTokens > 0 && prefillTokens >= maxBatchedTokens) return true;
  return totalBlocks > 0 && blocks >= FULL_SHARE * totalBlocks;
}
