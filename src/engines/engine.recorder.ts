import assert from "node:assert/strict";
import type { DynamoError } from "../errors/index.ts";
import {
  EngineOutput,
  GREEDY,
  decodeEngineOutput,
  forEachStepEntry,
  type FinishReason,
  type KvEvent,
  type PreprocessedRequest,
  type TokenLogprob,
} from "../protocol/index.ts";
import type { Engine, EngineInfo, EngineSink } from "./base.ts";

/**
 * For tests of engines: a sink that remembers what it was told and checks on the way what holds for every engine, that
 * each stream ends once, that nothing comes inside a method call and nothing after `stop`.
 */
export interface StreamRecord {
  readonly tokens: number[];
  first: { promptTokens: number; cachedTokens: number; queueMs: number; prefillMs: number } | undefined;
  /** By `stepCount`; 0 = not yet. */
  firstAtStep: number;
  finish: FinishReason | undefined;
  finishedAtStep: number;
  error: DynamoError | undefined;
  readonly logprobs: TokenLogprob[];
  promptLogprobs: TokenLogprob[] | undefined;
}

export interface RequestOverrides {
  readonly sampling?: Partial<PreprocessedRequest["sampling"]>;
  readonly stop?: Partial<PreprocessedRequest["stop"]>;
  readonly output?: Partial<PreprocessedRequest["output"]>;
  readonly cacheNamespace?: string;
  readonly priority?: number;
  readonly resumedTokens?: number;
}

/** A greedy request of 8 tokens without stop ids, unless told otherwise. */
export function aRequest(tokenIds: Uint32Array, overrides: RequestOverrides = {}): PreprocessedRequest {
  return {
    requestId: "test",
    model: "test",
    // The engine takes the array over.
    tokenIds: tokenIds.slice(),
    sampling: { ...GREEDY, ...overrides.sampling },
    stop: { maxTokens: 8, minTokens: 0, stopTokenIds: [], ignoreEos: false, ...overrides.stop },
    output: { topLogprobs: -1, promptLogprobs: false, ...overrides.output },
    priority: overrides.priority ?? 0,
    ...(overrides.resumedTokens === undefined ? {} : { resumedTokens: overrides.resumedTokens }),
    cacheNamespace: overrides.cacheNamespace ?? "",
  };
}

/** Longer than any step of a small model on a busy machine. */
const DEADLINE_MS = 60_000;

export class EngineRecorder implements EngineSink {
  readonly engine: Engine;
  readonly streams = new Map<number, StreamRecord>();
  readonly kvEvents: KvEvent[] = [];
  /** The first promise that was broken; a sink must not throw into the engine. */
  violation: Error | undefined = undefined;
  fatal: DynamoError | undefined = undefined;
  stepCount = 0;
  #insideCall = false;
  #isStopped = false;
  #nextStreamId = 1;
  readonly #output = new EngineOutput();
  #waiters: { isDone: () => boolean; resolve: () => void }[] = [];

  constructor(engine: Engine) {
    this.engine = engine;
  }

  start(signal = new AbortController().signal): Promise<EngineInfo> {
    return this.#call(() => this.engine.start(this, signal));
  }

  /** Submits under a new id and returns it. */
  submit(request: PreprocessedRequest): number {
    const streamId = this.#nextStreamId++;
    this.streams.set(streamId, newRecord());
    this.#call(() => this.engine.submit(streamId, request));
    return streamId;
  }

