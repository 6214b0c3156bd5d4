import assert from "node:assert/strict";
import { HashIndex } from "../std/index.ts";
import { createEviction, type EvictionPolicy, type EvictionName } from "./eviction/index.ts";

/**
 * Which block of one tier holds what, who uses it, and which goes first: the logical half of the block manager. It moves
 * no bytes; block `i` is slot `i` of whatever memory, file or bucket stands behind the tier.
 *
 *             allocate            stage(hash)            register
 *   RESET ------------> PARTIAL ------------> COMPLETE ------------> REGISTERED, referenced
 *     ^                    |                      |                     |  ^
 *     |<------ free -------+------- free ---------+             release |  | match, retain, upgrade
 *     |                                                                 v  |
 *     +<------------------------- evicted, dropped, cleared ------- REGISTERED, inactive
 *
 * A registered block can be matched by its sequence hash. Strong handles are block ids, counted; a block with none is
 * inactive: still matchable, and evicted when room is needed, in the order of the pool's policy. A weak handle keeps
 * nothing alive: a number made of block id and generation, which stops resolving once the block was reset.
 * The same content registered twice is kept once: the second block is reset, and its holder gets the first.
 *
 * Everything is an integer in a typed array: 36 bytes a block and 10 to 30 more for the policy; no call but the
 * constructor allocates. One owner, one thread. `naive-block-pool.ts` says the same in the plainest way.
 */
export const BlockState = { reset: 0, partial: 1, complete: 2, registered: 3 } as const;
export type BlockState = (typeof BlockState)[keyof typeof BlockState];

export interface BlockPoolOptions {
  /** 1 to 2^26. */
  readonly blockCount: number;
  /** @default "lineage" */
  readonly eviction?: EvictionName;
}

/** Since the start; names as in KVBM's pool metrics. */
export interface PoolCounters {
  allocations: number;
  evictions: number;
  stagings: number;
  registrations: number;
  /** Registrations of a hash that was there. */
  duplicates: number;
  /** Blocks asked for in matches, and found. */
  matchRequested: number;
  matchReturned: number;
}

const MAX_BLOCKS = 2 ** 26;
const MAX_GENERATION = 2 ** 27;
export const NO_BLOCK = -1;

export class BlockPool {
  readonly blockCount: number;
  readonly counters: PoolCounters = {
    allocations: 0,
    evictions: 0,
    stagings: 0,
    registrations: 0,
    duplicates: 0,
    matchRequested: 0,
    matchReturned: 0,
  };
  readonly #index: HashIndex;
  readonly #eviction: EvictionPolicy;
  readonly #state: Uint8Array;
  readonly #references: Int32Array;
  readonly #generation: Uint32Array;
  /** (lo, hi) of the sequence hash, and of the parent's; both 0 when there is no parent. */
  readonly #hashes: Uint32Array;
  readonly #parents: Uint32Array;
  readonly #resetBlocks: Int32Array;
  #resetCount: number;
  #registered = 0;
  #mutable = 0;
  /** (lo, hi) of what left since the last `takeEvicted`; grows by doubling, at most to what the pool holds. */
  #evicted = new Uint32Array(64);
  #evictedCount = 0;

