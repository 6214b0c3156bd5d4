import { randomBytes } from "node:crypto";
import assert from "node:assert/strict";
import type { KvEvent, KvRemoved, KvStored, StorageTier } from "../../protocol/index.ts";
import type { Random } from "../../std/index.ts";
import type { ApplyStatus, KvIndex, KvIndexStats, OverlapScores } from "./base.ts";
import { BlockTable, findBlock } from "./block-table.ts";
import { dumpRank } from "./dump-rank.ts";
import {
  CONTROL,
  FIGURES,
  FlatKvMemory,
  MAX_RECORDS,
  NODE_WORDS,
  RECORD_CHILD,
  RECORD_HI,
  RECORD_LO,
  RECORD_SET,
  RECORD_WORDS,
  type FlatKvShare,
} from "./flat-kv-memory.ts";
import { PrefixMatcher } from "./prefix-matcher.ts";
import { EMPTY_SET, NO_ROOM, PLANES, RankSetPool, memberOf } from "./rank-set-pool.ts";
import { RankTable } from "./rank-table.ts";
import { RecordLinks } from "./record-links.ts";
import { WriteGate } from "./write-gate.ts";

/**
 * The KV index as flat shared memory: this class is the one writer, `FlatKvIndexReader` reads the same memory in other
 * threads. README.md draws it. Guarantees: exactly what the naive index says, as long as the byte budget holds; over
 * it, the least recently used leaves are forgotten (under-report, never over-report). `stats().bytes` never passes
 * `maxBytes`.
 *
 * The records are a forest that is closed towards the root: a block that nobody holds stays while it has descendants, so
 * that parents are always known, removal works in any order, and a re-stored block makes what lies behind it count again.
 *
 * Cost: 50 to 100 ns per stored block that is known, up to 250 ns for a new one; a lookup is about 10 ns per block. `clearRank`
 * passes once over all records (3 to 15 ms per million), `dump` takes about 1 us per block of the rank.
 */
export interface FlatKvIndexOptions {
  /** Upper bound of `stats().bytes`, at least `MIN_INDEX_BYTES`. @default 256 MiB, about 4 million blocks */
  readonly maxBytes?: number;
  /** Where the secret of the hash table comes from. @default the system */
  readonly random?: Random;
}

export const MIN_INDEX_BYTES = 2 * 2 ** 20;
const DEFAULT_INDEX_BYTES = 256 * 2 ** 20;
/** One page of each array, the transition cache, rank arrays, and the rounding of each array to whole pages. */
const FIXED_BYTES = 2 ** 20;
/** 16 shared + 12 private + 1 touched, and one more for the map of large families. */
const RECORD_BYTES = 30;
/** The table's slots lie between 40 and 80 % full. */
const MAX_SLOT_BYTES_PER_RECORD = 12;
/** Of the budget; the rest is for rank sets. */
const RECORD_SHARE = 0.75;
/** A set's node, and its part of the buckets, which double. */
const NODE_BYTES = 32 + 16;
/** Blocks changed in one section of the write gate: some microseconds. */
const SECTION_BLOCKS = 64;
/** Records looked at in one section of a pass over all of them. */
const SECTION_SCAN = 4_096;
/** Evicted at once when the budget is reached: one pass of the hand serves many stores. */
const EVICTION_SHARE = 1 / 64;

const PLANE_OF_TIER: Readonly<Record<StorageTier, number>> = { device: 0, host: 1, disk: 2, external: 3 };

export class FlatKvIndex implements KvIndex {
  readonly #memory: FlatKvMemory;
  readonly #links: RecordLinks;
  readonly #table: BlockTable;
  readonly #pool: RankSetPool;
  readonly #gate: WriteGate;
  readonly #matcher: PrefixMatcher;
  readonly #ranks = new RankTable();
  readonly #maxRecords: number;
  /** Memberships by rank. */
  #rankMemberships = new Uint32Array(64);
  /** Records ever used, record 0 included. */
  #recordCount = 1;
  #freeHead = 0;
  /** Where the eviction hand stands. */
  #hand = 1;
  /** The record that the next block will be attached to; the hand spares it. */
  #pinned = 0;
  #blocks = 0;
  #memberships = 0;
  #evictedBlocks = 0;

