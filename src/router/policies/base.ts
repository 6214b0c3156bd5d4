import type { LoadSnapshot } from "../../protocol/index.ts";
import type { Random } from "../../std/index.ts";
import type { CandidateColumns, PromptShape } from "../scheduling/cost.ts";

/** What a rank can take, from its model card; 0 = not known. */
export interface WorkerCapacity {
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly totalBlocks: number;
}

/** One data-parallel rank of one worker as a policy sees it. Most workers have one rank, number 0. */
export interface WorkerCandidate {
  /** 16 hex digits. */
  readonly instanceId: string;
  /** Request-plane address. */
  readonly address: string;
  readonly dpRank: number;
  /** Requests this router (and the routers it hears of) has on the rank right now: exact. */
  readonly activeRequests: number;
  /** What the worker last told of itself: at most a quarter of a second old, and of all routers together. */
  readonly reportedLoad: LoadSnapshot;
  readonly capacity: WorkerCapacity;
}

export interface PolicySettings {
  /** 0 = the lowest cost always wins. */
  readonly temperature: number;
  /** See balance.ts; 0 = no bound. */
  readonly maxImbalance: number;
}

/** Everything a policy may look at: one consistent view, made for one decision. Reused for the next one. */
export interface RoutingSnapshot {
  /** At least one; the ineligible (inhibited, excluded, busy, not the pinned one) are already out. By instance id, rank. */
  readonly candidates: readonly WorkerCandidate[];
  /** Overlap, load and cost, aligned with `candidates`. Overlap is filled for policies that ask for it, else 0. */
  readonly columns: CandidateColumns;
  readonly prompt: PromptShape;
  readonly settings: PolicySettings;
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
 * A routing policy: a pure function over one snapshot. Every policy passes `policy.battery.ts`; a user's own joins by
 * `registerPolicy`.
 */
export interface RoutingPolicy {
  readonly name: string;
  /** The prompt is hashed and looked up only for policies that ask for it. @default false */
  readonly usesOverlap?: boolean;
  choose(snapshot: RoutingSnapshot): PolicyChoice;
}

/**
 * load = max(requests routers have there, requests the worker reports running or waiting). The own count is exact and at
 * once, so a burst between two reports still spreads; the reported one adds what other routers sent.
 */
export function requestLoad(candidate: WorkerCandidate): number {
  const reported = candidate.reportedLoad.runningRequests + candidate.reportedLoad.waitingRequests;
  return Math.max(candidate.activeRequests, reported);
}
