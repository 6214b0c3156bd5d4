import assert from "node:assert/strict";
import { DynamoError } from "../../errors/index.ts";
import {
  StepWriter,
  promptLengthOf,
  type KvEvent,
  type LoadSnapshot,
  type PreprocessedRequest,
  type TokenLogprob,
} from "../../protocol/index.ts";
import { systemClock, type Clock, type TimerHandle } from "../../std/index.ts";
import { blockHashSeed } from "../../tokens/index.ts";
import type { Engine, EngineInfo, EngineSink, ExportedBlocks, ImportedBlocks } from "../base.ts";
import type { EchoEngineConfig } from "../config.ts";
import { BlockCache, type BlockLease } from "./block-cache.ts";

/**
 * An engine that computes nothing and answers with the prompt's own tokens, over and over: the load for measuring the
 * frontend, the worker and the planes, and a partner for their tests. Everything but the arithmetic is that of a real
 * engine: continuous batching (each step gives one token to every running stream, in one packed batch), a bounded queue,
 * the context limit, stop ids, aborts, a prefix cache with true KV events.
 *
 * Runs on the loop of its caller. Cost: 0.2 to 0.3 us per token, one loop turn per step of all streams.
 */
export interface EchoEngineOptions {
  /** @default the system's clock */
  readonly clock?: Clock;
  /** Streams that wait for a place beyond `maxSequences`; more end with `worker-full`. @default 4096 */
  readonly maxWaitingRequests?: number;
  /** @default 256, bytes as tokens */
  readonly vocabularySize?: number;
}

/** Prompt tokens 65,536 blocks hold are more than tests and measurements use; also the limit of one KV event. */
const MAX_TOTAL_BLOCKS = 65_536;
const ENGINE_VERSION = "1";

class EchoStream {
  readonly id: number;
  readonly request: PreprocessedRequest;
  readonly arrivedMs: number;
  readonly promptTokens: number;
  /** Tokens it may generate, those of an earlier worker included: its own limit and the rest of the context. */
  readonly maxTokens: number;
  lease: BlockLease | undefined = undefined;
  startedMs = 0;
  firstTokenMs = 0;
  /** Where in the prompt the next token is. */
  cursor: number;
  generated: number;
  hasFirst = false;
  cancelled = false;

  constructor(id: number, request: PreprocessedRequest, arrivedMs: number, contextLength: number) {
    this.id = id;
    this.request = request;
    this.arrivedMs = arrivedMs;
    this.promptTokens = promptLengthOf(request);
    this.maxTokens = Math.min(request.stop.maxTokens, contextLength - this.promptTokens);
    this.generated = request.resumedTokens ?? 0;
    this.cursor = this.generated % this.promptTokens;
  }
}

type EngineState = "new" | "running" | "draining" | "stopped";

export class EchoEngine implements Engine {
  readonly #config: EchoEngineConfig;
  readonly #clock: Clock;
  readonly #maxWaitingRequests: number;
  readonly #vocabularySize: number;
  readonly #cache: BlockCache;
  readonly #totalBlocks: number;
  readonly #writer = new StepWriter();

  #state: EngineState = "new";
  #sink: EngineSink | undefined = undefined;
  /** All live streams; each is also in exactly one of `#waiting`, `#running` and `#refused`. */
  readonly #streams = new Map<number, EchoStream>();
  readonly #waiting: EchoStream[] = [];
  readonly #running: EchoStream[] = [];
  /** Ended before they began; told with the next step, because a sink is never called inside `submit`. */
  #refused: { stream: EchoStream; error: DynamoError }[] = [];
  #kvEvents: KvEvent[] = [];
  #pendingStep: TimerHandle | undefined = undefined;
  /** Called after a step: `drain` and `clearBlocks` wait there. */
  #afterStep: (() => boolean)[] = [];
  #stopping: Promise<void> | undefined = undefined;

  #steps = 0;
  #generatedTokens = 0;
  #promptTokens = 0;
  #cachedPromptTokens = 0;
  #waitingPromptTokens = 0;

