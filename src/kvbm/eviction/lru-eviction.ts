import type { EvictionPolicy, PoolView } from "./base.ts";
import { BlockLists } from "./block-list.ts";

/** Least recently inactive first. A chain that is released from its end loses its end first. */
export class LruEviction implements EvictionPolicy {
  readonly #list: BlockLists;
  #size = 0;

  constructor({ blockCount }: PoolView) {
    this.#list = new BlockLists(blockCount, 1);
  }

  get size(): number {
    return this.#size;
  }

  insert(block: number): void {
    this.#list.append(0, block);
    this.#size++;
  }

  remove(block: number): void {
    this.#list.remove(block);
    this.#size--;
  }

  takeVictim(): number {
    const block = this.#list.first(0);
    this.remove(block);
    return block;
  }

  registered(): void {}
  touched(): void {}
  forgotten(): void {}
}
