import type { BlockIdentity } from "./block-identity.ts";
import { follows, keyOf } from "./block-identity.ts";

/**
 * Blocks that wait to go one tier down, in the order (priority, tick): prompts before what was generated after them, which
 * is rarely asked for again. An entry is a weak reference: whether the block is still there is seen when its turn comes.
 * Bounded; a block that waits already is not taken twice.
 */
export type OffloadPriority = 0 | 1;

export class OffloadQueue {
  readonly #capacity: number;
  readonly #rows: [Row, Row] = [new Row(), new Row()];
  readonly #waiting = new Set<number>();

  constructor(capacity: number) {
    this.#capacity = capacity;
  }

  get size(): number {
    return this.#rows[0].size + this.#rows[1].size;
  }

  /** False when it is full. */
  tryAdd(block: BlockIdentity, priority: OffloadPriority): boolean {
    const key = keyOf(block.lo, block.hi);
    if (this.#waiting.has(key)) return true;
    if (this.size >= this.#capacity) return false;
    this.#waiting.add(key);
    this.#rows[priority].add(block);
    return true;
  }

  take(): BlockIdentity | undefined {
    const block = this.#rows[0].take() ?? this.#rows[1].take();
    if (block !== undefined) this.#waiting.delete(keyOf(block.lo, block.hi));
    return block;
  }

  peek(): BlockIdentity | undefined {
    return this.#rows[0].at(0) ?? this.#rows[1].at(0);
  }

  /**
   * Whether the blocks at the head, each of which follows the one before it, are as many as they will get: `limit`, or
   * something else comes behind them. Cost: their number.
   */
  hasWholeRun(limit: (first: BlockIdentity) => number): boolean {
    const row = this.#rows[0].size > 0 ? this.#rows[0] : this.#rows[1];
    const first = row.at(0);
    if (first === undefined) return false;
    const most = limit(first);
    let last = first;
    for (let i = 1; i < most; i++) {
      const next = row.at(i);
      if (next === undefined) return false;
      if (!follows(next, last)) return true;
      last = next;
    }
    return true;
  }

  clear(): void {
    while (this.take() !== undefined);
  }
}

/** First in, first out; the array is cut when half of it is taken. */
class Row {
  #blocks: BlockIdentity[] = [];
  #head = 0;

  get size(): number {
    return this.#blocks.length - this.#head;
  }

  add(block: BlockIdentity): void {
    this.#blocks.push(block);
  }

  at(i: number): BlockIdentity | undefined {
    return this.#blocks[this.#head + i];
  }

  take(): BlockIdentity | undefined {
    if (this.size === 0) return undefined;
    const block = this.#blocks[this.#head++];
    if (this.#head * 2 > this.#blocks.length + 64) {
      this.#blocks = this.#blocks.slice(this.#head);
      this.#head = 0;
    }
    return block;
  }
}