  constructor(config: EchoEngineConfig, options: EchoEngineOptions = {}) {
    this.#config = config;
    this.#clock = options.clock ?? systemClock;
    this.#maxWaitingRequests = options.maxWaitingRequests ?? 4096;
    this.#vocabularySize = options.vocabularySize ?? 256;
    const blocksPerSequence = Math.ceil(config.contextLength / config.blockSizeTokens);
    this.#totalBlocks = Math.min(MAX_TOTAL_BLOCKS, blocksPerSequence * config.maxSequences);
    this.#cache = new BlockCache(this.#totalBlocks, config.blockSizeTokens);
  }

  start(sink: EngineSink, signal: AbortSignal): Promise<EngineInfo> {
    if (signal.aborted) return Promise.reject(new DynamoError("cancelled", "the engine's start was cancelled"));
    if (this.#state !== "new") return Promise.reject(new DynamoError("engine-stopped", "an engine starts only once"));
    this.#state = "running";
    this.#sink = sink;
    const { contextLength, blockSizeTokens, maxSequences } = this.#config;
    return Promise.resolve({
      engine: "echo",
      engineVersion: ENGINE_VERSION,
      contextLength,
      blockSizeTokens,
      totalBlocks: this.#totalBlocks,
      maxSequences,
      // A step takes any prompt whole.
      maxBatchedTokens: contextLength * maxSequences,
      dataParallelSize: 1,
      vocabularySize: this.#vocabularySize,
      blockBytes: 0,
    });
  }

  submit(streamId: number, request: PreprocessedRequest): void {
    if (this.#state === "new" || this.#state === "stopped") {
      throw new DynamoError("engine-stopped", "the engine is not running");
    }
    assert(!this.#streams.has(streamId), "a stream id is unique among live streams");
    const stream = new EchoStream(streamId, request, this.#clock.monotonicMs(), this.#config.contextLength);
    this.#streams.set(streamId, stream);
    const error = this.#refusal(stream);
    if (error !== undefined) {
      this.#refused.push({ stream, error });
    } else {
      this.#waitingPromptTokens += request.tokenIds.length;
      enqueueByPriority(this.#waiting, stream);
    }
    this.#scheduleStep(0);
  }

  abort(streamId: number): void {
    const stream = this.#streams.get(streamId);
    if (stream === undefined || stream.cancelled) return;
    stream.cancelled = true;
    this.#scheduleStep(0);
  }

  load(): LoadSnapshot {
    return {
      runningRequests: this.#running.length,
      waitingRequests: this.#waiting.length,
      activeBlocks: this.#cache.activeCount,
      cachedBlocks: this.#cache.idleCount,
      totalBlocks: this.#totalBlocks,
      pendingPrefillTokens: this.#waitingPromptTokens,
      steps: this.#steps,
      generatedTokens: this.#generatedTokens,
      promptTokens: this.#promptTokens,
      cachedPromptTokens: this.#cachedPromptTokens,
      preemptions: 0,
    };
  }

  countBlocks(_sequenceHashes: Uint32Array): Promise<number> {
    return Promise.reject(unsupported("count blocks"));
  }

  exportBlocks(_sequenceHashes: Uint32Array): Promise<ExportedBlocks> {
    return Promise.reject(unsupported("export blocks"));
  }

  importBlocks(_blocks: ImportedBlocks): Promise<number> {
    return Promise.reject(unsupported("import blocks"));
  }

  clearBlocks(): Promise<number> {
    if (this.#sink === undefined) return Promise.resolve(0);
    const count = this.#cache.clear(this.#kvEvents);
    return this.#afterNextStep(() => true).then(() => count);
  }

  drain(): Promise<void> {
    if (this.#state === "new" || this.#state === "stopped") return Promise.resolve();
    this.#state = "draining";
    return this.#afterNextStep(() => this.#streams.size === 0);
  }

  stop(): Promise<void> {
    this.#stopping ??= this.#stop();
    return this.#stopping;
  }

  async #stop(): Promise<void> {
    this.#state = "stopped";
    this.#pendingStep?.cancel();
    this.#pendingStep = undefined;
    // The last entries, too, come outside of any method call.
    await new Promise<void>((resolve) => this.#clock.nextTurn(resolve));
    const error = new DynamoError("engine-stopped", "the engine was stopped");
    this.#writer.reset();
    for (const stream of this.#streams.values()) this.#writer.errorEntry(stream.id, error);
    this.#streams.clear();
    for (const stream of this.#running) this.#cache.release(stream.lease!);
    this.#running.length = 0;
    this.#waiting.length = 0;
    this.#waitingPromptTokens = 0;
    this.#refused = [];
    const sink = this.#sink;
    this.#sink = undefined;
    this.#cache.clear(this.#kvEvents);
    if (sink !== undefined) this.#deliver(sink);
    for (const settle of this.#afterStep) settle();
    this.#afterStep = [];
  }

  #refusal(stream: EchoStream): DynamoError | undefined {
    const { contextLength, maxSequences } = this.#config;
    const promptTokens = stream.request.tokenIds.length;
    if (this.#state === "draining") return new DynamoError("draining", "the engine is shutting down");
    if (promptTokens === 0) {
      return new DynamoError("invalid-field", "expected a prompt of at least 1 token, got 0", { param: "prompt" });
    }
    if (promptTokens >= contextLength) {
      return new DynamoError(
        "context-length",
        `the model's context is ${contextLength} tokens, the prompt has ${promptTokens}`,
      );
    }
    // Places that are free now count: a burst of `maxSequences` on an idle engine is not a queue.
    const waitingLimit = this.#maxWaitingRequests + maxSequences - this.#running.length;
    if (this.#waiting.length >= waitingLimit) {
      return new DynamoError("worker-full", `the engine's queue of ${this.#maxWaitingRequests} requests is full`);
    }
    return undefined;
  }

  #scheduleStep(delayMs: number): void {
    if (this.#pendingStep !== undefined || this.#state === "stopped") return;
    const run = (): void => {
      this.#pendingStep = undefined;
      this.#step();
    };
    if (delayMs > 0) {
      this.#pendingStep = this.#clock.setTimer(delayMs, run);
    } else {
      let isCancelled = false;
      this.#pendingStep = { cancel: () => void (isCancelled = true) };
      this.#clock.nextTurn(() => {
        if (!isCancelled) run();
      });
    }
  }

  #step(): void {
    const sink = this.#sink;
    if (sink === undefined) return;
    this.#writer.reset();
    for (const { stream, error } of this.#refused) {
      this.#writer.errorEntry(stream.id, error);
      this.#streams.delete(stream.id);
    }
    this.#refused = [];
    this.#dropCancelledWaiting();
    this.#admit();
    if (this.#running.length > 0) this.#steps++;
    this.#decode();
    this.#deliver(sink);
    this.#afterStep = this.#afterStep.filter((settle) => !settle());
    if (this.#running.length > 0 || this.#waiting.length > 0) this.#scheduleStep(this.#config.stepMs);
  }

  #deliver(sink: EngineSink): void {
    if (this.#kvEvents.length > 0) {
      const events = this.#kvEvents;
      this.#kvEvents = [];
      sink.onKvEvents(events);
    }
    if (this.#writer.entryCount > 0) sink.onStep(this.#writer.view());
  }

  #dropCancelledWaiting(): void {
    for (let i = this.#waiting.length - 1; i >= 0; i--) {
      const stream = this.#waiting[i]!;
      if (!stream.cancelled) continue;
      this.#waiting.splice(i, 1);
      this.#waitingPromptTokens -= stream.request.tokenIds.length;
      stream.startedMs = stream.firstTokenMs = this.#clock.monotonicMs();
      this.#writer.beginEntry(stream.id);
      this.#end(stream, "cancelled");
    }
  }

  #admit(): void {
    while (this.#running.length < this.#config.maxSequences && this.#waiting.length > 0) {
      const stream = this.#waiting.shift()!;
      const { tokenIds, output, cacheNamespace } = stream.request;
      this.#waitingPromptTokens -= tokenIds.length;
      stream.startedMs = stream.firstTokenMs = this.#clock.monotonicMs();
      const lease = this.#cache.acquire(tokenIds, blockHashSeed({ cacheNamespace }), this.#kvEvents);
      stream.lease = output.promptLogprobs ? { ...lease, cachedTokens: 0 } : lease;
      this.#promptTokens += tokenIds.length;
      this.#cachedPromptTokens += stream.lease.cachedTokens;
      this.#running.push(stream);
    }
  }

  /** One token for every running stream; those that end make room. */
  #decode(): void {
    const running = this.#running;
    let kept = 0;
    for (let i = 0; i < running.length; i++) {
      const stream = running[i]!;
      this.#writer.beginEntry(stream.id);
      if (this.#advance(stream)) {
        this.#writer.endEntry();
        running[kept++] = stream;
      } else {
        this.#cache.release(stream.lease!);
      }
    }
    running.length = kept;
  }

  /** Writes the stream's token; false when the stream ended with it. */
  #advance(stream: EchoStream): boolean {
    if (stream.cancelled) return this.#end(stream, "cancelled");
    const token = this.#nextToken(stream);
    if (token === undefined) return this.#end(stream, "stop");
    if (!stream.hasFirst) this.#writeFirst(stream);
    stream.generated++;
    this.#generatedTokens++;
    this.#writer.token(token);
    const { topLogprobs } = stream.request.output;
    if (topLogprobs >= 0) this.#writer.logprobs([this.#logprobOf(token, topLogprobs)]);
    return stream.generated < stream.maxTokens || this.#end(stream, "length");
  }

  /** The next token of the prompt, undefined when it is a stop token that may stop. */
  #nextToken(stream: EchoStream): number | undefined {
    const { tokenIds, stop } = stream.request;
    const token = tokenIds[stream.cursor]!;
    if (++stream.cursor === stream.promptTokens) stream.cursor = 0;
    if (stop.stopTokenIds.length === 0 || !stop.stopTokenIds.includes(token)) return token;
    if (stream.generated >= stop.minTokens) return undefined;
    // Too early to stop: the first token of the prompt that does not stop, else the lowest id that does not.
    const other = tokenIds.find((id, i) => i < stream.promptTokens && !stop.stopTokenIds.includes(id));
    if (other !== undefined) return other;
    let lowest = 0;
    while (stop.stopTokenIds.includes(lowest)) lowest++;
    return lowest;
  }

  #writeFirst(stream: EchoStream): void {
    const { tokenIds, output } = stream.request;
    stream.hasFirst = true;
    this.#writer.first({
      promptTokens: stream.promptTokens,
      cachedTokens: stream.lease?.cachedTokens ?? 0,
      queueMs: stream.startedMs - stream.arrivedMs,
      prefillMs: stream.firstTokenMs - stream.startedMs,
    });
    if (output.promptLogprobs && stream.lease !== undefined) {
      const records: TokenLogprob[] = [];
      for (const id of tokenIds.subarray(1, stream.promptTokens))
        records.push(this.#logprobOf(id, Math.max(0, output.topLogprobs)));
      this.#writer.promptLogprobs(records);
    }
  }

  /** Closes the stream's entry with its end; false, for `#advance`. */
  #end(stream: EchoStream, reason: "stop" | "length" | "cancelled"): false {
    if (!stream.hasFirst) this.#writeFirst(stream);
    this.#writer.finish(reason, this.#clock.monotonicMs() - stream.firstTokenMs);
    this.#writer.endEntry();
    this.#streams.delete(stream.id);
    return false;
  }

