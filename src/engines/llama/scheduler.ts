import assert from "node:assert/strict";
import type { BlockCache } from "./block-cache.ts";
import { NOT_RUNNING, type Sequence } from "./sequence.ts";

/**
 * Decides what the next engine step computes: continuous batching with chunked prefill, one batch per step. Pure
 * bookkeeping over sequences and the block cache: no clock, no native call of its own, so tests drive it with a fake.
 *
 * A step: every decoding sequence gets its one token; what is left of `maxBatchedTokens` goes to prefills that run, then
 * to new ones. Order everywhere is priority, then arrival. A waiting sequence starts when the blocks for all of its known
 * tokens are there, beside those promised to others and one to grow for each that runs; a sequence that cannot start
 * yet holds up those behind it, so a large one does not starve.
 *
 * When a running sequence finds no block, the last one in order gives up its blocks and waits again; its tokens are
 * kept and recomputed, mostly from blocks still in the cache. The first in order always gets on, so all do in the end.
 *
 * A sequence whose next block is just being computed by a running one waits for it: n samples of one prompt, or many
 * requests with one system prompt, compute the common part once.
 *
 * Cost of a step: O(running), plus O(waiting x running) while sequences are held back for a common prefix.
 */
export interface SchedulerOptions {
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  /** Rows of logits that a step may ask for beyond one per sequence: the chunk of prompts with logprobs. */
  readonly extraLogitRows: number;
  /** Sequences that may wait beyond those that could run; preempted ones may go above. */
  readonly maxWaiting: number;
}

export class Scheduler<S extends Sequence> {
  /** In order. Only this class changes it. */
  readonly running: S[] = [];
  /** In order. Only this class changes it. */
  readonly waiting: S[] = [];
  /** Sequences that can never fit into the cache, taken out by the last `plan`. */
  readonly oversized: S[] = [];
  preemptions = 0;
  readonly #cache: BlockCache;
  readonly #options: SchedulerOptions;
  readonly #planned: S[] = [];
  readonly #freeCellsIds: number[] = [];
  // Left in the step that is being planned.
  #tokenBudget = 0;
  #rowBudget = 0;

  constructor(cache: BlockCache, options: SchedulerOptions) {
    assert(options.maxBatchedTokens >= options.maxSequences, "a batch holds at least one token per sequence");
    this.#cache = cache;
    cache.users = this.running;
    this.#options = options;
    for (let id = options.maxSequences - 1; id >= 0; id--) this.#freeCellsIds.push(id);
  }

  /** False when the waiting queue is full. */
  tryAdd(sequence: S): boolean {
    const { maxSequences, maxWaiting } = this.#options;
    // Places that are free now count: a burst of `maxSequences` on an idle engine is not a queue.
    if (this.waiting.length + this.running.length >= maxWaiting + maxSequences) return false;
    insertInOrder(this.waiting, sequence);
    return true;
  }

  /** Takes a sequence out, finished or aborted. Its complete blocks stay in the cache. */
  remove(sequence: S): void {
    if (sequence.cellsId === NOT_RUNNING) {
      takeOut(this.waiting, sequence);
    } else {
      takeOut(this.running, sequence);
      this.#stop(sequence);
    }
  }

  /**
   * The sequences of the next step, decodes first, each with `plannedCount` tokens from `computedCount` on, for which
   * blocks are reserved. Valid until the next call; empty when there is nothing to do. Follow with `commit`.
   */
  plan(): readonly S[] {
    const { running } = this;
    this.#planned.length = 0;
    this.oversized.length = 0;
    this.#rowBudget = this.#options.extraLogitRows;
    this.#tokenBudget = this.#options.maxBatchedTokens;
    for (const sequence of running) if (sequence.remainingCount === 1) this.#tokenBudget--;
    // Only the last one can leave while its turn is planned, and those behind it while others' are.
    for (let i = 0; i < running.length; i++) this.#planRunning(running[i]!);
    this.#admit();
    this.#orderPlanned();
    return this.#planned;
  }

