import { requestLoad, type RoutingPolicy } from "./base.ts";

/** The least `requestLoad` wins, ties are drawn uniformly. */
export const leastLoadedPolicy: RoutingPolicy = {
  name: "least-loaded",
  choose({ candidates, random }) {
    let best = 0;
    let bestLoad = Infinity;
    let ties = 0;
    for (let i = 0; i < candidates.length; i++) {
      const load = requestLoad(candidates[i]!);
      if (load < bestLoad) {
        best = i;
        bestLoad = load;
        ties = 1;
      } else if (load === bestLoad) {
        // Reservoir of one: the k-th tie replaces the choice with probability 1/k.
        ties++;
        if (random.nextFloat() * ties < 1) best = i;
      }
    }
    return { index: best, reason: "least loaded" };
  },
};
