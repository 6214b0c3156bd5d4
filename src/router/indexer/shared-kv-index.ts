import { OverlapScores, type KvIndexReader, type KvIndexStats } from "./base.ts";
import { FlatKvIndexReader } from "./flat-kv-index-reader.ts";
import type { FlatKvShare } from "./flat-kv-memory.ts";
import { RankTable } from "./rank-table.ts";

/**
 * An index that another thread writes, with rank numbers of this thread's own: a router needs a number for a worker at
 * once, the writer's becomes known by message and may come before or after. Until both are there, and after either is
 * gone, the worker scores nothing: under-report, never somebody else's blocks for longer than a message travels.
 *
 * One per thread and model; nothing to close. Cost over a plain reader: one pass over the ranks per lookup.
 */
export class SharedKvIndex implements KvIndexReader {
  readonly #ranks = new RankTable();
  /** By own rank number: the writer's, or -1. */
  #writerRankOf = new Int32Array(64).fill(-1);
  /** By worker, then data-parallel rank, as the writer told. */
  readonly #told = new Map<string, readonly number[]>();
  /** Highest of the writer's numbers ever told, plus one. */
  #writerRankCount = 0;
  #reader: FlatKvIndexReader | undefined;
  readonly #scores = new OverlapScores();
  /** Of former indexes. */
  #starvedBefore = 0;

  /** The writer's index of now; undefined when it has none. What was told of ranks speaks of the former one. */
  attach(share: FlatKvShare | undefined): void {
    this.#starvedBefore = this.starvedLookups;
    this.#reader = share && new FlatKvIndexReader(share);
    this.#told.clear();
    this.#writerRankCount = 0;
    this.#writerRankOf.fill(-1);
  }

  /** The writer's numbers for a worker's ranks; none when it forgot the worker. */
  setWriterRanks(instanceId: string, writerRanks: readonly number[]): void {
    if (writerRanks.length === 0) this.#told.delete(instanceId);
    else this.#told.set(instanceId, writerRanks);
    for (const rank of writerRanks) this.#writerRankCount = Math.max(this.#writerRankCount, rank + 1);
    for (const rank of this.#ranks.ranksOf(instanceId)) this.#link(rank);
  }

  get rankCount(): number {
    return this.#ranks.rankCount;
  }

  rankOf(instanceId: string, dpRank: number): number {
    const rank = this.#ranks.numberOf(instanceId, dpRank);
    if (rank >= this.#writerRankOf.length) {
      const larger = new Int32Array(Math.max(rank + 1, 2 * this.#writerRankOf.length)).fill(-1);
      larger.set(this.#writerRankOf);
      this.#writerRankOf = larger;
    }
    this.#link(rank);
    return rank;
  }

  removeWorker(instanceId: string): void {
    for (const rank of this.#ranks.ranksOf(instanceId)) this.#writerRankOf[rank] = -1;
    this.#ranks.remove(instanceId);
  }

  findMatches(sequenceHashes: Uint32Array, blockCount: number, into: OverlapScores): void {
    const { rankCount } = this;
    into.reset(rankCount);
    if (this.#reader === undefined) return;
    const scores = this.#scores;
    // The reader zeroes as many as there are ranks in use, which may be fewer than were told.
    scores.reset(this.#writerRankCount);
    this.#reader.findMatches(sequenceHashes, blockCount, scores);
    for (let rank = 0; rank < rankCount; rank++) {
      const writerRank = this.#writerRankOf[rank]!;
      if (writerRank < 0) continue;
      into.device[rank] = scores.device[writerRank]!;
      into.host[rank] = scores.host[writerRank]!;
      into.disk[rank] = scores.disk[writerRank]!;
      into.shared[rank] = scores.shared[writerRank]!;
    }
  }

  /** Lookups that found nothing because the index never stood still. */
  get starvedLookups(): number {
    return this.#starvedBefore + (this.#reader?.starvedLookups ?? 0);
  }

  stats(): KvIndexStats {
    return this.#reader?.stats() ?? { ranks: 0, blocks: 0, memberships: 0, bytes: 0, evictedBlocks: 0 };
  }

  #link(rank: number): void {
    const { instanceId, dpRank } = this.#ranks.ownerOf(rank)!;
    this.#writerRankOf[rank] = this.#told.get(instanceId)?.[dpRank] ?? -1;
  }
}
