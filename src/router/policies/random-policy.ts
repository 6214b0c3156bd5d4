import type { RoutingPolicy } from "./base.ts";

/** Uniform over the candidates. */
export const randomPolicy: RoutingPolicy = {
  name: "random",
  choose: ({ candidates, random }) => ({ index: Math.floor(random.nextFloat() * candidates.length), reason: "drawn" }),
};
