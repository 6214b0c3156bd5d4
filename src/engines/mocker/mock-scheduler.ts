import assert from "node:assert/strict";
import type { KvEvent, LoadSnapshot } from "../../protocol/index.ts";
import { KvEventLog } from "./kv-event-log.ts";
import { KvPool } from "./kv-pool.ts";
import { RankState } from "./rank-state.ts";
import { checkSchedulerConfig, type SchedulerConfig } from "./scheduler-config.ts";
import type { BlockChain } from "./block-chain.ts";
import type { Sequence, SequenceEnd } from "./sequence.ts";
import { SglangPlanner } from "./sglang-planner.ts";
import { TransferLink } from "./transfer-link.ts";
import { planVllmPass } from "./vllm-planner.ts";

/**
 * One data-parallel rank of a mock engine: what a real engine's scheduler decides, with predicted times in place of
 * computing. Pure: time comes in as an argument, so that the mock engine runs it on the system's clock and replay on a
 * virtual one. Whoever drives it repeats:
 *
 *     beginPass(now) -> duration      KV events are there now: takeKvEvents()
 *     (duration passes)
 *     endPass(now)   -> tokens        told to the observer, ends too
 *
 * and, when `beginPass` finds nothing to do, waits for `submit` or until `nextWakeMs()`. Between begin and end requests may
 * come and be aborted; that has its effect with the next begin or end. Every submitted sequence ends exactly once.
 * Cost: about 0.1 us per running sequence and pass, and what its new blocks cost (kv-pool.ts).
 */
export interface PassObserver {
  /**
   * The sequence got `tokenId` (-1 = none came with its end), and with `end` it is over and its blocks are given back.
   * `sequence.generatedTokens` counts the token already. Must not call the scheduler.
   */
  onOutput(sequence: Sequence, tokenId: number, end: SequenceEnd | undefined): void;
}

export class MockScheduler {
  readonly config: SchedulerConfig;
  readonly #pool: KvPool;
  readonly #log: KvEventLog;
  readonly #link: TransferLink<Sequence>;
  readonly #rank: RankState;
  readonly #planner: { plan(nowMs: number): void };
  /** Live sequences by id. */
  readonly #sequences = new Map<number, Sequence>();
  #isPassRunning = false;
  #hasCancelled = false;

  #passes = 0;
  #generatedTokens = 0;
  #promptTokens = 0;
  #cachedPromptTokens = 0;

  /** Throws `invalid-config`. */
  constructor(config: SchedulerConfig) {
    checkSchedulerConfig(config);
    const { totalBlocks, blockSizeTokens, prefixCaching } = config;
    this.config = { ...config, contextLength: Math.min(config.contextLength, totalBlocks * blockSizeTokens) };
    this.#log = new KvEventLog(config.dpRank);
    this.#pool = new KvPool({ totalBlocks, blockSizeTokens, prefixCaching, log: this.#log });
    this.#link = new TransferLink(config.transfer.bandwidthBytesPerSecond);
    this.#rank = new RankState({ config: this.config, pool: this.#pool, link: this.#link });
    const rank = this.#rank;
    this.#planner =
      config.engineType === "sglang" ? new SglangPlanner(rank) : { plan: (nowMs) => planVllmPass(rank, nowMs) };
  }

  get isPassRunning(): boolean {
    return this.#isPassRunning;
  }

  get runningCount(): number {
    return this.#rank.heldCount;
  }

  get waitingCount(): number {
    return this.#rank.waiting.length;
  }

  /** Sequences that have not ended. */
  get liveCount(): number {
    return this.#sequences.size;
  }

