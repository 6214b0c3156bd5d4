import type { KvEvent } from "../../protocol/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import type { CacheEstimate } from "./answer.ts";

/**
 * What an engine with slots (llama.cpp's server) has in its cache: in each slot the last sequence that ran there. Learnt from
 * its answers, which say their slot at the end. What other clients of the engine put into its slots, and what it keeps of
 * former sequences elsewhere, is not seen.
 */
export class SlotCache implements CacheEstimate {
  readonly #blockSizeTokens: number;
  readonly #dpRank: number;
  readonly #slots: (readonly string[])[];
  /** Slots that hold a block. */
  readonly #copies = new Map<string, number>();

  constructor(options: { readonly blockSizeTokens: number; readonly slots: number; readonly dpRank: number }) {
    this.#blockSizeTokens = options.blockSizeTokens;
    this.#dpRank = options.dpRank;
    this.#slots = Array.from({ length: options.slots }, () => []);
  }

  computed(tokenIds: Uint32Array, cacheNamespace: string, slot?: number): KvEvent[] {
    const before = slot === undefined ? undefined : this.#slots[slot];
    if (before === undefined) return [];
    const count = Math.floor(tokenIds.length / this.#blockSizeTokens);
    const whole = tokenIds.subarray(0, count * this.#blockSizeTokens);
    const { sequenceHashes, localHashes } = hashBlocks(whole, this.#blockSizeTokens, blockHashSeed({ cacheNamespace }));
    const keys = Array.from({ length: count }, (_, block) => keyOf(sequenceHashes, block));
    this.#slots[slot!] = keys;
    const isNew = keys.map((key) => this.#add(key));
    const gone = before.filter((key) => this.#remove(key)).flatMap((key) => key.split(",").map(Number));
    const events: KvEvent[] = [];
    if (gone.length > 0) {
      events.push({ type: "removed", dpRank: this.#dpRank, tier: "device", sequenceHashes: Uint32Array.from(gone) });
    }
    const from = isNew.indexOf(true);
    // A chain has no gaps: behind the first block that is new, all are.
    if (from !== -1) {
      events.push({
        type: "stored",
        dpRank: this.#dpRank,
        tier: "device",
        parentHash: from === 0 ? undefined : [sequenceHashes[2 * from - 2]!, sequenceHashes[2 * from - 1]!],
        startBlock: from,
        sequenceHashes: sequenceHashes.slice(2 * from),
        localHashes: localHashes.slice(2 * from),
      });
    }
    return events;
  }

  clear(): void {
    this.#slots.fill([]);
    this.#copies.clear();
  }

  /** True for the first copy. */
  #add(key: string): boolean {
    const copies = this.#copies.get(key) ?? 0;
    this.#copies.set(key, copies + 1);
    return copies === 0;
  }

  /** True for the last copy. */
  #remove(key: string): boolean {
    const copies = this.#copies.get(key)! - 1;
    if (copies > 0) this.#copies.set(key, copies);
    else this.#copies.delete(key);
    return copies === 0;
  }
}

function keyOf(hashes: Uint32Array, block: number): string {
  return `${hashes[2 * block]},${hashes[2 * block + 1]}`;
}
