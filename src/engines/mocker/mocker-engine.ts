import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { DynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import {
  parseProfile,
  polynomialTiming,
  profileTiming,
  withSpeedup,
  type TimingModel,
} from "../../perf-model/index.ts";
import {
  EMPTY_LOAD,
  StepWriter,
  promptLengthOf,
  type KvEvent,
  type LoadSnapshot,
  type PreprocessedRequest,
  type TokenLogprob,
} from "../../protocol/index.ts";
import { systemClock, type Clock } from "../../std/index.ts";
import { blockHashSeed } from "../../tokens/index.ts";
import type {
  BlockPort,
  Engine,
  EngineInfo,
  EngineSink,
  ExportedBlocks,
  ImportedBlocks,
  SharedBlocks,
} from "../base.ts";
import type { MockerEngineConfig } from "../config.ts";
import { BlockChain } from "./block-chain.ts";
import { MOCK_BLOCK_BYTES, isBlockPayload, writeBlockPayload } from "./block-payload.ts";
import { MockScheduler, type PassObserver } from "./mock-scheduler.ts";
import { checkMockerConfig, schedulerConfig } from "./mocker-config.ts";
import { RankDriver } from "./rank-driver.ts";
import { Sequence, type SequenceEnd } from "./sequence.ts";
import { TimedLink } from "./timed-link.ts";

/**
 * An engine that schedules, caches, preempts and takes its time like a real one and computes nothing: MockScheduler on the
 * worker's clock. Answers are a pure function of the tokens before them (token-source.ts): the same prompt gets the same
 * answer on every worker, and a request that moves to another worker with the tokens it has goes on as if it had stayed.
 *
 * Data-parallel ranks are schedulers of their own; a request goes to the one it names, else to the one with the fewest. `EngineInfo` and `load` tell
 * the sum of all ranks. Roles: `prefill` ends each stream after its first token; `decode` waits for the KV cache of each
 * prompt over a link that its transfers share, in place of computing it: for replays without workers. Behind a worker the
 * role is the worker's, and imported blocks take their time over such a link. Blocks go to and from a host memory over
 * another one, beside the passes; a request that comes while some are on their way in waits for them. Blocks outside hold
 * bytes that say which block they are, so that a transfer that mixes them up is found out.
 */
export interface MockerEngineOptions {
  /** @default the system's clock */
  readonly clock?: Clock;
  readonly logger?: Logger;
  /** Streams that wait for a place beyond `maxSequences`; more end with `worker-full`. @default 4096 */
  readonly maxWaitingRequests?: number;
  /** For simulations of several engines that share links. @default links of the configured bandwidth, of its own */
  readonly links?: { readonly imports: BlockLink; readonly host: BlockLink };
}

/** The way of blocks into the cache, or between it and host memory. */
export interface BlockLink {
  /** Resolves when so many bytes are over; what is on its way when the engine stops, at once. */
  move(byteCount: number): Promise<void>;
  stop(): void;
}

const ENGINE_VERSION = "1";
/** The wire's bound on one batch of KV events. */
const MAX_EVENTS_PER_BATCH = 4_096;

interface Stream {
  readonly sequence: Sequence;
  readonly driver: RankDriver;
  readonly output: PreprocessedRequest["output"];
  /** Without the resumed ones, which for the scheduler are prompt. */
  readonly promptTokens: number;
  /** Kept only for prompt logprobs. */
  readonly promptTokenIds: Uint32Array | undefined;
  hasFirst: boolean;
}

type EngineState = "new" | "starting" | "running" | "draining" | "stopped";

export class MockerEngine implements Engine {
  readonly #config: MockerEngineConfig;
  readonly #clock: Clock;
  readonly #maxWaitingRequests: number;
  readonly #writer = new StepWriter();
  readonly #observer: PassObserver;

  #state: EngineState = "new";
  #sink: EngineSink | undefined = undefined;
  #drivers: readonly RankDriver[] = [];
  readonly #streams = new Map<number, Stream>();
  /** Ended before they began; told with the next turn, because a sink is never called inside `submit`. */
  #refused: { readonly streamId: number; readonly error: DynamoError }[] = [];
  /** Looked at after each turn; those that return true are done. */
  #afterTurn: (() => boolean)[] = [];
  #stopping: Promise<void> | undefined = undefined;
  readonly #stopSignal = new AbortController();
  /** Imported blocks come over a link that imports share; undefined = they take no time. */
  readonly #imports: BlockLink | undefined;
  readonly #host: BlockLink | undefined;
  #hostBytes: Uint8Array | undefined = undefined;
  /** Copies into the cache that are under way. */
  readonly #copiesIn = new Set<Promise<unknown>>();
  /** Streams that wait for those before them, and have not come to the scheduler. */
  readonly #held = new Map<number, Stream>();
  /** Of the stopped engine: the counters stay. */
  #finalLoad: LoadSnapshot = EMPTY_LOAD;

  constructor(config: MockerEngineConfig, options: MockerEngineOptions = {}) {
    this.#config = config;
    this.#clock = options.clock ?? systemClock;
    this.#maxWaitingRequests = options.maxWaitingRequests ?? 4_096;
    const { kvTransferBandwidthBytesPerSecond: bandwidth, speedupRatio } = config;
    const isTimed = bandwidth > 0 && speedupRatio > 0;
    const link = isTimed ? () => new TimedLink(bandwidth * speedupRatio, this.#clock) : () => undefined;
    this.#imports = options.links?.imports ?? link();
    this.#host = options.links?.host ?? link();
    this.#observer = { onOutput: (sequence, tokenId, end) => this.#onOutput(sequence, tokenId, end) };
  }

  async start(sink: EngineSink, signal: AbortSignal): Promise<EngineInfo> {
    if (signal.aborted) throw startCancelled();
    if (this.#state !== "new") throw new DynamoError("engine-stopped", "an engine starts only once");
    this.#state = "starting";
    checkMockerConfig(this.#config);
    const timing = await this.#timing();
    const { dataParallelSize, startupTimeMs } = this.#config;
    const schedulers = Array.from(
      { length: dataParallelSize },
      (_, rank) => new MockScheduler(schedulerConfig(this.#config, rank, timing)),
    );
    if (startupTimeMs > 0) await this.#startupTime(startupTimeMs, signal);
    if (signal.aborted || this.#stopSignal.signal.aborted) throw startCancelled();
    this.#sink = sink;
    const hooks = { onTurn: () => this.#beginTurn(), onTurnEnd: (events: readonly KvEvent[]) => this.#endTurn(events) };
    this.#drivers = schedulers.map((scheduler) => new RankDriver(scheduler, this.#clock, this.#observer, hooks));
    this.#state = "running";
    return this.#info(schedulers[0]!.config.contextLength);
  }

  submit(streamId: number, request: PreprocessedRequest): void {
    if (this.#state !== "running" && this.#state !== "draining") {
      throw new DynamoError("engine-stopped", "the engine is not running");
    }
    assert(!this.#streams.has(streamId), "a stream id is unique among live streams");
    const driver = (request.dpRank === undefined ? undefined : this.#drivers[request.dpRank]) ?? this.#leastBusy();
    const error = this.#refusal(request, driver.scheduler.config.contextLength);
    if (error === undefined) this.#accept(streamId, request, driver);
    else this.#refused.push({ streamId, error });
    driver.kick();
    // A busy rank tells refusals only when its pass ends: as late as a real engine's step would.
  }

  abort(streamId: number): void {
    const stream = this.#streams.get(streamId);
    if (stream === undefined) return;
    this.#letIn(streamId);
    stream.driver.scheduler.abort(streamId);
    stream.driver.kick();
  }

  load(): LoadSnapshot {
    if (this.#drivers.length === 0) return this.#finalLoad;
    const loads = this.#drivers.map(({ scheduler }) => scheduler.load());
    const load = loads.length === 1 ? loads[0]! : sumOfLoads(loads);
    return this.#held.size === 0 ? load : { ...load, waitingRequests: load.waitingRequests + this.#held.size };
  }

  countBlocks(sequenceHashes: Uint32Array): Promise<number> {
    return Promise.resolve(this.#countCached(sequenceHashes));
  }

  #countCached(sequenceHashes: Uint32Array): number {
    const wanted = { sequenceHashes, blockCount: sequenceHashes.length / 2 };
    let count = 0;
    for (const { scheduler } of this.#drivers) count = Math.max(count, scheduler.countCached(wanted));
    return count;
  }

  exportBlocks(sequenceHashes: Uint32Array): Promise<ExportedBlocks> {
    const count = this.#countCached(sequenceHashes);
    const data = new Uint8Array(count * MOCK_BLOCK_BYTES);
    for (let i = 0; i < count; i++) writeBlockPayload(sequenceHashes, i, data, i);
    return Promise.resolve({ sequenceHashes: sequenceHashes.slice(0, 2 * count), blockBytes: MOCK_BLOCK_BYTES, data });
  }

  /** Takes the leading blocks whose hashes follow from their tokens. Throws `malformed-frame` for bytes of another block. */
  async importBlocks(blocks: ImportedBlocks): Promise<number> {
    if (this.#drivers.length === 0) return 0;
    const { sequenceHashes, data, tokenIds, blockBytes, startBlock = 0, cacheNamespace = "" } = blocks;
    const chain = new BlockChain(tokenIds, this.#config.blockSizeTokens, blockHashSeed({ cacheNamespace }));
    if (blockBytes !== MOCK_BLOCK_BYTES) {
      throw new DynamoError("malformed-frame", `blocks of ${MOCK_BLOCK_BYTES} bytes are expected, got ${blockBytes}`);
    }
    let count = 0;
    const most = Math.min(chain.blockCount, sequenceHashes.length / 2);
    while (count < most && isSamePair(chain.sequenceHashes, sequenceHashes, count)) {
      if (count >= startBlock && !isBlockPayload(sequenceHashes, count, data, count - startBlock)) {
        throw new DynamoError("malformed-frame", `imported block ${count} does not hold what its hash says`);
      }
      count++;
    }
    chain.blockCount = count;
    await this.#imports?.move(this.#bytesOf(count - startBlock));
    if (this.#drivers.length === 0) return 0;
    const driver = this.#leastBusy();
    if (driver.scheduler.countCached({ sequenceHashes, blockCount: startBlock }) < startBlock) return 0;
    const taken = driver.scheduler.importChain(chain);
    await this.#afterNextTurn(driver, () => true);
    return taken;
  }

  readonly blockPort: BlockPort = {
    attach: (memory) => {
      this.#hostBytes = new Uint8Array(memory);
    },
    copyOut: (sequenceHashes, slots) => this.#copyOut(sequenceHashes, slots),
    copyIn: (blocks) => {
      const copy = this.#copyIn(blocks);
      this.#copiesIn.add(copy);
      const over = (): void => void this.#copiesIn.delete(copy);
      copy.then(over, over);
      return copy;
    },
  };

  async #copyOut(sequenceHashes: Uint32Array, slots: Int32Array): Promise<Uint8Array> {
    const host = this.#hostBytes;
    assert(host !== undefined, "host memory is attached before blocks are copied");
    const present = new Uint8Array(slots.length);
    for (let i = 0; i < slots.length; i++) {
      const wanted = { sequenceHashes: sequenceHashes.subarray(2 * i, 2 * i + 2), blockCount: 1 };
      present[i] = this.#drivers.some(({ scheduler }) => scheduler.countCached(wanted) === 1) ? 1 : 0;
    }
    await this.#host?.move(this.#bytesOf(present.reduce((sum, one) => sum + one, 0)));
    for (let i = 0; i < slots.length; i++) if (present[i] === 1) writeBlockPayload(sequenceHashes, i, host, slots[i]!);
    return present;
  }

  /** Throws `malformed-frame` for bytes of another block. */
  async #copyIn({ tokenIds, cacheNamespace, firstBlock, slots }: SharedBlocks): Promise<number> {
    const host = this.#hostBytes;
    assert(host !== undefined, "host memory is attached before blocks are copied");
    const chain = new BlockChain(tokenIds, this.#config.blockSizeTokens, blockHashSeed({ cacheNamespace }));
    await this.#host?.move(this.#bytesOf(slots.filter((slot) => slot >= 0).length));
    if (this.#drivers.length === 0) return 0;
    const driver = this.#leastBusy();
    const known = driver.scheduler.countCached(chain);
    let count = firstBlock;
    for (const slot of slots) {
      if (slot < 0 && count >= known) break;
      if (slot >= 0 && !isBlockPayload(chain.sequenceHashes, count, host, slot)) {
        throw new DynamoError("malformed-frame", `block ${count} of host memory does not hold what its hash says`);
      }
      count++;
    }
    if (known < firstBlock || count <= known) return 0;
    chain.blockCount = count;
    const taken = driver.scheduler.importChain(chain);
    await this.#afterNextTurn(driver, () => true);
    return Math.max(0, taken - known);
  }

  #bytesOf(blocks: number): number {
    return blocks * this.#config.blockSizeTokens * this.#config.kvBytesPerToken;
  }

  async clearBlocks(): Promise<number> {
    let count = 0;
    for (const driver of this.#drivers) {
      count += driver.scheduler.clearBlocks();
      await this.#afterNextTurn(driver, () => true);
    }
    return count;
  }

  /** Compares the accounts of all ranks with the truth of what runs, and gives the ranks' cached blocks; for tests. */
  check(): readonly Uint32Array[] {
    return this.#drivers.map(({ scheduler }) => {
      scheduler.check();
      return scheduler.cachedHashes();
    });
  }

  drain(): Promise<void> {
    const [driver] = this.#drivers;
    if (driver === undefined) return Promise.resolve();
    this.#state = "draining";
    return this.#afterNextTurn(driver, () => this.#streams.size === 0 && this.#refused.length === 0);
  }

  stop(): Promise<void> {
    this.#stopping ??= this.#stop();
    return this.#stopping;
  }

  async #stop(): Promise<void> {
    this.#state = "stopped";
    this.#stopSignal.abort();
    this.#imports?.stop();
    this.#host?.stop();
    this.#held.clear();
    for (const driver of this.#drivers) driver.stop();
    // The last entries, too, come outside of any method call.
    await new Promise<void>((resolve) => this.#clock.nextTurn(resolve));
    const error = new DynamoError("engine-stopped", "the engine was stopped");
    this.#writer.reset();
    for (const { streamId } of this.#refused) this.#writer.errorEntry(streamId, error);
    for (const streamId of this.#streams.keys()) this.#writer.errorEntry(streamId, error);
    this.#refused = [];
    this.#streams.clear();
    const events: KvEvent[] = [];
    for (const { scheduler } of this.#drivers) {
      scheduler.stop();
      events.push(...scheduler.takeKvEvents());
    }
    this.#deliver(events);
    this.#finalLoad = this.load();
    this.#drivers = [];
    this.#sink = undefined;
    const waiters = this.#afterTurn;
    this.#afterTurn = [];
    for (const settle of waiters) settle();
  }

  async #timing(): Promise<TimingModel> {
    const { profilePath, speedupRatio, decodeSpeedupRatio } = this.#config;
    let model = polynomialTiming;
    if (profilePath !== undefined) {
      const text = await readFile(profilePath, "utf8").catch((cause: unknown) => {
        throw new DynamoError("invalid-config", `the performance profile ${profilePath} cannot be read`, { cause });
      });
      model = profileTiming(parseProfile(text));
    }
    return withSpeedup(model, { speedupRatio, decodeSpeedupRatio });
  }

  #startupTime(ms: number, signal: AbortSignal): Promise<void> {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const timer = this.#clock.setTimer(ms, resolve);
    const either = AbortSignal.any([signal, this.#stopSignal.signal]);
    const onAbort = (): void => reject(startCancelled());
    either.addEventListener("abort", onAbort, { once: true });
    return promise.finally(() => {
      timer.cancel();
      either.removeEventListener("abort", onAbort);
    });
  }

  #info(contextLength: number): EngineInfo {
    const { blockSizeTokens, totalBlocks, maxSequences, maxBatchedTokens, dataParallelSize } = this.#config;
    return {
      engine: "mocker",
      engineVersion: ENGINE_VERSION,
      contextLength,
      blockSizeTokens,
      totalBlocks,
      maxSequences,
      maxBatchedTokens,
      dataParallelSize,
      vocabularySize: this.#config.vocabularySize,
      blockBytes: MOCK_BLOCK_BYTES,
    };
  }

  /** The rank with the fewest streams; the lowest of equals. */
  #leastBusy(): RankDriver {
    let best = this.#drivers[0]!;
    for (const driver of this.#drivers) if (driver.scheduler.liveCount < best.scheduler.liveCount) best = driver;
    return best;
  }

  #refusal({ tokenIds }: PreprocessedRequest, contextLength: number): DynamoError | undefined {
    if (this.#state === "draining") return new DynamoError("draining", "the engine is shutting down");
    if (tokenIds.length === 0) {
      return new DynamoError("invalid-field", "expected a prompt of at least 1 token, got 0", { param: "prompt" });
    }
    if (tokenIds.length >= contextLength) {
      return new DynamoError(
        "context-length",
        `the model's context is ${contextLength} tokens, the prompt has ${tokenIds.length}`,
      );
    }
    const { maxSequences, dataParallelSize } = this.#config;
    if (this.#streams.size >= this.#maxWaitingRequests + maxSequences * dataParallelSize) {
      return new DynamoError("worker-full", `the engine's queue of ${this.#maxWaitingRequests} requests is full`);
    }
    return undefined;
  }

  #accept(streamId: number, request: PreprocessedRequest, driver: RankDriver): void {
    const { tokenIds, stop, sampling, output, cacheNamespace, resumedTokens = 0 } = request;
    const { contextLength } = driver.scheduler.config;
    const sequence = new Sequence({
      id: streamId,
      tokenIds,
      maxTokens: Math.min(stop.maxTokens - resumedTokens, contextLength - tokenIds.length),
      minTokens: stop.minTokens - resumedTokens,
      stopTokenIds: stop.stopTokenIds,
      priority: request.priority,
      seed: sampling.temperature > 0 ? sampling.seed : undefined,
      hashSeed: blockHashSeed({ cacheNamespace }),
      usesPrefixCache: !output.promptLogprobs,
      blockSizeTokens: this.#config.blockSizeTokens,
      vocabularySize: this.#config.vocabularySize,
      reasoning: this.#config.reasoning,
      arrivedMs: this.#clock.monotonicMs(),
    });
    const promptTokens = promptLengthOf(request);
    const promptTokenIds = output.promptLogprobs ? tokenIds.subarray(0, promptTokens) : undefined;
    const stream = { sequence, driver, output, promptTokens, promptTokenIds, hasFirst: false };
    this.#streams.set(streamId, stream);
    if (this.#copiesIn.size === 0) {
      driver.scheduler.submit(sequence);
      return;
    }
    this.#held.set(streamId, stream);
    void Promise.allSettled(this.#copiesIn).then(() => this.#letIn(streamId));
  }

  #letIn(streamId: number): void {
    const stream = this.#held.get(streamId);
    if (stream === undefined) return;
    this.#held.delete(streamId);
    stream.driver.scheduler.submit(stream.sequence);
    stream.driver.kick();
  }

  #beginTurn(): void {
    this.#writer.reset();
    for (const { streamId, error } of this.#refused) this.#writer.errorEntry(streamId, error);
    this.#refused = [];
  }

  #endTurn(kvEvents: readonly KvEvent[]): void {
    this.#deliver(kvEvents);
    if (this.#afterTurn.length > 0) this.#afterTurn = this.#afterTurn.filter((settle) => !settle());
  }

  #deliver(kvEvents: readonly KvEvent[]): void {
    const sink = this.#sink;
    if (sink === undefined) return;
    for (let at = 0; at < kvEvents.length; at += MAX_EVENTS_PER_BATCH) {
      sink.onKvEvents(kvEvents.slice(at, at + MAX_EVENTS_PER_BATCH));
    }
    if (this.#writer.entryCount > 0) sink.onStep(this.#writer.view());
  }

  #onOutput(sequence: Sequence, tokenId: number, end: SequenceEnd | undefined): void {
    const stream = this.#streams.get(sequence.id)!;
    const writer = this.#writer;
    writer.beginEntry(sequence.id);
    if (!stream.hasFirst) this.#writeFirst(stream);
    if (tokenId >= 0) {
      writer.token(tokenId);
      const { topLogprobs } = stream.output;
      if (topLogprobs >= 0) writer.logprobs([this.#logprobOf(tokenId, topLogprobs)]);
    }
    if (end !== undefined) {
      const nowMs = this.#clock.monotonicMs();
      writer.finish(end, sequence.firstTokenMs < 0 ? 0 : nowMs - sequence.firstTokenMs);
      this.#streams.delete(sequence.id);
    }
    writer.endEntry();
  }

  #writeFirst(stream: Stream): void {
    stream.hasFirst = true;
    const { sequence, promptTokens, promptTokenIds, output } = stream;
    const nowMs = this.#clock.monotonicMs();
    const startedMs = sequence.startedMs < 0 ? nowMs : sequence.startedMs;
    this.#writer.first({
      promptTokens,
      cachedTokens: sequence.cachedTokens,
      queueMs: startedMs - sequence.arrivedMs,
      prefillMs: nowMs - startedMs,
    });
    if (promptTokenIds === undefined || sequence.firstTokenMs < 0) return;
    const records: TokenLogprob[] = [];
    for (const id of promptTokenIds.subarray(1)) records.push(this.#logprobOf(id, Math.max(0, output.topLogprobs)));
    this.#writer.promptLogprobs(records);
  }

  /** A constant: the token has half of the mass, each id after it half of what is left. */
  #logprobOf(token: number, top: number): TokenLogprob {
    const size = Math.max(this.#config.vocabularySize, token + 1);
    const topIds = Array.from({ length: top }, (_, i) => (token + i) % size);
    return { logprob: -Math.LN2, topIds, topLogprobs: topIds.map((_, i) => -(i + 1) * Math.LN2) };
  }

  /** Resolves after the first turn after which `done` is true, or when the engine stops. */
  #afterNextTurn(driver: RankDriver, done: () => boolean): Promise<void> {
    return new Promise((resolve) => {
      this.#afterTurn.push(() => {
        const isSettled = this.#state === "stopped" || done();
        if (isSettled) resolve();
        return isSettled;
      });
      driver.kick();
    });
  }
}

function isSamePair(a: Uint32Array, b: Uint32Array, i: number): boolean {
  return a[2 * i] === b[2 * i] && a[2 * i + 1] === b[2 * i + 1];
}

function sumOfLoads(loads: readonly LoadSnapshot[]): LoadSnapshot {
  const sum: Record<string, number> = { ...EMPTY_LOAD };
  for (const load of loads) for (const [field, value] of Object.entries(load)) sum[field]! += Number(value);
  return sum as unknown as LoadSnapshot;
}

function startCancelled(): DynamoError {
  return new DynamoError("cancelled", "the engine's start was cancelled");
}
