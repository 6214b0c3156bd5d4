import { DynamoError } from "../../errors/index.ts";

/**
 * Numbers for ranks: a (worker, data-parallel rank) pair gets the lowest free number, so that sets of ranks stay dense.
 * Workers join and leave rarely; everything here is plain.
 */
/** Far above any cluster (Dynamo is measured with 7,000); bounds what a rank-sized array can cost. */
export const MAX_RANK_COUNT = 65_536;

export interface RankOwner {
  readonly instanceId: string;
  readonly dpRank: number;
}

export class RankTable {
  readonly #byWorker = new Map<string, Map<number, number>>();
  readonly #owners: (RankOwner | undefined)[] = [];
  /** No number below this one is free. */
  #lowestFree = 0;

  /** Highest number in use plus one. */
  get rankCount(): number {
    return this.#owners.length;
  }

  /** Throws `invalid-config` when there are `MAX_RANK_COUNT` already. */
  numberOf(instanceId: string, dpRank: number): number {
    let ranks = this.#byWorker.get(instanceId);
    const known = ranks?.get(dpRank);
    if (known !== undefined) return known;
    let rank = this.#lowestFree;
    while (this.#owners[rank] !== undefined) rank++;
    if (rank >= MAX_RANK_COUNT) {
      throw new DynamoError("invalid-config", `the KV index knows at most ${MAX_RANK_COUNT} ranks`);
    }
    if (ranks === undefined) {
      ranks = new Map();
      this.#byWorker.set(instanceId, ranks);
    }
    ranks.set(dpRank, rank);
    this.#owners[rank] = { instanceId, dpRank };
    this.#lowestFree = rank + 1;
    return rank;
  }

  ownerOf(rank: number): RankOwner | undefined {
    return this.#owners[rank];
  }

  ranksOf(instanceId: string): number[] {
    return [...(this.#byWorker.get(instanceId)?.values() ?? [])];
  }

  remove(instanceId: string): void {
    for (const rank of this.ranksOf(instanceId)) {
      this.#owners[rank] = undefined;
      this.#lowestFree = Math.min(this.#lowestFree, rank);
    }
    this.#byWorker.delete(instanceId);
    while (this.#owners.length > 0 && this.#owners.at(-1) === undefined) this.#owners.pop();
  }
}
