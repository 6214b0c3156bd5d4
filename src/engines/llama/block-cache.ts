import assert from "node:assert/strict";
import type { KvEvent } from "../../protocol/index.ts";
import { HashIndex } from "../../std/index.ts";
import type { KvCells } from "./token-model.ts";

/**
 * The prefix cache: which complete blocks of which prefixes are in the KV memory, who uses them, which goes first when
 * room is needed, and an exact count of free blocks, so that a native call never runs out of cells.
 *
 * Sharing without copying. A cell of the unified KV memory belongs to a set of sequence ids and is free when the set is
 * empty. Running sequences have ids of their own. A block that is registered here also belongs to a *holder*, one of the
 * remaining ids, which keeps it alive when nobody runs it. A holder has at most one block per depth (a block's index in
 * its sequence), because two blocks of one depth have the same positions and could not be told apart:
 *
 *            depth 0   1   2   3            A-B-C-D is one prompt, A-B-E another, F a third.
 *   holder 0       A   B   C   D            A new prompt A-B-E-... takes A and B from holder 0 and E from holder 1 by
 *   holder 1       F   .   E   .            adding the cells of these positions to its own id; nothing moves.
 *
 * With as many holders as sequences that can run, a depth without a free holder has a block that nobody uses, so room
 * can always be made. A block goes to its parent's holder where it can: then a whole chain moves in one call.
 *
 * A block that is computed twice at the same time is kept once: the later sequence gives its cells back and takes the
 * registered ones. So every complete block in use is registered, and only unfinished ones are private to a sequence.
 *
 * Eviction is least recently used, leaves first. Blocks that nobody uses form a list; a sequence that ends puts its own
 * there from the last to the first, so a block always comes before its parent and the oldest is always a leaf (after
 * vLLM's free block queue).
 *
 * Owned by the engine's thread. No call allocates but `register` and eviction, which note events.
 */
export interface BlockCacheOptions {
  readonly blockSizeTokens: number;
  readonly totalBlocks: number;
  /** Holder ids are `firstHolder` to `firstHolder + holderCount - 1`. At least as many as sequences that pin blocks. */
  readonly firstHolder: number;
  readonly holderCount: number;
  /** Blocks of the longest sequence. */
  readonly maxDepth: number;
}

/** Pins blocks without a sequence of its own in the KV memory: for import and export. */
export const NO_SEQUENCE = -1;
const NONE = -1;
const NO_EVENTS: readonly KvEvent[] = Object.freeze([]);

export class BlockCache {
  readonly blockSizeTokens: number;
  readonly totalBlocks: number;
  readonly #cells: KvCells;
  readonly #firstHolder: number;
  readonly #holderCount: number;
  readonly #index: HashIndex;
  // Per block id.
  readonly #sequenceHashes: Uint32Array;
  readonly #references: Int32Array;
  readonly #children: Int32Array;
  readonly #parent: Int32Array;
  readonly #holder: Int32Array;
  readonly #depth: Int32Array;
  // List of unused blocks, oldest first; index `totalBlocks` is both ends.
  readonly #newer: Int32Array;
  readonly #older: Int32Array;
  readonly #freeIds: Int32Array;
  #freeIdCount: number;
  /** [depth][holder] -> 1 when the holder has a block of that depth. */
  readonly #held: Uint8Array;
  #registered = 0;
  #unused = 0;
  #private = 0;
  readonly #events: KvEvent[] = [];
  readonly #evictedHashes: number[] = [];

  constructor(cells: KvCells, options: BlockCacheOptions) {
    const { totalBlocks, holderCount, maxDepth } = options;
    assert(totalBlocks > 0, "a cache has at least one block");
    assert(holderCount > 0, "a cache has at least one holder");
    this.blockSizeTokens = options.blockSizeTokens;
    this.totalBlocks = totalBlocks;
    this.#cells = cells;
    this.#firstHolder = options.firstHolder;
    this.#holderCount = holderCount;
    this.#sequenceHashes = new Uint32Array(2 * totalBlocks);
    this.#index = new HashIndex(this.#sequenceHashes);
    this.#references = new Int32Array(totalBlocks);
    this.#children = new Int32Array(totalBlocks);
    this.#parent = new Int32Array(totalBlocks);
    this.#holder = new Int32Array(totalBlocks);
    this.#depth = new Int32Array(totalBlocks);
    this.#newer = new Int32Array(totalBlocks + 1).fill(totalBlocks);
    this.#older = new Int32Array(totalBlocks + 1).fill(totalBlocks);
    this.#freeIds = new Int32Array(totalBlocks);
    for (let i = 0; i < totalBlocks; i++) this.#freeIds[i] = totalBlocks - 1 - i;
    this.#freeIdCount = totalBlocks;
    this.#held = new Uint8Array(holderCount * maxDepth);
  }

  /** Blocks whose cells are all free. */
  get freeBlocks(): number {
    return this.totalBlocks - this.#registered - this.#private;
  }

