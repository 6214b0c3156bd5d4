/**
 * Blocks in order of a key, smallest first: a binary heap that knows where each block is, so that any block can be taken
 * out. `add`, `remove` and `takeFirst` cost O(log n) and allocate nothing. Block ids are below `capacity`.
 */
const ABSENT = -1;

export class BlockHeap {
  readonly #keys: Float64Array;
  readonly #blocks: Int32Array;
  /** Where in `#blocks` a block is. */
  readonly #positions: Int32Array;
  #count = 0;

  constructor(capacity: number) {
    this.#keys = new Float64Array(capacity);
    this.#blocks = new Int32Array(capacity);
    this.#positions = new Int32Array(capacity).fill(ABSENT);
  }

  get count(): number {
    return this.#count;
  }

  has(block: number): boolean {
    return this.#positions[block] !== ABSENT;
  }

  /** The block must not be in the heap. */
  add(block: number, key: number): void {
    this.#keys[block] = key;
    this.#rise(this.#count++, block);
  }

  /** The block must be in the heap. */
  remove(block: number): void {
    const at = this.#positions[block]!;
    this.#positions[block] = ABSENT;
    const last = this.#blocks[--this.#count]!;
    if (last === block) return;
    if (at > 0 && this.#keys[last]! < this.#keys[this.#blocks[(at - 1) >> 1]!]!) this.#rise(at, last);
    else this.#sink(at, last);
  }

  /** The block with the smallest key, or -1. */
  takeFirst(): number {
    if (this.#count === 0) return ABSENT;
    const first = this.#blocks[0]!;
    this.remove(first);
    return first;
  }

  #rise(at: number, block: number): void {
    const key = this.#keys[block]!;
    while (at > 0) {
      const above = (at - 1) >> 1;
      const other = this.#blocks[above]!;
      if (this.#keys[other]! <= key) break;
      this.#put(at, other);
      at = above;
    }
    this.#put(at, block);
  }

  #sink(at: number, block: number): void {
    const key = this.#keys[block]!;
    for (;;) {
      let below = 2 * at + 1;
      if (below >= this.#count) break;
      if (below + 1 < this.#count && this.#keys[this.#blocks[below + 1]!]! < this.#keys[this.#blocks[below]!]!) below++;
      const other = this.#blocks[below]!;
      if (key <= this.#keys[other]!) break;
      this.#put(at, other);
      at = below;
    }
    this.#put(at, block);
  }

  #put(at: number, block: number): void {
    this.#blocks[at] = block;
    this.#positions[block] = at;
  }
}
