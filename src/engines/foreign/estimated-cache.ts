import type { KvEvent } from "../../protocol/index.ts";
import type { CacheEstimate } from "./answer.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";

/**
 * What an engine that tells no KV events may have in its cache: whatever went there, least recently used out first when it
 * must be full. A guess, made as if the engine told it: other clients of the engine are not seen, and it may throw away other
 * blocks than these. One object for each rank.
 */
export class EstimatedCache implements CacheEstimate {
  readonly #blockSizeTokens: number;
  readonly #totalBlocks: number;
  readonly #dpRank: number;
  /** By hash, the least recently used first. */
  readonly #blocks = new Map<string, readonly [lo: number, hi: number]>();

  constructor(options: { readonly blockSizeTokens: number; readonly totalBlocks: number; readonly dpRank: number }) {
    this.#blockSizeTokens = options.blockSizeTokens;
    this.#totalBlocks = options.totalBlocks;
    this.#dpRank = options.dpRank;
  }

  get blockCount(): number {
    return this.#blocks.size;
  }

  /** A sequence was computed: its whole blocks are there now. */
  computed(tokenIds: Uint32Array, cacheNamespace: string): KvEvent[] {
    const count = Math.min(Math.floor(tokenIds.length / this.#blockSizeTokens), this.#totalBlocks);
    if (count === 0) return [];
    const whole = tokenIds.subarray(0, count * this.#blockSizeTokens);
    const { sequenceHashes, localHashes } = hashBlocks(whole, this.#blockSizeTokens, blockHashSeed({ cacheNamespace }));
    const keyOf = (block: number): string => `${sequenceHashes[2 * block]},${sequenceHashes[2 * block + 1]}`;
    // Without its parents a block would never be found: a chain that lost one begins there anew.
    let from = 0;
    while (from < count && this.#blocks.has(keyOf(from))) from++;
    for (let block = count - 1; block >= 0; block--) {
      const key = keyOf(block);
      this.#blocks.delete(key);
      // From the end on, so that of a chain the deepest block is the first to go.
      this.#blocks.set(key, [sequenceHashes[2 * block]!, sequenceHashes[2 * block + 1]!]);
    }
    const events = this.#evict();
    if (from === count) return events;
    events.push({
      type: "stored",
      dpRank: this.#dpRank,
      tier: "device",
      parentHash: from === 0 ? undefined : [sequenceHashes[2 * from - 2]!, sequenceHashes[2 * from - 1]!],
      startBlock: from,
      sequenceHashes: sequenceHashes.slice(2 * from),
      localHashes: localHashes.slice(2 * from),
    });
    return events;
  }

  /** The engine's cache is empty. */
  clear(): void {
    this.#blocks.clear();
  }

  #evict(): KvEvent[] {
    const gone: number[] = [];
    for (const [key, [lo, hi]] of this.#blocks) {
      if (this.#blocks.size <= this.#totalBlocks) break;
      this.#blocks.delete(key);
      gone.push(lo, hi);
    }
    if (gone.length === 0) return [];
    return [{ type: "removed", dpRank: this.#dpRank, tier: "device", sequenceHashes: Uint32Array.from(gone) }];
  }
}