  /** Submits in another way, such as a leg of a split request. */
  submitBy<T>(how: (streamId: number) => T): { readonly id: number; readonly result: T } {
    const id = this.#nextStreamId++;
    this.streams.set(id, newRecord());
    return { id, result: this.#call(() => how(id)) };
  }

  abort(streamId: number): void {
    this.#call(() => this.engine.abort(streamId));
  }

  drain(): Promise<void> {
    return this.#call(() => this.engine.drain());
  }

  async stop(): Promise<void> {
    await this.#call(() => this.engine.stop());
    this.#isStopped = true;
  }

  record(streamId: number): StreamRecord {
    const record = this.streams.get(streamId);
    assert.ok(record, `stream ${streamId} was submitted`);
    return record;
  }

  /** Submits and waits for the end. */
  async run(request: PreprocessedRequest): Promise<StreamRecord> {
    const streamId = this.submit(request);
    await this.ended([streamId]);
    return this.record(streamId);
  }

  ended(streamIds: readonly number[]): Promise<void> {
    return this.until(
      () => streamIds.every((id) => this.record(id).finish !== undefined),
      `the end of ${streamIds.length} streams`,
    );
  }

  /** Resolves when `isDone` is true after some call of the sink; rejects after the deadline. */
  async until(isDone: () => boolean, what: string): Promise<void> {
    if (!isDone()) {
      let timer: NodeJS.Timeout | undefined;
      await new Promise<void>((resolve, reject) => {
        timer = setTimeout(() => reject(new Error(`${what} did not come in ${DEADLINE_MS} ms`)), DEADLINE_MS);
        this.#waiters.push({ isDone: () => this.violation !== undefined || isDone(), resolve });
      }).finally(() => clearTimeout(timer));
    }
    this.check();
  }

  /** Throws what was found on the way. */
  check(): void {
    if (this.violation !== undefined) throw this.violation;
  }

  onStep(step: Uint8Array): void {
    this.#observe(() => {
      this.stepCount++;
      assert.ok(step.length > 0, "a step has at least one entry");
      forEachStepEntry(step, (streamId, start, end) => {
        assert.ok(end <= step.length, "entries lie inside the step");
        this.#onEntry(streamId, step, start, end);
      });
    });
  }

  onKvEvents(events: readonly KvEvent[]): void {
    this.#observe(() => {
      assert.ok(events.length > 0, "a batch of KV events has at least one");
      this.kvEvents.push(...structuredClone(events));
    });
  }

  onFatal(error: DynamoError): void {
    this.#observe(() => {
      this.fatal = error;
    });
  }

  #onEntry(streamId: number, step: Uint8Array, start: number, end: number): void {
    const record = this.record(streamId);
    assert.equal(record.finish, undefined, `stream ${streamId} got an entry after its final one`);
    const output = this.#output;
    decodeEngineOutput(step, start, end, output);
    assert.ok(
      output.tokenCount > 0 ||
        output.finish !== undefined ||
        output.promptLogprobs !== undefined ||
        output.restored !== undefined,
      "an entry says something",
    );
    if (output.hasFirst) {
      assert.equal(record.first, undefined, "FIRST comes once");
      const { promptTokens, cachedTokens, queueMs, prefillMs } = output;
      record.firstAtStep = this.stepCount;
      record.first = { promptTokens, cachedTokens, queueMs, prefillMs };
    }
    if (output.reportedCachedTokens !== undefined) {
      assert.ok(record.first, "FIRST comes before what the engine counted in the end");
      record.first = { ...record.first, cachedTokens: output.reportedCachedTokens };
    }
    if (output.tokenCount > 0) assert.ok(record.first, "FIRST comes with or before the first token");
    record.tokens.push(...output.tokenIds.subarray(0, output.tokenCount));
    record.logprobs.push(...(output.logprobs ?? []));
    record.promptLogprobs ??= output.promptLogprobs;
    record.finish = output.finish;
    if (output.finish !== undefined) record.finishedAtStep = this.stepCount;
    record.error = output.error;
  }

  #call<T>(method: () => T): T {
    this.#insideCall = true;
    try {
      return method();
    } finally {
      this.#insideCall = false;
    }
  }

  #observe(check: () => void): void {
    try {
      assert.equal(this.#insideCall, false, "a sink is never called inside a method call");
      assert.equal(this.#isStopped, false, "a sink is never called after stop resolved");
      check();
    } catch (error) {
      this.violation ??= error as Error;
    }
    const waiters = this.#waiters;
    this.#waiters = [];
    for (const waiter of waiters) {
      if (waiter.isDone()) waiter.resolve();
      else this.#waiters.push(waiter);
    }
  }
}

function newRecord(): StreamRecord {
  return {
    tokens: [],
    first: undefined,
    firstAtStep: 0,
    finish: undefined,
    finishedAtStep: 0,
    error: undefined,
    logprobs: [],
    promptLogprobs: undefined,
  };
}

/**
 * Replays the KV events of the device tier and throws at the first that cannot be true: a block stored twice, a parent that is not there, a
 * removal of what was never stored. Returns the sequence hashes (`lo,hi`) that are cached at the end.
 */
export function replayKvEvents(events: readonly KvEvent[]): Set<string> {
  const positions = new Map<string, number>();
  const keyAt = (hashes: Uint32Array, block: number): string => `${hashes[2 * block]},${hashes[2 * block + 1]}`;
  for (const event of events) {
    if (event.type !== "cleared" && event.tier !== "device") continue;
    if (event.type === "cleared") {
      positions.clear();
    } else if (event.type === "removed") {
      for (let block = 0; block < event.sequenceHashes.length / 2; block++) {
        assert.ok(positions.delete(keyAt(event.sequenceHashes, block)), "only stored blocks are removed");
      }
    } else {
      assert.equal(event.sequenceHashes.length, event.localHashes.length, "each block has both hashes");
      if (event.parentHash === undefined) {
        assert.equal(event.startBlock, 0, "only the root has no parent");
      } else {
        const position = positions.get(`${event.parentHash[0]},${event.parentHash[1]}`);
        assert.equal(position, event.startBlock - 1, "the parent is stored, one position before");
      }
      for (let block = 0; block < event.sequenceHashes.length / 2; block++) {
        const key = keyAt(event.sequenceHashes, block);
        assert.ok(!positions.has(key), "a block is stored once");
        positions.set(key, event.startBlock + block);
      }
    }
  }
  return new Set(positions.keys());
}