  constructor({ blockCount, eviction = "lineage" }: BlockPoolOptions) {
    assert(Number.isInteger(blockCount) && blockCount >= 1 && blockCount <= MAX_BLOCKS, "1 to 2^26 blocks");
    this.blockCount = blockCount;
    this.#hashes = new Uint32Array(2 * blockCount);
    this.#parents = new Uint32Array(2 * blockCount);
    this.#index = new HashIndex(this.#hashes);
    this.#state = new Uint8Array(blockCount);
    this.#references = new Int32Array(blockCount);
    this.#generation = new Uint32Array(blockCount);
    this.#resetBlocks = new Int32Array(blockCount);
    for (let i = 0; i < blockCount; i++) this.#resetBlocks[i] = blockCount - 1 - i;
    this.#resetCount = blockCount;
    this.#eviction = createEviction(eviction, {
      blockCount,
      hashes: this.#hashes,
      parents: this.#parents,
      find: (lo, hi) => this.#index.find(lo, hi),
    });
  }

  get resetCount(): number {
    return this.#resetCount;
  }

  /** Registered and unreferenced. */
  get inactiveCount(): number {
    return this.#eviction.size;
  }

  /** Registered and referenced. */
  get activeCount(): number {
    return this.#registered - this.#eviction.size;
  }

  get registeredCount(): number {
    return this.#registered;
  }

  /** Partial or complete. */
  get mutableCount(): number {
    return this.#mutable;
  }

  /** What `allocate` could give now. */
  get availableCount(): number {
    return this.#resetCount + this.#eviction.size;
  }

  stateOf(block: number): BlockState {
    return this.#state[block] as BlockState;
  }

  referencesOf(block: number): number {
    return this.#references[block]!;
  }

  hashOf(block: number): readonly [lo: number, hi: number] {
    return [this.#hashes[2 * block]!, this.#hashes[2 * block + 1]!];
  }

  /** All `count` blocks, as PARTIAL, to `into` from `at` on, or false and nothing changed. Reset blocks first. */
  allocate(count: number, into: Int32Array, at = 0): boolean {
    assert(at + count <= into.length, "there is room for the ids");
    if (this.availableCount < count) return false;
    for (let i = 0; i < count; i++) {
      if (this.#resetCount === 0) this.#evictOne();
      const block = this.#resetBlocks[--this.#resetCount]!;
      this.#state[block] = BlockState.partial;
      into[at + i] = block;
    }
    this.#mutable += count;
    this.counters.allocations += count;
    return true;
  }

  /** Its content is whole and has this sequence hash; `parent` (0, 0) = the first block of a sequence. */
  stage(block: number, lo: number, hi: number, parentLo: number, parentHi: number): void {
    assert(this.#state[block] === BlockState.partial, "only a partial block is staged");
    this.#state[block] = BlockState.complete;
    this.#hashes[2 * block] = lo;
    this.#hashes[2 * block + 1] = hi;
    this.#parents[2 * block] = parentLo;
    this.#parents[2 * block + 1] = parentHi;
    this.counters.stagings++;
  }

  /**
   * Makes a complete block matchable. Returns the strong handle that the caller holds from now on: the block itself, or,
   * when its content was there already, that one; then `block` was reset.
   */
  register(block: number): number {
    assert(this.#state[block] === BlockState.complete, "only a complete block is registered");
    const known = this.#index.find(this.#hashes[2 * block]!, this.#hashes[2 * block + 1]!);
    this.#mutable--;
    this.counters.registrations++;
    if (known !== NO_BLOCK) {
      this.counters.duplicates++;
      this.#reset(block);
      this.retain(known);
      return known;
    }
    this.#state[block] = BlockState.registered;
    this.#references[block] = 1;
    this.#index.add(block);
    this.#registered++;
    this.#eviction.registered(block);
    return block;
  }

  /** Gives a partial or complete block back. */
  free(block: number): void {
    const state = this.#state[block];
    assert(state === BlockState.partial || state === BlockState.complete, "only a mutable block is freed");
    this.#mutable--;
    this.#reset(block);
  }

  /** The block with this hash, not retained, or NO_BLOCK. Good until the next change. */
  find(lo: number, hi: number): number {
    return this.#index.find(lo, hi);
  }

  /** How many leading hashes of a chain ((lo, hi) pairs) are there; nothing is retained or counted. */
  prefixLength(hashes: Uint32Array, limit: number): number {
    let count = 0;
    while (count < limit && this.#index.find(hashes[2 * count]!, hashes[2 * count + 1]!) !== NO_BLOCK) count++;
    return count;
  }

  /** Retains the leading blocks of a chain up to the first that is missing; their ids go to `into`, the count is returned. */
  matchPrefix(hashes: Uint32Array, limit: number, into: Int32Array): number {
    let count = 0;
    for (; count < limit; count++) {
      const block = this.#index.find(hashes[2 * count]!, hashes[2 * count + 1]!);
      if (block === NO_BLOCK) break;
      this.retain(block);
      into[count] = block;
    }
    this.counters.matchRequested += limit;
    this.counters.matchReturned += count;
    return count;
  }

  /** Retains every block of a chain that is there; NO_BLOCK in `into` where one is missing. Returns how many are there. */
  scanMatches(hashes: Uint32Array, limit: number, into: Int32Array): number {
    let found = 0;
    for (let i = 0; i < limit; i++) {
      const block = this.#index.find(hashes[2 * i]!, hashes[2 * i + 1]!);
      into[i] = block;
      if (block === NO_BLOCK) continue;
      this.retain(block);
      found++;
    }
    this.counters.matchRequested += limit;
    this.counters.matchReturned += found;
    return found;
  }

  /** One more strong handle on a registered block. */
  retain(block: number): void {
    assert(this.#state[block] === BlockState.registered, "only a registered block is retained");
    if (this.#references[block]!++ === 0) this.#eviction.remove(block);
    this.#eviction.touched(block);
  }

  /** One strong handle less; after the last the block is inactive. */
  release(block: number): void {
    const references = --this.#references[block]!;
    assert(references >= 0, "a block is released as often as it was retained");
    if (references === 0) this.#eviction.insert(block);
  }

  /** Releases a whole chain from its end, so that a block becomes inactive before its parent. */
  releaseAll(blocks: Int32Array, count: number): void {
    for (let i = count - 1; i >= 0; i--) this.release(blocks[i]!);
  }

  /** A number that `upgrade` turns back into the block as long as it was not reset. */
  weakHandle(block: number): number {
    return this.#generation[block]! * MAX_BLOCKS + block;
  }

  /** A strong handle for a weak one, or NO_BLOCK when the block is not registered any more. */
  upgrade(weak: number): number {
    const block = weak % MAX_BLOCKS;
    const isSame = block < this.blockCount && this.#generation[block] === (weak - block) / MAX_BLOCKS;
    if (!isSame || this.#state[block] !== BlockState.registered) return NO_BLOCK;
    this.retain(block);
    return block;
  }

  /** Forgets a registered block that nobody holds (its bytes turned out bad). False when somebody does. */
  drop(block: number): boolean {
    assert(this.#state[block] === BlockState.registered, "only a registered block is dropped");
    if (this.#references[block]! > 0) return false;
    this.#eviction.remove(block);
    this.#forget(block);
    return true;
  }

  /** Evicts everything that nobody holds; returns how many. */
  clear(): number {
    const count = this.#eviction.size;
    while (this.#eviction.size > 0) this.#evictOne();
    return count;
  }

  /** The (lo, hi) hashes of the blocks that stopped being matchable since the last call, in order. */
  takeEvicted(): Uint32Array {
    const taken = this.#evicted.slice(0, this.#evictedCount);
    this.#evictedCount = 0;
    return taken;
  }

  #evictOne(): void {
    const block = this.#eviction.takeVictim();
    assert(this.#references[block] === 0, "a block that somebody holds is never evicted");
    this.counters.evictions++;
    this.#forget(block);
  }

  #forget(block: number): void {
    this.#index.remove(block);
    this.#registered--;
    this.#eviction.forgotten(block);
    this.#noteEvicted(this.#hashes[2 * block]!, this.#hashes[2 * block + 1]!);
    this.#reset(block);
  }

  #reset(block: number): void {
    this.#state[block] = BlockState.reset;
    this.#generation[block] = (this.#generation[block]! + 1) % MAX_GENERATION;
    this.#resetBlocks[this.#resetCount++] = block;
  }

  #noteEvicted(lo: number, hi: number): void {
    if (this.#evictedCount + 2 > this.#evicted.length) {
      const grown = new Uint32Array(this.#evicted.length * 2);
      grown.set(this.#evicted);
      this.#evicted = grown;
    }
    this.#evicted[this.#evictedCount++] = lo;
    this.#evicted[this.#evictedCount++] = hi;
  }
}
