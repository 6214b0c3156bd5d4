import type { RoutingPolicy } from "./base.ts";

/** The caller names the worker; the router has left only that one, and refuses requests that name none. */
export const directPolicy: RoutingPolicy = {
  name: "direct",
  choose: () => ({ index: 0, reason: "named by the caller" }),
};
