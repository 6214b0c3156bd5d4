import type { Clock } from "../../std/index.ts";
import type { KvIndexReader, KvIndexStats, OverlapScores } from "../indexer/base.ts";
import { ChainTable, grown } from "./chain-table.ts";

/**
 * A KV index without events: what this router sent to a rank is taken to be cached there for a while. For engines that
 * publish no events (`--no-router-kv-events`), and beside events for the moment between a decision and the engine's
 * word of it (`--router-predicted-ttl-secs`).
 *
 * One life time for all entries means that the order of their last use is the order in which they fall due: one linked
 * list takes the place of a timing wheel, and expiry happens on the way in, without a timer:
 *
 *     oldest ◄──► ... ◄──► newest      record: blocks move to the newest end, deepest first, the root last
 *       └ due? remove                   too many: remove from the oldest end until 80 % are left
 *
 * So a rank never holds a block without the one before it (the invariant of the chain table), and pruning takes leaves
 * before their parents. Cost per recorded block 0.1 us; memory at most about 75 bytes per (block, rank). May over-report:
 * engines evict when they like. Owned by the router.
 */
export interface ApproximateIndexOptions {
  readonly clock: Clock;
  readonly ttlMs: number;
  /** (block, rank) pairs. @default 2^20 */
  readonly maxMembers?: number;
}

const NONE = -1;
const MAX_MEMBERS = 1 << 20;
const KEPT_WHEN_PRUNING = 0.8;

export class ApproximateIndex implements KvIndexReader {
  readonly #table = new ChainTable();
  readonly #clock: Clock;
  readonly #ttlMs: number;
  readonly #maxMembers: number;
  #dueMs = new Float64Array(this.#table.memberCapacity);
  #older = new Int32Array(this.#table.memberCapacity);
  #newer = new Int32Array(this.#table.memberCapacity);
  #oldest = NONE;
  #newest = NONE;
  #rankCount = 0;
  #prunedBlocks = 0;

  constructor({ clock, ttlMs, maxMembers = MAX_MEMBERS }: ApproximateIndexOptions) {
    this.#clock = clock;
    this.#ttlMs = ttlMs;
    this.#maxMembers = maxMembers;
  }

  get rankCount(): number {
    return this.#rankCount;
  }

  /** A prompt with these blocks was sent to `rank`. */
  record(rank: number, sequenceHashes: Uint32Array, blockCount: number): void {
    const nowMs = this.#clock.monotonicMs();
    this.#expire(nowMs);
    this.#rankCount = Math.max(this.#rankCount, rank + 1);
    // A prompt beyond the bound would push out its own root: its head is what others can share.
    const recorded = Math.min(blockCount, Math.floor(this.#maxMembers * KEPT_WHEN_PRUNING));
    for (let block = recorded - 1; block >= 0; block--) {
      const node = this.#table.add(sequenceHashes[2 * block]!, sequenceHashes[2 * block + 1]!, rank);
      if (!this.#table.isNew) this.#unlink(node);
      else if (node >= this.#dueMs.length) this.#grow();
      this.#append(node, nowMs + this.#ttlMs);
    }
    if (this.#table.memberCount > this.#maxMembers) this.#prune();
  }

  findMatches(sequenceHashes: Uint32Array, blockCount: number, into: OverlapScores): void {
    into.reset(this.#rankCount);
    this.#expire(this.#clock.monotonicMs());
    this.#table.leadingInto(sequenceHashes, blockCount, into.device);
  }

  /** The rank left, or lost its cache. */
  clearRank(rank: number): void {
    this.#table.forEachOfRank(rank, (node) => this.#remove(node));
  }

  stats(): KvIndexStats {
    return {
      ranks: this.#rankCount,
      blocks: this.#table.blockCount,
      memberships: this.#table.memberCount,
      bytes: this.#table.bytes + this.#dueMs.length * 16,
      evictedBlocks: this.#prunedBlocks,
    };
  }

  #expire(nowMs: number): void {
    while (this.#oldest !== NONE && this.#dueMs[this.#oldest]! <= nowMs) this.#remove(this.#oldest);
  }

  #prune(): void {
    const kept = Math.floor(this.#maxMembers * KEPT_WHEN_PRUNING);
    while (this.#table.memberCount > kept) {
      this.#remove(this.#oldest);
      this.#prunedBlocks++;
    }
  }

  #remove(node: number): void {
    this.#unlink(node);
    this.#table.remove(node);
  }

  #append(node: number, dueMs: number): void {
    this.#dueMs[node] = dueMs;
    this.#newer[node] = NONE;
    this.#older[node] = this.#newest;
    if (this.#newest === NONE) this.#oldest = node;
    else this.#newer[this.#newest] = node;
    this.#newest = node;
  }

  #unlink(node: number): void {
    const older = this.#older[node]!;
    const newer = this.#newer[node]!;
    if (older === NONE) this.#oldest = newer;
    else this.#newer[older] = newer;
    if (newer === NONE) this.#newest = older;
    else this.#older[newer] = older;
  }

  #grow(): void {
    const size = this.#table.memberCapacity;
    this.#dueMs = grown(this.#dueMs, size);
    this.#older = grown(this.#older, size);
    this.#newer = grown(this.#newer, size);
  }
}
