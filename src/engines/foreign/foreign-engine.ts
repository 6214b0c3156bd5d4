import assert from "node:assert/strict";
import { DynamoError, toDynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import { StepWriter, type KvEvent, type LoadSnapshot, type PreprocessedRequest } from "../../protocol/index.ts";
import type { Clock } from "../../std/index.ts";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";
import type {
  Engine,
  EngineInfo,
  EngineProcessState,
  EngineSink,
  EngineTransfer,
  ExportedBlocks,
  ImportedBlocks,
} from "../base.ts";
import type { CacheEstimate, DialectCall, EngineDialect, EngineFacts } from "./answer.ts";
import type { AnswerHeaders, EngineHttp, HttpCall, OpenCall } from "./engine-http.ts";
import type { EngineExit } from "./engine-process.ts";
import type { EngineServer } from "./engine-server.ts";
import { EstimatedCache } from "./estimated-cache.ts";
import { ForeignStream, type TransferLeg } from "./foreign-stream.ts";
import { ForeignTransfer } from "./foreign-transfer.ts";
import type { KvFeed } from "./kv-feed.ts";
import { LoadPoller } from "./load-poller.ts";
import { MirroredBlocks } from "./mirrored-blocks.ts";
import { SseReader } from "./sse-reader.ts";

/**
 * An engine that is a process of its own, spoken to over HTTP: the engine contract over a dialect (what its requests,
 * answers and metrics look like), a feed of its KV events, and, when it is ours, its server.
 *
 *     new -> starting -> up <-> down -> stopped
 *                         down: it crashed, hangs or was restarted by somebody; its streams ended with `engine-stopped`,
 *                         so that they go on elsewhere; when it answers again it is probed anew, and is up
 *
 * One event loop turn is one step: whatever the answers of all streams brought in it becomes one `onStep`.
 */
export interface ForeignEngineOptions {
  readonly dialect: EngineDialect;
  readonly http: EngineHttp;
  /** Undefined for an engine that somebody else runs. */
  readonly server?: EngineServer;
  readonly feed: KvFeed | undefined;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly vocabularySize: number;
  readonly startTimeoutMs: number;
  readonly metricsIntervalMs?: number | undefined;
  readonly metricsMaxAgeMs?: number | undefined;
  readonly hangTimeoutMs?: number | undefined;
  /** Ports and files that were taken for it. */
  readonly onStopped?: () => void;
}

type State = "new" | "starting" | "up" | "down" | "stopped";

const POLL_START_MS = 200;
const PROGRESS_MS = 10_000;
const METRICS_INTERVAL_MS = 1_000;
const SCRAPE_TIMEOUT_MS = 5_000;
const HANG_TIMEOUT_MS = 30_000;
/** Starts in a row that fail after it had served once. */
const MAX_FAILED_RESTARTS = 3;

export class ForeignEngine implements Engine {
  readonly #options: ForeignEngineOptions;
  readonly #poller: LoadPoller;
  readonly #writer = new StepWriter();
  readonly #streams = new Map<number, ForeignStream>();
  #dirty: ForeignStream[] = [];
  #isFlushDue = false;
  #state: State = "new";
  #isDraining = false;
  #sink: EngineSink | undefined;
  #facts: EngineFacts | undefined;
  #info: EngineInfo | undefined;
  #mirrors: MirroredBlocks[] = [];
  /** In place of a feed. */
  #estimates: CacheEstimate[] = [];
  #whenIdle: (() => void)[] = [];
  #stopping: Promise<void> | undefined;
  readonly #stopSignal = new AbortController();
  /** Exit of the life that is being brought up. */
  #exit: EngineExit | undefined;
  #failedRestarts = 0;
  #downSinceMs = 0;
  #downReason: string | undefined;
  #lastAnswerMs = 0;
  /** By its scrapes. */
  #life: number | undefined;
  #feedLives: number | undefined;

  #steps = 0;
  #generatedTokens = 0;
  #promptTokens = 0;
  #cachedPromptTokens = 0;
  /** Most streams, and blocks of theirs, since the scrape before the newest: what of a scrape is ours at most. */
  #peakStreams = 0;
  #othersStreams = 0;
  #othersBlocks = 0;
  readonly #transfer: ForeignTransfer | undefined;
  readonly counts = { unpredicted: 0, restarts: 0, downs: 0, hangs: 0 };

  constructor(options: ForeignEngineOptions) {
    this.#options = options;
    this.#transfer =
      options.dialect.transfer === undefined
        ? undefined
        : new ForeignTransfer({
            dialect: options.dialect.transfer,
            facts: () => this.#facts!,
            submit: (id, request, leg) => this.#submit(id, request, leg),
          });
    const { dialect, http, clock, logger, metricsIntervalMs = METRICS_INTERVAL_MS } = options;
    this.#poller = new LoadPoller({
      dialect,
      http,
      clock,
      logger,
      intervalMs: metricsIntervalMs,
      maxAgeMs: options.metricsMaxAgeMs ?? 5 * metricsIntervalMs + SCRAPE_TIMEOUT_MS,
      timeoutMs: Math.min(SCRAPE_TIMEOUT_MS, options.hangTimeoutMs ?? HANG_TIMEOUT_MS),
      onScrape: () => this.#onScrape(),
      onMiss: (isGone) => this.#onMiss(isGone),
      isBusy: () => this.#streams.size > 0,
    });
  }

  // ---- Engine ----

  async start(sink: EngineSink, signal: AbortSignal): Promise<EngineInfo> {
    if (signal.aborted) throw new DynamoError("cancelled", "the engine's start was cancelled");
    if (this.#state !== "new") throw new DynamoError("engine-stopped", "an engine starts only once");
    this.#state = "starting";
    this.#sink = sink;
    const { server, feed } = this.#options;
    server?.start();
    const facts = await this.#untilUp(AbortSignal.any([signal, this.#stopSignal.signal]));
    for (let dpRank = 0; dpRank < facts.dataParallelSize; dpRank++) {
      this.#mirrors.push(new MirroredBlocks());
      if (feed === undefined) this.#estimates.push(this.#newEstimate(facts, dpRank));
    }
    await feed?.open({
      blockSizeTokens: facts.blockSizeTokens,
      dataParallelSize: facts.dataParallelSize,
      blockHashAlgorithm: facts.blockHashAlgorithm,
      onEvents: (events) => this.#onKvEvents(events),
    });
    this.#assertNotStopped();
    return this.#isUp(facts);
  }

  #newEstimate(facts: EngineFacts, dpRank: number): CacheEstimate {
    const { blockSizeTokens, totalBlocks } = facts;
    return (
      this.#options.dialect.estimate?.(facts, dpRank) ?? new EstimatedCache({ blockSizeTokens, totalBlocks, dpRank })
    );
  }

  get transfer(): EngineTransfer | undefined {
    return this.#transfer;
  }

  submit(streamId: number, request: PreprocessedRequest): void {
    this.#submit(streamId, request, undefined);
  }

  #submit(streamId: number, request: PreprocessedRequest, leg: TransferLeg | undefined): void {
    if (this.#state === "new" || this.#state === "starting" || this.#state === "stopped") {
      throw new DynamoError("engine-stopped", "the engine is not running");
    }
    assert(!this.#streams.has(streamId), "a stream id is unique among live streams");
    const facts = this.#facts!;
    const stream = new ForeignStream({
      id: streamId,
      request,
      nowMs: this.#options.clock.monotonicMs(),
      contextLength: facts.contextLength,
      predictedCachedTokens: this.#predict(request, facts),
      isText: facts.tokens === "estimated",
      keepsTokens: this.#estimates.length > 0,
      leg,
      onDirty: (dirty) => this.#onDirty(dirty),
    });
    this.#streams.set(streamId, stream);
    this.#peakStreams = Math.max(this.#peakStreams, this.#streams.size);
    const refusal = this.#refusal(request, facts, leg === undefined);
    if (refusal !== undefined) stream.fail(refusal);
    else this.#open(stream, facts);
  }

  abort(streamId: number): void {
    const stream = this.#streams.get(streamId);
    if (stream === undefined) return;
    // Closing the connection is how the engine is told; it frees the request's blocks with its next step.
    stream.call?.abort();
    stream.cancel();
  }

  load(): LoadSnapshot {
    const scraped = this.#poller.load;
    const totalBlocks = this.#totalBlocks();
    const own = this.#streams.size;
    const others = scraped === undefined ? 0 : this.#othersStreams;
    const waitingRequests = Math.min(own + others, scraped?.waitingRequests ?? 0);
    const activeBlocks = Math.min(
      totalBlocks,
      this.#ownBlocks() + (scraped === undefined || others === 0 ? 0 : this.#othersBlocks),
    );
    const known = this.#mirrors.reduce((sum, mirror) => sum + mirror.deviceBlockCount, 0);
    return {
      runningRequests: own + others - waitingRequests,
      waitingRequests,
      activeBlocks,
      cachedBlocks: Math.max(0, Math.min(known, totalBlocks) - activeBlocks),
      totalBlocks,
      pendingPrefillTokens: this.#pendingPrefillTokens(),
      steps: this.#steps + (scraped?.steps ?? 0),
      generatedTokens: this.#generatedTokens,
      promptTokens: this.#promptTokens,
      cachedPromptTokens: this.#cachedPromptTokens,
      preemptions: scraped?.preemptions ?? 0,
    };
  }

  countBlocks(sequenceHashes: Uint32Array): Promise<number> {
    return Promise.resolve(this.#mirrors.length === 0 ? 0 : this.#mirrors[0]!.countLeading(sequenceHashes));
  }

  exportBlocks(_sequenceHashes: Uint32Array): Promise<ExportedBlocks> {
    return Promise.reject(this.#unsupported("export blocks"));
  }

  importBlocks(_blocks: ImportedBlocks): Promise<number> {
    return Promise.reject(this.#unsupported("import blocks"));
  }

  async clearBlocks(): Promise<number> {
    if (this.#state !== "up") return 0;
    const { dialect, http, feed } = this.#options;
    const count = (): number => this.#mirrors.reduce((sum, mirror) => sum + mirror.deviceBlockCount, 0);
    if (!(await dialect.clearCache(http))) return 0;
    const before = count();
    await feed?.cleared();
    if (feed === undefined) this.#forgetBlocks();
    return before;
  }

  drain(): Promise<void> {
    if (this.#state === "new" || this.#state === "stopped") return Promise.resolve();
    this.#isDraining = true;
    if (this.#streams.size === 0) return Promise.resolve();
    return new Promise((resolve) => this.#whenIdle.push(resolve));
  }

  stop(): Promise<void> {
    this.#stopping ??= this.#stop();
    return this.#stopping;
  }

  processState(): EngineProcessState {
    return {
      isUp: this.#state === "up",
      restarts: this.counts.restarts,
      metricsAgeSeconds: this.#poller.ageMs / 1_000,
      mispredictedRequests: this.counts.unpredicted,
      isKvWhole: this.#options.feed?.isWhole ?? false,
      hashMismatches: this.#options.feed?.hashMismatches ?? 0,
    };
  }

  describe(): Readonly<Record<string, unknown>> {
    const { dialect, http, server, feed } = this.#options;
    const ageMs = this.#poller.ageMs;
    return {
      engine: dialect.name,
      version: this.#facts?.engineVersion ?? null,
      url: http.url,
      mode: server === undefined ? "attached" : "supervised",
      state: this.#state,
      ...(this.#downReason === undefined ? {} : { down_reason: this.#downReason }),
      ...this.counts,
      metrics: {
        age_seconds: Number.isFinite(ageMs) ? Number((ageMs / 1_000).toFixed(1)) : null,
        stale: this.#poller.isStale,
        scrapes: this.#poller.scrapes,
        misses: this.#poller.misses,
      },
      kv_events: feed === undefined ? null : { whole: feed.isWhole, ...feed.describe() },
      server: server === undefined ? null : server.describe(),
    };
  }

  ownMetrics(): string {
    return this.#poller.ownMetrics();
  }

  searchLog(text: string, limit: number): readonly string[] {
    return this.#options.server?.log.search(text, limit) ?? [];
  }

  /** The engine's server ended. */
  onServerExit(exit: EngineExit): void {
    this.#exit = exit;
    if (this.#state === "up") this.#goDown(exit.text);
  }

  // ---- Up and down ----

  /** Waits until the server serves, and asks it what it is. */
  async #untilUp(signal: AbortSignal): Promise<EngineFacts> {
    const { dialect, http, server, clock, logger, startTimeoutMs } = this.#options;
    const startMs = clock.monotonicMs();
    let saidMs = startMs;
    this.#exit = undefined;
    for (;;) {
      if (signal.aborted) throw new DynamoError("cancelled", "the engine's start was cancelled");
      this.#throwIfExited();
      if (await this.#asksUp(signal)) break;
      const nowMs = clock.monotonicMs();
      if (nowMs - startMs >= startTimeoutMs) throw this.#startTimeout(startTimeoutMs);
      if (nowMs - saidMs >= PROGRESS_MS) {
        saidMs = nowMs;
        logger.info(server?.progress() ?? { url: http.url }, `waiting for ${dialect.name}`);
      }
      await pause(clock, POLL_START_MS, signal);
    }
    try {
      const facts = await dialect.probe(http, signal);
      server?.serves();
      return facts;
    } catch (thrown) {
      this.#throwIfExited();
      throw thrown;
    }
  }

  async #asksUp(signal: AbortSignal): Promise<boolean> {
    const { dialect, http, server } = this.#options;
    try {
      return await dialect.isUp(http, signal);
    } catch (thrown) {
      const error = toDynamoError(thrown, "worker-unreachable");
      // Ours is still on its way; one that should run already is not there.
      if (server !== undefined || this.#state === "down") return false;
      if (error.reason === "cancelled" || error.reason === "invalid-config") throw error;
      throw new DynamoError(
        "worker-unreachable",
        `no ${dialect.name} answers at ${http.url}; start it first, or correct --engine-url`,
        { diagnostic: error.diagnostic ?? error.publicMessage, cause: error },
      );
    }
  }

  #throwIfExited(): void {
    const { server } = this.#options;
    if (this.#exit === undefined || server === undefined) return;
    const { isMissing, text } = this.#exit;
    const hint = isMissing ? " (install it, or say where it is with --engine-command)" : " before it served";
    throw server.failure(`${text}${hint}`);
  }

  #startTimeout(startTimeoutMs: number): DynamoError {
    const { server, dialect, http } = this.#options;
    const text = `did not serve within ${startTimeoutMs / 1_000} s; raise --engine-start-timeout-secs if it only needs longer`;
    return server?.failure(text) ?? new DynamoError("worker-unreachable", `${dialect.name} at ${http.url} ${text}`);
  }

  #isUp(facts: EngineFacts): EngineInfo {
    const { dialect, feed, logger, clock } = this.#options;
    this.#facts = facts;
    this.#life = facts.life;
    this.#feedLives = feed?.lives;
    this.#state = "up";
    this.#downReason = undefined;
    this.#failedRestarts = 0;
    this.#lastAnswerMs = clock.monotonicMs();
    for (const note of facts.notes) logger.info(`${dialect.name}: ${note}`);
    this.#info = {
      engine: dialect.name,
      engineVersion: facts.engineVersion,
      contextLength: facts.contextLength,
      blockSizeTokens: facts.blockSizeTokens,
      totalBlocks: facts.totalBlocks,
      maxSequences: facts.maxSequences,
      maxBatchedTokens: facts.maxBatchedTokens,
      dataParallelSize: facts.dataParallelSize,
      vocabularySize: this.#options.vocabularySize,
      blockBytes: 0,
      answerForms: facts.answerForms,
      kvEvents: feed === undefined ? "estimated" : "exact",
      ...(facts.lacks === undefined ? {} : { lacks: facts.lacks }),
      ...(facts.tokens === undefined ? {} : { tokens: facts.tokens }),
      ...(dialect.transfer === undefined ? {} : { kvConnector: dialect.transfer.connector }),
    };
    this.#poller.start();
    return this.#info;
  }

  /** Gone, or as good as: its streams go on elsewhere, and its cache is lost. */
  #goDown(why: string): void {
    if (this.#state !== "up") return;
    const { dialect, server, logger, clock } = this.#options;
    this.#state = "down";
    this.#downSinceMs = clock.monotonicMs();
    this.#downReason = why;
    this.counts.downs++;
    this.#poller.stop();
    const error = new DynamoError("engine-stopped", `the engine ${why}`, {
      diagnostic: `${dialect.name} at ${this.#options.http.url}${server === undefined ? "" : `; its last lines: ${server.log.tail(5).join(" | ")}`}`,
    });
    const next = server === undefined ? "start it again there: this worker waits for it" : "it is started again";
    logger.error(
      { diagnostic: error.diagnostic, streams: this.#streams.size },
      `${dialect.name} ${why}; ${next}, and its requests go elsewhere`,
    );
    this.#failAll(error);
    this.#forgetBlocks();
    this.#sink?.onUnavailable?.(error);
    void this.#recover();
  }

  async #recover(): Promise<void> {
    const { server, logger, dialect, clock } = this.#options;
    const signal = this.#stopSignal.signal;
    for (;;) {
      try {
        if (server !== undefined && !server.isRunning) {
          const started = Promise.withResolvers<void>();
          const pauseMs = server.restartLater(started.resolve);
          logger.warn(`${dialect.name} is started again in ${pauseMs / 1_000} s`);
          signal.addEventListener("abort", () => started.resolve(), { once: true });
          await started.promise;
          this.counts.restarts++;
        }
        const facts = await this.#untilUp(signal);
        if (signal.aborted) return;
        this.#checkSame(facts);
        const seconds = Number(((clock.monotonicMs() - this.#downSinceMs) / 1_000).toFixed(1));
        const info = this.#isUp(facts);
        logger.info({ seconds }, `${dialect.name} is back`);
        this.#sink?.onAvailable?.(info);
        return;
      } catch (thrown) {
        if (signal.aborted) return;
        const error = toDynamoError(thrown, "engine-failed");
        if (error.reason === "invalid-config" || ++this.#failedRestarts >= MAX_FAILED_RESTARTS) {
          this.#sink?.onFatal(error);
          return;
        }
        logger.error({ reason: error.reason, diagnostic: error.diagnostic }, error.publicMessage);
        if (server !== undefined && server.isRunning) server.kill();
        else await pause(clock, METRICS_INTERVAL_MS, signal);
      }
    }
  }

  /** What a worker has told about its engine and cannot take back while it runs. */
  #checkSame(facts: EngineFacts): void {
    const before = this.#facts!;
    for (const [field, text] of [
      ["servedModel", "model"],
      ["blockSizeTokens", "KV block size"],
      ["dataParallelSize", "data-parallel size"],
    ] as const) {
      if (facts[field] === before[field]) continue;
      throw new DynamoError(
        "invalid-config",
        `the engine at ${this.#options.http.url} came back with another ${text} (${facts[field]}, was ${before[field]}); start the worker again`,
      );
    }
  }

  /** Of all ranks. */
  #totalBlocks(): number {
    return this.#facts === undefined ? 0 : this.#facts.totalBlocks * this.#facts.dataParallelSize;
  }

  #onScrape(): void {
    const { clock, dialect, feed } = this.#options;
    const scraped = this.#poller.load;
    this.#lastAnswerMs = clock.monotonicMs();
    if (scraped === undefined) return;
    this.#transfer?.onScrape(this.#poller.text);
    // Quicker than we look: its port was never seen closed.
    const isOther = this.#life !== undefined && scraped.life !== this.#life;
    if (isOther || (dialect.isLifeInEvents === true && feed?.lives !== this.#feedLives)) {
      return this.#goDown("was restarted by somebody");
    }
    this.#life = scraped.life;
    const all = scraped.runningRequests + scraped.waitingRequests;
    this.#othersStreams = Math.max(0, all - this.#peakStreams);
    const usedBlocks = Math.round((scraped.kvUsage ?? 0) * this.#totalBlocks());
    this.#othersBlocks = Math.max(0, usedBlocks - this.#ownBlocks());
    this.#peakStreams = this.#streams.size;
  }

  #onMiss(isGone: boolean): void {
    if (this.#state !== "up") return;
    const { server, clock, hangTimeoutMs = HANG_TIMEOUT_MS } = this.#options;
    // A server of ours tells by its exit.
    if (isGone && server === undefined) return this.#goDown("is gone: nobody listens at its address");
    const silentMs = clock.monotonicMs() - this.#lastAnswerMs;
    if (silentMs < hangTimeoutMs) return;
    this.counts.hangs++;
    this.#goDown(`hangs: no answer to anything for ${Math.round(silentMs / 1_000)} s`);
    server?.kill();
  }

  // ---- Streams ----

  #refusal(request: PreprocessedRequest, facts: EngineFacts, isWhole: boolean): DynamoError | undefined {
    if (this.#isDraining) return new DynamoError("draining", "the engine is shutting down");
    if (this.#state !== "up") {
      return new DynamoError("engine-stopped", `the engine ${this.#downReason ?? "is not there"} and is coming back`);
    }
    const { tokenIds } = request;
    if (tokenIds.length >= facts.contextLength) {
      return new DynamoError(
        "context-length",
        `the model's context is ${facts.contextLength} tokens, the prompt has ${tokenIds.length}`,
      );
    }
    if (request.answerForm !== undefined && (request.resumedTokens ?? 0) > 0) {
      // Its grammar would begin anew in the middle of the answer.
      return new DynamoError("unsupported-operation", "an answer that must have a form cannot be carried on elsewhere");
    }
    // Some engines do not look: one such id ends vLLM's worker process, and the server with it.
    const { vocabularySize } = this.#options;
    const strange = tokenIds.find((id) => id >= vocabularySize);
    if (strange === undefined) return this.#options.dialect.refusal?.(request, facts, isWhole);
    return new DynamoError("invalid-field", `expected token ids below ${vocabularySize}, got ${strange}`, {
      param: "prompt",
    });
  }

  #open(stream: ForeignStream, facts: EngineFacts): void {
    const { dialect, http } = this.#options;
    const { request } = stream;
    const { leg } = stream;
    const reader = dialect.read(request, facts, stream, leg?.kind === "prefill");
    const call = this.#callOf(request, facts, leg);
    this.#promptTokens += stream.promptTokens;
    let status = 0;
    let headers: AnswerHeaders = {};
    let body = "";
    const events = new SseReader((data) => {
      if (data === "[DONE]") reader.done?.();
      else reader.event(data);
    });
    const guarded = (run: () => void): void => {
      try {
        run();
      } catch (thrown) {
        stream.call?.abort();
        stream.fail(malformed(dialect.name, thrown));
      }
    };
    const send = (isRetry: boolean): void => {
      const open = http.open(call, {
        onStatus: (code, fields) => {
          status = code;
          headers = fields;
        },
        onBytes: (bytes) => {
          this.#lastAnswerMs = this.#options.clock.monotonicMs();
          if (status === 200 && call.isStream) guarded(() => events.push(bytes));
          else if (body.length < MAX_BODY_CHARS) body += bytes.toString("utf8");
        },
        onEnd: () =>
          guarded(() => {
            if (status !== 200) return stream.fail(dialect.errorOf(status, body, headers));
            if (call.isStream) events.end();
            else reader.whole(body);
            stream.over();
          }),
        onError: (error) => {
          // A kept connection that the server closed just then: the request has not been seen, or not been answered.
          // What another engine holds for it must not be asked for twice.
          if (status === 0 && !isRetry && leg === undefined && this.#state === "up") return send(true);
          stream.fail(
            new DynamoError("engine-stopped", "the connection to the engine broke", {
              diagnostic: error.message,
              cause: error,
            }),
          );
          this.#poller.hurry();
        },
      });
      stream.call = call.abortCall === undefined ? open : abortedTwice(open, http, call.abortCall);
    };
    send(false);
  }

  #callOf(request: PreprocessedRequest, facts: EngineFacts, leg: TransferLeg | undefined): DialectCall {
    const { dialect } = this.#options;
    if (leg === undefined) return dialect.call(request, facts);
    return leg.kind === "prefill"
      ? dialect.transfer!.prefillCall(request, facts, leg.requestId)
      : dialect.transfer!.decodeCall(request, facts, leg.ticket);
  }

  #onDirty(stream: ForeignStream): void {
    this.#dirty.push(stream);
    this.#flushLater();
  }

  #flushLater(): void {
    if (this.#isFlushDue) return;
    this.#isFlushDue = true;
    this.#options.clock.nextTurn(() => this.#flush());
  }

  #flush(): void {
    this.#isFlushDue = false;
    const sink = this.#sink;
    if (sink === undefined || this.#state === "stopped") return;
    this.#writeDirty();
    if (this.#writer.entryCount > 0) {
      this.#steps++;
      sink.onStep(this.#writer.view());
      this.#transfer?.dropTickets();
    }
    this.#settleIdle();
  }

  #writeDirty(): void {
    const nowMs = this.#options.clock.monotonicMs();
    const dirty = this.#dirty;
    this.#dirty = [];
    this.#writer.reset();
    for (const stream of dirty) {
      const isFirst = stream.firstTokenMs < 0;
      stream.write(this.#writer, nowMs);
      if (isFirst && stream.firstTokenMs >= 0) this.#estimate(stream);
      if (!stream.isEnded) continue;
      this.#estimate(stream);
      this.#streams.delete(stream.id);
      this.#transfer?.ended(stream);
      this.#generatedTokens += stream.newTokens;
      this.#cachedPromptTokens += stream.cachedTokens;
      if (stream.leg?.kind !== "decode" && stream.cachedTokens !== stream.predictedCachedTokens)
        this.counts.unpredicted++;
    }
  }

  #settleIdle(): void {
    if (this.#streams.size > 0) return;
    for (const resolve of this.#whenIdle.splice(0)) resolve();
  }

  #failAll(error: DynamoError): void {
    for (const stream of this.#streams.values()) {
      stream.call?.abort();
      stream.fail(error);
    }
  }

  async #stop(): Promise<void> {
    const { clock, http, server, feed, onStopped } = this.#options;
    this.#stopSignal.abort();
    this.#poller.stop();
    feed?.close();
    this.#failAll(new DynamoError("engine-stopped", "the engine was stopped"));
    // The last entries, too, come outside of any method call.
    await new Promise<void>((resolve) => clock.nextTurn(resolve));
    const sink = this.#sink;
    if (sink !== undefined) {
      this.#writeDirty();
      if (this.#writer.entryCount > 0) sink.onStep(this.#writer.view());
      this.#forgetBlocks();
    }
    this.#sink = undefined;
    this.#state = "stopped";
    this.#settleIdle();
    await Promise.all([http.close(), server?.stop()]);
    onStopped?.();
  }

  // ---- Blocks and load ----

  #onKvEvents(events: readonly KvEvent[]): void {
    if (this.#sink === undefined || this.#state === "stopped") return;
    const changed: KvEvent[] = [];
    for (const event of events) {
      const mirror = this.#mirrors[event.dpRank];
      if (mirror !== undefined) changed.push(...mirror.apply([event]));
    }
    if (changed.length > 0) this.#sink.onKvEvents(changed);
  }

  /** Of an engine without events: its prompt, and at the end its answer, are taken to be in the cache. */
  #estimate({ request, keptTokens = [], isEnded, firstTokenMs, slotId }: ForeignStream): void {
    const estimate = this.#estimates[request.dpRank ?? 0];
    if (estimate === undefined || firstTokenMs < 0) return;
    // The last token was sampled, not computed.
    const answer = isEnded ? keptTokens.slice(0, -1) : [];
    const tokenIds = Uint32Array.from([...request.tokenIds, ...answer]);
    this.#onKvEvents(estimate.computed(tokenIds, request.cacheNamespace, slotId));
  }

  #forgetBlocks(): void {
    for (const estimate of this.#estimates) estimate.clear();
    const events: KvEvent[] = [];
    for (const [dpRank, mirror] of this.#mirrors.entries()) {
      if (mirror.deviceBlockCount > 0) events.push(...mirror.apply([{ type: "cleared", dpRank }]));
    }
    if (events.length > 0) this.#sink?.onKvEvents(events);
  }

  /** What the engine will find in its cache, as far as it has told; the last token is always computed. */
  #predict(request: PreprocessedRequest, facts: EngineFacts): number {
    const mirror = this.#mirrors[request.dpRank ?? 0];
    const { tokenIds, output, cacheNamespace } = request;
    if (mirror === undefined || mirror.deviceBlockCount === 0 || output.promptLogprobs) return 0;
    const blockSize = facts.blockSizeTokens;
    const maxBlocks = Math.floor((tokenIds.length - 1) / blockSize);
    if (maxBlocks <= 0) return 0;
    const seed = blockHashSeed({ cacheNamespace, loraName: request.loraName ?? "" });
    const { sequenceHashes } = hashBlocks(tokenIds.subarray(0, maxBlocks * blockSize), blockSize, seed);
    return mirror.countLeading(sequenceHashes) * blockSize;
  }

  #ownBlocks(): number {
    const blockSize = this.#facts?.blockSizeTokens ?? 1;
    let blocks = 0;
    for (const { request, newTokens, firstTokenMs } of this.#streams.values()) {
      if (firstTokenMs >= 0) blocks += Math.ceil((request.tokenIds.length + newTokens) / blockSize);
    }
    return blocks;
  }

  #pendingPrefillTokens(): number {
    let tokens = 0;
    for (const { request, firstTokenMs, predictedCachedTokens } of this.#streams.values()) {
      if (firstTokenMs < 0) tokens += request.tokenIds.length - predictedCachedTokens;
    }
    return tokens;
  }

  #assertNotStopped(): void {
    if (this.#stopSignal.signal.aborted) throw new DynamoError("cancelled", "the engine was stopped while it started");
  }

  #unsupported(operation: string): DynamoError {
    return new DynamoError("unsupported-operation", `a ${this.#options.dialect.name} server cannot ${operation}`);
  }
}

/** A whole answer with the logprobs of a long prompt. */
const MAX_BODY_CHARS = 256 * 1024 * 1024;

/** Closes the connection, and says so: whether the words arrive does not matter then. */
function abortedTwice(open: OpenCall, http: EngineHttp, words: HttpCall): OpenCall {
  const ignore = (): void => undefined;
  return {
    abort: () => {
      open.abort();
      http.open(words, { onStatus: ignore, onBytes: ignore, onEnd: ignore, onError: ignore });
    },
  };
}

function malformed(name: string, cause: unknown): DynamoError {
  return new DynamoError("malformed-frame", `the answer of ${name} could not be read`, {
    diagnostic: String(cause),
    cause,
  });
}

function pause(clock: Clock, delayMs: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) return resolve();
    const done = (): void => {
      timer.cancel();
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = clock.setTimer(delayMs, done);
    signal.addEventListener("abort", done, { once: true });
  });
}
