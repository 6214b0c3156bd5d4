import { EMPTY_LOAD, type LoadSnapshot } from "../protocol/index.ts";
import type { WorkerCandidate, WorkerCapacity } from "./policies/index.ts";
import { Inhibition } from "./inhibition.ts";
import { taintMultiplier } from "./scheduling/cost.ts";
import type { ActiveSequences } from "./scheduling/active-sequences.ts";

/** What the router is told of a worker when it joins; all of it is in the worker's model card. */
export interface WorkerDetails {
  /** @default 1 */
  readonly dataParallelSize?: number;
  /** Of one rank. @default not known */
  readonly capacity?: WorkerCapacity;
  /** Labels that requests can require or prefer, such as a topology domain. */
  readonly taints?: readonly string[];
}

/** One data-parallel rank: what a request is sent to. */
export class Rank implements WorkerCandidate {
  readonly worker: Worker;
  readonly instanceId: string;
  readonly address: string;
  readonly dpRank: number;
  readonly capacity: WorkerCapacity;
  /** In the router's own load tracking. */
  readonly slot: number;
  /** In the KV index; -1 without one. */
  readonly indexRank: number;
  readonly #sequences: ActiveSequences;
  reportedLoad: LoadSnapshot = EMPTY_LOAD;

  constructor(worker: Worker, dpRank: number, indexRank: number, sequences: ActiveSequences) {
    this.worker = worker;
    this.instanceId = worker.instanceId;
    this.address = worker.address;
    this.capacity = worker.capacity;
    this.dpRank = dpRank;
    this.indexRank = indexRank;
    this.#sequences = sequences;
    this.slot = sequences.addSlot();
  }

  get activeRequests(): number {
    return this.#sequences.requests(this.slot);
  }

  /** Prompt tokens that routers have there and that are not computed yet. */
  get prefillTokens(): number {
    return this.#sequences.prefillTokens(this.slot);
  }

  /** Blocks of the requests that routers have there. */
  get decodeBlocks(): number {
    return this.#sequences.decodeBlocks(this.slot);
  }
}

const UNKNOWN_CAPACITY: WorkerCapacity = Object.freeze({ maxSequences: 0, maxBatchedTokens: 0, totalBlocks: 0 });
const NO_TAINTS: readonly string[] = Object.freeze([]);

export class Worker {
  readonly instanceId: string;
  readonly address: string;
  readonly capacity: WorkerCapacity;
  readonly taints: readonly string[];
  readonly ranks: readonly Rank[];
  reportedLoad: LoadSnapshot = EMPTY_LOAD;
  readonly inhibition = new Inhibition();

  constructor(
    instanceId: string,
    address: string,
    details: WorkerDetails,
    sequences: ActiveSequences,
    indexRankOf: (dpRank: number) => number,
  ) {
    this.instanceId = instanceId;
    this.address = address;
    this.capacity = details.capacity ?? UNKNOWN_CAPACITY;
    this.taints = details.taints ?? NO_TAINTS;
    this.ranks = Array.from(
      { length: details.dataParallelSize ?? 1 },
      (_, dpRank) => new Rank(this, dpRank, indexRankOf(dpRank), sequences),
    );
  }

  get activeRequests(): number {
    let sum = 0;
    for (const rank of this.ranks) sum += rank.activeRequests;
    return sum;
  }

  /** A report speaks of the whole worker: each rank gets its part. */
  report(load: LoadSnapshot): void {
    this.reportedLoad = load;
    const count = this.ranks.length;
    const part =
      count === 1
        ? load
        : {
            ...load,
            runningRequests: load.runningRequests / count,
            waitingRequests: load.waitingRequests / count,
            activeBlocks: load.activeBlocks / count,
            pendingPrefillTokens: load.pendingPrefillTokens / count,
          };
    for (const rank of this.ranks) rank.reportedLoad = part;
  }
}

/** A taint that a request would like its worker to have (weight above 0) or not to have (below 0). */
export interface PreferredTaint {
  readonly taint: string;
  readonly weight: number;
}

export function preferenceMultiplier(worker: Worker, preferred: readonly PreferredTaint[]): number {
  let sum = 0;
  for (const { taint, weight } of preferred) if (worker.taints.includes(taint)) sum += weight;
  return taintMultiplier(sum);
}