  /** The planned step was computed: moves its sequences on and registers the blocks that became complete. */
  commit(): void {
    const size = this.#cache.blockSizeTokens;
    for (const sequence of this.#planned) {
      sequence.computedCount += sequence.plannedCount;
      const complete = Math.floor(sequence.computedCount / size);
      const { blockCount } = sequence;
      if (complete === blockCount) continue;
      sequence.hashUpTo(complete);
      sequence.reserveBlockIds();
      this.#cache.register(sequence.cellsId, sequence.blocks, blockCount, complete, sequence);
      sequence.privateCount -= complete - blockCount;
      sequence.blockCount = complete;
    }
  }

  /** Tokens of prompts, and of preempted sequences, that are accepted but not computed. */
  pendingPrefillTokens(): number {
    let tokens = 0;
    for (const sequence of this.waiting) tokens += sequence.tokenCount;
    for (const sequence of this.running) if (sequence.remainingCount > 1) tokens += sequence.remainingCount;
    return tokens;
  }

  #planRunning(sequence: S): void {
    const count = this.#chunkOf(sequence);
    sequence.plannedCount = 0;
    if (count === 0) return;
    const blocks = this.#missingBlocks(sequence, count);
    while (!this.#cache.reserve(blocks)) {
      const victim = this.running.at(-1)!;
      if (victim !== sequence) {
        this.#preempt(victim);
        continue;
      }
      // Alone and without room: it needs more blocks than there are.
      if (this.running.length === 1) this.#dropOversized(sequence);
      else this.#preempt(sequence);
      return;
    }
    this.#addToPlan(sequence, count, blocks);
  }

  /** Tokens that this sequence may compute in this step. A decode's token was set aside before. */
  #chunkOf(sequence: S): number {
    const remaining = sequence.remainingCount;
    if (remaining === 1) return 1;
    const chunk = Math.min(remaining, this.#tokenBudget);
    return sequence.wantsAllLogits ? Math.min(chunk, this.#rowBudget) : chunk;
  }

  #missingBlocks(sequence: S, count: number): number {
    const covered = sequence.blockCount + sequence.privateCount;
    return Math.ceil((sequence.computedCount + count) / this.#cache.blockSizeTokens) - covered;
  }

  #addToPlan(sequence: S, count: number, blocks: number): void {
    sequence.privateCount += blocks;
    sequence.plannedCount = count;
    this.#planned.push(sequence);
    if (sequence.remainingCount === 1) return;
    this.#tokenBudget -= count;
    if (sequence.wantsAllLogits) this.#rowBudget -= count;
  }

  #admit(): void {
    const { running, waiting } = this;
    for (let i = 0; i < waiting.length;) {
      if (running.length === this.#options.maxSequences || this.#tokenBudget === 0) return;
      const sequence = waiting[i]!;
      const cached = this.#findCached(sequence);
      if (cached === undefined) {
        i++;
      } else if (this.#fits(sequence, cached)) {
        waiting.splice(i, 1);
        this.#start(sequence, cached);
      } else if (running.length === 0) {
        this.#dropOversized(sequence);
      } else {
        return;
      }
    }
  }

  /** Leading blocks that are in the cache; undefined when the block after them is just being computed by another. */
  #findCached(sequence: S): number | undefined {
    sequence.reserveBlockIds();
    if (!sequence.usesCache) return 0;
    // The last token is computed in any case: its logits are wanted.
    const limit = Math.floor((sequence.tokenCount - 1) / this.#cache.blockSizeTokens);
    sequence.hashUpTo(limit);
    const cached = this.#cache.findPrefix(sequence.sequenceHashes, limit, sequence.blocks);
    if (cached < limit && this.running.some((other) => this.#willComplete(other, sequence, cached))) return undefined;
    return cached;
  }

  #willComplete(other: S, sequence: S, block: number): boolean {
    return (
      other.blockCount <= block &&
      other.tokenCount >= (block + 1) * this.#cache.blockSizeTokens &&
      other.hashedBlocks > block &&
      other.sequenceHashes[2 * block] === sequence.sequenceHashes[2 * block] &&
      other.sequenceHashes[2 * block + 1] === sequence.sequenceHashes[2 * block + 1]
    );
  }

  /** Whether all known tokens can be computed without taking blocks from a running sequence. */
  #fits(sequence: S, cached: number): boolean {
    const size = this.#cache.blockSizeTokens;
    let needed = Math.ceil(sequence.tokenCount / size) - cached + this.#cache.unusedAmong(sequence.blocks, cached);
    for (const other of this.running) {
      const promised = Math.ceil(other.tokenCount / size) - other.blockCount - other.privateCount;
      needed += Math.max(promised, 0) + 1;
    }
    return needed <= this.#cache.freeBlocks + this.#cache.unusedBlocks;
  }

  #start(sequence: S, cached: number): void {
    sequence.cellsId = this.#freeCellsIds.pop()!;
    const upcoming = Math.ceil(sequence.tokenCount / this.#cache.blockSizeTokens) - cached;
    this.#cache.acquire(sequence.cellsId, sequence.blocks, cached, upcoming);
    sequence.blockCount = cached;
    sequence.computedCount = cached * this.#cache.blockSizeTokens;
    sequence.plannedCount = 0;
    if (!sequence.wasAdmitted) {
      sequence.wasAdmitted = true;
      sequence.cachedTokenCount = sequence.computedCount;
    }
    insertInOrder(this.running, sequence);
    if (sequence.remainingCount === 1) this.#tokenBudget--;
    const count = this.#chunkOf(sequence);
    if (count === 0) return;
    const blocks = this.#missingBlocks(sequence, count);
    const reserved = this.#cache.reserve(blocks);
    assert(reserved, "a sequence that fits gets its blocks");
    this.#addToPlan(sequence, count, blocks);
  }

  #preempt(sequence: S): void {
    this.preemptions++;
    takeOut(this.running, sequence);
    this.#stop(sequence);
    insertInOrder(this.waiting, sequence);
  }

  #dropOversized(sequence: S): void {
    this.remove(sequence);
    this.oversized.push(sequence);
  }

  /** Back to nothing computed; the caller took it out of `running`. */
  #stop(sequence: S): void {
    this.#cache.release(sequence.cellsId, sequence.blocks, sequence.blockCount, sequence.privateCount);
    this.#freeCellsIds.push(sequence.cellsId);
    sequence.cellsId = NOT_RUNNING;
    sequence.blockCount = 0;
    sequence.privateCount = 0;
    sequence.computedCount = 0;
    sequence.plannedCount = 0;
  }

  /** Decodes to the front, in place and in order: their logits are few and their batch rows regular. */
  #orderPlanned(): void {
    const planned = this.#planned;
    let decodes = 0;
    for (let i = 0; i < planned.length; i++) {
      const sequence = planned[i]!;
      if (sequence.remainingCount !== 1) continue;
      planned.copyWithin(decodes + 1, decodes, i);
      planned[decodes++] = sequence;
    }
  }
}

function isBefore(a: Sequence, b: Sequence): boolean {
  return a.priority !== b.priority ? a.priority > b.priority : a.arrival < b.arrival;
}

function insertInOrder<S extends Sequence>(list: S[], sequence: S): void {
  let low = 0;
  let high = list.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if (isBefore(list[middle]!, sequence)) low = middle + 1;
    else high = middle;
  }
  list.splice(low, 0, sequence);
}

function takeOut<S extends Sequence>(list: S[], sequence: S): void {
  const at = list.indexOf(sequence);
  assert(at >= 0, "a sequence that is removed is there");
  list.splice(at, 1);
}
