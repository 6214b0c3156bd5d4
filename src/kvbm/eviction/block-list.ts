/**
 * Doubly linked lists of block ids in two arrays, oldest first; a block is in at most one of them. Each list is a ring
 * through a sentinel of its own behind the blocks. Every operation takes constant time and allocates nothing.
 */
export class BlockLists {
  readonly #next: Int32Array;
  readonly #previous: Int32Array;
  readonly #blockCount: number;

  constructor(blockCount: number, listCount: number) {
    this.#blockCount = blockCount;
    this.#next = new Int32Array(blockCount + listCount);
    this.#previous = new Int32Array(blockCount + listCount);
    for (let list = 0; list < listCount; list++) {
      this.#next[blockCount + list] = blockCount + list;
      this.#previous[blockCount + list] = blockCount + list;
    }
  }

  append(list: number, block: number): void {
    const sentinel = this.#blockCount + list;
    const last = this.#previous[sentinel]!;
    this.#next[last] = block;
    this.#previous[block] = last;
    this.#next[block] = sentinel;
    this.#previous[sentinel] = block;
  }

  remove(block: number): void {
    const next = this.#next[block]!;
    const previous = this.#previous[block]!;
    this.#next[previous] = next;
    this.#previous[next] = previous;
  }

  /** The oldest block of a list, or -1. */
  first(list: number): number {
    const block = this.#next[this.#blockCount + list]!;
    return block >= this.#blockCount ? -1 : block;
  }
}
