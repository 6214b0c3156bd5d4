import assert from "node:assert/strict";
import { DynamoError, toDynamoError } from "../../errors/index.ts";
import {
  StepWriter,
  promptLengthOf,
  type FinishReason,
  type KvEvent,
  type LoadSnapshot,
  type PreprocessedRequest,
  type TokenLogprob,
} from "../../protocol/index.ts";
import type { Clock, Random } from "../../std/index.ts";
import { blockHashSeed, hashBlocks, type BlockHashes } from "../../tokens/index.ts";
import type { ExportedBlocks, ImportedBlocks, SharedBlocks } from "../index.ts";
import { BlockCache, NO_SEQUENCE, type CellMover } from "./block-cache.ts";
import { Sampler, promptLogprob } from "./sampler.ts";
import { Scheduler } from "./scheduler.ts";
import { Sequence } from "./sequence.ts";
import type { TokenModel } from "./token-model.ts";

/**
 * The engine without its thread: takes requests, runs steps on a model, samples, and packs what happened. One step is
 * plan, fill the batch, decode, commit, sample; all of it synchronous. Who drives it decides where it runs: the engine's
 * thread with libllama, a test with a fake model.
 *
 * Sequence ids of the KV memory: 0 to maxSequences - 1 run, then one scratch id for blocks that leave and enter, the rest
 * are holders of the block cache.
 */
export interface EngineLoopOptions {
  /** Longest sequence, prompt and output; at most what the cache holds. */
  readonly contextLength: number;
  readonly totalBlocks: number;
  /** Blocks that the KV memory has cells for beyond `totalBlocks`; see the block cache. */
  readonly spareBlocks: number;
  /** Whether every sequence's cells are to lie in the order of its positions; see the block cache. */
  readonly keepsOrder: boolean;
  readonly blockSizeTokens: number;
  readonly maxSequences: number;
  readonly maxBatchedTokens: number;
  readonly maxWaitingRequests: number;
  /** Sequence ids of the model's KV memory. */
  readonly sequenceIds: number;
  /** Rows of logits a step may ask for beyond one per sequence. */
  readonly extraLogitRows: number;
  readonly clock: Clock;
  /** Seeds requests that bring none. */
  readonly random: Random;
}

const NOT_YET = -1;

class Stream extends Sequence {
  readonly id: number;
  readonly request: PreprocessedRequest;
  readonly sampler: Sampler;
  /** Tokens of prompt and output together at which it ends with `length`. */
  readonly maxTokenCount: number;
  readonly arrivedMs: number;
  startedMs = NOT_YET;
  firstTokenMs = NOT_YET;
  promptLogprobs: TokenLogprob[] = [];
  /** Index in the batch of its first planned token. */
  batchStart = 0;

  constructor(
    id: number,
    request: PreprocessedRequest,
    options: { sampler: Sampler; arrival: number; arrivedMs: number; blockSizeTokens: number; contextLength: number },
  ) {
    super({
      tokenIds: request.tokenIds,
      promptCount: promptLengthOf(request),
      blockSizeTokens: options.blockSizeTokens,
      cacheNamespace: request.cacheNamespace,
      priority: request.priority,
      arrival: options.arrival,
      usesCache: !request.output.promptLogprobs,
    });
    this.id = id;
    this.request = request;
    this.sampler = options.sampler;
    this.maxTokenCount = Math.min(this.promptCount + request.stop.maxTokens, options.contextLength);
    this.arrivedMs = options.arrivedMs;
    this.wantsAllLogits = request.output.promptLogprobs && this.promptCount > 1;
  }
}

export class EngineLoop {
  readonly #model: TokenModel;
  readonly #options: EngineLoopOptions;
  readonly #cache: BlockCache;
  readonly #scheduler: Scheduler<Stream>;
  readonly #scratch: number;
  readonly blockBytes: number;
  readonly #streams = new Map<number, Stream>();
  readonly #writer = new StepWriter();
  #shared: Uint8Array = new Uint8Array(0);
  #arrivals = 0;
  #steps = 0;
  #generatedTokens = 0;
  #promptTokens = 0;
  #cachedPromptTokens = 0;

