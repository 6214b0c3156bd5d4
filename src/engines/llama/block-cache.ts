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
 * A block that is computed twice is kept once: a sequence gives its cells back and takes the registered ones that others
 * use. So every complete block in use is registered, and only unfinished ones are private to a sequence.
 *
 * Eviction is least recently used, leaves first. Blocks that nobody uses form a list; a sequence that ends puts its own
 * there from the last to the first, so a block always comes before its parent and the oldest is always a leaf (after
 * vLLM's free block queue).
 *
 * Order. The library's attention adds up cells in the order in which they lie, so equal texts from equal tokens need a
 * sequence's cells in the order of its positions. The library puts new cells into the first free ones behind the last it
 * filled, so all is well while nothing in front becomes free. Therefore cells of blocks that go are *retired*, not freed,
 * until there is no room behind; then all are reclaimed at once, and a new epoch begins. What was placed in an epoch before
 * lies anywhere: chains that are taken up again move behind the others first, and running sequences move at once.
 *
 * Owned by the engine's thread. No call allocates but `register` and eviction, which note events, and what moves cells.
 */
export interface BlockCacheOptions {
  readonly blockSizeTokens: number;
  readonly totalBlocks: number;
  /** Holder ids are `firstHolder` to `firstHolder + holderCount - 1`. At least as many as sequences that pin blocks. */
  readonly firstHolder: number;
  readonly holderCount: number;
  /** Blocks of the longest sequence. */
  readonly maxDepth: number;
  /** Blocks for which there are cells beyond `totalBlocks`: the more, the rarer are epochs. */
  readonly spareBlocks: number;
  /** Without one cells are left where they are: their order does not matter then. */
  readonly mover?: CellMover;
}

/** Copies cells to other places in the KV memory. */
export interface CellMover {
  readonly blockBytes: number;
  /** Copies at most a block's cells out; returns their bytes. */
  read(sequence: number, start: number, end: number, into: Uint8Array): number;
  /** Puts what was read from [start, end) into the sequence, in new cells. */
  write(from: Uint8Array, sequence: number, start: number, end: number): void;
}

/** A block of running sequences, or a part of what is private to one (block -1), on its way to another place. */
interface CellPart {
  readonly block: number;
  readonly sequence: number;
  readonly start: number;
  readonly end: number;
  /** Bytes. */
  length: number;
}

/** A sequence's use of the cache. */
export interface CellUser {
  /** `NO_SEQUENCE` before it runs. */
  readonly cellsId: number;
  readonly blocks: Int32Array;
  readonly blockCount: number;
  /** Tokens in the KV memory. */
  readonly computedCount: number;
}

/** Pins blocks without a sequence of its own in the KV memory: for import and export. */
export const NO_SEQUENCE = -1;
const NONE = -1;
/** More running blocks than this are not moved at an epoch's beginning: their texts may differ by rounding. */
const MAX_MOVED_BYTES = 256e6;
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
  readonly #spareBlocks: number;
  readonly #mover: CellMover | undefined;
  /** Blocks that are free but whose cells are not. */
  #retired = 0;
  /** Per block id: when its cells were placed. Grows with every block; below `#epochStart` they lie anywhere. */
  readonly #placed: Float64Array;
  #placedCount = 0;
  #epochStart = 0;
  #arena = new Uint8Array(0);
  /** Those that run; set by who runs them. */
  users: readonly CellUser[] = [];
  /** Chains that were taken up, or kept, out of order for want of room. */
  unordered = 0;
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
    this.#placed = new Float64Array(totalBlocks);
    this.#spareBlocks = options.spareBlocks;
    this.#mover = options.mover;
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

  /**
   * Pins the chain and adds its cells to the sequence, which must be empty. `blocks` come from `findPrefix`; `upcoming` is
   * how many blocks will follow: with room for them now, they lie behind these.
   */
  acquire(sequence: number, blocks: Int32Array, count: number, upcoming = 0): void {
    for (let i = 0; i < count; i++) this.#pin(blocks[i]!);
    if (sequence === NO_SEQUENCE) return;
    this.#putInOrder(blocks, count, upcoming);
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
    if (this.#placeableBlocks < count) this.#beginEpoch();
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
        this.#keepOnce(sequence, known, depth);
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
    if (sequence !== NO_SEQUENCE) {
      const size = this.blockSizeTokens;
      // These are in their holders, too.
      if (count > 0) this.#cells.removeCells(sequence, 0, count * size);
      if (privateCount > 0) this.#cells.retireCells(sequence, count * size, (count + privateCount) * size);
      this.#retired += privateCount;
    }
    this.#private -= privateCount;
    assert(this.#private >= 0, "no more private blocks are given back than were reserved");
    for (let i = count - 1; i >= 0; i--) this.#unpin(blocks[i]!);
  }

  /** Evicts everything that nobody uses; returns how many blocks. */
  clear(): number {
    const count = this.#unused;
    while (this.#unused > 0) this.#evictOldest();
    if (this.users.length === 0) this.#beginEpoch();
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

  /** Blocks for which there are free cells. */
  get #placeableBlocks(): number {
    return this.freeBlocks + this.#spareBlocks - this.#retired;
  }

  /** Moves what of a pinned chain does not lie in order behind everything, with room left for `upcoming` blocks. */
  #putInOrder(blocks: Int32Array, count: number, upcoming: number): void {
    const mover = this.#mover;
    if (mover === undefined) return;
    let ordered = this.#orderedPrefix(blocks, count);
    if (this.#placeableBlocks < count - ordered + upcoming) {
      while (this.#unused > 0 && this.freeBlocks < upcoming) this.#evictOldest();
      const chain = { cellsId: NO_SEQUENCE, blocks, blockCount: count, computedCount: count * this.blockSizeTokens };
      this.#beginEpoch([...this.users, chain]);
      return;
    }
    for (; ordered < count; ordered++) {
      const block = blocks[ordered]!;
      // Somebody runs on it, out of order.
      if (this.#references[block]! > 1) break;
      this.#moveBehind(block, mover);
    }
    if (ordered < count) this.unordered++;
  }

  #moveBehind(block: number, mover: CellMover): void {
    const { start, end } = this.positionsOf(block);
    const holder = this.holderOf(block);
    const arena = this.#arenaOf(mover.blockBytes);
    const length = mover.read(holder, start, end, arena);
    this.#cells.retireCells(holder, start, end);
    this.#retired++;
    mover.write(arena.subarray(0, length), holder, start, end);
    this.#placed[block] = this.#placedCount++;
  }

  /** Leading blocks whose cells lie in order. */
  #orderedPrefix(blocks: Int32Array, count: number): number {
    let after = this.#epochStart - 1;
    for (let i = 0; i < count; i++) {
      const placed = this.#placed[blocks[i]!]!;
      if (placed <= after) return i;
      after = placed;
    }
    return count;
  }

  /** Frees what was retired; what runs moves, so that it lies in order with what it will compute. */
  #beginEpoch(users: readonly CellUser[] = this.users): void {
    const mover = this.#mover;
    const parts = mover === undefined ? [] : this.#partsOf(users);
    const byteCount = parts.length * (mover?.blockBytes ?? 0);
    const isMoving = mover !== undefined && byteCount <= MAX_MOVED_BYTES;
    if (!isMoving) this.unordered += users.length;
    const arena = isMoving ? this.#arenaOf(byteCount) : this.#arena;
    if (isMoving) this.#takeOut(users, parts, arena, mover);
    this.#cells.reclaimCells();
    this.#retired = 0;
    this.#epochStart = this.#placedCount;
    if (isMoving) this.#putBack(users, parts, arena, mover);
  }

  /** Copies the parts to the arena, a block's bytes each, and frees their cells. */
  #takeOut(users: readonly CellUser[], parts: readonly CellPart[], arena: Uint8Array, mover: CellMover): void {
    const { blockBytes } = mover;
    parts.forEach((part, i) => {
      const into = arena.subarray(i * blockBytes, (i + 1) * blockBytes);
      part.length = mover.read(part.sequence, part.start, part.end, into);
    });
    for (const { cellsId, computedCount } of users) {
      if (cellsId !== NO_SEQUENCE && computedCount > 0) this.#cells.removeCells(cellsId, 0, computedCount);
    }
    for (const { block, sequence, start, end } of parts) {
      if (block !== NONE) this.#cells.removeCells(sequence, start, end);
    }
  }

  #putBack(users: readonly CellUser[], parts: readonly CellPart[], arena: Uint8Array, mover: CellMover): void {
    const { blockBytes } = mover;
    parts.forEach(({ block, sequence, start, end, length }, i) => {
      mover.write(arena.subarray(i * blockBytes, i * blockBytes + length), sequence, start, end);
      if (block !== NONE) this.#placed[block] = this.#placedCount++;
    });
    for (const { cellsId, blocks, blockCount } of users) {
      if (cellsId === NO_SEQUENCE) continue;
      for (let i = 0; i < blockCount; i++) this.#copy(this.holderOf(blocks[i]!), cellsId, i, i + 1);
    }
  }

  /** What these use, each block once and before those that follow it, then what is private. */
  #partsOf(users: readonly CellUser[]): CellPart[] {
    const parts: CellPart[] = [];
    const seen = new Set<number>();
    for (const { cellsId, blocks, blockCount, computedCount } of users) {
      for (let i = 0; i < blockCount; i++) {
        const block = blocks[i]!;
        if (seen.has(block)) continue;
        seen.add(block);
        parts.push({ block, sequence: this.holderOf(block), ...this.positionsOf(block), length: 0 });
      }
      const start = blockCount * this.blockSizeTokens;
      for (let at = start; at < computedCount; at += this.blockSizeTokens) {
        const end = Math.min(at + this.blockSizeTokens, computedCount);
        parts.push({ block: NONE, sequence: cellsId, start: at, end, length: 0 });
      }
    }
    return parts;
  }

  /** Memory, kept for the next time. */
  #arenaOf(byteCount: number): Uint8Array {
    if (this.#arena.length < byteCount) this.#arena = new Uint8Array(byteCount);
    return this.#arena;
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
    this.#placed[block] = this.#placedCount++;
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

  /**
   * The sequence has computed a block that is registered already. When others use that, so does the sequence and gives its
   * own cells back; otherwise its own take the place of the old ones, which may lie out of order.
   */
  #keepOnce(sequence: number, known: number, depth: number): void {
    const isUsed = this.#references[known]! > 0;
    const [from, to] = isUsed ? [this.holderOf(known), sequence] : [sequence, this.holderOf(known)];
    const start = depth * this.blockSizeTokens;
    this.#cells.retireCells(to, start, start + this.blockSizeTokens);
    this.#retired++;
    this.#copy(from, to, depth, depth + 1);
    if (!isUsed) this.#placed[known] = this.#placedCount++;
    this.#pin(known);
    this.#private--;
  }

  #evictOldest(): void {
    const block = this.#newer[this.totalBlocks]!;
    assert(this.#references[block] === 0, "a block in use is never evicted");
    assert(this.#children[block] === 0, "a block is evicted after its children");
    const depth = this.#depth[block]!;
    const start = depth * this.blockSizeTokens;
    this.#cells.retireCells(this.holderOf(block), start, start + this.blockSizeTokens);
    this.#retired++;
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
