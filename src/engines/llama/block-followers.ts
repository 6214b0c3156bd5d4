import type { EngineLoop } from "./engine-loop.ts";

/**
 * Chains of blocks that somebody wants as they come into the cache, in order. Whoever drives the loop asks after each step
 * what came: one look per chain, and a copy of what is new. A block that leaves the cache before its turn ends nothing; the
 * chain waits until it is computed again.
 */
interface Chain {
  readonly sequenceHashes: Uint32Array;
  /** The first block that has not come. */
  next: number;
}

export interface FollowedBlocks {
  readonly id: number;
  readonly data: Uint8Array<ArrayBuffer>;
}

const NONE: readonly FollowedBlocks[] = Object.freeze([]);

export class BlockFollowers {
  readonly #loop: Pick<EngineLoop, "countBlocks" | "exportBlocks">;
  readonly #chains = new Map<number, Chain>();

  constructor(loop: Pick<EngineLoop, "countBlocks" | "exportBlocks">) {
    this.#loop = loop;
  }

  add(id: number, sequenceHashes: Uint32Array): void {
    if (sequenceHashes.length > 0) this.#chains.set(id, { sequenceHashes, next: 0 });
  }

  remove(id: number): void {
    this.#chains.delete(id);
  }

  /** What came since the last call. A chain that is complete is forgotten. */
  take(): readonly FollowedBlocks[] {
    if (this.#chains.size === 0) return NONE;
    const taken: FollowedBlocks[] = [];
    for (const [id, chain] of this.#chains) {
      const rest = chain.sequenceHashes.subarray(2 * chain.next);
      if (this.#loop.countBlocks(rest.subarray(0, 2)) === 0) continue;
      const { data, sequenceHashes } = this.#loop.exportBlocks(rest);
      chain.next += sequenceHashes.length / 2;
      taken.push({ id, data: data as Uint8Array<ArrayBuffer> });
      if (2 * chain.next === chain.sequenceHashes.length) this.#chains.delete(id);
    }
    return taken;
  }
}
