import type { RoutingSnapshot } from "./base.ts";
import { requestLoad } from "./base.ts";

/** The candidates' cost without those at the cap of imbalance: Infinity in `masked`. Shared, used within one choice. */
let masked = new Float64Array(16);

/** Index of the lowest value; ties are drawn uniformly by a reservoir of one (the k-th tie wins with probability 1/k). */
export function lowest(values: Float64Array, count: number, random: { nextFloat(): number }): number {
  let best = 0;
  let bestValue = Infinity;
  let ties = 0;
  for (let i = 0; i < count; i++) {
    const value = values[i]!;
    if (value < bestValue) {
      best = i;
      bestValue = value;
      ties = 1;
    } else if (value === bestValue) {
      ties++;
      if (random.nextFloat() * ties < 1) best = i;
    }
  }
  return best;
}

/**
 * One draw with weights exp(-normalised cost / temperature), costs normalised to 0..1 over the finite ones. All equal:
 * uniform.
 */
export function sampled(
  values: Float64Array,
  count: number,
  temperature: number,
  random: { nextFloat(): number },
): number {
  let min = Infinity;
  let max = -Infinity;
  for (let i = 0; i < count; i++) {
    const value = values[i]!;
    if (value === Infinity) continue;
    if (value < min) min = value;
    if (value > max) max = value;
  }
  const range = max > min ? max - min : 1;
  const weight = (value: number): number => (value === Infinity ? 0 : Math.exp(-(value - min) / range / temperature));
  let total = 0;
  for (let i = 0; i < count; i++) total += weight(values[i]!);
  let left = random.nextFloat() * total;
  let last = 0;
  for (let i = 0; i < count; i++) {
    const share = weight(values[i]!);
    if (share === 0) continue;
    last = i;
    left -= share;
    if (left < 0) return i;
  }
  // Rounding may leave a crumb: it belongs to the last candidate that has a share.
  return last;
}

/** The snapshot's costs, with Infinity for candidates whose load is at `cap`. Valid until the next call. */
export function costsBelow(
  { candidates, columns }: RoutingSnapshot,
  cap: number,
): { costs: Float64Array; left: number } {
  const { count } = columns;
  if (cap === Infinity) return { costs: columns.cost, left: count };
  if (masked.length < count) masked = new Float64Array(columns.cost.length);
  let left = 0;
  for (let i = 0; i < count; i++) {
    const isBelow = requestLoad(candidates[i]!) < cap;
    masked[i] = isBelow ? columns.cost[i]! : Infinity;
    if (isBelow) left++;
  }
  return { costs: masked, left };
}
