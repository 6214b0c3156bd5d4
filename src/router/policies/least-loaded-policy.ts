import type { RoutingPolicy, WorkerCandidate } from "./base.ts";

/**
 * load = max(requests this router has there, requests the worker reports running or waiting); the least wins, ties are
 * drawn uniformly. The own count is exact and at once, so a burst between two reports still spreads; the reported one
 * adds what other routers sent.
 */
export const leastLoadedPolicy: RoutingPolicy = {
  name: "least-loaded",
  choose({ candidates, random }) {
    let best = 0;
    let bestLoad = Infinity;
    let ties = 0;
    for (let i = 0; i < candidates.length; i++) {
      const load = loadOf(candidates[i]!);
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
    return { index: best, reason: `least loaded with ${bestLoad} requests` };
  },
};

function loadOf(candidate: WorkerCandidate): number {
  const reported = candidate.reportedLoad.runningRequests + candidate.reportedLoad.waitingRequests;
  return Math.max(candidate.activeRequests, reported);
}
