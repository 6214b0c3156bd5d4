import type { KvEvent } from "../../protocol/index.ts";
import { hashBlocks, type HashPair } from "../../tokens/index.ts";

/**
 * Which prompt blocks the echo engine would hold if it computed anything: so that its cached-token counts and KV events
 * are true statements about a cache of `totalBlocks`, with least-recently-used eviction.
 *
 *   active   blocks that running streams use, with how many of them
 *   idle     blocks that only wait for reuse, oldest first (a Map keeps the order of insertion)
 *
 * A stream takes and gives back the blocks of a prompt together, and gives them back from the end, so that a block is
 * always older in `idle` than its parent: a block goes before its parent, and what is cached is always whole chains.
 * Cost: one hash and one or two map operations per block of a prompt. Owned by one engine.
 */
interface Block {
  readonly key: number;
  readonly hash: HashPair;
  users: number;
}

/** The blocks one stream uses, in order of the prompt. */
export interface BlockLease {
  readonly cachedTokens: number;
  readonly blocks: readonly Block[];
}

export class BlockCache {
  readonly #totalBlocks: number;
  readonly #blockSizeTokens: number;
  readonly #active = new Map<number, Block>();
  readonly #idle = new Map<number, Block>();

  constructor(totalBlocks: number, blockSizeTokens: number) {
    this.#totalBlocks = totalBlocks;
    this.#blockSizeTokens = blockSizeTokens;
  }

  get activeCount(): number {
    return this.#active.size;
  }

  get idleCount(): number {
    return this.#idle.size;
  }

  /**
   * Takes the blocks of a prompt, those that were there and those that now are; what changed goes to `events`. Stops at
   * the first block for which no room can be made. `cachedTokens` leaves out the last prompt token, which an engine
   * always has to compute.
   */
  acquire(tokenIds: Uint32Array, seed: HashPair, events: KvEvent[]): BlockLease {
    const { blockCount, localHashes, sequenceHashes } = hashBlocks(tokenIds, this.#blockSizeTokens, seed);
    const blocks: Block[] = [];
    while (blocks.length < blockCount) {
      const block = this.#reuse(keyOf(sequenceHashes, blocks.length));
      if (block === undefined) break;
      blocks.push(block);
    }
    const foundCount = blocks.length;
    const evicted: number[] = [];
    while (blocks.length < blockCount && this.#makeRoom(evicted)) {
      const index = blocks.length;
      const block: Block = {
        key: keyOf(sequenceHashes, index),
        hash: [sequenceHashes[2 * index]!, sequenceHashes[2 * index + 1]!],
        users: 1,
      };
      this.#active.set(block.key, block);
      blocks.push(block);
    }
    if (evicted.length > 0) events.push(removedEvent(evicted));
    if (blocks.length > foundCount) {
      events.push({
        type: "stored",
        dpRank: 0,
        tier: "device",
        parentHash: blocks[foundCount - 1]?.hash,
        startBlock: foundCount,
        sequenceHashes: sequenceHashes.slice(2 * foundCount, 2 * blocks.length),
        localHashes: localHashes.slice(2 * foundCount, 2 * blocks.length),
      });
    }
    const reusable = Math.floor((tokenIds.length - 1) / this.#blockSizeTokens);
    return { cachedTokens: Math.min(foundCount, reusable) * this.#blockSizeTokens, blocks };
  }

  release(lease: BlockLease): void {
    for (let i = lease.blocks.length - 1; i >= 0; i--) {
      const block = lease.blocks[i]!;
      if (--block.users > 0) continue;
      this.#active.delete(block.key);
      this.#idle.set(block.key, block);
    }
  }

  /** Drops all idle blocks; returns how many. */
  clear(events: KvEvent[]): number {
    const count = this.#idle.size;
    const hashes = [...this.#idle.values()].flatMap((block) => block.hash);
    this.#idle.clear();
    if (count > 0) events.push(removedEvent(hashes));
    return count;
  }

  #reuse(key: number): Block | undefined {
    const active = this.#active.get(key);
    if (active !== undefined) {
      active.users++;
      return active;
    }
    const idle = this.#idle.get(key);
    if (idle === undefined) return undefined;
    this.#idle.delete(key);
    this.#active.set(key, idle);
    idle.users = 1;
    return idle;
  }

  #makeRoom(evicted: number[]): boolean {
    if (this.#active.size + this.#idle.size < this.#totalBlocks) return true;
    for (const [key, block] of this.#idle) {
      this.#idle.delete(key);
      evicted.push(...block.hash);
      return true;
    }
    return false;
  }
}

/** 53 bits of the hash: a number is a far cheaper key than a BigInt, and a clash at 65,536 blocks has odds of 1e-7. */
function keyOf(sequenceHashes: Uint32Array, block: number): number {
  return (sequenceHashes[2 * block + 1]! & 0x1f_ffff) * 0x1_0000_0000 + sequenceHashes[2 * block]!;
}

function removedEvent(hashes: readonly number[]): KvEvent {
  return { type: "removed", dpRank: 0, tier: "device", sequenceHashes: Uint32Array.from(hashes) };
}