  constructor(model: TokenModel, options: EngineLoopOptions) {
    const { maxSequences, blockSizeTokens, totalBlocks, sequenceIds } = options;
    this.#model = model;
    this.#options = options;
    this.#scratch = maxSequences;
    this.blockBytes = this.#measureBlock();
    const firstHolder = maxSequences + 1;
    // Besides running sequences, an import pins a chain.
    assert(sequenceIds - firstHolder >= maxSequences + 1, "there is a holder for every sequence that can pin a block");
    this.#cache = new BlockCache(model, {
      blockSizeTokens,
      totalBlocks,
      firstHolder,
      holderCount: sequenceIds - firstHolder,
      maxDepth: Math.ceil(options.contextLength / blockSizeTokens),
      spareBlocks: options.spareBlocks,
      ...(options.keepsOrder ? { mover: this.#mover() } : {}),
    });
    this.#scheduler = new Scheduler(this.#cache, {
      maxSequences,
      maxBatchedTokens: options.maxBatchedTokens,
      extraLogitRows: options.extraLogitRows,
      maxWaiting: options.maxWaitingRequests,
    });
    this.#writer.reset();
  }

  /** True when `step` would do something. */
  get hasWork(): boolean {
    return this.#streams.size > 0;
  }

  /** Queues a request. What cannot run ends with an error entry in the next result. */
  submit(streamId: number, request: PreprocessedRequest): void {
    assert(!this.#streams.has(streamId), "a stream id is unique among live streams");
    const error = this.#refusal(request) ?? this.#trySubmit(streamId, request);
    if (error !== undefined) this.#writer.errorEntry(streamId, error);
  }

  abort(streamId: number): void {
    const stream = this.#streams.get(streamId);
    if (stream === undefined) return;
    this.#writer.beginEntry(streamId);
    if (stream.firstTokenMs === NOT_YET) this.#writeFirst(stream, this.#options.clock.monotonicMs());
    this.#finish(stream, "cancelled");
    this.#writer.endEntry();
  }

  /** Ends every stream with the error. */
  failAll(error: DynamoError): void {
    for (const stream of this.#streams.values()) {
      this.#scheduler.remove(stream);
      this.#writer.errorEntry(stream.id, error);
    }
    this.#streams.clear();
  }

  /** One engine step. Blocks for as long as the model computes. Throws `engine-failed`: the engine is then unusable. */
  step(): void {
    const planned = this.#scheduler.plan();
    for (const stream of this.#scheduler.oversized) {
      this.#streams.delete(stream.id);
      this.#writer.errorEntry(stream.id, this.#tooLong(stream.tokenCount));
    }
    if (planned.length === 0) {
      assert(this.#scheduler.oversized.length > 0 || !this.hasWork, "a step makes progress while there is work");
      return;
    }
    this.#noteStarts(planned);
    this.#model.decode(this.#fillBatch(planned));
    for (const stream of planned) if (stream.wantsAllLogits) this.#collectPromptLogprobs(stream);
    this.#scheduler.commit();
    this.#steps++;
    const nowMs = this.#options.clock.monotonicMs();
    for (const stream of planned) if (stream.remainingCount === 0) this.#sample(stream, nowMs);
  }

  /** The packed entries since the last call, a copy of its own; undefined when there are none. */
  takeStep(): Uint8Array<ArrayBuffer> | undefined {
    if (this.#writer.entryCount === 0) return undefined;
    const step = new Uint8Array(this.#writer.view());
    this.#writer.reset();
    return step;
  }

  takeEvents(): readonly KvEvent[] {
    return this.#cache.takeEvents();
  }

  load(): LoadSnapshot {
    return {
      runningRequests: this.#scheduler.running.length,
      waitingRequests: this.#scheduler.waiting.length,
      activeBlocks: this.#cache.activeBlocks,
      cachedBlocks: this.#cache.unusedBlocks,
      totalBlocks: this.#cache.totalBlocks,
      pendingPrefillTokens: this.#scheduler.pendingPrefillTokens(),
      steps: this.#steps,
      generatedTokens: this.#generatedTokens,
      promptTokens: this.#promptTokens,
      cachedPromptTokens: this.#cachedPromptTokens,
      preemptions: this.#scheduler.preemptions,
    };
  }

  clearBlocks(): number {
    return this.#cache.clear();
  }

  /** How many leading blocks are here. */
  countBlocks(sequenceHashes: Uint32Array): number {
    const limit = Math.min(sequenceHashes.length / 2, this.#cache.totalBlocks);
    return this.#cache.findPrefix(sequenceHashes, limit, new Int32Array(limit));
  }

  /** The leading blocks that are here, copied out. Cost: 0.1 ms per block of 360 kB. */
  exportBlocks(sequenceHashes: Uint32Array): ExportedBlocks {
    const limit = Math.min(sequenceHashes.length / 2, this.#cache.totalBlocks);
    const blocks = new Int32Array(limit);
    const count = this.#cache.findPrefix(sequenceHashes, limit, blocks);
    const { blockBytes } = this;
    const data = new Uint8Array(count * blockBytes);
    for (let i = 0; i < count; i++) {
      this.#exportBlock(blocks[i]!, data.subarray(i * blockBytes, (i + 1) * blockBytes));
    }
    return { sequenceHashes: sequenceHashes.slice(0, 2 * count), blockBytes, data };
  }

  /**
   * Registers blocks computed elsewhere; returns how many were new and found room. Throws `invalid-field` when sizes or
   * hashes do not fit the tokens: a block under a wrong hash would answer other requests with foreign text.
   */
  importBlocks(blocks: ImportedBlocks): number {
    const { startBlock = 0 } = blocks;
    const hashes = this.#checkedHashes(blocks);
    return this.#takeIn(hashes, (index) => {
      const at = (index - startBlock) * this.blockBytes;
      return at < 0 ? undefined : blocks.data.subarray(at, at + this.blockBytes);
    });
  }

  /** The memory that `copyOut` writes and `copyIn` reads: slot `i` is the bytes `[i * blockBytes, (i + 1) * blockBytes)`. */
  attach(memory: SharedArrayBuffer): void {
    this.#shared = new Uint8Array(memory);
  }

  /** Copies those of the blocks that are here to their slots; 1 per block that was. Cost: as `exportBlocks`. */
  copyOut(sequenceHashes: Uint32Array, slots: Int32Array): Uint8Array {
    const present = new Uint8Array(slots.length);
    const block = new Int32Array(1);
    for (let i = 0; i < slots.length; i++) {
      if (this.#cache.findPrefix(sequenceHashes.subarray(2 * i, 2 * i + 2), 1, block) === 0) continue;
      this.#exportBlock(block[0]!, this.#slot(slots[i]!));
      present[i] = 1;
    }
    return present;
  }

  /** Registers blocks from shared memory under the hashes that follow from their tokens; returns how many were new. */
  copyIn({ tokenIds, cacheNamespace, firstBlock, slots }: SharedBlocks): number {
    const hashes = hashBlocks(tokenIds, this.#options.blockSizeTokens, blockHashSeed({ cacheNamespace }));
    assert(hashes.blockCount >= firstBlock + slots.length, "there are tokens for every block");
    return this.#takeIn(hashes, (index) => {
      const slot = slots[index - firstBlock] ?? -1;
      return slot < 0 ? undefined : this.#slot(slot);
    });
  }

  #slot(slot: number): Uint8Array {
    const end = (slot + 1) * this.blockBytes;
    assert(slot >= 0 && end <= this.#shared.length, "a slot lies inside the shared memory");
    return this.#shared.subarray(end - this.blockBytes, end);
  }

  #exportBlock(block: number, into: Uint8Array): void {
    const { start, end } = this.#cache.positionsOf(block);
    const written = this.#readCells(this.#cache.holderOf(block), start, end, into);
    assert(written === this.blockBytes, "every block has the same size");
  }

  #mover(): CellMover {
    return {
      blockBytes: this.blockBytes,
      read: (sequence, start, end, into) => this.#readCells(sequence, start, end, into),
      write: (from, sequence, start, end) => this.#writeCells(from, sequence, start, end),
    };
  }

  #readCells(sequence: number, start: number, end: number, into: Uint8Array): number {
    this.#model.copyCells(sequence, this.#scratch, start, end);
    const written = this.#model.exportState(this.#scratch, into);
    this.#model.removeCells(this.#scratch, start, end);
    return written;
  }

  #writeCells(from: Uint8Array, sequence: number, start: number, end: number): void {
    const isAccepted = this.#model.importState(this.#scratch, from);
    assert(isAccepted, "what was read can be written, and has room");
    this.#model.copyCells(this.#scratch, sequence, start, end);
    this.#model.removeCells(this.#scratch, start, end);
  }

  /** Takes blocks in order until one is neither here nor given, is not what it should be, or finds no room. */
  #takeIn(hashes: BlockHashes, bytesOf: (index: number) => Uint8Array | undefined): number {
    const { blockSizeTokens: size, contextLength } = this.#options;
    const limit = Math.min(hashes.blockCount, Math.floor(contextLength / size));
    const ids = new Int32Array(limit);
    // Those that are here come first: a block goes before its parent.
    const found = this.#cache.findPrefix(hashes.sequenceHashes, limit, ids);
    this.#cache.acquire(NO_SEQUENCE, ids, found);
    let wanted = 0;
    while (found + wanted < limit && bytesOf(found + wanted) !== undefined) wanted++;
    wanted = Math.min(wanted, this.#cache.freeBlocks + this.#cache.unusedBlocks);
    // At once, so that their cells lie in order.
    const isReserved = this.#cache.reserve(wanted);
    assert(isReserved, "there is room for what was counted");
    let taken = 0;
    for (; taken < wanted; taken++) {
      const index = found + taken;
      if (!this.#importState(bytesOf(index)!, index * size)) break;
      this.#cache.register(this.#scratch, ids, index, index + 1, hashes);
      this.#model.removeCells(this.#scratch, index * size, (index + 1) * size);
    }
    this.#cache.release(NO_SEQUENCE, ids, found + taken, wanted - taken);
    return taken;
  }

  #checkedHashes(blocks: ImportedBlocks): ReturnType<typeof hashBlocks> {
    const { cacheNamespace = "", tokenIds, sequenceHashes, data, startBlock = 0 } = blocks;
    const hashes = hashBlocks(tokenIds, this.#options.blockSizeTokens, blockHashSeed({ cacheNamespace }));
    const count = hashes.blockCount;
    const fits =
      tokenIds.length === count * this.#options.blockSizeTokens &&
      blocks.blockBytes === this.blockBytes &&
      startBlock <= count &&
      data.length === (count - startBlock) * this.blockBytes &&
      sequenceHashes.length === 2 * count &&
      hashes.sequenceHashes.every((half, i) => half === sequenceHashes[i]);
    if (fits) return hashes;
    throw new DynamoError("invalid-field", "the blocks to import do not fit this engine or their tokens", {
      diagnostic: `${tokenIds.length} tokens, ${sequenceHashes.length / 2} hashes, ${data.length} bytes in blocks of ${blocks.blockBytes}, expected blocks of ${this.blockBytes} bytes and hashes that follow from the tokens`,
    });
  }

  /** Puts one block into the scratch sequence; false, and nothing there, when the bytes are not that block's. */
  #importState(data: Uint8Array, start: number): boolean {
    const accepted = this.#model.importState(this.#scratch, data);
    const range = this.#model.positionsOf(this.#scratch);
    if (accepted && range.start === start && range.end === start + this.#options.blockSizeTokens) return true;
    if (range.end > 0) this.#model.removeCells(this.#scratch, 0, range.end);
    return false;
  }

  /** Computes one block, which also warms the model up, and asks for its size. */
  #measureBlock(): number {
    const { batch } = this.#model;
    const size = this.#options.blockSizeTokens;
    for (let start = 0; start < size; start += this.#options.maxBatchedTokens) {
      const count = Math.min(size - start, this.#options.maxBatchedTokens);
      for (let i = 0; i < count; i++) {
        batch.tokenIds[i] = 0;
        batch.positions[i] = start + i;
        batch.sequenceIds[i] = this.#scratch;
        batch.wantsLogits[i] = i === count - 1 ? 1 : 0;
      }
      this.#model.decode(count);
    }
    const bytes = this.#model.stateBytes(this.#scratch);
    this.#model.clearCells();
    return bytes;
  }

  #refusal(request: PreprocessedRequest): DynamoError | undefined {
    const { tokenIds, stop } = request;
    if (tokenIds.length === 0) {
      return new DynamoError("invalid-field", "expected a prompt of at least 1 token, got 0", { param: "prompt" });
    }
    if (!(stop.maxTokens >= 1)) {
      return new DynamoError("invalid-field", `expected max_tokens of at least 1, got ${stop.maxTokens}`, {
        param: "max_tokens",
      });
    }
    if (tokenIds.length >= this.#options.contextLength) return this.#tooLong(tokenIds.length);
    const { vocabularySize } = this.#model;
    for (const id of tokenIds) {
      if (id < vocabularySize) continue;
      return new DynamoError("invalid-field", `expected token ids below ${vocabularySize}, got ${id}`, {
        param: "prompt",
      });
    }
    return undefined;
  }

  #tooLong(tokenCount: number): DynamoError {
    const { contextLength } = this.#options;
    return new DynamoError(
      "context-length",
      `the model's context is ${contextLength} tokens, the request has ${tokenCount} and needs room for one more`,
    );
  }

  #trySubmit(streamId: number, request: PreprocessedRequest): DynamoError | undefined {
    const { clock, random, blockSizeTokens, contextLength, maxWaitingRequests } = this.#options;
    let stream: Stream;
    try {
      const sampler = new Sampler(request.sampling, {
        vocabularySize: this.#model.vocabularySize,
        promptTokenIds: request.tokenIds.subarray(0, promptLengthOf(request)),
        resumedTokenIds: request.tokenIds.subarray(promptLengthOf(request)),
        seed: request.sampling.seed ?? random.nextU32(),
      });
      stream = new Stream(streamId, request, {
        sampler,
        arrival: this.#arrivals++,
        arrivedMs: clock.monotonicMs(),
        blockSizeTokens,
        contextLength,
      });
    } catch (thrown) {
      return toDynamoError(thrown, "engine-failed");
    }
    if (!this.#scheduler.tryAdd(stream)) {
      return new DynamoError("worker-full", `the engine's queue of ${maxWaitingRequests} requests is full`);
    }
    this.#streams.set(streamId, stream);
    this.#promptTokens += stream.promptCount;
    return undefined;
  }

  #noteStarts(planned: readonly Stream[]): void {
    for (const stream of planned) {
      if (stream.startedMs !== NOT_YET) continue;
      stream.startedMs = this.#options.clock.monotonicMs();
      this.#cachedPromptTokens += stream.cachedTokenCount;
    }
  }

  #fillBatch(planned: readonly Stream[]): number {
    const { tokenIds, positions, sequenceIds, wantsLogits } = this.#model.batch;
    let at = 0;
    for (const stream of planned) {
      stream.batchStart = at;
      const { computedCount, plannedCount, cellsId } = stream;
      for (let i = 0; i < plannedCount; i++, at++) {
        tokenIds[at] = stream.tokenIds[computedCount + i]!;
        positions[at] = computedCount + i;
        sequenceIds[at] = cellsId;
        wantsLogits[at] = stream.wantsAllLogits ? 1 : 0;
      }
      if (plannedCount === stream.remainingCount) wantsLogits[at - 1] = 1;
    }
    return at;
  }

  /** Every prompt token but the first is predicted by the row of the one before it. */
  #collectPromptLogprobs(stream: Stream): void {
    const { computedCount, plannedCount, promptCount, promptLogprobs } = stream;
    const top = Math.max(0, stream.request.output.topLogprobs);
    const end = Math.min(computedCount + plannedCount, promptCount - 1);
    // After a preemption the first positions come again.
    for (let position = Math.max(computedCount, promptLogprobs.length); position < end; position++) {
      const row = this.#model.logits(stream.batchStart + position - computedCount);
      promptLogprobs.push(promptLogprob(row, stream.tokenIds[position + 1]!, top));
    }
    if (promptLogprobs.length === promptCount - 1) stream.wantsAllLogits = false;
  }

  #sample(stream: Stream, nowMs: number): void {
    const { request, sampler } = stream;
    const { stop, output } = request;
    const logits = this.#model.logits(stream.batchStart + stream.plannedCount - 1);
    const token = sampler.sample(logits, stream.generatedCount < stop.minTokens ? stop.stopTokenIds : undefined);
    this.#writer.beginEntry(stream.id);
    if (stream.firstTokenMs === NOT_YET) this.#writeFirst(stream, nowMs);
    if (stop.stopTokenIds.includes(token) && stream.generatedCount >= stop.minTokens) {
      this.#finish(stream, "stop");
    } else {
      this.#generatedTokens++;
      this.#writer.token(token);
      if (output.topLogprobs >= 0) this.#writer.logprobs([sampler.logprobs(logits, token, output.topLogprobs)]);
      sampler.accept(token);
      stream.append(token);
      if (stream.tokenCount >= stream.maxTokenCount) this.#finish(stream, "length");
    }
    this.#writer.endEntry();
  }

  #writeFirst(stream: Stream, nowMs: number): void {
    const startedMs = stream.startedMs === NOT_YET ? nowMs : stream.startedMs;
    stream.firstTokenMs = nowMs;
    this.#writer.first({
      promptTokens: stream.promptCount,
      cachedTokens: stream.cachedTokenCount,
      queueMs: startedMs - stream.arrivedMs,
      prefillMs: nowMs - startedMs,
    });
    if (stream.promptLogprobs.length > 0 && !stream.wantsAllLogits) {
      this.#writer.promptLogprobs(stream.promptLogprobs);
      stream.promptLogprobs = [];
    }
  }

  #finish(stream: Stream, reason: Exclude<FinishReason, "error">): void {
    this.#writer.finish(reason, this.#options.clock.monotonicMs() - stream.firstTokenMs);
    this.#scheduler.remove(stream);
    this.#streams.delete(stream.id);
  }
}
