import type { Reason } from "../errors/index.ts";

/**
 * When a worker is left out for a while, and for how long. Only what speaks of the worker counts: push-back for capacity
 * never does, nor does an engine's failure, which may be the request's own. A mark always expires: the first after 5 s
 * (Dynamo's: long enough for discovery to catch up, short enough to forgive), each further one in a row twice as late up to
 * a minute, and a request that finished there starts over. Many streams that lose the same worker at once are one failure.
 */
export const INHIBITION_MS = 5_000;
const MAX_INHIBITION_MS = 60_000;

const WORKER_FAULTS: ReadonlySet<Reason> = new Set<Reason>([
  "worker-lost",
  "worker-unreachable",
  "worker-stalled",
  "connect-timeout",
  "engine-stopped",
  // It is leaving, and discovery will say so.
  "draining",
  "endpoint-not-found",
]);

/** The worker could not go on with a request, and could not with another one either. */
export function isWorkerFault(outcome: string): boolean {
  return WORKER_FAULTS.has(outcome as Reason);
}

export class Inhibition {
  untilMs = -Infinity;
  #failuresInARow = 0;

  /** True when this is a new failure, not another report of the one that is being waited for. */
  fail(nowMs: number): boolean {
    if (nowMs < this.untilMs) return false;
    this.untilMs = nowMs + Math.min(MAX_INHIBITION_MS, INHIBITION_MS * 2 ** this.#failuresInARow);
    this.#failuresInARow++;
    return true;
  }

  succeed(): void {
    this.#failuresInARow = 0;
  }
}
