import assert from "node:assert/strict";

/**
 * Which block has a sequence hash: open addressing with linear probing over one array of block ids. The hashes stay in
 * the caller's array (block i at 2i and 2i + 1), so an entry is four bytes and a lookup allocates nothing. Removal moves
 * later entries of the run back (Knuth, vol. 3, 6.4, algorithm R): no tombstones, no decay. Never more than half full.
 */
const EMPTY = -1;

export class BlockIndex {
  readonly #hashes: Uint32Array;
  readonly #entries: Int32Array;
  readonly #mask: number;

  /** `hashes`: (lo, hi) pairs by block id, filled by the caller before `add`. */
  constructor(hashes: Uint32Array) {
    this.#hashes = hashes;
    let size = 4;
    while (size < hashes.length) size *= 2;
    this.#entries = new Int32Array(size).fill(EMPTY);
    this.#mask = size - 1;
  }

  /** The block with this hash, or -1. */
  find(lo: number, hi: number): number {
    const hashes = this.#hashes;
    for (let at = lo & this.#mask; ; at = (at + 1) & this.#mask) {
      const block = this.#entries[at]!;
      if (block === EMPTY || (hashes[2 * block] === lo && hashes[2 * block + 1] === hi)) return block;
    }
  }

  /** The block's hash must not be in the index yet. */
  add(block: number): void {
    let at = this.#homeOf(block);
    while (this.#entries[at] !== EMPTY) at = (at + 1) & this.#mask;
    this.#entries[at] = block;
  }

  remove(block: number): void {
    const entries = this.#entries;
    const mask = this.#mask;
    let hole = this.#homeOf(block);
    while (entries[hole] !== block) {
      assert(entries[hole] !== EMPTY, "a block that is removed is in the index");
      hole = (hole + 1) & mask;
    }
    for (let at = (hole + 1) & mask; entries[at] !== EMPTY; at = (at + 1) & mask) {
      // An entry may move back to the hole unless its home lies after the hole.
      const distanceFromHome = (at - this.#homeOf(entries[at]!)) & mask;
      if (distanceFromHome < ((at - hole) & mask)) continue;
      entries[hole] = entries[at]!;
      hole = at;
    }
    entries[hole] = EMPTY;
  }

  #homeOf(block: number): number {
    return this.#hashes[2 * block]! & this.#mask;
  }
}
