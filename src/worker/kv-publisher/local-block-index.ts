import type { KvEvent, KvStored, StorageTier } from "../../protocol/index.ts";

/**
 * The blocks that one rank of this worker holds, per tier with a count of how often each was stored: enough to leave out
 * removals of blocks that are still there in a second copy, and to dump everything for a router that starts late.
 *
 *   #slots    open addressing (linear probing, half full at most) from sequence hash to record
 *   records   parallel arrays by record number; freed ones form a list through `#parent`
 *
 * As in the router's index, records are a forest that is closed towards the root: a removed block stays as a *ghost*
 * while it has descendants, so that a dump leads to the same index as the events did, whatever the order of removals.
 *
 * Bounded by `maxBlocks`: what does not fit is not told to routers either, so that they under-report. Cost: 50 bytes per
 * block, some 50 ns per stored or removed block, 5 to 10 ms for a dump of 65,536 blocks. Owned by the rank's log.
 */
const TIERS: readonly StorageTier[] = ["device", "host", "disk", "external"];
const NONE = -1;
const FREED = -1;
/** A count that reached this stays: nobody knows any more how many copies there are. */
const COUNT_MAX = 0xffff;

export class LocalBlockIndex {
  readonly #maxBlocks: number;
  #slots: Int32Array;
  #mask: number;
  #capacity: number;
  #sequenceHashes: Uint32Array;
  #localHashes: Uint32Array;
  /** Record of the block before it, `NONE` at the root; of a free record: the next free one. */
  #parent: Int32Array;
  /** Index of the block in its sequence. */
  #depth: Int32Array;
  /** `FREED` for a record that is not in use. */
  #childCount: Int32Array;
  /** Four tiers per record. */
  #counts: Uint16Array;
  #used = 0;
  #freeHead = NONE;
  #size = 0;

  constructor(options: { readonly maxBlocks: number; readonly initialBlocks?: number }) {
    this.#maxBlocks = options.maxBlocks;
    this.#capacity = Math.max(16, Math.min(options.maxBlocks, options.initialBlocks ?? 1_024));
    this.#slots = new Int32Array(slotCount(this.#capacity)).fill(NONE);
    this.#mask = this.#slots.length - 1;
    this.#sequenceHashes = new Uint32Array(2 * this.#capacity);
    this.#localHashes = new Uint32Array(2 * this.#capacity);
    this.#parent = new Int32Array(this.#capacity);
    this.#depth = new Int32Array(this.#capacity);
    this.#childCount = new Int32Array(this.#capacity);
    this.#counts = new Uint16Array(4 * this.#capacity);
  }

  /** Records: distinct blocks, and ghosts. */
  get size(): number {
    return this.#size;
  }

  /** Copies of a block in a tier; 0 when it is not there. */
  countOf(lo: number, hi: number, tier: StorageTier): number {
    const record = this.#find(lo, hi);
    return record === NONE ? 0 : this.#counts[4 * record + TIERS.indexOf(tier)]!;
  }

