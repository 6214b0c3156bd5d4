import { HashIndex } from "../std/index.ts";
import type { HashPair } from "../tokens/index.ts";

/**
 * The blocks of one engine rank by the engine's own hashes: an entry each, in typed arrays, 60 bytes and the index. Names
 * are scrambled one to one before they are looked up, because nobody promises that an engine's hashes are good ones.
 * One owner, `VllmEventMapper`. An entry is free again when its last copy is gone.
 */
export const NO_BLOCK = -1;

const FIRST_ROOM = 1_024;
const NO_NAMESPACE = "";

export interface FilledBlocks {
  /** In the order of the chain. */
  readonly entries: Int32Array;
  readonly sequenceHashes: Uint32Array;
  readonly localHashes: Uint32Array;
  readonly parentHash: HashPair | undefined;
  readonly startBlock: number;
  readonly namespace: string;
  readonly tierIndex: number;
}

export class EventBlocks {
  #names = new Uint32Array(2 * FIRST_ROOM);
  #hashes = new Uint32Array(2 * FIRST_ROOM);
  #localHashes = new Uint32Array(2 * FIRST_ROOM);
  #parentHashes = new Uint32Array(2 * FIRST_ROOM);
  /** Blocks in front of it in its sequence. */
  depths = new Uint32Array(FIRST_ROOM);
  /** Four tiers for each entry. */
  copies = new Uint32Array(4 * FIRST_ROOM);
  /** By which event an entry was named last. */
  #stamps = new Uint32Array(FIRST_ROOM);
  #free = new Int32Array(FIRST_ROOM);
  /** Cache namespace of the chain: only its first block carries it. */
  readonly namespaces: string[] = [];
  #index = new HashIndex(this.#names);
  #freeCount = 0;
  #used = 0;
  #stamp = 0;

  get count(): number {
    return this.#used - this.#freeCount;
  }

  find(lo: number, hi: number): number {
    return this.#index.find(scrambled(lo, hi), hi);
  }

  /**
   * Entries for these names (lo and hi by turns), new ones for new names: without copies until `fill`. Undefined, and
   * nothing changed, when a name comes twice.
   */
  enter(names: readonly number[]): Int32Array | undefined {
    const entries = new Int32Array(names.length / 2);
    const stamp = ++this.#stamp;
    for (let i = 0; i < entries.length; i++) {
      const hi = names[2 * i + 1]!;
      const lo = scrambled(names[2 * i]!, hi);
      const known = this.#index.find(lo, hi);
      if (known !== NO_BLOCK && this.#stamps[known] === stamp) {
        for (let back = i - 1; back >= 0; back--) if (!this.isUsed(entries[back]!)) this.#forget(entries[back]!);
        return undefined;
      }
      const entry = known === NO_BLOCK ? this.#add(lo, hi) : known;
      this.#stamps[entry] = stamp;
      entries[i] = entry;
    }
    return entries;
  }

  /** What was entered gets its content and one more copy. */
  fill({ entries, sequenceHashes, localHashes, parentHash, startBlock, namespace, tierIndex }: FilledBlocks): void {
    let parentLo = parentHash?.[0] ?? 0;
    let parentHi = parentHash?.[1] ?? 0;
    for (let i = 0; i < entries.length; i++) {
      const entry = entries[i]!;
      const lo = sequenceHashes[2 * i]!;
      const hi = sequenceHashes[2 * i + 1]!;
      if (!this.isUsed(entry)) {
        this.#hashes[2 * entry] = lo;
        this.#hashes[2 * entry + 1] = hi;
        this.#localHashes[2 * entry] = localHashes[2 * i]!;
        this.#localHashes[2 * entry + 1] = localHashes[2 * i + 1]!;
        this.#parentHashes[2 * entry] = parentLo;
        this.#parentHashes[2 * entry + 1] = parentHi;
        this.depths[entry] = startBlock + i;
        this.namespaces[entry] = namespace;
      }
      this.copies[4 * entry + tierIndex]!++;
      parentLo = lo;
      parentHi = hi;
    }
  }

  /** It has a copy somewhere. */
  isUsed(entry: number): boolean {
    const { copies } = this;
    const at = 4 * entry;
    return (copies[at]! | copies[at + 1]! | copies[at + 2]! | copies[at + 3]!) !== 0;
  }

  removeCopy(entry: number, tierIndex: number): void {
    this.copies[4 * entry + tierIndex]!--;
    if (!this.isUsed(entry)) this.#forget(entry);
  }

  /** The name stays, for other content. */
  dropCopies(entry: number): void {
    this.copies.fill(0, 4 * entry, 4 * entry + 4);
  }

  hasHash(entry: number, lo: number, hi: number): boolean {
    return this.#hashes[2 * entry] === lo && this.#hashes[2 * entry + 1] === hi;
  }

  hashOf(entry: number): HashPair {
    return [this.#hashes[2 * entry]!, this.#hashes[2 * entry + 1]!];
  }

  copyHash(entry: number, out: Uint32Array, at: number): void {
    out[at] = this.#hashes[2 * entry]!;
    out[at + 1] = this.#hashes[2 * entry + 1]!;
  }

  localHashOf(entry: number): HashPair {
    return [this.#localHashes[2 * entry]!, this.#localHashes[2 * entry + 1]!];
  }

  /** Of the block in front of it; undefined for the first of a sequence. */
  parentHashOf(entry: number): HashPair | undefined {
    if (this.depths[entry] === 0) return undefined;
    return [this.#parentHashes[2 * entry]!, this.#parentHashes[2 * entry + 1]!];
  }

  #add(lo: number, hi: number): number {
    if (this.#freeCount === 0 && this.#used === this.depths.length) this.#grow();
    const entry = this.#freeCount > 0 ? this.#free[--this.#freeCount]! : this.#used++;
    this.#names[2 * entry] = lo;
    this.#names[2 * entry + 1] = hi;
    this.#index.add(entry);
    return entry;
  }

  #forget(entry: number): void {
    this.#index.remove(entry);
    this.namespaces[entry] = NO_NAMESPACE;
    this.#free[this.#freeCount++] = entry;
  }

  #grow(): void {
    this.#names = doubled(this.#names);
    this.#hashes = doubled(this.#hashes);
    this.#localHashes = doubled(this.#localHashes);
    this.#parentHashes = doubled(this.#parentHashes);
    this.depths = doubled(this.depths);
    this.copies = doubled(this.copies);
    this.#stamps = doubled(this.#stamps);
    // Empty now, or nothing would have to grow.
    this.#free = new Int32Array(this.depths.length);
    this.#index = new HashIndex(this.#names);
    for (let entry = 0; entry < this.#used; entry++) this.#index.add(entry);
  }
}

function doubled(array: Uint32Array): Uint32Array<ArrayBuffer> {
  const larger = new Uint32Array(2 * array.length);
  larger.set(array);
  return larger;
}

/** The low half with the high one mixed in, one to one for each high half (steps of a known 32-bit mixer). */
function scrambled(lo: number, hi: number): number {
  let mixed = lo ^ Math.imul(hi, 0x9e3779b1);
  mixed = Math.imul(mixed ^ (mixed >>> 16), 0x21f0aaad);
  return (mixed ^ (mixed >>> 15)) >>> 0;
}
