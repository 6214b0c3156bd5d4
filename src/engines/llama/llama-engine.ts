import assert from "node:assert/strict";
import { Worker } from "node:worker_threads";
import { DynamoError } from "../../errors/index.ts";
import { silentLogger, type Logger } from "../../observability/index.ts";
import { StepWriter, forEachStepEntry, type LoadSnapshot, type PreprocessedRequest } from "../../protocol/index.ts";
import { systemClock, type Clock } from "../../std/index.ts";
import type {
  BlockPort,
  Engine,
  EngineInfo,
  EngineSink,
  ExportedBlocks,
  ImportedBlocks,
  LlamaEngineConfig,
} from "../index.ts";
import { MAX_SEQUENCE_IDS } from "./llama-context.ts";
import { LoadBoard, type Command, type PlainError, type Reply, type Report, type ThreadData } from "./messages.ts";

/**
 * The embedded llama engine, main side: a thin client of the engine's thread. Commands are collected and posted once per
 * turn of the loop, results come one message per step. It knows which streams live, so that whatever happens to the
 * thread each of them ends exactly once.
 */
export interface LlamaEngineOptions {
  /** @default drops everything */
  readonly logger?: Logger;
  /** For deadlines on the thread. @default the system's clock */
  readonly clock?: Clock;
  /** Requests that wait beyond `maxSequences`; more end with `worker-full`. @default 4096 */
  readonly maxWaitingRequests?: number;
  /** Another thread program, for tests of its death. */
  readonly threadUrl?: URL;
}

/** Far more than one step takes; then the thread is ended by force. */
const STOP_TIMEOUT_MS = 30_000;
/** Sequence ids besides the running ones: as many holders, scratch, and one that an import pins. See engine-loop.ts. */
const MAX_SEQUENCES = Math.floor((MAX_SEQUENCE_IDS - 2) / 2);

type State = "new" | "starting" | "running" | "draining" | "stopping" | "dead";

interface Call {
  readonly resolve: (value: Reply) => void;
  readonly reject: (error: DynamoError) => void;
}

/** The library warns of memory for more tokens than the model's context: all sequences share it, none gets that long. */
const CELLS_NOTE = /n_ctx_seq \(\d+\) > n_ctx_train/;

export class LlamaEngine implements Engine {
  readonly #config: LlamaEngineConfig;
  readonly #logger: Logger;
  readonly #clock: Clock;
  readonly #maxWaitingRequests: number;
  readonly #threadUrl: URL;
  readonly #wakeMemory = new SharedArrayBuffer(4);
  readonly #wake = new Int32Array(this.#wakeMemory);
  readonly #loadMemory = new SharedArrayBuffer(LoadBoard.BYTES);
  readonly #board = new LoadBoard(this.#loadMemory);

  #state: State = "new";
  #sink: EngineSink | undefined = undefined;
  #thread: Worker | undefined = undefined;
  #threadGone: Promise<unknown> = Promise.resolve();
  #started: { resolve: (info: EngineInfo) => void; reject: (error: DynamoError) => void } | undefined = undefined;
  readonly #streams = new Set<number>();
  #commands: Command[] = [];
  /** Entries of streams that were refused here, told on the next turn. */
  readonly #refusals = new StepWriter();
  #flush: NodeJS.Immediate | undefined = undefined;
  readonly #calls = new Map<number, Call>();
  #callCount = 0;
  readonly #followers = new Map<number, (data: Uint8Array) => void>();
  #drained: (() => void)[] = [];
  #stopped: Promise<void> | undefined = undefined;

  constructor(config: LlamaEngineConfig, options: LlamaEngineOptions = {}) {
    checkConfig(config);
    this.#config = config;
    this.#logger = options.logger ?? silentLogger;
    this.#clock = options.clock ?? systemClock;
    this.#maxWaitingRequests = options.maxWaitingRequests ?? 4096;
    // Beside this file, as source or compiled.
    const extension = import.meta.url.endsWith(".ts") ? "ts" : "js";
    this.#threadUrl = options.threadUrl ?? new URL(`./llama-thread.${extension}`, import.meta.url);
    this.#refusals.reset();
  }

