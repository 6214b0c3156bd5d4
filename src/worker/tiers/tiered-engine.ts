import type { Engine, EngineInfo, EngineSink, ExportedBlocks, ImportedBlocks } from "../../engines/index.ts";
import { DynamoError, toDynamoError } from "../../errors/index.ts";
import type { RestoredFrom, TieredCache, TierMatch } from "../../kvbm/index.ts";
import {
  EngineOutput,
  StepWriter,
  decodeEngineOutput,
  forEachStepEntry,
  promptLengthOf,
  type LoadSnapshot,
  type PreprocessedRequest,
} from "../../protocol/index.ts";
import type { Clock } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";

/**
 * An engine with tiers below its cache: another engine, its events followed and its requests looked at before they go in.
 *
 *     submit --> match --- nothing below ------------------------------> engine
 *                  |------ in the host: copyIn, at once ---------------> engine
 *                  +------ below: PARKED --read, late or failed--------> copyIn what came --> engine
 *                             |-- abort -> cancelled    |-- engine dies, stop -> engine-stopped
 *
 * A request is parked at most as long as computing the blocks would take, and never fails for the tiers' sake: what does
 * not come is computed. Every accepted stream ends exactly once, also while it is parked.
 */
export interface TieredEngineOptions {
  readonly engine: Engine;
  /** Once the engine runs; `onEvents` is for the sink. */
  readonly makeCache: (info: EngineInfo, hooks: CacheHooks) => Promise<TieredCache>;
  /** Counts requests that were not parked because too many were. */
  readonly onParkingFull: () => void;
  readonly clock: Clock;
}

export type CacheHooks = Pick<ConstructorParameters<typeof TieredCache>[0], "port" | "onEvents" | "isBusy"> & {
  readonly attach: (memory: SharedArrayBuffer) => void;
};

/** Below this the timer and a slow event loop say more than the tiers. */
const MIN_PARKED_MS = 100;
const MAX_PARKED_MS = 10_000;
/** Each holds host slots while it waits. */
const MAX_PARKED = 256;

interface Parked {
  readonly request: PreprocessedRequest;
  readonly abort: AbortController;
  readonly sinceMs: number;
}

interface Restoring {
  readonly from: RestoredFrom;
  /** For what lay below the host. */
  readonly parkedMs: number;
}

export class TieredEngine implements Engine {
  readonly #options: TieredEngineOptions;
  readonly #engine: Engine;
  readonly #parked = new Map<number, Parked>();
  /** Streams whose first entry, which tells the prefill's time, is still to come, with what was restored for them. */
  readonly #unbegun = new Map<number, Restoring | undefined>();
  readonly #told = new StepWriter();
  readonly #output = new EngineOutput();
  #cache: TieredCache | undefined = undefined;
  #info: EngineInfo | undefined = undefined;
  #sink: EngineSink | undefined = undefined;
  #isDraining = false;
  /** Ends reads of imports. */
  readonly #stopping = new AbortController();
  #whenUnparked: (() => void)[] = [];
  #stopped: Promise<void> | undefined = undefined;

  constructor(options: TieredEngineOptions) {
    this.#options = options;
    this.#engine = options.engine;
  }

