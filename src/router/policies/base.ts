import type { LoadSnapshot } from "../../protocol/index.ts";
import type { Random } from "../../std/index.ts";

/** One worker as a policy sees it. */
export interface WorkerCandidate {
  /** 16 hex digits. */
  readonly instanceId: string;
  /** Request-plane address. */
  readonly address: string;
  /** Requests this router has on the worker right now: exact. */
  readonly activeRequests: number;
  /** What the worker last told of itself: at most a quarter of a second old, and of all routers together. */
  readonly reportedLoad: LoadSnapshot;
}

/** Everything a policy may look at: one consistent view, made for one decision. */
export interface RoutingSnapshot {
  /** At least one; the ineligible (inhibited, excluded, not the pinned one) are already out. Sorted by instance id. */
  readonly candidates: readonly WorkerCandidate[];
  /** Decisions made before this one. */
  readonly turn: number;
  readonly random: Random;
}

export interface PolicyChoice {
  /** Into `candidates`. */
  readonly index: number;
  /** Why, in a few words, for the explanation. */
  readonly reason: string;
}

/**
 * A routing policy: a pure function over one snapshot. Every policy passes `policy.battery.ts`. KV-aware routing joins
 * here as one more policy once the snapshot carries overlaps.
 */
export interface RoutingPolicy {
  readonly name: string;
  choose(snapshot: RoutingSnapshot): PolicyChoice;
}
