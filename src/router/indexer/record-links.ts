import { SharedArena } from "./shared-arena.ts";

/**
 * What the writer alone keeps per record, 12 bytes: its parent, how many children it has, and the hash of its own tokens
 * for dumps. Parent (26 bits) and number of children (6 bits) share a word; where 6 bits do not do, at the few records
 * where many prompts part, the number is in a map.
 */
const WORDS = 3;
const PARENT_BITS = 26;
const PARENT_MASK = 2 ** PARENT_BITS - 1;
const ONE_CHILD = 2 ** PARENT_BITS;
/** Means: the number is in the map. */
const MANY = 63;

export class RecordLinks {
  readonly #arena: SharedArena;
  #words: Uint32Array;
  readonly #childCounts = new Map<number, number>();

  constructor(maxRecords: number) {
    this.#arena = new SharedArena({ maxWords: maxRecords * WORDS });
    this.#words = this.#arena.words;
  }

  /** The map's entries are estimated; there are at most 1/63 as many as records. */
  get bytes(): number {
    return this.#words.byteLength + this.#childCounts.size * 48;
  }

  /** Room for records 0 to count-1. */
  ensureRecords(count: number): void {
    if (this.#arena.ensureWords(count * WORDS)) this.#words = this.#arena.words;
  }

  /** A record as new: no children. `parent` 0 = none. */
  start(record: number, parent: number, localLo: number, localHi: number): void {
    const at = record * WORDS;
    this.#words[at] = parent;
    this.#words[at + 1] = localLo;
    this.#words[at + 2] = localHi;
  }

  parentOf(record: number): number {
    return this.#words[record * WORDS]! & PARENT_MASK;
  }

  localLoOf(record: number): number {
    return this.#words[record * WORDS + 1]!;
  }

  localHiOf(record: number): number {
    return this.#words[record * WORDS + 2]!;
  }

  hasChildren(record: number): boolean {
    return this.#words[record * WORDS]! > PARENT_MASK;
  }

  addChild(record: number): void {
    const at = record * WORDS;
    const count = this.#words[at]! >>> PARENT_BITS;
    if (count < MANY) this.#words[at]! += ONE_CHILD;
    if (count >= MANY - 1) this.#childCounts.set(record, (this.#childCounts.get(record) ?? MANY - 1) + 1);
  }

  removeChild(record: number): void {
    const at = record * WORDS;
    const count = this.#words[at]! >>> PARENT_BITS;
    if (count < MANY) {
      this.#words[at]! -= ONE_CHILD;
      return;
    }
    const remaining = this.#childCounts.get(record)! - 1;
    if (remaining >= MANY) {
      this.#childCounts.set(record, remaining);
      return;
    }
    this.#childCounts.delete(record);
    this.#words[at]! -= ONE_CHILD;
  }
}
