import type { KvEvent } from "../../protocol/index.ts";

/**
 * What changed in one rank's cache since the last `take`, as KV events in order. Events stay under the wire's bound of
 * blocks, longer ones are split.
 */
const MAX_BLOCKS_PER_EVENT = 65_536;

export class KvEventLog {
  readonly #dpRank: number;
  #events: KvEvent[] = [];

  constructor(dpRank: number) {
    this.#dpRank = dpRank;
  }

  get isEmpty(): boolean {
    return this.#events.length === 0;
  }

  take(): readonly KvEvent[] {
    const events = this.#events;
    this.#events = [];
    return events;
  }

  /** Blocks `from` to `to - 1` of a chain whose hashes are (lo, hi) pairs from its root on. Copies. */
  stored(sequenceHashes: Uint32Array, localHashes: Uint32Array, from: number, to: number): void {
    for (let start = from; start < to; start += MAX_BLOCKS_PER_EVENT) {
      const end = Math.min(to, start + MAX_BLOCKS_PER_EVENT);
      this.#events.push({
        type: "stored",
        dpRank: this.#dpRank,
        tier: "device",
        parentHash: start === 0 ? undefined : [sequenceHashes[2 * start - 2]!, sequenceHashes[2 * start - 1]!],
        startBlock: start,
        sequenceHashes: sequenceHashes.slice(2 * start, 2 * end),
        localHashes: localHashes.slice(2 * start, 2 * end),
      });
    }
  }

  /** (lo, hi) pairs. Copies. */
  removed(hashes: readonly number[]): void {
    for (let start = 0; start < hashes.length; start += 2 * MAX_BLOCKS_PER_EVENT) {
      const sequenceHashes = Uint32Array.from(hashes.slice(start, start + 2 * MAX_BLOCKS_PER_EVENT));
      this.#events.push({ type: "removed", dpRank: this.#dpRank, tier: "device", sequenceHashes });
    }
  }
}