  /** The prompt must be shorter than the context, `maxTokens` no more than what that leaves; ids are unique. */
  submit(sequence: Sequence): void {
    assert(!this.#sequences.has(sequence.id), "a sequence id is unique among live ones");
    assert(sequence.promptTokens + sequence.maxTokens <= this.config.contextLength, "a sequence fits the context");
    this.#sequences.set(sequence.id, sequence);
    sequence.awaitsTransfer = this.config.role === "decode" && sequence.usesPrefixCache;
    this.#rank.enqueue(sequence);
  }

  /** Unknown ids are ignored. */
  abort(id: number): void {
    const sequence = this.#sequences.get(id);
    if (sequence === undefined || sequence.cancelled) return;
    sequence.cancelled = true;
    this.#hasCancelled = true;
  }

  /** Plans a pass and returns how long it takes, ms; undefined when nothing can run now. */
  beginPass(nowMs: number, observer: PassObserver): number | undefined {
    assert(!this.#isPassRunning, "one pass at a time");
    this.#link.advance(nowMs, (sequence) => this.#rank.endTransfer(sequence));
    if (this.#hasCancelled) this.#dropCancelled(nowMs, observer);
    this.#planner.plan(nowMs);
    if (this.#rank.scheduled.length === 0) return undefined;
    this.#isPassRunning = true;
    this.#passes++;
    return this.#durationMs();
  }

  endPass(nowMs: number, observer: PassObserver): void {
    assert(this.#isPassRunning, "a pass that ends has begun");
    this.#isPassRunning = false;
    const { scheduled, running } = this.#rank;
    let hasEnds = false;
    for (let i = 0; i < scheduled.length; i++) {
      const sequence = scheduled[i]!;
      sequence.computedTokens += sequence.scheduledTokens;
      sequence.scheduledTokens = 0;
      if (sequence.cancelled || sequence.remainingTokens > 0) continue;
      if (this.#emit(sequence, nowMs, observer)) hasEnds = true;
    }
    scheduled.length = 0;
    if (hasEnds) removeEnded(running, this.#sequences);
    if (this.#hasCancelled) this.#dropCancelled(nowMs, observer);
  }

  /** When something happens without a call: a transfer into an idle rank ends. Infinity = never. */
  nextWakeMs(): number {
    return this.#link.nextEndMs();
  }

  takeKvEvents(): readonly KvEvent[] {
    return this.#log.take();
  }

  get hasKvEvents(): boolean {
    return !this.#log.isEmpty;
  }

  load(): LoadSnapshot {
    const { waiting, running, parked, preemptions } = this.#rank;
    let pending = 0;
    for (const sequence of waiting) pending += sequence.knownTokens;
    for (const sequence of running) if (!sequence.isDecoding) pending += sequence.remainingTokens;
    return {
      runningRequests: running.length + parked.length,
      waitingRequests: waiting.length,
      activeBlocks: this.#pool.activeCount,
      cachedBlocks: this.#pool.idleCount,
      totalBlocks: this.#pool.totalBlocks,
      pendingPrefillTokens: pending,
      steps: this.#passes,
      generatedTokens: this.#generatedTokens,
      promptTokens: this.#promptTokens,
      cachedPromptTokens: this.#cachedPromptTokens,
      preemptions,
    };
  }

  countCached(chain: Pick<BlockChain, "sequenceHashes" | "blockCount">): number {
    return this.#pool.countCached(chain);
  }

  importChain(chain: BlockChain): number {
    return this.#pool.importChain(chain);
  }

  /** Evicts what no sequence uses; returns how many blocks. */
  clearBlocks(): number {
    return this.#pool.clear();
  }

  /** Ends everything at once, without telling an observer, and empties the cache. Returns what was live. */
  stop(): readonly Sequence[] {
    const live = [...this.#sequences.values()];
    for (const sequence of live) this.#pool.release(sequence.table);
    this.#sequences.clear();
    const { waiting, running, parked, scheduled } = this.#rank;
    for (const list of [waiting, running, parked, scheduled]) list.length = 0;
    this.#isPassRunning = false;
    this.#pool.clear();
    return live;
  }

  /** Compares the block accounting with the truth of the live sequences; for tests. */
  check(): void {
    const { waiting, running, parked } = this.#rank;
    assert(waiting.length + running.length + parked.length === this.#sequences.size, "a live sequence is in one list");
    for (const sequence of waiting) assert(sequence.table.blocks.length === 0, "what waits holds no block");
    this.#pool.check([...running, ...parked].map(({ table }) => table));
  }

  /** (lo, hi) pairs of the cached blocks, in no order; for tests. */
  cachedHashes(): Uint32Array {
    return this.#pool.cachedHashes();
  }

  #durationMs(): number {
    const { scheduled } = this.#rank;
    const config = this.config;
    const pool = this.#pool;
    let prefillCount = 0;
    let prefixTokens = 0;
    let inputTokens = 0;
    let decodeCount = 0;
    let contextTokens = 0;
    for (let i = 0; i < scheduled.length; i++) {
      const sequence = scheduled[i]!;
      if (sequence.isDecoding) {
        decodeCount++;
        contextTokens += sequence.knownTokens;
      } else {
        prefillCount++;
        prefixTokens += sequence.computedTokens;
        inputTokens += sequence.computedTokens + sequence.scheduledTokens;
      }
    }
    const { timing, blockSizeTokens } = config;
    const prefillMs = timing.prefillMs({ sequenceCount: prefillCount, inputTokens, prefixTokens });
    if (config.role === "prefill" || decodeCount === 0) return prefillMs;
    const decodeMs = timing.decodeMs({
      sequenceCount: decodeCount,
      activeKvTokens: pool.activeCount * blockSizeTokens,
      totalKvTokens: pool.totalBlocks * blockSizeTokens,
      contextTokens,
    });
    return prefillMs + decodeMs;
  }

  /** The token that the pass computed; true when the sequence ended with it. */
  #emit(sequence: Sequence, nowMs: number, observer: PassObserver): boolean {
    const token = sequence.generate();
    if (sequence.firstTokenMs < 0) this.#countPrompt(sequence, nowMs);
    let end: SequenceEnd | undefined;
    if (token < 0) end = "stop";
    else {
      this.#generatedTokens++;
      if (sequence.generatedTokens >= sequence.maxTokens || this.config.role === "prefill") end = "length";
    }
    if (end !== undefined) this.#leave(sequence);
    observer.onOutput(sequence, token, end);
    sequence.lastTokenMs = nowMs;
    return end !== undefined;
  }

  #countPrompt(sequence: Sequence, nowMs: number): void {
    sequence.firstTokenMs = nowMs;
    this.#promptTokens += sequence.promptTokens;
    this.#cachedPromptTokens += sequence.cachedTokens;
  }

  #leave(sequence: Sequence): void {
    this.#pool.release(sequence.table);
    this.#sequences.delete(sequence.id);
  }

  #dropCancelled(nowMs: number, observer: PassObserver): void {
    this.#hasCancelled = false;
    const { waiting, running, parked } = this.#rank;
    const cancelled: Sequence[] = [];
    for (const list of [waiting, parked, running])
      for (const sequence of list) if (sequence.cancelled) cancelled.push(sequence);
    for (const sequence of cancelled) {
      this.#link.remove(sequence, nowMs);
      this.#leave(sequence);
    }
    for (const list of [waiting, parked, running]) removeEnded(list, this.#sequences);
    for (const sequence of cancelled) observer.onOutput(sequence, -1, "cancelled");
  }
}

function removeEnded(list: Sequence[], live: ReadonlyMap<number, Sequence>): void {
  let kept = 0;
  for (const sequence of list) if (live.get(sequence.id) === sequence) list[kept++] = sequence;
  list.length = kept;
}
