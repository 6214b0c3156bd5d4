import assert from "node:assert/strict";
import { HashIndex } from "../../std/index.ts";
import type { BlockChain } from "./block-chain.ts";
import { BlockHeap } from "./block-heap.ts";
import type { KvEventLog } from "./kv-event-log.ts";

/**
 * The mock engine's KV cache: `totalBlocks` blocks that hold nothing but are accounted for as a real engine does it. Each
 * block is in exactly one state:
 *
 *     free -> private      one sequence's, not full yet (or the prefix cache is off)
 *          -> registered   full, findable by its sequence hash; used by `users` sequences, idle with none
 *     idle -> free         evicted, with a `removed` event
 *
 * Registered blocks form trees by prefix. A sequence that uses a block uses all its parents, so idle blocks hang below
 * used ones, and only leaves are evicted, least recently used first; a parent that becomes a leaf keeps the time it was
 * last used (after the lineage back end of Dynamo's block manager). So what is cached is always whole chains. A sequence
 * that fills a block which is already cached gives up its own and uses that one: no hash is there twice.
 *
 * One owner. Cost: a hash look-up per full block, O(log idle) per eviction; no allocation but the events.
 */
const NO_BLOCK = -1;

/** The blocks of one sequence, in order: `registeredCount` of them registered, the others private. */
export class BlockTable {
  readonly blocks: number[] = [];
  registeredCount = 0;
}

export interface KvPoolOptions {
  readonly totalBlocks: number;
  readonly blockSizeTokens: number;
  readonly prefixCaching: boolean;
  readonly log: KvEventLog;
}

export class KvPool {
  readonly totalBlocks: number;
  readonly #blockSizeTokens: number;
  readonly #prefixCaching: boolean;
  readonly #log: KvEventLog;

  readonly #hashes: Uint32Array;
  readonly #index: HashIndex;
  readonly #users: Int32Array;
  readonly #parents: Int32Array;
  readonly #childCounts: Int32Array;
  /** When an idle block was last used, in releases. */
  readonly #ticks: Float64Array;
  #tick = 0;
  /** Idle blocks without children. */
  readonly #leaves: BlockHeap;
  readonly #free: Int32Array;
  #freeCount: number;
  #idleCount = 0;
  readonly #evicted: number[] = [];

  constructor({ totalBlocks, blockSizeTokens, prefixCaching, log }: KvPoolOptions) {
    this.totalBlocks = totalBlocks;
    this.#blockSizeTokens = blockSizeTokens;
    this.#prefixCaching = prefixCaching;
    this.#log = log;
    this.#hashes = new Uint32Array(2 * totalBlocks);
    this.#index = new HashIndex(this.#hashes);
    this.#users = new Int32Array(totalBlocks);
    this.#parents = new Int32Array(totalBlocks).fill(NO_BLOCK);
    this.#childCounts = new Int32Array(totalBlocks);
    this.#ticks = new Float64Array(totalBlocks);
    this.#leaves = new BlockHeap(totalBlocks);
    // Lowest ids first: nicer to read in a dump.
    this.#free = Int32Array.from({ length: totalBlocks }, (_, i) => totalBlocks - 1 - i);
    this.#freeCount = totalBlocks;
  }

  /** Blocks that sequences use. */
  get activeCount(): number {
    return this.totalBlocks - this.#freeCount - this.#idleCount;
  }

  /** Blocks kept only because they may be reused. */
  get idleCount(): number {
    return this.#idleCount;
  }

  /** Blocks that could be had: free ones and idle ones. */
  get availableCount(): number {
    return this.#freeCount + this.#idleCount;
  }

