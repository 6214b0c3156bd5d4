import type { KvEvent, KvRemoved, KvStored, StorageTier } from "../../protocol/index.ts";
import { HashIndex } from "../../std/index.ts";

/**
 * What one rank of a foreign engine has in its cache, by what it told: a count of copies for each block. Engines store a
 * block twice when two requests compute it at once, and tell each copy; upwards a block is told when its first copy comes
 * and when its last one goes. So it can be asked how much of a prompt is there, which is the prediction of what the engine
 * will reuse.
 *
 * Costs 16 bytes a block for its room, which grows with the engine's. One owner.
 */
export class MirroredBlocks {
  readonly #tiers = new Map<StorageTier, CopyCounts>();

  /** Blocks of the device tier. */
  get deviceBlockCount(): number {
    return this.#tiers.get("device")?.size ?? 0;
  }

  /** The events that change what is there; takes what it is given for true. */
  apply(events: readonly KvEvent[]): KvEvent[] {
    const out: KvEvent[] = [];
    for (const event of events) {
      if (event.type === "cleared") {
        this.#tiers.clear();
        out.push(event);
      } else if (event.type === "stored") this.#store(event, out);
      else this.#remove(event, out);
    }
    return out;
  }

  /** How many leading blocks of the chain are on the device. */
  countLeading(sequenceHashes: Uint32Array, maxBlocks = sequenceHashes.length / 2): number {
    const counts = this.#tiers.get("device");
    if (counts === undefined) return 0;
    let block = 0;
    while (block < maxBlocks && counts.has(sequenceHashes[2 * block]!, sequenceHashes[2 * block + 1]!)) block++;
    return block;
  }

  #store(event: KvStored, out: KvEvent[]): void {
    const { sequenceHashes } = event;
    const counts = this.#countsOf(event.tier);
    const count = sequenceHashes.length / 2;
    let from = -1;
    for (let block = 0; block <= count; block++) {
      const isNew = block < count && counts.add(sequenceHashes[2 * block]!, sequenceHashes[2 * block + 1]!);
      if (isNew && from === -1) from = block;
      if (isNew || from === -1) continue;
      out.push(from === 0 && block === count ? event : partOf(event, from, block));
      from = -1;
    }
  }

  #remove(event: KvRemoved, out: KvEvent[]): void {
    const { sequenceHashes } = event;
    const counts = this.#countsOf(event.tier);
    const gone: number[] = [];
    for (let i = 0; i < sequenceHashes.length; i += 2) {
      const lo = sequenceHashes[i]!;
      const hi = sequenceHashes[i + 1]!;
      if (counts.remove(lo, hi)) gone.push(lo, hi);
    }
    if (gone.length === 0) return;
    out.push(gone.length === sequenceHashes.length ? event : { ...event, sequenceHashes: Uint32Array.from(gone) });
  }

  #countsOf(tier: StorageTier): CopyCounts {
    let counts = this.#tiers.get(tier);
    if (counts === undefined) this.#tiers.set(tier, (counts = new CopyCounts()));
    return counts;
  }
}

/** Blocks `from` to `to` of a stored event. */
function partOf(event: KvStored, from: number, to: number): KvStored {
  return {
    ...event,
    parentHash: from === 0 ? event.parentHash : [event.sequenceHashes[2 * from - 2]!, event.sequenceHashes[2 * from - 1]!],
    startBlock: event.startBlock + from,
    sequenceHashes: event.sequenceHashes.slice(2 * from, 2 * to),
    localHashes: event.localHashes.slice(2 * from, 2 * to),
  }; // prettier-ignore
}

const FIRST_ROOM = 1_024;

/** Copies by 64-bit hash: entries in typed arrays, found by open addressing; doubles when full. */
class CopyCounts {
  #hashes = new Uint32Array(2 * FIRST_ROOM);
  #copies = new Uint32Array(FIRST_ROOM);
  #index = new HashIndex(this.#hashes);
  /** Entries that are free again. */
  #free: number[] = [];
  #used = 0;

  get size(): number {
    return this.#used - this.#free.length;
  }

  has(lo: number, hi: number): boolean {
    return this.#index.find(lo, hi) !== -1;
  }

  /** True for the first copy. */
  add(lo: number, hi: number): boolean {
    const known = this.#index.find(lo, hi);
    if (known !== -1) {
      this.#copies[known]!++;
      return false;
    }
    if (this.#free.length === 0 && this.#used === this.#copies.length) this.#grow();
    const entry = this.#free.pop() ?? this.#used++;
    this.#hashes[2 * entry] = lo;
    this.#hashes[2 * entry + 1] = hi;
    this.#copies[entry] = 1;
    this.#index.add(entry);
    return true;
  }

  /** True for the last copy; false too for what is not there. */
  remove(lo: number, hi: number): boolean {
    const entry = this.#index.find(lo, hi);
    if (entry === -1) return false;
    if (--this.#copies[entry]! > 0) return false;
    this.#index.remove(entry);
    this.#free.push(entry);
    return true;
  }

  #grow(): void {
    const hashes = new Uint32Array(2 * this.#hashes.length);
    hashes.set(this.#hashes);
    const copies = new Uint32Array(2 * this.#copies.length);
    copies.set(this.#copies);
    this.#hashes = hashes;
    this.#copies = copies;
    this.#index = new HashIndex(hashes);
    for (let entry = 0; entry < this.#used; entry++) this.#index.add(entry);
  }
}