  async start(sink: EngineSink, signal: AbortSignal): Promise<EngineInfo> {
    this.#sink = sink;
    const info = await this.#engine.start(
      {
        onStep: (step) => this.#onStep(step),
        onKvEvents: (events) => {
          this.#sink?.onKvEvents(events);
          this.#cache?.onDeviceEvents(events);
        },
        onFatal: (error) => {
          this.#endParked(new DynamoError("engine-stopped", "the engine stopped"));
          this.#sink?.onFatal(error);
        },
      },
      signal,
    );
    const { blockPort } = this.#engine;
    if (blockPort === undefined || info.blockBytes === 0) {
      throw new DynamoError(
        "invalid-config",
        `the ${info.engine} engine has no KV blocks to keep in host memory or below`,
      );
    }
    if (info.dataParallelSize > 1) {
      throw new DynamoError(
        "invalid-config",
        `host memory and what lies below it keep the blocks of one rank, this engine has ${info.dataParallelSize}`,
      );
    }
    this.#cache = await this.#options.makeCache(info, {
      attach: (memory) => blockPort.attach(memory),
      port: blockPort,
      onEvents: (events) => this.#sink?.onKvEvents(events),
      isBusy: () => this.#engine.load().runningRequests > 0,
    });
    this.#info = info;
    await this.#cache.open();
    return info;
  }

  submit(streamId: number, request: PreprocessedRequest): void {
    if (this.#isDraining) {
      this.#endLater((step) => step.errorEntry(streamId, new DynamoError("draining", "the engine is shutting down")));
      return;
    }
    const match = this.#match(request);
    if (match?.needsRead !== true) {
      this.#submit(streamId, request, match);
    } else if (this.#parked.size < MAX_PARKED) {
      this.#park(streamId, request, match);
    } else {
      this.#options.onParkingFull();
      this.#submit(streamId, request, match);
    }
  }

  abort(streamId: number): void {
    const parked = this.#parked.get(streamId);
    if (parked === undefined) {
      this.#engine.abort(streamId);
      return;
    }
    this.#unpark(streamId);
    parked.abort.abort();
    const queueMs = this.#options.clock.monotonicMs() - parked.sinceMs;
    this.#endLater((step) => {
      step.beginEntry(streamId);
      step.first({ promptTokens: promptLengthOf(parked.request), cachedTokens: 0, queueMs, prefillMs: 0 });
      step.finish("cancelled", 0);
      step.endEntry();
    });
  }

  load(): LoadSnapshot {
    const load = this.#engine.load();
    return this.#parked.size === 0 ? load : { ...load, waitingRequests: load.waitingRequests + this.#parked.size };
  }

  /** With what lies in the host and on disk: it comes in before an import, or with the request, like that of any other. */
  async countBlocks(sequenceHashes: Uint32Array): Promise<number> {
    const inEngine = await this.#engine.countBlocks(sequenceHashes);
    return this.#cache?.countNear(sequenceHashes, inEngine) ?? inEngine;
  }

  exportBlocks(sequenceHashes: Uint32Array): Promise<ExportedBlocks> {
    return this.#engine.exportBlocks(sequenceHashes);
  }

  get followBlocks(): Engine["followBlocks"] {
    const engine = this.#engine;
    if (engine.followBlocks === undefined) return undefined;
    return (sequenceHashes, onBlocks) => engine.followBlocks!(sequenceHashes, onBlocks);
  }

  /** Behind blocks that may lie in the tiers: those first. What has left them meanwhile is missing, and nothing is taken. */
  async importBlocks(blocks: ImportedBlocks): Promise<number> {
    const { startBlock = 0, tokenIds, cacheNamespace = "" } = blocks;
    if (startBlock > 0) await this.#bringIn(tokenIds, cacheNamespace, startBlock);
    return this.#engine.importBlocks(blocks);
  }

  async #bringIn(tokenIds: Uint32Array, cacheNamespace: string, blockCount: number): Promise<void> {
    if (this.#cache === undefined || this.#info === undefined) return;
    const hashes = hashBlocks(tokenIds, this.#info.blockSizeTokens, blockHashSeed({ cacheNamespace }));
    const match = this.#cache.match(hashes, blockCount);
    if (match === undefined) return;
    if (match.needsRead) {
      const deadlineMs = this.#readDeadlineMs(match);
      await this.#cache.fetch(match, { deadlineMs, signal: this.#stopping.signal });
    }
    this.#cache.copyIn(match, tokenIds, cacheNamespace);
  }

  /** Computing the blocks would be done by then. */
  #readDeadlineMs({ recomputeMs }: TierMatch): number {
    return this.#options.clock.monotonicMs() + Math.min(MAX_PARKED_MS, Math.max(MIN_PARKED_MS, recomputeMs));
  }

  /** Of the engine's cache, the host and the disk; returns how many were in the engine's cache. */
  async clearBlocks(): Promise<number> {
    const count = await this.#engine.clearBlocks();
    await this.#cache?.clear();
    return count;
  }

  async drain(): Promise<void> {
    this.#isDraining = true;
    if (this.#parked.size > 0) await new Promise<void>((resolve) => this.#whenUnparked.push(resolve));
    await this.#engine.drain();
  }

  stop(): Promise<void> {
    this.#stopped ??= this.#stop();
    return this.#stopped;
  }

  async #stop(): Promise<void> {
    this.#isDraining = true;
    this.#stopping.abort();
    await new Promise<void>((resolve) => this.#options.clock.nextTurn(resolve));
    this.#endParked(new DynamoError("engine-stopped", "the engine was stopped"));
    await this.#engine.stop();
    this.#sink = undefined;
    await this.#cache?.close();
  }

  #match(request: PreprocessedRequest): TierMatch | undefined {
    // Such a request wants the logits of its prompt, so all of it is computed.
    if (this.#cache === undefined || this.#info === undefined || request.output.promptLogprobs) return undefined;
    const { tokenIds, cacheNamespace } = request;
    const { blockSizeTokens, contextLength } = this.#info;
    if (tokenIds.length >= contextLength) return undefined;
    // At least one token is left to compute.
    const limit = Math.floor((tokenIds.length - 1) / blockSizeTokens);
    if (limit <= 0) return undefined;
    return this.#cache.match(hashBlocks(tokenIds, blockSizeTokens, blockHashSeed({ cacheNamespace })), limit);
  }

  /** With the blocks of the match that are in the host by now. */
  #submit(streamId: number, request: PreprocessedRequest, match: TierMatch | undefined, parkedMs = 0): void {
    const from = match === undefined ? undefined : this.#cache?.copyIn(match, request.tokenIds, request.cacheNamespace);
    this.#engine.submit(streamId, request);
    this.#unbegun.set(streamId, from === undefined ? undefined : { from, parkedMs });
  }

  #park(streamId: number, request: PreprocessedRequest, match: TierMatch): void {
    const sinceMs = this.#options.clock.monotonicMs();
    const parked: Parked = { request, abort: new AbortController(), sinceMs };
    this.#parked.set(streamId, parked);
    const deadlineMs = this.#readDeadlineMs(match);
    void this.#cache!.fetch(match, { deadlineMs, signal: parked.abort.signal }).then(() => {
      if (this.#parked.get(streamId) !== parked) return;
      try {
        this.#submit(streamId, request, match, this.#options.clock.monotonicMs() - sinceMs);
      } catch (thrown) {
        this.#endLater((step) => step.errorEntry(streamId, toDynamoError(thrown, "engine-stopped")));
      }
      this.#unpark(streamId);
    });
  }

  #unpark(streamId: number): void {
    this.#parked.delete(streamId);
    if (this.#parked.size > 0) return;
    for (const resolve of this.#whenUnparked) resolve();
    this.#whenUnparked = [];
  }

  #endParked(error: DynamoError): void {
    if (this.#parked.size === 0) return;
    const step = new StepWriter();
    step.reset();
    for (const [streamId, { abort }] of this.#parked) {
      abort.abort();
      step.errorEntry(streamId, error);
      this.#unpark(streamId);
    }
    this.#sink?.onStep(step.view());
  }

  #endLater(write: (step: StepWriter) => void): void {
    this.#options.clock.nextTurn(() => {
      const step = new StepWriter();
      step.reset();
      write(step);
      this.#sink?.onStep(step.view());
    });
  }

  #onStep(step: Uint8Array): void {
    if (this.#unbegun.size > 0) {
      this.#told.reset();
      forEachStepEntry(step, (streamId, start, end) => {
        if (!this.#unbegun.has(streamId)) return;
        const restoring = this.#unbegun.get(streamId);
        this.#unbegun.delete(streamId);
        this.#notePrefill(step, start, end);
        if (restoring !== undefined) this.#tellRestored(streamId, restoring);
      });
      if (this.#told.entryCount > 0) this.#sink?.onStep(this.#told.view());
    }
    this.#sink?.onStep(step);
  }

  /** In front of the engine's first word. */
  #tellRestored(streamId: number, { from, parkedMs }: Restoring): void {
    const { copyMs, ...blocks } = from;
    if (blocks.hostBlocks + blocks.diskBlocks + blocks.objectBlocks === 0) return;
    this.#told.beginEntry(streamId);
    this.#told.restored({ ...blocks, milliseconds: parkedMs + copyMs });
    this.#told.endEntry();
  }

  #notePrefill(step: Uint8Array, start: number, end: number): void {
    const output = this.#output;
    decodeEngineOutput(step, start, end, output);
    if (!output.hasFirst || output.finish === "cancelled") return;
    this.#cache?.costs.tookToPrefill(output.promptTokens - output.cachedTokens, output.prefillMs);
  }
}
