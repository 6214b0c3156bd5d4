import { requestLoad, type RoutingPolicy } from "./base.ts";

/**
 * Two different candidates drawn uniformly, the less loaded wins (Mitzenmacher 2001): nearly as even as least-loaded, and
 * routers with the same stale reports do not all run to the same worker.
 */
export const powerOfTwoPolicy: RoutingPolicy = {
  name: "power-of-two",
  choose({ candidates, random }) {
    const count = candidates.length;
    const first = Math.floor(random.nextFloat() * count);
    if (count === 1) return { index: first, reason: "the only one" };
    const second = (first + 1 + Math.floor(random.nextFloat() * (count - 1))) % count;
    // The order of the draw is itself random, so a tie is too.
    const index = requestLoad(candidates[second]!) < requestLoad(candidates[first]!) ? second : first;
    return { index, reason: "the less loaded of two drawn" };
  },
};