  /** A constant: the token has half of the mass, each id after it half of what is left. */
  #logprobOf(token: number, top: number): TokenLogprob {
    const count = Math.min(top, this.#vocabularySize);
    const topIds = Array.from({ length: count }, (_, i) => (token + i) % Math.max(this.#vocabularySize, token + 1));
    return { logprob: -Math.LN2, topIds, topLogprobs: topIds.map((_, i) => -(i + 1) * Math.LN2) };
  }

  /** Resolves after the first step that `done` is true after, or when the engine stops. */
  #afterNextStep(done: () => boolean): Promise<void> {
    return new Promise((resolve) => {
      this.#afterStep.push(() => {
        const settled = this.#state === "stopped" || done();
        if (settled) resolve();
        return settled;
      });
      this.#scheduleStep(0);
    });
  }
}

/** First come, first served among equals; a higher priority goes before. */
function enqueueByPriority(queue: EchoStream[], stream: EchoStream): void {
  let at = queue.length;
  while (at > 0 && queue[at - 1]!.request.priority < stream.request.priority) at--;
  if (at === queue.length) queue.push(stream);
  else queue.splice(at, 0, stream);
}

function unsupported(operation: string): DynamoError {
  return new DynamoError("unsupported-operation", `the echo engine cannot ${operation}`);
}
