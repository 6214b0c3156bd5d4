import type { RoutingPolicy } from "./base.ts";
import { directPolicy } from "./direct-policy.ts";
import { kvPolicy } from "./kv-policy.ts";
import { leastLoadedPolicy } from "./least-loaded-policy.ts";
import { powerOfTwoPolicy } from "./power-of-two-policy.ts";
import { randomPolicy } from "./random-policy.ts";
import { roundRobinPolicy } from "./round-robin-policy.ts";
import { stayUntilSaturatedPolicy } from "./stay-until-saturated-policy.ts";

export * from "./base.ts";
export { userPolicy } from "./user-policy.ts";
export {
  directPolicy,
  kvPolicy,
  leastLoadedPolicy,
  powerOfTwoPolicy,
  randomPolicy,
  roundRobinPolicy,
  stayUntilSaturatedPolicy,
};

/** By the name of `--router-mode`. */
export const ROUTING_POLICIES = {
  kv: kvPolicy,
  "round-robin": roundRobinPolicy,
  random: randomPolicy,
  "power-of-two": powerOfTwoPolicy,
  "least-loaded": leastLoadedPolicy,
  direct: directPolicy,
  "stay-until-saturated": stayUntilSaturatedPolicy,
} as const satisfies Record<string, RoutingPolicy>;

/** Ours by name; a registered one is any other word. */
export type RouterMode = keyof typeof ROUTING_POLICIES;

const registered = new Map<string, RoutingPolicy>();

/**
 * Makes a policy of one's own available under `--router-mode <name>` in this process. Our names cannot be replaced; run
 * `policyBattery` on it first.
 * @example registerPolicy("last", { name: "last", choose: ({ candidates }) => ({ index: candidates.length - 1, reason: "last" }) })
 */
export function registerPolicy(name: string, policy: RoutingPolicy): void {
  if (Object.hasOwn(ROUTING_POLICIES, name)) throw new RangeError(`${name} is a policy of the router itself`);
  registered.set(name, policy);
}

/** undefined when there is none of that name. */
export function findPolicy(name: string): RoutingPolicy | undefined {
  if (Object.hasOwn(ROUTING_POLICIES, name)) return ROUTING_POLICIES[name as RouterMode];
  return registered.get(name);
}