  /** Registered blocks that nobody uses: kept because they may be reused. */
  get unusedBlocks(): number {
    return this.#unused;
  }

  /** Blocks that running sequences use, shared ones once. */
  get activeBlocks(): number {
    return this.#registered - this.#unused + this.#private;
  }

  get registeredBlocks(): number {
    return this.#registered;
  }

  /**
   * The leading blocks of a chain that are registered: their ids go to `into`, the count is returned. Nothing is pinned:
   * the ids are good until the next change.
   */
  findPrefix(sequenceHashes: Uint32Array, limit: number, into: Int32Array): number {
    let count = 0;
    while (count < limit) {
      const block = this.#index.find(sequenceHashes[2 * count]!, sequenceHashes[2 * count + 1]!);
      if (block === NONE) break;
      into[count++] = block;
    }
    return count;
  }

  /** How many of these blocks are unused now: `acquire` would take them out of what can be evicted. */
  unusedAmong(blocks: Int32Array, count: number): number {
    let unused = 0;
    for (let i = 0; i < count; i++) if (this.#references[blocks[i]!] === 0) unused++;
    return unused;
  }

  /** Pins the chain and adds its cells to the sequence, which must be empty. `blocks` come from `findPrefix`. */
  acquire(sequence: number, blocks: Int32Array, count: number): void {
    for (let i = 0; i < count; i++) this.#pin(blocks[i]!);
    if (sequence === NO_SEQUENCE) return;
    // One call per stretch of blocks in the same holder.
    for (let start = 0; start < count;) {
      const holder = this.#holder[blocks[start]!]!;
      let end = start + 1;
      while (end < count && this.#holder[blocks[end]!] === holder) end++;
      this.#copy(this.#firstHolder + holder, sequence, start, end);
      start = end;
    }
  }

  /** Makes room for `count` more private blocks, evicting what is needed. False, and nothing changed, if it cannot. */
  reserve(count: number): boolean {
    if (this.freeBlocks + this.#unused < count) return false;
    while (this.freeBlocks < count) this.#evictOldest();
    this.#private += count;
    return true;
  }

  /**
   * Registers blocks [from, to) of a sequence, which are computed and private, under their hashes ((lo, hi) pairs by
   * block index). Their ids go to `blocks`; blocks before `from` are there already. The sequence keeps them pinned.
   */
  register(
    sequence: number,
    blocks: Int32Array,
    from: number,
    to: number,
    hashes: { readonly sequenceHashes: Uint32Array; readonly localHashes: Uint32Array },
  ): void {
    const { sequenceHashes } = hashes;
    // First block of the stretch that goes to one holder in one call.
    let copyFrom = from;
    let copyHolder = NONE;
    let storedFrom = from;
    for (let depth = from; depth < to; depth++) {
      const known = this.#index.find(sequenceHashes[2 * depth]!, sequenceHashes[2 * depth + 1]!);
      let holder = NONE;
      if (known === NONE) {
        const parent = depth === 0 ? NONE : blocks[depth - 1]!;
        const block = this.#insert(parent, depth, sequenceHashes);
        blocks[depth] = block;
        holder = this.#holder[block]!;
      }
      if (holder !== copyHolder) {
        if (copyHolder !== NONE) this.#copy(sequence, this.#firstHolder + copyHolder, copyFrom, depth);
        copyFrom = depth;
        copyHolder = holder;
      }
      if (known !== NONE) {
        this.#noteStored(hashes, storedFrom, depth);
        storedFrom = depth + 1;
        this.#replaceByRegistered(sequence, known, depth);
        blocks[depth] = known;
      }
    }
    if (copyHolder !== NONE) this.#copy(sequence, this.#firstHolder + copyHolder, copyFrom, to);
    this.#noteStored(hashes, storedFrom, to);
  }

  /**
   * Ends a sequence's use: its `count` registered blocks may be evicted from now on, the cells of its `privateCount`
   * other ones are free.
   */
  release(sequence: number, blocks: Int32Array, count: number, privateCount: number): void {
    const total = count + privateCount;
    if (sequence !== NO_SEQUENCE && total > 0) this.#cells.removeCells(sequence, 0, total * this.blockSizeTokens);
    this.#private -= privateCount;
    assert(this.#private >= 0, "no more private blocks are given back than were reserved");
    for (let i = count - 1; i >= 0; i--) this.#unpin(blocks[i]!);
  }

  /** Evicts everything that nobody uses; returns how many blocks. */
  clear(): number {
    const count = this.#unused;
    while (this.#unused > 0) this.#evictOldest();
    return count;
  }

  /** The holder's sequence id of a registered block: where its cells can be read. */
  holderOf(block: number): number {
    return this.#firstHolder + this.#holder[block]!;
  }

  /** The positions of a registered block's cells. */
  positionsOf(block: number): { start: number; end: number } {
    const start = this.#depth[block]! * this.blockSizeTokens;
    return { start, end: start + this.blockSizeTokens };
  }

  /** What happened since the last call, in order. */
  takeEvents(): readonly KvEvent[] {
    this.#noteRemoved();
    if (this.#events.length === 0) return NO_EVENTS;
    return this.#events.splice(0);
  }

  #copy(from: number, to: number, startBlock: number, endBlock: number): void {
    this.#cells.copyCells(from, to, startBlock * this.blockSizeTokens, endBlock * this.blockSizeTokens);
  }

  #pin(block: number): void {
    if (this.#references[block]!++ > 0) return;
    this.#unlink(block);
    this.#unused--;
  }

  #unpin(block: number): void {
    const references = --this.#references[block]!;
    assert(references >= 0, "a block is released as often as it was taken");
    if (references > 0) return;
    const end = this.totalBlocks;
    const newest = this.#older[end]!;
    this.#newer[newest] = block;
    this.#older[block] = newest;
    this.#newer[block] = end;
    this.#older[end] = block;
    this.#unused++;
  }

  #unlink(block: number): void {
    const newer = this.#newer[block]!;
    const older = this.#older[block]!;
    this.#newer[older] = newer;
    this.#older[newer] = older;
  }

  /** A new block, pinned once, in place of a private one. Its cells still have to be copied to its holder. */
  #insert(parent: number, depth: number, sequenceHashes: Uint32Array): number {
    const holder = this.#takeHolder(parent, depth);
    // Private and registered blocks together never exceed the total, so an id is free.
    const block = this.#freeIds[--this.#freeIdCount]!;
    this.#sequenceHashes[2 * block] = sequenceHashes[2 * depth]!;
    this.#sequenceHashes[2 * block + 1] = sequenceHashes[2 * depth + 1]!;
    this.#index.add(block);
    this.#references[block] = 1;
    this.#children[block] = 0;
    this.#parent[block] = parent;
    this.#holder[block] = holder;
    this.#depth[block] = depth;
    if (parent !== NONE) this.#children[parent]!++;
    this.#private--;
    this.#registered++;
    return block;
  }

  /** A holder without a block of this depth, the parent's if possible; evicts until there is one. */
  #takeHolder(parent: number, depth: number): number {
    const row = depth * this.#holderCount;
    const preferred = parent === NONE ? 0 : this.#holder[parent]!;
    for (;;) {
      for (let i = 0; i < this.#holderCount; i++) {
        const holder = (preferred + i) % this.#holderCount;
        if (this.#held[row + holder] !== 0) continue;
        this.#held[row + holder] = 1;
        return holder;
      }
      assert(this.#unused > 0, "a full depth has an unused block");
      this.#evictOldest();
    }
  }

  /** The sequence has computed a block that is registered already: it uses that one and gives its own cells back. */
  #replaceByRegistered(sequence: number, known: number, depth: number): void {
    const start = depth * this.blockSizeTokens;
    this.#cells.removeCells(sequence, start, start + this.blockSizeTokens);
    this.#copy(this.holderOf(known), sequence, depth, depth + 1);
    this.#pin(known);
    this.#private--;
  }

  #evictOldest(): void {
    const block = this.#newer[this.totalBlocks]!;
    assert(this.#references[block] === 0, "a block in use is never evicted");
    assert(this.#children[block] === 0, "a block is evicted after its children");
    const depth = this.#depth[block]!;
    const start = depth * this.blockSizeTokens;
    this.#cells.removeCells(this.holderOf(block), start, start + this.blockSizeTokens);
    this.#held[depth * this.#holderCount + this.#holder[block]!] = 0;
    this.#unlink(block);
    this.#unused--;
    this.#registered--;
    const parent = this.#parent[block]!;
    if (parent !== NONE) this.#children[parent]!--;
    this.#index.remove(block);
    this.#freeIds[this.#freeIdCount++] = block;
    this.#evictedHashes.push(this.#sequenceHashes[2 * block]!, this.#sequenceHashes[2 * block + 1]!);
  }

  #noteStored(
    hashes: { readonly sequenceHashes: Uint32Array; readonly localHashes: Uint32Array },
    from: number,
    to: number,
  ): void {
    if (from >= to) return;
    // What was evicted to make room left before this came in.
    this.#noteRemoved();
    const { sequenceHashes, localHashes } = hashes;
    this.#events.push({
      type: "stored",
      dpRank: 0,
      tier: "device",
      parentHash: from === 0 ? undefined : [sequenceHashes[2 * from - 2]!, sequenceHashes[2 * from - 1]!],
      startBlock: from,
      sequenceHashes: sequenceHashes.slice(2 * from, 2 * to),
      localHashes: localHashes.slice(2 * from, 2 * to),
    });
  }

  #noteRemoved(): void {
    if (this.#evictedHashes.length === 0) return;
    this.#events.push({
      type: "removed",
      dpRank: 0,
      tier: "device",
      sequenceHashes: Uint32Array.from(this.#evictedHashes),
    });
    this.#evictedHashes.length = 0;
  }
}