  constructor({ maxBytes = DEFAULT_INDEX_BYTES, random }: FlatKvIndexOptions = {}) {
    assert(maxBytes >= MIN_INDEX_BYTES, `Expected maxBytes to be at least ${MIN_INDEX_BYTES}, got ${maxBytes}`);
    const recordBytes = (maxBytes - FIXED_BYTES) * RECORD_SHARE;
    this.#maxRecords = Math.min(MAX_RECORDS, Math.floor(recordBytes / (RECORD_BYTES + MAX_SLOT_BYTES_PER_RECORD)));
    const maxSlots = (this.#maxRecords * MAX_SLOT_BYTES_PER_RECORD) / 4;
    const maxNodes = Math.floor((maxBytes - FIXED_BYTES - recordBytes) / NODE_BYTES);
    this.#memory = new FlatKvMemory({ records: this.#maxRecords, slots: maxSlots, nodes: maxNodes });
    this.#links = new RecordLinks(this.#maxRecords);
    const { control } = this.#memory;
    control[CONTROL.seedA] = random?.nextU32() ?? randomBytes(4).readInt32LE();
    control[CONTROL.seedB] = random?.nextU32() ?? randomBytes(4).readInt32LE();
    this.#table = new BlockTable(this.#memory, maxSlots);
    this.#pool = new RankSetPool(this.#memory, maxNodes);
    this.#gate = new WriteGate(control);
    this.#matcher = new PrefixMatcher(this.#memory);
    this.#publish();
  }

  /** What a `FlatKvIndexReader` in another thread is made from; post it as it is. */
  share(): FlatKvShare {
    return this.#memory.share();
  }

  get rankCount(): number {
    return this.#ranks.rankCount;
  }

  rankOf(instanceId: string, dpRank: number): number {
    const rank = this.#ranks.numberOf(instanceId, dpRank);
    if (rank >= this.#rankMemberships.length) {
      const larger = new Uint32Array(Math.max(rank + 1, 2 * this.#rankMemberships.length));
      larger.set(this.#rankMemberships);
      this.#rankMemberships = larger;
    }
    this.#publish();
    return rank;
  }

  findMatches(sequenceHashes: Uint32Array, blockCount: number, into: OverlapScores): void {
    const record = this.#matcher.match(sequenceHashes, blockCount, into);
    this.#memory.touched[record] = 1;
  }

  stats(): KvIndexStats {
    return {
      ranks: this.#ranks.rankCount,
      blocks: this.#blocks,
      memberships: this.#memberships,
      bytes: this.#bytes,
      evictedBlocks: this.#evictedBlocks,
    };
  }

  get #bytes(): number {
    return this.#memory.bytes + this.#links.bytes + this.#pool.privateBytes + this.#rankMemberships.byteLength;
  }

  apply(rank: number, event: KvEvent): ApplyStatus {
    if (this.#ranks.ownerOf(rank) === undefined) return "invalid-block";
    if (event.type === "cleared") {
      this.clearRank(rank);
      return "ok";
    }
    const plane = PLANE_OF_TIER[event.tier];
    if (plane === undefined || event.sequenceHashes.length % 2 !== 0) return "invalid-block";
    this.#gate.open();
    const status = event.type === "stored" ? this.#store(rank, plane, event) : this.#remove(rank, plane, event);
    this.#unpin();
    this.#publish();
    this.#gate.close();
    return status;
  }

  #store(rank: number, plane: number, event: KvStored): ApplyStatus {
    const { sequenceHashes: hashes, localHashes, parentHash } = event;
    if (localHashes.length !== hashes.length) return "invalid-block";
    const memory = this.#memory;
    const member = memberOf(plane, rank);
    let parent = 0;
    if (parentHash !== undefined) {
      parent = findBlock(memory, parentHash[0] >>> 0, parentHash[1] >>> 0);
      if (parent === 0) return "parent-block-not-found";
    }
    const blockCount = hashes.length >>> 1;
    let isNew = false;
    let warmEnd = 0;
    for (let block = 0; block < blockCount; block++) {
      if (block !== 0 && block % SECTION_BLOCKS === 0) this.#breathe();
      const lo = hashes[2 * block]!;
      const hi = hashes[2 * block + 1]!;
      this.#pinned = parent;
      let record = this.#childOf(parent, lo, hi);
      isNew = record === 0;
      if (isNew && block >= warmEnd) {
        // Behind a new block there are only new ones, each at a place of the table that no cache has.
        warmEnd = Math.min(blockCount, block + SECTION_BLOCKS);
        this.#table.warm(hashes, block + 1, warmEnd);
      }
      if (record === 0) {
        record = this.#tryCreate(parent, lo, hi);
        if (record === 0) return this.#giveUp(blockCount - block);
        this.#links.start(record, parent, localHashes[2 * block]!, localHashes[2 * block + 1]!);
      } else if (this.#links.parentOf(record) !== parent) {
        return "invalid-block";
      }
      const from = memory.records[record * RECORD_WORDS + RECORD_SET]!;
      let to = this.#pool.with(from, member);
      if (to !== from) {
        if (to === NO_ROOM) {
          this.#pinned = record;
          to = this.#makeRoomAndRetry(from, member);
          if (to === NO_ROOM) return this.#giveUp(blockCount - block);
        }
        this.#pool.move(from, to);
        memory.records[record * RECORD_WORDS + RECORD_SET] = to;
        if (from === EMPTY_SET) this.#blocks++;
        this.#memberships++;
        this.#rankMemberships[rank]!++;
      }
      parent = record;
    }
    if (!isNew) memory.touched[parent] = 1;
    return "ok";
  }

  /** What the hand spared may have nothing left to stay for. */
  #unpin(): void {
    const record = this.#pinned;
    this.#pinned = 0;
    this.#freeIfUnused(record);
  }

  /** Blocks of a rank that do not fit the budget are as good as evicted. */
  #giveUp(blocks: number): ApplyStatus {
    this.#evictedBlocks += blocks;
    return "ok";
  }

  #remove(rank: number, plane: number, event: KvRemoved): ApplyStatus {
    const { sequenceHashes: hashes } = event;
    const memory = this.#memory;
    const member = memberOf(plane, rank);
    const blockCount = hashes.length >>> 1;
    let status: ApplyStatus = "ok";
    let parent = 0;
    for (let block = 0; block < blockCount; block++) {
      if (block !== 0 && block % SECTION_BLOCKS === 0) this.#breathe();
      const lo = hashes[2 * block]!;
      const hi = hashes[2 * block + 1]!;
      // Engines free chains from the tail: the next block is most likely the parent of the one before.
      const at = parent * RECORD_WORDS;
      const isParent = parent !== 0 && memory.records[at + RECORD_LO] === lo && memory.records[at + RECORD_HI] === hi;
      const record = isParent ? parent : findBlock(memory, lo, hi);
      const from = memory.records[record * RECORD_WORDS + RECORD_SET]!;
      const to = record === 0 ? from : this.#pool.without(from, member);
      if (record === 0 || to === from) {
        status = "block-not-found";
        parent = 0;
        continue;
      }
      parent = this.#links.parentOf(record);
      if (to === NO_ROOM) this.#drop(record);
      else this.#takeFrom(record, from, to, rank);
    }
    return status;
  }

