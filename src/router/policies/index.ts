import { leastLoadedPolicy } from "./least-loaded-policy.ts";
import { randomPolicy } from "./random-policy.ts";
import { roundRobinPolicy } from "./round-robin-policy.ts";

export * from "./base.ts";
export { leastLoadedPolicy, randomPolicy, roundRobinPolicy };

/** By the name of `--router-mode`. */
export const ROUTING_POLICIES = {
  "round-robin": roundRobinPolicy,
  random: randomPolicy,
  "least-loaded": leastLoadedPolicy,
} as const;

export type RouterMode = keyof typeof ROUTING_POLICIES;