  /**
   * Notes the blocks of a stored event. Returns how many leading ones it took: it stops where there is no room, at a block
   * that is known behind another parent, and takes none of a chain whose parent is not known.
   */
  store(event: KvStored): number {
    const { sequenceHashes, localHashes, parentHash } = event;
    const blockCount = sequenceHashes.length / 2;
    const tier = TIERS.indexOf(event.tier);
    let parent = NONE;
    if (parentHash !== undefined) {
      parent = this.#find(parentHash[0], parentHash[1]);
      if (parent === NONE) return 0;
    }
    for (let i = 0; i < blockCount; i++) {
      const lo = sequenceHashes[2 * i]!;
      const hi = sequenceHashes[2 * i + 1]!;
      let record = this.#find(lo, hi);
      if (record === NONE) {
        if (this.#size >= this.#maxBlocks) return i;
        record = this.#insert(lo, hi, parent);
        this.#localHashes[2 * record] = localHashes[2 * i]!;
        this.#localHashes[2 * record + 1] = localHashes[2 * i + 1]!;
      } else if (this.#parent[record] !== parent) return i;
      const at = 4 * record + tier;
      this.#counts[at] = Math.min(COUNT_MAX, this.#counts[at]! + 1);
      parent = record;
    }
    return blockCount;
  }

  /** Takes one copy away. True when it was the last one of this tier, or the block was not known: routers must be told. */
  remove(lo: number, hi: number, tier: StorageTier): boolean {
    const record = this.#find(lo, hi);
    if (record === NONE) return true;
    const at = 4 * record + TIERS.indexOf(tier);
    const count = this.#counts[at]!;
    if (count === 0) return true;
    if (count === COUNT_MAX) return false;
    this.#counts[at] = count - 1;
    if (count > 1) return false;
    this.#freeIfUnused(record);
    return true;
  }

  clear(): void {
    this.#slots.fill(NONE);
    this.#counts.fill(0);
    this.#used = 0;
    this.#freeHead = NONE;
    this.#size = 0;
  }

  /**
   * Everything as events of at most `maxBlocks` blocks, parents before children: chains are followed from their first
   * block on, one stored event per tier for each stretch of blocks that are in the same tiers. Ghosts are stored with the
   * others and removed at the end.
   */
  dump(dpRank: number, maxBlocks: number): KvEvent[] {
    const records = this.#byDepth();
    const firstChild = this.#firstChildren(records);
    const seen = new Uint8Array(this.#used);
    const events: KvEvent[] = [];
    const ghosts: number[] = [];
    const run: number[] = [];
    const flush = (): void => {
      if (run.length > 0) this.#emit(run, dpRank, events, ghosts);
      run.length = 0;
    };
    for (let at = 0; at < records.length; at++) {
      let runTiers = 0;
      for (let record = records[at]!; record !== NONE && seen[record] === 0; record = firstChild[record]!) {
        seen[record] = 1;
        const tiers = this.#tiersOf(record);
        if (run.length >= maxBlocks || tiers !== runTiers) flush();
        runTiers = tiers;
        run.push(record);
      }
      flush();
    }
    for (let at = 0; at < ghosts.length; at += 2 * maxBlocks) {
      const sequenceHashes = Uint32Array.from(ghosts.slice(at, at + 2 * maxBlocks));
      events.push({ type: "removed", dpRank, tier: "device", sequenceHashes });
    }
    return events;
  }

  #emit(run: readonly number[], dpRank: number, events: KvEvent[], ghosts: number[]): void {
    const first = run[0]!;
    const sequenceHashes = new Uint32Array(2 * run.length);
    const localHashes = new Uint32Array(2 * run.length);
    const [ownSequenceHashes, ownLocalHashes] = [this.#sequenceHashes, this.#localHashes];
    for (let i = 0; i < run.length; i++) {
      const record = run[i]!;
      sequenceHashes[2 * i] = ownSequenceHashes[2 * record]!;
      sequenceHashes[2 * i + 1] = ownSequenceHashes[2 * record + 1]!;
      localHashes[2 * i] = ownLocalHashes[2 * record]!;
      localHashes[2 * i + 1] = ownLocalHashes[2 * record + 1]!;
    }
    const parent = this.#parent[first]!;
    const parentHash =
      parent === NONE
        ? undefined
        : ([this.#sequenceHashes[2 * parent]!, this.#sequenceHashes[2 * parent + 1]!] as const);
    const startBlock = this.#depth[first]!;
    const tiers = this.#tiersOf(first);
    if (tiers === 0) ghosts.push(...sequenceHashes);
    for (const [bit, tier] of TIERS.entries()) {
      if (((tiers || 1) & (1 << bit)) === 0) continue;
      events.push({ type: "stored", dpRank, tier, parentHash, startBlock, sequenceHashes, localHashes });
    }
  }

  /** All records, the shallow ones first: sorted by counting, as there are few depths and many records. */
  #byDepth(): Int32Array {
    const depth = this.#depth;
    const childCount = this.#childCount;
    const used = this.#used;
    let deepest = 0;
    for (let record = 0; record < used; record++) {
      if (childCount[record] !== FREED && depth[record]! > deepest) deepest = depth[record]!;
    }
    // At d + 1 the number of records of depth d; then where depth d + 1 begins.
    const starts = new Int32Array(deepest + 2);
    for (let record = 0; record < used; record++) if (childCount[record] !== FREED) starts[depth[record]! + 1]!++;
    for (let d = 0; d <= deepest; d++) starts[d + 1]! += starts[d]!;
    const records = new Int32Array(this.#size);
    for (let record = 0; record < used; record++) {
      if (childCount[record] !== FREED) records[starts[depth[record]!]!++] = record;
    }
    return records;
  }

  /** For every record one of its children, or none. */
  #firstChildren(records: Int32Array): Int32Array {
    const firstChild = new Int32Array(this.#used).fill(NONE);
    for (const record of records) {
      const parent = this.#parent[record]!;
      if (parent !== NONE && firstChild[parent] === NONE) firstChild[parent] = record;
    }
    return firstChild;
  }

  /** The tiers a record is in, as bits. */
  #tiersOf(record: number): number {
    const counts = this.#counts;
    const at = 4 * record;
    return (counts[at]! && 1) | (counts[at + 1]! && 2) | (counts[at + 2]! && 4) | (counts[at + 3]! && 8);
  }

  #find(lo: number, hi: number): number {
    const slots = this.#slots;
    const hashes = this.#sequenceHashes;
    for (let slot = lo & this.#mask; ; slot = (slot + 1) & this.#mask) {
      const record = slots[slot]!;
      if (record === NONE || (hashes[2 * record] === lo && hashes[2 * record + 1] === hi)) return record;
    }
  }

  #insert(lo: number, hi: number, parent: number): number {
    if (this.#freeHead === NONE && this.#used === this.#capacity) this.#grow();
    let record = this.#freeHead;
    if (record === NONE) record = this.#used++;
    else this.#freeHead = this.#parent[record]!;
    this.#sequenceHashes[2 * record] = lo;
    this.#sequenceHashes[2 * record + 1] = hi;
    this.#parent[record] = parent;
    this.#depth[record] = parent === NONE ? 0 : this.#depth[parent]! + 1;
    this.#childCount[record] = 0;
    if (parent !== NONE) this.#childCount[parent] = this.#childCount[parent]! + 1;
    this.#place(record);
    this.#size++;
    return record;
  }

  #place(record: number): void {
    let slot = this.#sequenceHashes[2 * record]! & this.#mask;
    while (this.#slots[slot] !== NONE) slot = (slot + 1) & this.#mask;
    this.#slots[slot] = record;
  }

  /** A record goes when its block is in no tier and nothing is behind it; then its parent may be the next. */
  #freeIfUnused(first: number): void {
    for (let record = first; record !== NONE;) {
      if (this.#childCount[record]! > 0 || this.#tiersOf(record) !== 0) return;
      const parent = this.#parent[record]!;
      this.#free(record);
      if (parent !== NONE) this.#childCount[parent] = this.#childCount[parent]! - 1;
      record = parent;
    }
  }

  /** Takes the record out and moves later ones of its probe sequence up, so that no tombstones are needed. */
  #free(record: number): void {
    const slots = this.#slots;
    const mask = this.#mask;
    let hole = this.#sequenceHashes[2 * record]! & mask;
    while (slots[hole] !== record) hole = (hole + 1) & mask;
    for (let slot = (hole + 1) & mask; slots[slot] !== NONE; slot = (slot + 1) & mask) {
      const home = this.#sequenceHashes[2 * slots[slot]!]! & mask;
      if (((slot - home) & mask) < ((slot - hole) & mask)) continue;
      slots[hole] = slots[slot]!;
      hole = slot;
    }
    slots[hole] = NONE;
    this.#childCount[record] = FREED;
    this.#parent[record] = this.#freeHead;
    this.#freeHead = record;
    this.#size--;
  }

  #grow(): void {
    this.#capacity = Math.min(this.#maxBlocks, this.#capacity * 2);
    this.#sequenceHashes = copyTo(new Uint32Array(2 * this.#capacity), this.#sequenceHashes);
    this.#localHashes = copyTo(new Uint32Array(2 * this.#capacity), this.#localHashes);
    this.#parent = copyTo(new Int32Array(this.#capacity), this.#parent);
    this.#depth = copyTo(new Int32Array(this.#capacity), this.#depth);
    this.#childCount = copyTo(new Int32Array(this.#capacity), this.#childCount);
    this.#counts = copyTo(new Uint16Array(4 * this.#capacity), this.#counts);
    if (slotCount(this.#capacity) === this.#slots.length) return;
    this.#slots = new Int32Array(slotCount(this.#capacity)).fill(NONE);
    this.#mask = this.#slots.length - 1;
    // Called with every record in use.
    for (let record = 0; record < this.#used; record++) this.#place(record);
  }
}

/** A power of two, at least twice the records. */
function slotCount(capacity: number): number {
  return 2 ** Math.ceil(Math.log2(2 * capacity));
}

function copyTo<T extends Uint32Array | Int32Array | Uint16Array>(target: T, source: T): T {
  target.set(source);
  return target;
}