  start(sink: EngineSink, signal: AbortSignal): Promise<EngineInfo> {
    if (this.#state !== "new") return Promise.reject(new DynamoError("engine-stopped", "an engine starts only once"));
    if (signal.aborted) return Promise.reject(new DynamoError("cancelled", "the engine's start was cancelled"));
    this.#state = "starting";
    this.#sink = sink;
    const workerData: ThreadData = {
      config: this.#config,
      maxWaitingRequests: this.#maxWaitingRequests,
      wake: this.#wakeMemory,
      load: this.#loadMemory,
    };
    const thread = new Worker(this.#threadUrl, { workerData, name: "llama" });
    this.#thread = thread;
    this.#threadGone = new Promise((resolve) => thread.once("exit", resolve));
    thread.on("message", (report: Report) => this.#onReport(report));
    // Both are followed by `exit`; a thread that ends in order reports `ended` before.
    thread.on("error", (cause: Error) => this.#onEnded(threadError("the engine's thread failed", cause)));
    thread.on("exit", (code) => this.#onEnded(threadError(`the engine's thread ended with code ${code}`)));
    return new Promise((resolve, reject) => {
      this.#started = { resolve, reject };
      const cancel = (): void => {
        this.#started?.reject(new DynamoError("cancelled", "the engine's start was cancelled"));
        this.#started = undefined;
      };
      signal.addEventListener("abort", cancel, { once: true });
      void this.#threadGone.then(() => signal.removeEventListener("abort", cancel));
    });
  }

  submit(streamId: number, request: PreprocessedRequest): void {
    assert(!this.#streams.has(streamId), "a stream id is unique among live streams");
    if (this.#state !== "running" && this.#state !== "draining") {
      throw new DynamoError("engine-stopped", "the engine is not running");
    }
    this.#streams.add(streamId);
    if (this.#state === "draining") {
      this.#refuse(streamId, new DynamoError("draining", "the engine is shutting down"));
    } else if (this.#streams.size > this.#maxWaitingRequests + this.#config.maxSequences) {
      // Checked here too, because the thread may be busy with a step while many arrive.
      const text = `the engine's queue of ${this.#maxWaitingRequests} requests is full`;
      this.#refuse(streamId, new DynamoError("worker-full", text));
    } else {
      this.#post({ type: "submit", streamId, request });
    }
  }

  abort(streamId: number): void {
    if (this.#streams.has(streamId)) this.#post({ type: "abort", streamId });
  }

  load(): LoadSnapshot {
    const load = this.#board.read();
    if (this.#state === "dead") {
      return { ...load, runningRequests: 0, waitingRequests: 0, activeBlocks: 0, pendingPrefillTokens: 0 };
    }
    // Counts what is on its way to the thread, too.
    return { ...load, waitingRequests: Math.max(0, this.#streams.size - load.runningRequests) };
  }

  countBlocks(sequenceHashes: Uint32Array): Promise<number> {
    return this.#call((callId) => ({ type: "count", callId, sequenceHashes })) as Promise<number>;
  }

  readonly followBlocks = (sequenceHashes: Uint32Array, onBlocks: (data: Uint8Array) => void): (() => void) => {
    const callId = this.#callCount++;
    this.#followers.set(callId, onBlocks);
    this.#post({ type: "follow", callId, sequenceHashes });
    return () => {
      if (this.#followers.delete(callId)) this.#post({ type: "unfollow", callId });
    };
  };

  exportBlocks(sequenceHashes: Uint32Array): Promise<ExportedBlocks> {
    return this.#call((callId) => ({ type: "export", callId, sequenceHashes })) as Promise<ExportedBlocks>;
  }

  importBlocks(blocks: ImportedBlocks): Promise<number> {
    return this.#call((callId) => ({ type: "import", callId, blocks })) as Promise<number>;
  }

  readonly blockPort: BlockPort = {
    attach: (memory) => this.#post({ type: "attach", memory }),
    copyOut: (sequenceHashes, slots) =>
      this.#call((callId) => ({ type: "copy-out", callId, sequenceHashes, slots })) as Promise<Uint8Array>,
    copyIn: (blocks) => this.#call((callId) => ({ type: "copy-in", callId, blocks })) as Promise<number>,
  };

  clearBlocks(): Promise<number> {
    return this.#call((callId) => ({ type: "clear", callId })) as Promise<number>;
  }

  drain(): Promise<void> {
    if (this.#state === "running") this.#state = "draining";
    if (this.#streams.size === 0) return Promise.resolve();
    return new Promise((resolve) => this.#drained.push(resolve));
  }

  stop(): Promise<void> {
    this.#stopped ??= this.#stop();
    return this.#stopped;
  }

  async #stop(): Promise<void> {
    const thread = this.#thread;
    if (thread !== undefined && this.#state !== "dead") {
      this.#state = "stopping";
      this.#started?.reject(new DynamoError("engine-stopped", "the engine was stopped while it started"));
      this.#started = undefined;
      this.#post({ type: "stop" });
      const deadline = this.#clock.setTimer(STOP_TIMEOUT_MS, () => void thread.terminate());
      await this.#threadGone;
      deadline.cancel();
    }
    await this.#threadGone;
    this.#state = "dead";
    this.#sink = undefined;
  }

  #refuse(streamId: number, error: DynamoError): void {
    this.#refusals.errorEntry(streamId, error);
    this.#flushSoon();
  }

  #post(command: Command): void {
    this.#commands.push(command);
    this.#flushSoon();
  }

  #call(command: (callId: number) => Command): Promise<Reply> {
    if (this.#state !== "running" && this.#state !== "draining") {
      return Promise.reject(new DynamoError("engine-stopped", "the engine is not running"));
    }
    return new Promise((resolve, reject) => {
      const callId = this.#callCount++;
      this.#calls.set(callId, { resolve, reject });
      this.#post(command(callId));
    });
  }

  /** One message and one wake-up for all commands of a turn of the loop. */
  #flushSoon(): void {
    this.#flush ??= setImmediate(() => {
      this.#flush = undefined;
      if (this.#commands.length > 0) {
        this.#thread?.postMessage(this.#commands);
        this.#commands = [];
        Atomics.add(this.#wake, 0, 1);
        Atomics.notify(this.#wake, 0);
      }
      if (this.#refusals.entryCount > 0) {
        // A copy, because the sink may submit again.
        const step = new Uint8Array(this.#refusals.view());
        this.#refusals.reset();
        this.#deliver(step);
      }
    });
  }

  #onReport(report: Report): void {
    switch (report.type) {
      case "started":
        for (const { level, text } of report.log)
          if (!CELLS_NOTE.test(text)) this.#logger.warn({ level }, `libllama: ${text}`);
        if (this.#state === "starting") this.#state = "running";
        this.#started?.resolve(report.info);
        this.#started = undefined;
        return;
      case "step":
        if (report.events.length > 0) this.#sink?.onKvEvents(report.events);
        if (report.step !== undefined) this.#deliver(report.step);
        return;
      case "blocks":
        this.#followers.get(report.callId)?.(report.data);
        return;
      case "reply":
        this.#takeCall(report.callId)?.resolve(report.value);
        return;
      case "call-failed":
        this.#takeCall(report.callId)?.reject(revive(report.error));
        return;
      case "ended":
        this.#onEnded(report.error === undefined ? undefined : revive(report.error));
    }
  }

  #takeCall(callId: number): Call | undefined {
    const call = this.#calls.get(callId);
    this.#calls.delete(callId);
    return call;
  }

  /** Forgets the streams that end with this step, then passes it on. */
  #deliver(step: Uint8Array): void {
    forEachStepEntry(step, (streamId, _start, _end, final) => {
      if (final) this.#streams.delete(streamId);
    });
    this.#sink?.onStep(step);
    if (this.#streams.size > 0) return;
    for (const resolve of this.#drained) resolve();
    this.#drained = [];
  }

  /** The thread is gone or about to be. Ends everything that is left; `error` undefined when it was asked to. */
  #onEnded(error: DynamoError | undefined): void {
    if (this.#state === "dead") return;
    const wasStarting = this.#started;
    const expected = this.#state === "stopping" || this.#state === "starting";
    this.#state = "dead";
    clearImmediate(this.#flush);
    this.#flush = undefined;
    this.#commands = [];
    this.#refusals.reset();
    const stopped = new DynamoError("engine-stopped", "the engine stopped", {
      ...(error?.diagnostic === undefined ? {} : { diagnostic: error.diagnostic }),
      cause: error,
    });
    this.#started = undefined;
    wasStarting?.reject(error ?? stopped);
    const step = new StepWriter();
    step.reset();
    for (const streamId of this.#streams) step.errorEntry(streamId, stopped);
    this.#streams.clear();
    if (step.entryCount > 0) this.#sink?.onStep(step.view());
    for (const resolve of this.#drained) resolve();
    this.#drained = [];
    for (const call of this.#calls.values()) call.reject(stopped);
    this.#calls.clear();
    this.#followers.clear();
    if (error === undefined || expected) return;
    this.#logger.error({ reason: error.reason, diagnostic: error.diagnostic }, "the engine's thread died");
    this.#sink?.onFatal(error);
  }
}

function threadError(text: string, cause?: Error): DynamoError {
  if (cause === undefined) return new DynamoError("engine-failed", text);
  return new DynamoError("engine-failed", text, { diagnostic: cause.stack ?? cause.message, cause });
}

function revive(error: PlainError): DynamoError {
  return new DynamoError(error.reason, error.publicMessage, error.options);
}

function checkConfig(config: LlamaEngineConfig): void {
  const problems: string[] = [];
  const check = (field: keyof LlamaEngineConfig, min: number, max: number): void => {
    const value = config[field];
    if (typeof value === "number" && Number.isInteger(value) && value >= min && value <= max) return;
    problems.push(`${field}: expected a whole number from ${min} to ${max}, got ${value}`);
  };
  check("threads", 1, 1024);
  check("blockSizeTokens", 1, 1024);
  check("maxSequences", 1, MAX_SEQUENCES);
  check("maxBatchedTokens", config.maxSequences, 65_536);
  check("contextLength", 0, 1 << 24);
  check("kvCacheTokens", config.blockSizeTokens, 1 << 24);
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("; "));
}