  /** `rank` loses one tier of the record. */
  #takeFrom(record: number, from: number, to: number, rank: number): void {
    this.#pool.move(from, to);
    this.#memory.records[record * RECORD_WORDS + RECORD_SET] = to;
    this.#memberships--;
    this.#rankMemberships[rank]!--;
    if (to !== EMPTY_SET) return;
    this.#blocks--;
    this.#freeIfUnused(record);
  }

  /** Forgets who holds the record: the answer to "no room for the smaller set", and eviction. */
  #drop(record: number): void {
    const at = record * RECORD_WORDS + RECORD_SET;
    const set = this.#memory.records[at]!;
    this.#pool.forEachMember(set, (_plane, rank) => {
      this.#memberships--;
      this.#rankMemberships[rank]!--;
    });
    this.#pool.move(set, EMPTY_SET);
    this.#memory.records[at] = EMPTY_SET;
    this.#blocks--;
    this.#evictedBlocks++;
    this.#freeIfUnused(record);
  }

  clearRank(rank: number): void {
    if (this.#ranks.ownerOf(rank) === undefined) return;
    this.#gate.open();
    this.#clear(rank);
    this.#publish();
    this.#gate.close();
  }

  removeWorker(instanceId: string): void {
    for (const rank of this.#ranks.ranksOf(instanceId)) this.clearRank(rank);
    this.#ranks.remove(instanceId);
    this.#publish();
  }

  #clear(rank: number): void {
    const memory = this.#memory;
    const pool = this.#pool;
    /** By set: 0 not looked at, 1 without the rank, 2 with it. Right to the end: sets made meanwhile are without it. */
    const verdicts = new Uint8Array(memory.sets.length / NODE_WORDS);
    for (let record = 1; record < this.#recordCount && this.#rankMemberships[rank] !== 0; record++) {
      if (record % SECTION_SCAN === 0) this.#breathe();
      const set = memory.records[record * RECORD_WORDS + RECORD_SET]!;
      if (set === EMPTY_SET) continue;
      let verdict = verdicts[set];
      if (verdict === undefined || verdict === 0) {
        verdict = pool.hasRank(set, rank) ? 2 : 1;
        verdicts[set] = verdict;
      }
      if (verdict === 2) this.#clearRecord(record, rank);
    }
  }

  #clearRecord(record: number, rank: number): void {
    const at = record * RECORD_WORDS + RECORD_SET;
    for (let plane = 0; plane < PLANES; plane++) {
      const from = this.#memory.records[at]!;
      const to = this.#pool.without(from, memberOf(plane, rank));
      if (to === NO_ROOM) {
        this.#drop(record);
        return;
      }
      if (to !== from) this.#takeFrom(record, from, to, rank);
      if (to === EMPTY_SET) return;
    }
  }

  dump(rank: number): KvEvent[] {
    const owner = this.#ranks.ownerOf(rank);
    if (owner === undefined) return [];
    const { records } = this.#memory;
    return dumpRank(owner.dpRank, rank, {
      records,
      links: this.#links,
      recordCount: this.#recordCount,
      pool: this.#pool,
    });
  }

  /** The record of a block behind `parent`, or 0: the parent's first guess, then the table. */
  #childOf(parent: number, lo: number, hi: number): number {
    const { records } = this.#memory;
    const childAt = parent * RECORD_WORDS + RECORD_CHILD;
    const child = parent === 0 ? 0 : records[childAt]!;
    const at = child * RECORD_WORDS;
    if (child !== 0 && records[at + RECORD_LO] === lo && records[at + RECORD_HI] === hi) return child;
    const record = findBlock(this.#memory, lo, hi);
    // The branch in use becomes the guess; only a true child may: its parent clears the guess when it goes.
    if (record !== 0 && parent !== 0 && this.#links.parentOf(record) === parent) {
      records[childAt] = record;
    }
    return record;
  }

  /** A new record without owners, or 0 when the budget has no room for it even after eviction. */
  #tryCreate(parent: number, lo: number, hi: number): number {
    const record = this.#takeRecord();
    if (record === 0) return 0;
    const { records, touched } = this.#memory;
    const at = record * RECORD_WORDS;
    records[at + RECORD_LO] = lo;
    records[at + RECORD_HI] = hi;
    records[at + RECORD_SET] = EMPTY_SET;
    records[at + RECORD_CHILD] = 0;
    touched[record] = 0;
    if (!this.#table.tryAdd(record)) {
      this.#putBack(record);
      return 0;
    }
    if (parent !== 0) {
      this.#links.addChild(parent);
      records[parent * RECORD_WORDS + RECORD_CHILD] = record;
    }
    return record;
  }

  #takeRecord(): number {
    if (this.#freeHead === 0) {
      if (this.#recordCount < this.#maxRecords) {
        this.#memory.ensureRecords(this.#recordCount + 1);
        this.#links.ensureRecords(this.#recordCount + 1);
        return this.#recordCount++;
      }
      this.#evict(Math.ceil(this.#recordCount * EVICTION_SHARE));
      if (this.#freeHead === 0) return 0;
    }
    const record = this.#freeHead;
    this.#freeHead = this.#memory.records[record * RECORD_WORDS + RECORD_CHILD]!;
    return record;
  }

  #putBack(record: number): void {
    const { records } = this.#memory;
    const at = record * RECORD_WORDS;
    records[at + RECORD_LO] = 0;
    records[at + RECORD_HI] = 0;
    records[at + RECORD_SET] = EMPTY_SET;
    records[at + RECORD_CHILD] = this.#freeHead;
    this.#freeHead = record;
  }

  /** Frees the record if nobody holds it and nothing lies behind it, and then its ancestors likewise. */
  #freeIfUnused(first: number): void {
    const { records } = this.#memory;
    const links = this.#links;
    for (let record = first; record !== 0;) {
      const at = record * RECORD_WORDS;
      if (records[at + RECORD_SET] !== EMPTY_SET || links.hasChildren(record)) return;
      if (record === this.#pinned) return;
      const parent = links.parentOf(record);
      this.#table.remove(record);
      this.#putBack(record);
      if (parent !== 0) {
        links.removeChild(parent);
        const guessAt = parent * RECORD_WORDS + RECORD_CHILD;
        if (records[guessAt] === record) records[guessAt] = 0;
      }
      record = parent;
    }
  }

  /** Rank sets take up all their room: leaves go, and with them sets, until the wanted set fits. */
  #makeRoomAndRetry(from: number, member: number): number {
    for (;;) {
      const evicted = this.#evict(Math.ceil(this.#blocks / 16));
      this.#pool.sweep();
      const to = this.#pool.with(from, member);
      if (to !== NO_ROOM || evicted === 0) return to;
    }
  }

  /**
   * Second chance over leaves: the hand goes round the records. A leaf that was touched since the last time (a lookup ended
   * there, or another rank stored it too) is spared once; one that was not goes, and with it the chain above it as far as
   * nothing else hangs from it and nobody touched it. Cheaper than a list in order of use, which every lookup of every
   * thread would have to write. Returns how many blocks went.
   */
  #evict(wanted: number): number {
    const { touched } = this.#memory;
    const before = this.#evictedBlocks;
    for (let steps = 2 * this.#recordCount; steps > 0 && this.#evictedBlocks - before < wanted; steps--) {
      if (steps % SECTION_SCAN === 0) this.#breathe();
      let record = this.#hand;
      this.#hand = record + 1 >= this.#recordCount ? 1 : record + 1;
      while (this.#isEvictable(record)) {
        if (touched[record] === 1) {
          touched[record] = 0;
          break;
        }
        const parent = this.#links.parentOf(record);
        this.#drop(record);
        record = parent;
      }
    }
    return this.#evictedBlocks - before;
  }

  #isEvictable(record: number): boolean {
    if (record === 0 || record === this.#pinned) return false;
    const isHeld = this.#memory.records[record * RECORD_WORDS + RECORD_SET] !== EMPTY_SET;
    return isHeld && !this.#links.hasChildren(record);
  }

  /** Between two slices of a long change: readers get their turn. */
  #breathe(): void {
    this.#gate.close();
    this.#gate.open();
  }

  #publish(): void {
    const { control, figures } = this.#memory;
    control[CONTROL.rankCount] = this.#ranks.rankCount;
    figures[FIGURES.ranks] = this.#ranks.rankCount;
    figures[FIGURES.blocks] = this.#blocks;
    figures[FIGURES.memberships] = this.#memberships;
    figures[FIGURES.bytes] = this.#bytes;
    figures[FIGURES.evictedBlocks] = this.#evictedBlocks;
  }
}
