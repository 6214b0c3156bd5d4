import { loadCap } from "./balance.ts";
import type { RoutingPolicy } from "./base.ts";
import { costsBelow, lowest, sampled } from "./select.ts";

/**
 * The lowest cost (scheduling/cost.ts) among the candidates below the bound on imbalance (balance.ts); ties uniformly.
 * With a temperature, one draw by cost instead.
 */
export const kvPolicy: RoutingPolicy = {
  name: "kv",
  usesOverlap: true,
  choose(snapshot) {
    const { columns, settings, random } = snapshot;
    const { costs, left } = costsBelow(snapshot, loadCap(snapshot));
    const isBounded = left < columns.count;
    if (settings.temperature > 0) {
      const index = sampled(costs, columns.count, settings.temperature, random);
      return { index, reason: isBounded ? "drawn by cost, without the overloaded" : "drawn by cost" };
    }
    const index = lowest(costs, columns.count, random);
    return { index, reason: isBounded ? "lowest cost of those below the bound on imbalance" : "lowest cost" };
  },
};
