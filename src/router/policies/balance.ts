import { requestLoad, type RoutingSnapshot } from "./base.ts";

/**
 * The bound on imbalance. The cost function counts a shared prefix once, so a hot one makes its worker look nearly free:
 * a thousand short questions about one long document would all go to the worker that has it, while others idle. So the
 * KV policies choose only among candidates with
 *
 *   load < cap,   cap = max(floor, factor x mean load),   floor = half of what the engine runs at once, 2 to 16
 *
 * Below the floor a worker batches its requests and nothing is lost by staying; above it the prefix is computed a second
 * time elsewhere, and is hot there too. With load = requests, a worker never has more than the cap + 1, whatever the
 * prompts. At least one candidate is always under the cap: the least loaded is at most at the mean.
 */
export function loadCap({ candidates, settings }: RoutingSnapshot): number {
  if (settings.maxImbalance === 0 || candidates.length === 1) return Infinity;
  let sum = 0;
  for (let i = 0; i < candidates.length; i++) sum += requestLoad(candidates[i]!);
  const sequences = candidates[0]!.capacity.maxSequences;
  const floor = sequences === 0 ? FLOOR_MAX : Math.max(FLOOR_MIN, Math.min(FLOOR_MAX, sequences >> 1));
  // A factor of one would already refuse everybody at the mean.
  return Math.max(floor, Math.max(settings.maxImbalance, FACTOR_MIN) * (sum / candidates.length));
}

const FLOOR_MIN = 2;
const FLOOR_MAX = 16;
const FACTOR_MIN = 1.1;
