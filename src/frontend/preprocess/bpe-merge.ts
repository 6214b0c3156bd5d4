import { mergeHash, type BpeVocabulary } from "./bpe-vocabulary.ts";

/**
 * The merge loop of byte-pair encoding: of all neighbours that have a merge, the one of lowest rank (leftmost if equal)
 * becomes one token, until none is left. Short pieces rescan an array, which beats a heap up to some hundred bytes; long
 * ones use a heap and can stop in the middle, so that a hostile piece never holds the event loop.
 */

/** Not a rank: above all of them. */
const NONE = 0x7fffffff;

/** Pieces up to this many bytes are merged by rescanning; also the size of the scratch arrays. */
export const SHORT_PIECE_BYTES_MAX = 256;

const scratchRanks = new Int32Array(SHORT_PIECE_BYTES_MAX);
const scratchMerged = new Int32Array(SHORT_PIECE_BYTES_MAX);

/** Merges `ids[0 .. count)` in place and returns the new count. count <= SHORT_PIECE_BYTES_MAX. O(count^2), tiny factor. */
export function mergeShort(ids: Int32Array, count: number, table: Int32Array, mask: number): number {
  const ranks = scratchRanks;
  const merged = scratchMerged;
  for (let index = 0; index + 1 < count; index++) {
    const slot = findMerge(table, mask, ids[index] as number, ids[index + 1] as number);
    ranks[index] = slot < 0 ? NONE : (table[slot + 2] as number);
    merged[index] = slot < 0 ? -1 : (table[slot + 3] as number);
  }
  while (count > 1) {
    let best = NONE;
    let at = -1;
    for (let index = 0; index + 1 < count; index++) {
      if ((ranks[index] as number) < best) {
        best = ranks[index] as number;
        at = index;
      }
    }
    if (at < 0) break;
    ids[at] = merged[at] as number;
    count--;
    for (let index = at + 1; index < count; index++) {
      ids[index] = ids[index + 1] as number;
      ranks[index] = ranks[index + 1] as number;
      merged[index] = merged[index + 1] as number;
    }
    for (let index = at > 0 ? at - 1 : 0; index <= at && index + 1 < count; index++) {
      const slot = findMerge(table, mask, ids[index] as number, ids[index + 1] as number);
      ranks[index] = slot < 0 ? NONE : (table[slot + 2] as number);
      merged[index] = slot < 0 ? -1 : (table[slot + 3] as number);
    }
  }
  return count;
}

/** Index of the pair's entry in the table, or -1. */
function findMerge(table: Int32Array, mask: number, left: number, right: number): number {
  for (let slot = mergeHash(left, right) & mask; ; slot = (slot + 1) & mask) {
    const index = slot * 4;
    const found = table[index] as number;
    if (found === -1) return -1;
    if (found === left && table[index + 1] === right) return index;
  }
}

/** Positions fit into 26 bits and ranks into 22, so that (rank, position) is one exact double. */
const POSITIONS = 2 ** 26;

/**
 * One long piece: a linked list of tokens and a binary heap of (rank, position). Entries that a merge made stale are
 * recognised when popped. O(n log n) time, about 40 bytes per byte of the piece.
 */
export class LongMerge {
  readonly #table: Int32Array;
  readonly #mask: number;
  readonly #ids: Int32Array;
  readonly #next: Int32Array;
  readonly #previous: Int32Array;
  /** Rank of the pair that begins here; NONE if it has no merge or the position is gone. */
  readonly #ranks: Int32Array;
  readonly #heap: Float64Array;
  #heapSize = 0;
  #prepared = 0;

  /** Takes `ids` over. */
  constructor(ids: Int32Array, vocabulary: BpeVocabulary) {
    const count = ids.length;
    this.#table = vocabulary.mergeTable;
    this.#mask = vocabulary.mergeMask;
    this.#ids = ids;
    this.#next = new Int32Array(count);
    this.#previous = new Int32Array(count);
    this.#ranks = new Int32Array(count).fill(NONE);
    // Each pair once, and at most two per merge, of which there are at most count - 1.
    this.#heap = new Float64Array(count * 2 + 2);
  }

  /** Works for about `budget` merges; true when finished. */
  step(budget: number): boolean {
    const ids = this.#ids;
    while (this.#prepared < ids.length) {
      if (budget-- <= 0) return false;
      const position = this.#prepared++;
      this.#previous[position] = position - 1;
      this.#next[position] = position + 1 < ids.length ? position + 1 : -1;
      if (position > 0) this.#push(position - 1);
    }
    while (this.#heapSize > 0) {
      if (budget-- <= 0) return false;
      const key = this.#pop();
      const rank = Math.floor(key / POSITIONS);
      const position = key - rank * POSITIONS;
      if (this.#ranks[position] === rank) this.#merge(position);
    }
    return true;
  }

  /** The tokens, in order; call when `step` said true. */
  *tokens(): Generator<number> {
    for (let at = 0; at >= 0; at = this.#next[at] as number) yield this.#ids[at] as number;
  }

  #merge(left: number): void {
    const right = this.#next[left] as number;
    const slot = findMerge(this.#table, this.#mask, this.#ids[left] as number, this.#ids[right] as number);
    const after = this.#next[right] as number;
    this.#ids[left] = this.#table[slot + 3] as number;
    this.#next[left] = after;
    if (after >= 0) this.#previous[after] = left;
    this.#ranks[right] = NONE;
    this.#ranks[left] = NONE;
    if (after >= 0) this.#push(left);
    const before = this.#previous[left] as number;
    if (before >= 0) this.#push(before);
  }

  /** Looks up the pair that begins at `position` and queues it if it has a merge. */
  #push(position: number): void {
    const right = this.#ids[this.#next[position] as number] as number;
    const slot = findMerge(this.#table, this.#mask, this.#ids[position] as number, right);
    if (slot < 0) {
      this.#ranks[position] = NONE;
      return;
    }
    const rank = this.#table[slot + 2] as number;
    this.#ranks[position] = rank;
    const heap = this.#heap;
    const key = rank * POSITIONS + position;
    let index = this.#heapSize++;
    while (index > 0) {
      const parent = (index - 1) >> 1;
      if ((heap[parent] as number) <= key) break;
      heap[index] = heap[parent] as number;
      index = parent;
    }
    heap[index] = key;
  }

  #pop(): number {
    const heap = this.#heap;
    const top = heap[0] as number;
    const last = heap[--this.#heapSize] as number;
    const size = this.#heapSize;
    let index = 0;
    for (let child = 1; child < size; child = index * 2 + 1) {
      if (child + 1 < size && (heap[child + 1] as number) < (heap[child] as number)) child++;
      if ((heap[child] as number) >= last) break;
      heap[index] = heap[child] as number;
      index = child;
    }
    heap[index] = last;
    return top;
  }
}
