import { kvPolicy, registerPolicy, type RoutingSnapshot } from "../../src/router/policies/index.ts";

/**
 * The kv policy's promise of balance, at each of its decisions: a shared prefix draws requests to the worker that has it,
 * but no worker gets one more when it has as many as the bound says already (router/policies/balance.ts, said again here):
 *
 *     load < max(floor, factor x mean)      floor = half of what an engine runs at once, 2 to 16; factor at least 1.1
 *
 * or has least of all. The policy is the product's; a frontend of a run takes it under this name.
 */
export const WATCHED_KV = "kv-watched";

let tell: ((violation: string) => void) | undefined;
let decisions = 0;

registerPolicy(WATCHED_KV, {
  ...kvPolicy,
  choose: (snapshot) => {
    const choice = kvPolicy.choose(snapshot);
    check(snapshot, choice.index);
    return choice;
  },
});

/** One run at a time. Returns how many decisions there were, when it is over. */
export function watchBalance(onViolation: (violation: string) => void): () => number {
  tell = onViolation;
  decisions = 0;
  return () => {
    tell = undefined;
    return decisions;
  };
}

function check({ candidates, settings }: RoutingSnapshot, chosen: number): void {
  if (tell === undefined || settings.maxImbalance === 0 || candidates.length === 1) return;
  decisions++;
  const loads = candidates.map(({ activeRequests, reportedLoad: { runningRequests, waitingRequests } }) =>
    Math.max(activeRequests, runningRequests + waitingRequests),
  );
  const mean = loads.reduce((sum, load) => sum + load, 0) / loads.length;
  const floor = Math.min(16, Math.max(2, Math.floor(candidates[0]!.capacity.maxSequences / 2)));
  const bound = Math.max(floor, Math.max(1.1, settings.maxImbalance) * mean);
  const load = loads[chosen]!;
  if (load >= bound && load > Math.min(...loads)) {
    tell(`the kv policy gave one more to a worker with ${load} of a mean of ${mean}, loads ${loads.join(" ")}`);
  }
}
