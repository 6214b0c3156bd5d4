import type { EvictionPolicy, PoolView } from "./base.ts";
import { BlockLists } from "./block-list.ts";
import { FrequencySketch } from "./frequency-sketch.ts";

/**
 * Rarely used first: four lists by how often a block's content was asked for (below 2, 6, 15, and above), each least
 * recently inactive first; the coldest list that is not empty gives the victim. Counts outlive the block, so content
 * that comes back is known (TinyLFU). Thresholds as in KVBM's multi-LRU.
 */
const THRESHOLDS = [2, 6, 15] as const;

export class FrequencyEviction implements EvictionPolicy {
  readonly #lists: BlockLists;
  readonly #sketch: FrequencySketch;
  readonly #hashes: Uint32Array;
  #size = 0;

  constructor({ blockCount, hashes }: PoolView) {
    this.#lists = new BlockLists(blockCount, THRESHOLDS.length + 1);
    this.#sketch = new FrequencySketch(blockCount);
    this.#hashes = hashes;
  }

  get size(): number {
    return this.#size;
  }

  registered(block: number): void {
    this.touched(block);
  }

  touched(block: number): void {
    this.#sketch.add(this.#hashes[2 * block]!, this.#hashes[2 * block + 1]!);
  }

  insert(block: number): void {
    const count = this.#sketch.count(this.#hashes[2 * block]!, this.#hashes[2 * block + 1]!);
    let list = 0;
    while (list < THRESHOLDS.length && count >= THRESHOLDS[list]!) list++;
    this.#lists.append(list, block);
    this.#size++;
  }

  remove(block: number): void {
    this.#lists.remove(block);
    this.#size--;
  }

  takeVictim(): number {
    let block = -1;
    for (let list = 0; block < 0; list++) block = this.#lists.first(list);
    this.remove(block);
    return block;
  }

  forgotten(): void {}
}
