import { DynamoError } from "../errors/index.ts";
import type { Rank } from "./worker-set.ts";
import type { RouteRequest } from "./route-request.ts";
import type { ActiveSequences } from "./scheduling/active-sequences.ts";
import { hasThresholds, isBusy, type BusyThresholds } from "./scheduling/busy.ts";

/**
 * Which ranks a request may go to. Hard filters: already tried, allowed ids, required taints, the pinned one, busy. Soft
 * filter: a worker that just failed is left out unless nothing else is left, for one must be tried. When no filter
 * applies the router's own array is used as it is: no allocation.
 */
export interface Eligible {
  readonly ranks: readonly Rank[];
  /** How many ranks each filter took out, for the explanation. */
  readonly leftOut: LeftOut;
}

export interface LeftOut {
  readonly tried: number;
  readonly notAllowed: number;
  readonly inhibited: number;
  readonly busy: number;
}

const NOTHING: LeftOut = Object.freeze({ tried: 0, notAllowed: 0, inhibited: 0, busy: 0 });

export interface EligibilityContext {
  readonly model: string;
  readonly ranks: readonly Rank[];
  readonly nowMs: number;
  /** No worker is inhibited from here on. */
  readonly inhibitedUntilMs: number;
  readonly thresholds: BusyThresholds;
  readonly sequences: ActiveSequences;
}

/** Throws `no-workers`, or `worker-full` when all that are left are busy. */
export function eligibleRanks(request: RouteRequest, context: EligibilityContext): Eligible {
  const { ranks, nowMs, inhibitedUntilMs, thresholds, sequences } = context;
  const { excluded, allowed, pinned, requiredTaints, resumedTokens } = request;
  let left = ranks;
  let tried = 0;
  if (excluded !== undefined && excluded.size > 0) {
    left = left.filter((rank) => !excluded.has(rank.instanceId));
    tried = ranks.length - left.length;
  }
  const before = left.length;
  if (allowed !== undefined) left = left.filter((rank) => allowed.has(rank.instanceId));
  if (requiredTaints !== undefined && requiredTaints.length > 0) {
    left = left.filter((rank) => requiredTaints.every((taint) => rank.worker.taints.includes(taint)));
  }
  if (pinned !== undefined) {
    left = left.filter(
      (rank) => rank.instanceId === pinned.instanceId && (pinned.dpRank === undefined || rank.dpRank === pinned.dpRank),
    );
  }
  const notAllowed = before - left.length;
  if (left.length === 0) throw noWorkers(request, context, tried);
  let inhibited = 0;
  if (nowMs < inhibitedUntilMs) {
    const healthy = left.filter((rank) => rank.worker.inhibition.untilMs <= nowMs);
    if (healthy.length > 0) {
      inhibited = left.length - healthy.length;
      left = healthy;
    }
  }
  let busy = 0;
  if (hasThresholds(thresholds)) {
    const free = left.filter((rank) => !isRankBusy(rank, thresholds, sequences));
    busy = left.length - free.length;
    // An answer that is under way was let in before.
    if (free.length === 0 && resumedTokens === undefined) throw allBusy(request, context, busy);
    if (busy > 0 && free.length > 0) left = free;
  }
  const leftOut = left === ranks ? NOTHING : { tried, notAllowed, inhibited, busy };
  return { ranks: left, leftOut };
}

/** The larger of what routers know of and what the worker reports counts: either may be ahead of the other. */
export function isRankBusy(rank: Rank, thresholds: BusyThresholds, sequences: ActiveSequences): boolean {
  return isBusy(thresholds, {
    decodeBlocks: Math.max(sequences.decodeBlocks(rank.slot), rank.reportedLoad.activeBlocks),
    prefillTokens: Math.max(sequences.prefillTokens(rank.slot), rank.reportedLoad.pendingPrefillTokens),
    totalBlocks: rank.capacity.totalBlocks,
    maxBatchedTokens: rank.capacity.maxBatchedTokens,
  });
}

/** Whether a rank can begin at once with a request of so many blocks: a place in its engine and KV memory beside what it has. */
export function hasRoom(rank: Rank, blocks: number, sequences: ActiveSequences): boolean {
  const { capacity, reportedLoad, slot } = rank;
  const requests = Math.max(sequences.requests(slot), reportedLoad.runningRequests + reportedLoad.waitingRequests);
  if (capacity.maxSequences > 0 && requests >= capacity.maxSequences) return false;
  const used = Math.max(sequences.decodeBlocks(slot), reportedLoad.activeBlocks);
  return capacity.totalBlocks === 0 || used + blocks <= capacity.totalBlocks;
}

function noWorkers(request: RouteRequest, { model, ranks }: EligibilityContext, tried: number): DynamoError {
  if (request.pinned !== undefined) {
    return new DynamoError("no-workers", `the named worker does not serve ${model} now`, {
      diagnostic: `worker ${request.pinned.instanceId}, rank ${request.pinned.dpRank ?? "any"}`,
    });
  }
  return new DynamoError("no-workers", `no worker that serves ${model} is available`, {
    diagnostic: `${ranks.length} known, ${tried} already tried`,
  });
}

function allBusy(request: RouteRequest, { model }: EligibilityContext, busy: number): DynamoError {
  const message =
    request.pinned === undefined ? `every worker that serves ${model} is busy` : `the named worker of ${model} is busy`;
  return new DynamoError("worker-full", message, { diagnostic: `${busy} ranks above the busy thresholds` });
}
