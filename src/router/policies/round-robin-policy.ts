import type { RoutingPolicy } from "./base.ts";

/** candidate = turn mod count. Each worker gets every count-th request while the set stays the same. */
export const roundRobinPolicy: RoutingPolicy = {
  name: "round-robin",
  choose: ({ candidates, turn }) => ({ index: turn % candidates.length, reason: "next in turn" }),
};