  /** How many leading blocks of the chain are cached, at most `limit`. */
  countCached(chain: Pick<BlockChain, "sequenceHashes" | "blockCount">, limit = chain.blockCount): number {
    if (!this.#prefixCaching) return 0;
    const end = Math.min(limit, chain.blockCount);
    let count = 0;
    while (count < end && this.#find(chain.sequenceHashes, count) !== NO_BLOCK) count++;
    return count;
  }

  /** How many of the chain's first `count` blocks, all cached, are idle: using them takes them from what is available. */
  countIdle(chain: BlockChain, count: number): number {
    // Used blocks come first on any path from the root.
    let idle = 0;
    for (let i = count - 1; i >= 0 && this.#users[this.#find(chain.sequenceHashes, i)] === 0; i--) idle++;
    return idle;
  }

  /** Puts the chain's first `count` blocks, all cached, into an empty table. */
  useCached(table: BlockTable, chain: BlockChain, count: number): void {
    assert(table.blocks.length === 0, "a prefix is only taken into an empty table");
    for (let i = 0; i < count; i++) table.blocks.push(this.#use(this.#find(chain.sequenceHashes, i)));
    table.registeredCount = count;
  }

  /**
   * Makes the table cover `tokens` tokens and registers the blocks that are full with them. False, and nothing changed,
   * when there are not as many blocks as that takes without sharing.
   */
  tryGrow(table: BlockTable, chain: BlockChain, tokens: number): boolean {
    const blockCount = Math.ceil(tokens / this.#blockSizeTokens);
    if (blockCount - table.blocks.length > this.availableCount) return false;
    if (this.#prefixCaching) {
      const full = Math.floor(tokens / this.#blockSizeTokens);
      if (full > table.registeredCount) this.#registerUpTo(table, chain, full);
    }
    while (table.blocks.length < blockCount) table.blocks.push(this.#takeFree());
    this.#logEvicted();
    return true;
  }

  /** Blocks for `tokens` tokens, without registering: what they will hold is still on its way. False when there is no room. */
  tryReserve(table: BlockTable, tokens: number): boolean {
    const blockCount = Math.ceil(tokens / this.#blockSizeTokens);
    if (blockCount - table.blocks.length > this.availableCount) return false;
    while (table.blocks.length < blockCount) table.blocks.push(this.#takeFree());
    this.#logEvicted();
    return true;
  }

  /** Gives all blocks of the table back. */
  release(table: BlockTable): void {
    const { blocks } = table;
    for (let i = blocks.length - 1; i >= 0; i--) {
      const block = blocks[i]!;
      if (i >= table.registeredCount) this.#free[this.#freeCount++] = block;
      else if (--this.#users[block]! === 0) this.#rest(block);
    }
    blocks.length = 0;
    table.registeredCount = 0;
  }

  /** Puts a chain into the cache as if it had been computed; returns how many leading blocks are there now. */
  importChain(chain: BlockChain): number {
    if (!this.#prefixCaching) return 0;
    const table = new BlockTable();
    const cached = this.countCached(chain);
    const room = this.availableCount - this.countIdle(chain, cached);
    this.useCached(table, chain, cached);
    const count = Math.min(chain.blockCount, cached + room);
    const isGrown = this.tryGrow(table, chain, count * this.#blockSizeTokens);
    assert(isGrown, "there is room for as many blocks as are available");
    this.release(table);
    return count;
  }

  /** Evicts every idle block; returns how many. */
  clear(): number {
    const count = this.#idleCount;
    while (this.#leaves.count > 0) this.#free[this.#freeCount++] = this.#evict();
    this.#logEvicted();
    assert(this.#idleCount === 0, "every idle block becomes a leaf");
    return count;
  }

  /** Compares all counters with the truth of the tables that are in use; for tests. */
  check(tables: readonly BlockTable[]): void {
    const users = new Int32Array(this.totalBlocks);
    const owners = new Set<number>();
    for (const { blocks, registeredCount } of tables) {
      blocks.forEach((block, i) => {
        if (i < registeredCount) users[block]!++;
        else assert(!owners.has(block) && owners.add(block), "a private block has one owner");
      });
    }
    const free = new Set(this.#free.subarray(0, this.#freeCount));
    assert(free.size === this.#freeCount, "no block is free twice");
    const children = new Int32Array(this.totalBlocks);
    let idle = 0;
    for (let block = 0; block < this.totalBlocks; block++) {
      const isRegistered = !free.has(block) && !owners.has(block);
      assert(!(free.has(block) && owners.has(block)), "no block is both free and in use");
      assert(users[block] === this.#users[block], "the users of a block are counted");
      if (!isRegistered) {
        assert(users[block] === 0, "only registered blocks are shared");
        continue;
      }
      assert(this.#find(this.#hashes, block) === block, "a registered block is found by its hash, and no other is");
      if (users[block] === 0) idle++;
      const parent = this.#parents[block]!;
      if (parent !== NO_BLOCK) {
        children[parent]!++;
        assert(users[parent]! >= users[block]!, "who uses a block uses its parent");
      }
    }
    for (let block = 0; block < this.totalBlocks; block++) {
      assert(children[block] === this.#childCounts[block], "the children of a block are counted");
      const isLeaf = !free.has(block) && !owners.has(block) && users[block] === 0 && children[block] === 0;
      assert(this.#leaves.has(block) === isLeaf, "the leaves are the idle blocks without children");
    }
    assert(idle === this.#idleCount, "idle blocks are counted");
  }

  /** (lo, hi) pairs of all blocks that can be found, in no order; for tests. */
  cachedHashes(): Uint32Array {
    const found: number[] = [];
    for (let block = 0; block < this.totalBlocks; block++) {
      if (this.#find(this.#hashes, block) === block) found.push(this.#hashes[2 * block]!, this.#hashes[2 * block + 1]!);
    }
    return Uint32Array.from(found);
  }

  #registerUpTo(table: BlockTable, chain: BlockChain, full: number): void {
    const { sequenceHashes, localHashes } = chain;
    let firstNew = full;
    for (let i = table.registeredCount; i < full; i++) {
      const known = this.#find(sequenceHashes, i);
      if (known !== NO_BLOCK) {
        assert(firstNew === full, "what is cached is always whole chains");
        if (i < table.blocks.length) this.#free[this.#freeCount++] = table.blocks[i]!;
        table.blocks[i] = this.#use(known);
        continue;
      }
      firstNew = Math.min(firstNew, i);
      if (i === table.blocks.length) table.blocks.push(this.#takeFree());
      this.#register(table.blocks[i]!, i === 0 ? NO_BLOCK : table.blocks[i - 1]!, sequenceHashes, i);
    }
    table.registeredCount = full;
    // What had to go is told first: nothing evicted just now can be one of the blocks stored just now.
    this.#logEvicted();
    if (firstNew < full) this.#log.stored(sequenceHashes, localHashes, firstNew, full);
  }

  #register(block: number, parent: number, sequenceHashes: Uint32Array, i: number): void {
    this.#hashes[2 * block] = sequenceHashes[2 * i]!;
    this.#hashes[2 * block + 1] = sequenceHashes[2 * i + 1]!;
    this.#index.add(block);
    this.#users[block] = 1;
    this.#parents[block] = parent;
    if (parent !== NO_BLOCK) this.#childCounts[parent]!++;
  }

  #find(hashes: Uint32Array, i: number): number {
    return this.#index.find(hashes[2 * i]!, hashes[2 * i + 1]!);
  }

  #use(block: number): number {
    if (this.#users[block]!++ === 0) {
      this.#idleCount--;
      if (this.#leaves.has(block)) this.#leaves.remove(block);
    }
    return block;
  }

  /** The block has no users any more. */
  #rest(block: number): void {
    this.#idleCount++;
    this.#ticks[block] = ++this.#tick;
    if (this.#childCounts[block] === 0) this.#leaves.add(block, this.#tick);
  }

  /** There must be an available block. */
  #takeFree(): number {
    return this.#freeCount > 0 ? this.#free[--this.#freeCount]! : this.#evict();
  }

  #evict(): number {
    const block = this.#leaves.takeFirst();
    assert(block !== NO_BLOCK, "where a block is idle, a leaf is");
    this.#evicted.push(this.#hashes[2 * block]!, this.#hashes[2 * block + 1]!);
    this.#index.remove(block);
    this.#idleCount--;
    const parent = this.#parents[block]!;
    this.#parents[block] = NO_BLOCK;
    if (parent !== NO_BLOCK && --this.#childCounts[parent]! === 0 && this.#users[parent] === 0) {
      this.#leaves.add(parent, this.#ticks[parent]!);
    }
    return block;
  }

  #logEvicted(): void {
    if (this.#evicted.length === 0) return;
    this.#log.removed(this.#evicted);
    this.#evicted.length = 0;
  }
}
