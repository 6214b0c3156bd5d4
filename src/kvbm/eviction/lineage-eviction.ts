import { HashIndex } from "../../std/index.ts";
import type { EvictionPolicy, PoolView } from "./base.ts";

/**
 * Leaves first, of these the one that has been inactive longest: a block goes before its parent, so what is left of a
 * chain is always its beginning, the part that later prompts can use. When the last child of an inactive block goes, it
 * becomes a leaf with the age it had.
 *
 * A block's children may be registered before it, or stay when it was dropped: they are counted under the parent's hash
 * as a ghost until it comes. When every inactive block has a child that somebody holds (possible only with matches that
 * skip holes), the oldest goes all the same; finding it takes time linear in the pool.
 *
 * A binary heap by age over block ids: logarithmic time, 36 bytes a block, nothing allocated.
 */
const NOT_IN_HEAP = -1;

export class LineageEviction implements EvictionPolicy {
  readonly #view: PoolView;
  readonly #children: Int32Array;
  /** When the block became inactive, counted in insertions; 0 = it is not. */
  readonly #ages: Float64Array;
  readonly #heap: Int32Array;
  readonly #heapAt: Int32Array;
  #heapSize = 0;
  #clock = 0;
  #size = 0;
  // Parents that are not there: hash and children by entry.
  readonly #ghostHashes: Uint32Array;
  readonly #ghostChildren: Int32Array;
  readonly #ghosts: HashIndex;
  readonly #freeGhosts: Int32Array;
  #freeGhostCount: number;

  constructor(view: PoolView) {
    const { blockCount } = view;
    this.#view = view;
    this.#children = new Int32Array(blockCount);
    this.#ages = new Float64Array(blockCount);
    this.#heap = new Int32Array(blockCount);
    this.#heapAt = new Int32Array(blockCount).fill(NOT_IN_HEAP);
    // One per registered block at most, and one more while its parent turns into a ghost.
    this.#ghostHashes = new Uint32Array(2 * (blockCount + 1));
    this.#ghostChildren = new Int32Array(blockCount + 1);
    this.#ghosts = new HashIndex(this.#ghostHashes);
    this.#freeGhosts = Int32Array.from({ length: blockCount + 1 }, (_, i) => i);
    this.#freeGhostCount = blockCount + 1;
  }

  get size(): number {
    return this.#size;
  }

  registered(block: number): void {
    const { hashes } = this.#view;
    this.#children[block] = this.#takeGhost(hashes[2 * block]!, hashes[2 * block + 1]!);
    this.#countChild(block, 1);
  }

  touched(): void {}

  insert(block: number): void {
    this.#ages[block] = ++this.#clock;
    this.#size++;
    if (this.#children[block] === 0) this.#push(block);
  }

  remove(block: number): void {
    this.#ages[block] = 0;
    this.#size--;
    if (this.#heapAt[block] !== NOT_IN_HEAP) this.#takeOut(block);
  }

  takeVictim(): number {
    const block = this.#heapSize > 0 ? this.#heap[0]! : this.#oldest();
    this.remove(block);
    return block;
  }

  forgotten(block: number): void {
    const { hashes } = this.#view;
    const children = this.#children[block]!;
    this.#children[block] = 0;
    if (children > 0) this.#addGhost(hashes[2 * block]!, hashes[2 * block + 1]!, children);
    this.#countChild(block, -1);
  }

  /** One child more or less for the block's parent, wherever it is. */
  #countChild(block: number, change: 1 | -1): void {
    const { parents } = this.#view;
    const lo = parents[2 * block]!;
    const hi = parents[2 * block + 1]!;
    if (lo === 0 && hi === 0) return;
    const parent = this.#view.find(lo, hi);
    if (parent < 0) {
      this.#addGhost(lo, hi, change);
      return;
    }
    const children = (this.#children[parent]! += change);
    if (this.#ages[parent] === 0) return;
    if (children === 0) this.#push(parent);
    else if (this.#heapAt[parent] !== NOT_IN_HEAP) this.#takeOut(parent);
  }

  #addGhost(lo: number, hi: number, change: number): void {
    let ghost = this.#ghosts.find(lo, hi);
    if (ghost < 0) {
      ghost = this.#freeGhosts[--this.#freeGhostCount]!;
      this.#ghostHashes[2 * ghost] = lo;
      this.#ghostHashes[2 * ghost + 1] = hi;
      this.#ghosts.add(ghost);
    }
    const children = (this.#ghostChildren[ghost]! += change);
    if (children === 0) this.#freeGhost(ghost);
  }

  #takeGhost(lo: number, hi: number): number {
    const ghost = this.#ghosts.find(lo, hi);
    if (ghost < 0) return 0;
    const children = this.#ghostChildren[ghost]!;
    this.#ghostChildren[ghost] = 0;
    this.#freeGhost(ghost);
    return children;
  }

  #freeGhost(ghost: number): void {
    this.#ghosts.remove(ghost);
    this.#freeGhosts[this.#freeGhostCount++] = ghost;
  }

  #oldest(): number {
    let oldest = -1;
    for (let block = 0; block < this.#ages.length; block++) {
      const age = this.#ages[block]!;
      if (age > 0 && (oldest < 0 || age < this.#ages[oldest]!)) oldest = block;
    }
    return oldest;
  }

  #push(block: number): void {
    this.#heap[this.#heapSize] = block;
    this.#heapAt[block] = this.#heapSize;
    this.#up(this.#heapSize++);
  }

  #takeOut(block: number): void {
    const at = this.#heapAt[block]!;
    this.#heapAt[block] = NOT_IN_HEAP;
    const last = this.#heap[--this.#heapSize]!;
    if (last === block) return;
    this.#heap[at] = last;
    this.#heapAt[last] = at;
    this.#up(at);
    this.#down(this.#heapAt[last]!);
  }

  #up(from: number): void {
    const block = this.#heap[from]!;
    const age = this.#ages[block]!;
    let at = from;
    while (at > 0) {
      const above = (at - 1) >> 1;
      const other = this.#heap[above]!;
      if (this.#ages[other]! <= age) break;
      this.#heap[at] = other;
      this.#heapAt[other] = at;
      at = above;
    }
    this.#heap[at] = block;
    this.#heapAt[block] = at;
  }

  #down(from: number): void {
    const block = this.#heap[from]!;
    const age = this.#ages[block]!;
    let at = from;
    for (;;) {
      let below = 2 * at + 1;
      if (below >= this.#heapSize) break;
      if (below + 1 < this.#heapSize && this.#ages[this.#heap[below + 1]!]! < this.#ages[this.#heap[below]!]!) below++;
      const other = this.#heap[below]!;
      if (this.#ages[other]! >= age) break;
      this.#heap[at] = other;
      this.#heapAt[other] = at;
      at = below;
    }
    this.#heap[at] = block;
    this.#heapAt[block] = at;
  }
}
