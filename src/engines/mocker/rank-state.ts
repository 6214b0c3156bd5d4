import type { KvPool } from "./kv-pool.ts";
import type { SchedulerConfig } from "./scheduler-config.ts";
import type { Sequence } from "./sequence.ts";
import type { TransferLink } from "./transfer-link.ts";

/**
 * The sequences of one rank and the moves a planner has: admit, schedule, preempt. A sequence is in exactly one of
 * `waiting`, `parked` (its KV cache is being transferred) and `running`; only the latter two hold blocks.
 */
export interface RankStateOptions {
  readonly config: SchedulerConfig;
  readonly pool: KvPool;
  readonly link: TransferLink<Sequence>;
}

export class RankState {
  readonly config: SchedulerConfig;
  readonly pool: KvPool;
  readonly link: TransferLink<Sequence>;
  /** Next first. */
  readonly waiting: Sequence[] = [];
  readonly parked: Sequence[] = [];
  /** Oldest admission first. */
  readonly running: Sequence[] = [];
  /** Of the pass that is being planned or runs: in order, with their `scheduledTokens`. */
  readonly scheduled: Sequence[] = [];
  readonly watermarkBlocks: number;
  preemptions = 0;

  constructor({ config, pool, link }: RankStateOptions) {
    this.config = config;
    this.pool = pool;
    this.link = link;
    this.watermarkBlocks = Math.floor(config.watermark * config.totalBlocks);
  }

  get heldCount(): number {
    return this.running.length + this.parked.length;
  }

  /** First come, first served among equals; a higher priority goes before. */
  enqueue(sequence: Sequence): void {
    const { waiting } = this;
    let at = waiting.length;
    while (at > 0 && waiting[at - 1]!.priority < sequence.priority) at--;
    if (at === waiting.length) waiting.push(sequence);
    else waiting.splice(at, 0, sequence);
  }

  /** Leading blocks of the sequence that it would take from the cache; its last token is always computed. */
  reusableBlocks(sequence: Sequence): number {
    if (!sequence.usesPrefixCache) return 0;
    const limit = Math.floor((sequence.knownTokens - 1) / this.config.blockSizeTokens);
    return this.pool.countCached(sequence.chain, limit);
  }

  /**
   * Moves a waiting sequence to `running`, or to `parked` when its KV cache has to come over the link, with what the cache
   * has of it. `reservedBlocks` stay available to others; nothing is reserved on an empty rank, where everything fits.
   */
  tryAdmit(index: number, reservedBlocks: number, nowMs: number): boolean {
    const sequence = this.waiting[index]!;
    const { pool, config } = this;
    const reused = this.reusableBlocks(sequence);
    const needed = Math.ceil(sequence.knownTokens / config.blockSizeTokens) - reused;
    const left = pool.availableCount - pool.countIdle(sequence.chain, reused) - needed;
    if (left < (this.heldCount === 0 ? 0 : reservedBlocks)) return false;
    if (index === 0) this.waiting.shift();
    else this.waiting.splice(index, 1);
    pool.useCached(sequence.table, sequence.chain, reused);
    sequence.computedTokens = reused * config.blockSizeTokens;
    if (sequence.startedMs < 0) {
      sequence.startedMs = nowMs;
      sequence.cachedTokens = sequence.computedTokens;
    }
    if (!sequence.awaitsTransfer) this.running.push(sequence);
    else this.#beginTransfer(sequence, nowMs);
    return true;
  }

  /** Gives a running sequence `tokens` in this pass; false when there are no blocks for it. */
  trySchedule(sequence: Sequence, tokens: number): boolean {
    if (!this.pool.tryGrow(sequence.table, sequence.chain, sequence.computedTokens + tokens)) return false;
    sequence.scheduledTokens = tokens;
    this.scheduled.push(sequence);
    return true;
  }

  /** Takes all blocks of a running sequence away and puts it to the front of the queue; returns the tokens it had in the pass. */
  preempt(index: number): number {
    const sequence = this.running[index]!;
    this.running.splice(index, 1);
    const tokens = sequence.scheduledTokens;
    if (tokens > 0) this.scheduled.splice(this.scheduled.indexOf(sequence), 1);
    sequence.scheduledTokens = 0;
    sequence.computedTokens = 0;
    sequence.wasTransferred = false;
    sequence.preemptions++;
    this.preemptions++;
    this.pool.release(sequence.table);
    this.waiting.unshift(sequence);
    return tokens;
  }

  /** The transfer is over: all but the last prompt token is computed. */
  endTransfer(sequence: Sequence): void {
    sequence.awaitsTransfer = false;
    sequence.wasTransferred = true;
    const tokens = sequence.promptTokens - 1;
    this.pool.tryGrow(sequence.table, sequence.chain, tokens);
    sequence.computedTokens = tokens;
    this.parked.splice(this.parked.indexOf(sequence), 1);
    this.running.push(sequence);
  }

  #beginTransfer(sequence: Sequence, nowMs: number): void {
    const { kvBytesPerToken, bandwidthBytesPerSecond, timingMode } = this.config.transfer;
    const present = timingMode === "destination_missing" ? sequence.computedTokens : 0;
    const bytes = (sequence.promptTokens - present) * kvBytesPerToken;
    this.pool.tryReserve(sequence.table, sequence.promptTokens);
    this.parked.push(sequence);
    if (bytes === 0 || bandwidthBytesPerSecond === 0) this.endTransfer(sequence);
    else this.link.add(sequence, bytes, nowMs);
  }
}
