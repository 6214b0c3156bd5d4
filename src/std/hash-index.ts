import assert from "node:assert/strict";

/**
 * Which entry has a 64-bit hash: open addressing with linear probing over one array of entry ids. The hashes stay in the
 * caller's array (entry i: lo at 2i, hi at 2i + 1), so a slot is four bytes and a lookup allocates nothing. The hash is
 * taken to be good: its low bits choose the slot. Removal moves later slots of the run back (Knuth, vol. 3, 6.4,
 * algorithm R): no tombstones, no decay. Never more than half full. Owned by whoever owns the hashes.
 */
const EMPTY = -1;

export class HashIndex {
  readonly #hashes: Uint32Array;
  readonly #slots: Int32Array;
  readonly #mask: number;

  /** `hashes`: length = 2 x most entries; an entry's hash is written there before `add` and stays until `remove`. */
  constructor(hashes: Uint32Array) {
    this.#hashes = hashes;
    let size = 4;
    while (size < hashes.length) size *= 2;
    this.#slots = new Int32Array(size).fill(EMPTY);
    this.#mask = size - 1;
  }

  /** The entry with this hash, or -1. */
  find(lo: number, hi: number): number {
    const hashes = this.#hashes;
    for (let at = lo & this.#mask; ; at = (at + 1) & this.#mask) {
      const entry = this.#slots[at]!;
      if (entry === EMPTY || (hashes[2 * entry] === lo && hashes[2 * entry + 1] === hi)) return entry;
    }
  }

  /** The entry's hash must not be in the index yet. */
  add(entry: number): void {
    let at = this.#homeOf(entry);
    while (this.#slots[at] !== EMPTY) at = (at + 1) & this.#mask;
    this.#slots[at] = entry;
  }

  remove(entry: number): void {
    const slots = this.#slots;
    const mask = this.#mask;
    let hole = this.#homeOf(entry);
    while (slots[hole] !== entry) {
      assert(slots[hole] !== EMPTY, "an entry that is removed is in the index");
      hole = (hole + 1) & mask;
    }
    for (let at = (hole + 1) & mask; slots[at] !== EMPTY; at = (at + 1) & mask) {
      // A slot may move back to the hole unless its home lies after the hole.
      const distanceFromHome = (at - this.#homeOf(slots[at]!)) & mask;
      if (distanceFromHome < ((at - hole) & mask)) continue;
      slots[hole] = slots[at]!;
      hole = at;
    }
    slots[hole] = EMPTY;
  }

  #homeOf(entry: number): number {
    return this.#hashes[2 * entry]! & this.#mask;
  }
}
