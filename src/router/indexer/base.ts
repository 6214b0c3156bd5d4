import type { KvEvent } from "../../protocol/index.ts";

/**
 * The KV index: which worker holds which blocks, per tier. `FlatKvIndex` is the product, `NaiveKvIndex` its oracle; both
 * run `kv-index.battery.ts`. Block identity is the public sequence hash (a block with its whole prefix) as (lo, hi) u32
 * pairs. Owners are ranks: a (worker, data-parallel rank) pair, numbered densely so that sets of ranks are bit sets.
 *
 * The index may under-report (events lost, recovery under way, evicted for its byte budget), never over-report once it
 * has applied everything a worker published.
 */
export type ApplyStatus = "ok" | "parent-block-not-found" | "block-not-found" | "invalid-block";

/** Matched leading blocks per rank; arrays are indexed by rank number and reused from call to call. */
export class OverlapScores {
  /** Leading blocks in the device tier. */
  device: Uint32Array = new Uint32Array(64);
  /** Blocks that continue the device match in host memory, then on disk, then in the shared store or on disk. */
  host: Uint32Array = new Uint32Array(64);
  disk: Uint32Array = new Uint32Array(64);
  shared: Uint32Array = new Uint32Array(64);

  /** Makes room for ranks 0 to count-1 and zeroes them. */
  reset(rankCount: number): void {
    if (rankCount > this.device.length) {
      const size = Math.max(rankCount, this.device.length * 2);
      this.device = new Uint32Array(size);
      this.host = new Uint32Array(size);
      this.disk = new Uint32Array(size);
      this.shared = new Uint32Array(size);
      return;
    }
    this.device.fill(0, 0, rankCount);
    this.host.fill(0, 0, rankCount);
    this.disk.fill(0, 0, rankCount);
    this.shared.fill(0, 0, rankCount);
  }
}

export interface KvIndexStats {
  readonly ranks: number;
  /** Distinct blocks known. */
  readonly blocks: number;
  /** (block, rank, tier) triples. */
  readonly memberships: number;
  readonly bytes: number;
  readonly evictedBlocks: number;
}

export interface KvIndexReader {
  /** Highest rank number in use plus one. */
  readonly rankCount: number;
  /**
   * Fills `into` for every rank: how many of the leading `blockCount` blocks of the chain it holds.
   * `sequenceHashes`: length >= 2 x blockCount.
   */
  findMatches(sequenceHashes: Uint32Array, blockCount: number, into: OverlapScores): void;
  stats(): KvIndexStats;
}

export interface KvIndex extends KvIndexReader {
  /** The rank number of a worker's data-parallel rank, allocating the lowest free one. */
  rankOf(instanceId: string, dpRank: number): number;
  /** Applies one event of that rank. Never throws: what cannot be applied is said in the status. */
  apply(rank: number, event: KvEvent): ApplyStatus;
  /** Forgets all blocks of one rank (a `cleared` event, or before a full restore). */
  clearRank(rank: number): void;
  /** Forgets the worker and frees its rank numbers. */
  removeWorker(instanceId: string): void;
  /** Every block of a rank as stored events, parents before children; for recovery of others and for tests. */
  dump(rank: number): KvEvent[];
}
