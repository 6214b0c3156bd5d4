import type { KvEvent } from "../../protocol/index.ts";
import { HashIndex } from "../../std/index.ts";

/**
 * What the engine's cache holds, as its events tell: a few milliseconds behind the truth, good for a guess. 20 bytes a
 * block. Bounded by the blocks of the engine; what does not fit (it cannot, if events are right) is not noted.
 */
export class DeviceMirror {
  readonly #hashes: Uint32Array;
  readonly #index: HashIndex;
  readonly #free: number[] = [];

  constructor(totalBlocks: number) {
    this.#hashes = new Uint32Array(2 * totalBlocks);
    this.#index = new HashIndex(this.#hashes);
    for (let i = totalBlocks - 1; i >= 0; i--) this.#free.push(i);
  }

  has(lo: number, hi: number): boolean {
    return this.#index.find(lo, hi) >= 0;
  }

  apply(event: KvEvent): void {
    if (event.type === "cleared" || event.tier !== "device") return;
    const { sequenceHashes } = event;
    for (let i = 0; i < sequenceHashes.length; i += 2) {
      const lo = sequenceHashes[i]!;
      const hi = sequenceHashes[i + 1]!;
      const known = this.#index.find(lo, hi);
      if (event.type === "stored" && known < 0) this.#add(lo, hi);
      else if (event.type === "removed" && known >= 0) this.#remove(known);
    }
  }

  #add(lo: number, hi: number): void {
    const entry = this.#free.pop();
    if (entry === undefined) return;
    this.#hashes[2 * entry] = lo;
    this.#hashes[2 * entry + 1] = hi;
    this.#index.add(entry);
  }

  #remove(entry: number): void {
    this.#index.remove(entry);
    this.#free.push(entry);
  }
}
