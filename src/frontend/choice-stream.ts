import assert from "node:assert/strict";
import { DynamoError, toDynamoError, type Reason } from "../errors/index.ts";
import {
  EngineOutput,
  decodeEngineOutput,
  encodeRequest,
  type FinishReason,
  type OfferedHandoff,
  type PreprocessedRequest,
  type PullResult,
  featuresOf,
  lackOf,
  type EngineFeature,
} from "../protocol/index.ts";
import {
  DECODE_STAGE_OVERRIDES,
  isWorkerFault,
  type PoolOutlook,
  type RouteRequest,
  type RoutingDecision,
  type WaitingRoute,
} from "../router/index.ts";
import { FIRST_BACK_OFF_MS, type StreamEnd } from "../runtime/request-plane/index.ts";
import { Attempt, type AttemptOwner } from "./attempt.ts";
import { ChoiceTrace } from "./choice-trace.ts";
import type { GenerationRun } from "./generation-run.ts";
import { LogprobCollector } from "./logprob-collector.ts";
import { Detokenizer, StopMatcher } from "./postprocess/index.ts";
import type { RoutingHints } from "./routing-hints.ts";
import { SplitStage } from "./split-stage.ts";

/**
 * One choice of a request: routed to a worker, its items turned into text, written once per loop turn. Items only
 * collect token ids; detokenizing, stop matching and writing happen at the end of the turn, so that a stream that is
 * behind makes one larger write instead of many.
 *
 * A worker that dies, hangs or refuses ends an attempt, not the choice: the next worker gets the prompt and the tokens so
 * far and goes on behind them (docs/design/migration.md). All that has text (detokenizer, stop strings, logprobs, the
 * client's stream) lives here and does not notice. Cost: four bytes per token kept.
 *
 * Where there are prefill workers, an answer may begin on one of them and go on with a decode worker, which fetches the
 * prompt's blocks: a planned migration, with the same exactly-once rule (docs/design/disaggregation.md, split-stage.ts).
 *
 *     tokens   [ written to the client ........ | of this turn ]   count
 *     exactly once per position: an attempt begins at `count`, and no item of an earlier one is taken after that
 */

/** Shared: a payload is decoded and used before the next one is looked at. */
const OUTPUT = new EngineOutput();
/** A worker that is full is not to blame and costs no migration, but a request does not ask all of a large pool. */
const MAX_REFUSALS = 3;
const REFUSALS: ReadonlySet<Reason> = new Set<Reason>(["worker-full", "stream-limit"]);
/** Reasons another worker may not have, besides those of a broken worker. */
const ENGINE_FAILED: Reason = "engine-failed";
/** A network breaks connections of workers that are well: such a worker may be asked once more. */
const CONNECTION_FAULTS: ReadonlySet<Reason> = new Set<Reason>([
  "worker-lost",
  "worker-unreachable",
  "connect-timeout",
]);
/** What the router says when all that this choice has not tried are gone or busy. */
const NOBODY_UNTRIED: ReadonlySet<Reason> = new Set<Reason>(["no-workers", "worker-full"]);
/** This request's, perhaps no fault of the worker: it may only have too much to do. */
const STAGE_LIMITS: ReadonlySet<Reason> = new Set<Reason>(["first-token-timeout", "stream-idle-timeout"]);
/** Above this many unread bytes at the client, the worker gets no new credit for the stream. */
export const CREDIT_PAUSE_BYTES = 64 * 1024;
/** Every so many tokens of an answer the time of a step is noted. */
const STEP_SAMPLE_TOKENS = 8;
/**
 * What a worker may send ahead of its client. A token takes about 12 bytes on the request plane and up to 300 as an event
 * of the client's stream: with the plane's own 256 KiB a client that stopped reading would be cut off, not waited for.
 */
const WINDOW_BYTES = 8 * 1024;

export interface ChoiceOptions {
  readonly stops: readonly string[];
  readonly hints: RoutingHints;
  /** The first choice of the same prompt: its blocks are hashed once for all of them. */
  readonly sibling: ChoiceStream | undefined;
}

export class ChoiceStream implements AttemptOwner {
  readonly index: number;
  readonly #run: GenerationRun;
  readonly #request: PreprocessedRequest;
  readonly #detokenizer: Detokenizer;
  readonly #stop: StopMatcher;
  readonly #logprobs: LogprobCollector | undefined;
  readonly #excluded = new Set<string>();
  readonly #features: readonly EngineFeature[];
  /** Some of its tokens were made of text by a worker (`tokens: estimated` of its card). */
  isEstimated = false;
  /** Excluded over a broken connection, oldest first. Each comes back once, when nobody untried is left. */
  readonly #secondChances: { readonly instanceId: string; readonly fromMs: number }[] = [];
  readonly #triedAgain = new Set<string>();
  /** Of the prompt; it remembers the prompt's hashes. */
  readonly #promptRoute: RouteRequest;
  /** In the router's queue. */
  #waiting: WaitingRoute | undefined;
  #attempt: Attempt | undefined;
  readonly #sibling: ChoiceStream | undefined;
  /** undefined: no traces are exported. */
  readonly #trace: ChoiceTrace | undefined;
  #refusals = 0;
  #refusal: DynamoError | undefined;
  #hasEngineFailed = false;
  /** A worker that had it is gone: what comes now is a continuation, even of no token. */
  #hasLostWorker = false;
  /** Why the last attempt ended, and when: -1 = no migration under way. */
  #lastFailure: DynamoError | undefined;
  #migratingSinceMs = -1;
  #tokens = new Uint32Array(16);
  #count = 0;
  #written = 0;
  #finish: FinishReason | undefined;
  #ended = false;
  instanceId = "";
  migrations = 0;
  tokenCount = 0;
  cachedTokens = 0;
  queueMs = 0;
  prefillMs = 0;
  decodeMs = 0;
  detokenizeMs = 0;
  firstTokenMs = -1;
  #lastTokenMs = -1;
  #hasFirst = false;
  /** Undefined before the first dispatch, and where no request of the model is split. */
  #split: SplitStage | undefined;
  /** When it went to the router, then when it went to a worker. */
  #sinceMs = Infinity;

  constructor(
    run: GenerationRun,
    index: number,
    request: PreprocessedRequest,
    { stops, hints, sibling }: ChoiceOptions,
  ) {
    this.index = index;
    this.#run = run;
    this.#request = request;
    this.#features = featuresOf(request);
    const { tokenizer } = run.model.preprocessor;
    this.#detokenizer = new Detokenizer(tokenizer, { skipSpecialTokens: true });
    this.#stop = new StopMatcher(stops);
    this.#sibling = sibling;
    this.#trace = run.span === undefined ? undefined : new ChoiceTrace(run.span);
    this.#promptRoute = {
      ...hints.route,
      requestId: request.requestId,
      tokenIds: request.tokenIds,
      cacheNamespace: request.cacheNamespace,
      deadlineMs: run.deadlineMs,
      excluded: this.#excluded,
      ...(run.span?.isRecording === true ? { explain: true } : {}),
    };
    this.#logprobs = request.output.topLogprobs >= 0 ? new LogprobCollector(tokenizer) : undefined;
  }

  get ended(): boolean {
    return this.#ended;
  }

  /** Where it stands, for stage limits and operators. */
  get stage(): "route_queue" | "dispatch" | "decode" {
    if (this.#waiting !== undefined) return "route_queue";
    return this.#lastTokenMs >= this.#sinceMs ? "decode" : "dispatch";
  }

  /** Since when it stands there; in `decode` since its last token. Infinity until it was dispatched. */
  get sinceMs(): number {
    return Math.max(this.#sinceMs, this.#lastTokenMs);
  }

  /** A limit of its stage is over: the worker is left, and another one tried if there may be one. */
  overdue(error: DynamoError): void {
    this.#attempt?.onStalled(error);
  }

  /** Of the prompt's blocks, once it was routed. */
  get hashes(): RouteRequest["hashes"] {
    return this.#promptRoute.hashes;
  }

  /** Routes and sends, at once or when the router's queue has its turn; on failure tells the run. */
  dispatch(): void {
    const { planes, stages } = this.#run;
    const startMs = planes.clock.monotonicMs();
    this.#sinceMs = startMs;
    stages.enter("route");
    this.#trace?.routing(startMs);
    if (this.#count === 0 && this.#split === undefined && this.#maySplit()) void this.#considerSplit(startMs);
    else this.#proceed(startMs);
  }

  #proceed(startMs: number): void {
    if (this.#split?.phase === "reserve") this.#reserve(startMs);
    else this.#route(startMs);
  }

  #route(startMs: number): void {
    const { model } = this.#run;
    const request = this.#requestNow();
    const reserved = this.#takeReserved(request);
    if (reserved !== undefined) {
      this.#send(request, reserved, startMs);
      return;
    }
    try {
      // Step 4: route.
      const router = model.remote ?? (this.#isWithPrefillWorker ? model.prefill!.router : model.router);
      const route = this.#routeOf(request);
      const routed = router.routeWhenReady(this.#isWithPrefillWorker ? { ...route, pool: "prefill" } : route);
      if ("instanceId" in routed) this.#send(request, routed, startMs);
      else void this.#await(request, routed, startMs);
    } catch (thrown) {
      this.#routeFailed(thrown, startMs);
    }
  }

  // ---- A decode worker first, so that no prompt is computed that has nowhere to go on ----

  #reserve(startMs: number): void {
    const { model } = this.#run;
    try {
      const routed = (model.remote ?? model.router).routeWhenReady({
        ...this.#routeOf(this.#request),
        stage: "decode",
        overrides: DECODE_STAGE_OVERRIDES,
        needsRoom: true,
      });
      if ("instanceId" in routed) this.#reserved(routed, startMs);
      else void this.#awaitRoom(routed, startMs);
    } catch (thrown) {
      this.#noRoom(thrown, startMs);
    }
  }

  async #awaitRoom(waiting: WaitingRoute, startMs: number): Promise<void> {
    const { model, planes } = this.#run;
    const late = new DynamoError("worker-full", "no decode worker had a place and KV memory in time");
    const timer = planes.clock.setTimer(model.decodeWaitMs, () => waiting.cancel(late));
    this.#waiting = waiting;
    model.metrics.disaggregationWaiting(1);
    let failure: unknown;
    const decision = await waiting.decision.catch((thrown: unknown) => void (failure = thrown));
    timer.cancel();
    this.#waiting = undefined;
    model.metrics.disaggregationWaiting(-1);
    if (decision === undefined) this.#noRoom(failure, startMs);
    else if (this.#ended) {
      decision.release({ outcome: "cancelled" });
      this.#routeFailed(new DynamoError("cancelled", "the choice ended while it waited"), startMs);
    } else this.#reserved(decision, startMs);
  }

  #reserved(decision: RoutingDecision, startMs: number): void {
    const split = this.#split!;
    split.waitedMs = this.#run.planes.clock.monotonicMs() - startMs;
    split.reserve(decision);
    this.#route(startMs);
  }

  /** The decode workers' own queues have it then, whole. */
  #noRoom(thrown: unknown, startMs: number): void {
    const error = toDynamoError(thrown);
    if (this.#ended || isOwnFault(error)) {
      this.#routeFailed(error, startMs);
      return;
    }
    const split = this.#split!;
    split.waitedMs = this.#run.planes.clock.monotonicMs() - startMs;
    this.#tellFallback(error.reason, "", error.diagnostic);
    split.fallBack(error.reason);
    this.#route(startMs);
  }

  /** The decode worker that was kept for these blocks, if it is still there. */
  #takeReserved({ handoff }: PreprocessedRequest): RoutingDecision | undefined {
    if (handoff === undefined) return undefined;
    const reserved = this.#split?.takeReserved();
    if (reserved === undefined) return undefined;
    const { instanceId } = reserved;
    const isThere = this.#run.model.router.workers.some((worker) => worker.instanceId === instanceId);
    if (isThere && !this.#excluded.has(instanceId)) return reserved;
    reserved.release({ outcome: "not-used" });
    return undefined;
  }

  /** Whether the first token, or the handoff behind it, is awaited from a prefill worker. */
  get #isWithPrefillWorker(): boolean {
    return this.#split?.isWithPrefillWorker === true;
  }

  /** What was decided about splitting, and how it went; undefined where there are no prefill workers. */
  get split(): SplitStage | undefined {
    return this.#split;
  }

  /** Whether there is anything to decide. */
  #maySplit(): boolean {
    const { prefill, advisor, metrics, card } = this.#run.model;
    if (prefill === undefined || advisor.mode === "never") return false;
    if (prefill.router.workers.length === 0) {
      metrics.disaggregationFallback("no-workers");
      return false;
    }
    const { output, stop, tokenIds } = this.#request;
    // Nothing to split: a prompt of less than a block hands none over, one token is the prefill's own, prompt logprobs need every token's logits, a named worker is to do all of it.
    const isWhole = stop.maxTokens === 1 || output.promptLogprobs || this.#promptRoute.pinned !== undefined;
    return !isWhole && tokenIds.length >= card.blockSizeTokens;
  }

  /** At once, or when a router service has told how its pools would take it. */
  async #considerSplit(startMs: number): Promise<void> {
    const { remote, router, prefill } = this.#run.model;
    const route = this.#routeOf(this.#request);
    if (remote !== undefined) {
      const outlooks = await remote.outlooks(route);
      if (this.#ended) {
        this.#routeFailed(new DynamoError("cancelled", "the choice ended while a router was asked"), startMs);
        return;
      }
      if (outlooks !== undefined) this.#decideSplit(outlooks.decode, outlooks.prefill, outlooks.isOwn);
    } else {
      try {
        this.#decideSplit(router.outlook(route), prefill!.router.outlook(route), false);
      } catch {
        // One of the pools has nobody who could take it: the usual way tells why, or waits.
      }
    }
    this.#proceed(startMs);
  }

  #decideSplit(decode: PoolOutlook, prefill: PoolOutlook, isOwnView: boolean): void {
    const { advisor, metrics, splits } = this.#run.model;
    const { tokenIds, stop } = this.#request;
    const decided = advisor.decide({
      promptTokens: tokenIds.length,
      outputTokens: stop.maxTokens,
      decode,
      prefill,
    });
    const advice = isOwnView
      ? { ...decided, reason: `${decided.reason} (without the router service's view)` }
      : decided;
    metrics.disaggregation(advice.choice);
    this.#split = new SplitStage(advisor.mode, advice);
    splits.add(this.#run.requestId, this.#split);
  }

  /** With the tokens that are there already. */
  #requestNow(): PreprocessedRequest {
    const { tokenIds, output } = this.#request;
    // Step 5: prefill.
    if (this.#split?.isPrefillOnly === true) {
      return { ...this.#request, prefillOnly: true, stop: { ...this.#request.stop, maxTokens: 1 } };
    }
    // Step 6: transfer.
    const handoff = this.#split?.handoff;
    if (this.#count === 0) {
      // Let in before it lost its worker: the next one takes it as such, into the room that it keeps for those.
      const request = this.#hasLostWorker ? { ...this.#request, resumedTokens: 0 } : this.#request;
      return handoff === undefined ? request : { ...request, handoff };
    }
    const all = new Uint32Array(tokenIds.length + this.#count);
    all.set(tokenIds);
    all.set(this.#tokens.subarray(0, this.#count), tokenIds.length);
    const promptLogprobs = output.promptLogprobs && this.#logprobs?.hasSeenPrompt !== true;
    return {
      ...this.#request,
      tokenIds: all,
      resumedTokens: this.#count,
      output: { ...output, promptLogprobs },
      ...(handoff === undefined ? {} : { handoff }),
    };
  }

  /** Workers whose engine cannot do what the request needs; those that joined meanwhile included. */
  #excludeUnable(): void {
    if (this.#features.length === 0) return;
    for (const [instanceId, card] of this.#run.model.cards) {
      if (lackOf(card, this.#features) !== undefined) this.#excluded.add(instanceId);
    }
  }

  #routeOf({ tokenIds, resumedTokens, prefillOnly, handoff }: PreprocessedRequest): RouteRequest {
    this.#excludeUnable();
    if (resumedTokens === 0) return { ...this.#promptRoute, resumedTokens };
    if (resumedTokens !== undefined) {
      const isHandedOver = handoff !== undefined;
      const stage = isHandedOver ? ({ stage: "decode", overrides: DECODE_STAGE_OVERRIDES } as const) : {};
      return { ...this.#promptRoute, tokenIds, resumedTokens, hashes: undefined, ...stage };
    }
    if (this.#sibling?.hashes !== undefined) this.#promptRoute.hashes ??= this.#sibling.hashes;
    if (handoff !== undefined) return { ...this.#promptRoute, stage: "decode", overrides: DECODE_STAGE_OVERRIDES };
    if (prefillOnly !== true) return this.#promptRoute;
    return { ...this.#promptRoute, stage: "prefill" };
  }

  async #await(request: PreprocessedRequest, waiting: WaitingRoute, startMs: number): Promise<void> {
    this.#waiting = waiting;
    try {
      const decision = await waiting.decision;
      this.#waiting = undefined;
      // Cancelled between the router's decision and this turn of the loop.
      if (this.#ended) {
        decision.release({ outcome: "cancelled" });
        this.#trace?.ended("cancelled", 0, this.#run.planes.clock.monotonicMs());
        this.#run.stages.leave("route", this.#run.planes.clock.monotonicMs() - startMs);
      } else this.#send(request, decision, startMs);
    } catch (thrown) {
      this.#waiting = undefined;
      this.#routeFailed(thrown, startMs);
    }
  }

  #routeFailed(thrown: unknown, startMs: number): void {
    this.#run.stages.leave("route", this.#run.planes.clock.monotonicMs() - startMs);
    if (this.#ended) return;
    const error = toDynamoError(thrown);
    this.#trace?.ended(error.reason, this.#count, this.#run.planes.clock.monotonicMs());
    if (this.#isWithPrefillWorker && !isOwnFault(error)) {
      this.#fallBack(error);
      return;
    }
    const pauseMs = NOBODY_UNTRIED.has(error.reason) ? this.#giveSecondChance() : undefined;
    if (pauseMs !== undefined) {
      if (pauseMs <= 0) this.dispatch();
      else this.#run.planes.clock.setTimer(pauseMs, () => this.#dispatchAgain());
      return;
    }
    // Nobody is left to go on with it: what is told is why it had to go.
    this.#end(error.reason === "no-workers" ? (this.#lastFailure ?? error) : error, "route-failed");
  }

  /**
   * In how many ms a worker whose connection broke may be asked again; undefined when there is none. One that is dead
   * refuses the connection at once, one that is frozen costs one more connect timeout: the whole pool gone is still an error
   * soon.
   */
  #giveSecondChance(): number | undefined {
    const known = this.#run.model.router.workers;
    for (;;) {
      const chance = this.#secondChances.shift();
      if (chance === undefined) return undefined;
      const { instanceId, fromMs } = chance;
      if (!known.some((worker) => worker.instanceId === instanceId)) continue;
      this.#triedAgain.add(instanceId);
      this.#excluded.delete(instanceId);
      return fromMs - this.#run.planes.clock.monotonicMs();
    }
  }

  #dispatchAgain(): void {
    if (!this.#ended) this.dispatch();
  }

  #send(request: PreprocessedRequest, decision: RoutingDecision, startMs: number): void {
    const { model, planes, stages, requestId, deadlineMs } = this.#run;
    const nowMs = planes.clock.monotonicMs();
    stages.leave("route", nowMs - startMs);
    this.#sinceMs = nowMs;
    const traceparent = this.#trace?.routed(decision, nowMs) ?? this.#run.traceparent;
    this.instanceId = decision.instanceId;
    if (model.cards.get(decision.instanceId)?.tokens === "estimated") this.isEstimated = true;
    const attempt = new Attempt(this, decision, model.progress);
    this.#attempt = attempt;
    const sent =
      (model.cards.get(decision.instanceId) ?? model.card).dataParallelSize > 1
        ? { ...request, dpRank: decision.dpRank }
        : request;
    const endpoint = this.#isWithPrefillWorker ? model.prefill!.generateEndpoint : model.generateEndpoint;
    if (this.#isWithPrefillWorker) this.#split!.prefillWorker = decision.instanceId;
    try {
      // Step 7: decode.
      attempt.start((handler) =>
        planes.request.client.open(
          decision.address,
          encodeRequest(sent),
          {
            endpoint,
            requestId,
            traceparent,
            timeoutMs: Math.max(1, deadlineMs - nowMs),
            windowBytes: WINDOW_BYTES,
            isLastResort: this.#triedAgain.has(decision.instanceId),
          },
          handler,
        ),
      );
    } catch (thrown) {
      this.#end(toDynamoError(thrown));
    }
  }

  /** Stops the worker's work for this choice; the run is not told. */
  cancel(error: DynamoError): void {
    if (this.#ended) return;
    this.#attempt?.abandon(error.reason, error);
    this.#close(error.reason);
    this.#waiting?.cancel(error);
  }

  /** Text put in front of the answer (`echo`). */
  prime(text: string): void {
    this.#run.writer.delta(this.index, text, undefined);
  }

  onItem(bytes: Uint8Array, start: number, end: number): void {
    try {
      decodeEngineOutput(bytes, start, end, OUTPUT);
    } catch (thrown) {
      this.#end(toDynamoError(thrown));
      return;
    }
    if (OUTPUT.handoff !== undefined) {
      this.#onHandoff(OUTPUT.handoff);
      return;
    }
    if (OUTPUT.pull !== undefined) this.#onPull(OUTPUT.pull);
    if (OUTPUT.restored !== undefined) this.#attempt?.decision.restored(OUTPUT.restored);
    if (OUTPUT.hasFirst) this.#onFirst();
    if (OUTPUT.reportedCachedTokens !== undefined) this.#onReportedCached(OUTPUT.reportedCachedTokens);
    if (OUTPUT.tokenCount > 0) this.#collect(OUTPUT.tokenIds, OUTPUT.tokenCount);
    if (this.#ended) return;
    if (OUTPUT.promptLogprobs !== undefined) this.#logprobs?.addPrompt(OUTPUT.promptLogprobs, this.#request.tokenIds);
    if (OUTPUT.logprobs !== undefined) this.#logprobs?.add(OUTPUT.logprobs);
    if (OUTPUT.finish !== undefined) {
      this.decodeMs += OUTPUT.decodeMs;
      if (OUTPUT.error !== undefined) this.#onFailure(OUTPUT.error);
      // The engine only cancels by itself when it is being stopped.
      else if (OUTPUT.finish === "cancelled")
        this.#onFailure(new DynamoError("engine-stopped", "the engine stopped while the request ran"));
      else if (this.#split?.isPrefillOnly === true && OUTPUT.finish === "length") this.#onPrefilled();
      else this.#finish = OUTPUT.finish;
    }
  }

  onTurnEnd(): void {
    this.#emitTurn();
    if (!this.#ended) this.returnCredit();
  }

  onAttemptEnd(end: StreamEnd): void {
    if (end === undefined && this.#finish !== undefined) this.#emitTurn();
    if (this.#ended) return;
    // A clean end without a finish reason: the answer is cut off, and nobody must take it for whole.
    this.#onFailure(end ?? new DynamoError("worker-lost", "the worker ended the stream without finishing the answer"));
  }

  /** Gives the worker credit for what the client has taken; called again when its socket drained. */
  returnCredit(): void {
    if (this.#run.writer.bufferedBytes <= CREDIT_PAUSE_BYTES) this.#attempt?.grant();
  }

  /** The worker's first word, of each attempt. What is told of the request is what the first one said. */
  #onFirst(): void {
    const { decision } = this.#attempt!;
    const promptTokens = this.#request.tokenIds.length;
    if (OUTPUT.promptTokens !== promptTokens) {
      this.#end(
        new DynamoError("engine-failed", "the engine did not take the request as it was sent", {
          diagnostic: `${OUTPUT.promptTokens} prompt tokens of ${promptTokens}, ${this.#count} resumed`,
        }),
      );
      return;
    }
    decision.firstToken(OUTPUT.cachedTokens);
    this.#learn();
    this.#trace?.firstToken(OUTPUT.cachedTokens, this.#run.planes.clock.monotonicMs());
    if (this.#migratingSinceMs >= 0) this.#migrated("success");
    if (this.#hasFirst) return;
    this.#hasFirst = true;
    this.cachedTokens = OUTPUT.cachedTokens;
    this.queueMs = OUTPUT.queueMs;
    this.prefillMs = OUTPUT.prefillMs;
  }

  /** The engine's own count in place of the worker's guess; of a moved answer, the first engine's was told already. */
  #onReportedCached(cachedTokens: number): void {
    this.#attempt?.decision.firstToken(cachedTokens);
    if (this.migrations === 0) this.cachedTokens = cachedTokens;
  }

  // ---- Split over two workers ----

  /** Now and then, from a token. The time to the second one holds the handoff. */
  #learnStep(milliseconds: number): void {
    const { prefill, router, advisor, progress } = this.#run.model;
    if (prefill === undefined || this.#written < 2 || this.#count % STEP_SAMPLE_TOKENS !== 0) return;
    const pool = this.#isWithPrefillWorker ? prefill.router : router;
    // A router service has the bookings then; what is here of them is here.
    const active = Math.max(pool.activeRequestsOf(this.instanceId), progress.streamCountOf(this.instanceId));
    if (active > 0) advisor.sawStep(active, milliseconds);
  }

  /** From an engine's first word, for the choice of other requests. */
  #learn(): void {
    const { advisor, prefill, metrics } = this.#run.model;
    if (prefill === undefined) return;
    const split = this.#split;
    if (split?.pull === undefined && this.#count === 0) {
      const pool = this.#isWithPrefillWorker ? "prefill" : "decode";
      advisor.sawPrefill(pool, this.instanceId, this.#request.tokenIds.length - OUTPUT.cachedTokens, OUTPUT.prefillMs);
    } else if (split?.pull?.outcome === "pulled" && split.gapMs < 0) {
      split.gapMs = this.#run.planes.clock.monotonicMs() - split.firstTokenMs;
      advisor.sawHandoff(split.pull.pulledBlocks - split.pull.earlyBlocks, split.gapMs, split.pull.pulledBlocks);
      metrics.handoffSeconds(split.gapMs / 1_000);
    }
  }

  /** The prefill worker's engine is done: its token goes out at once, its place is free; the blocks are to follow. */
  #onPrefilled(): void {
    this.#emitTurn();
    const attempt = this.#attempt;
    if (this.#ended || attempt === undefined) return;
    const { clock } = this.#run.planes;
    const split = this.#split!;
    split.phase = "handoff";
    split.firstTokenMs = clock.monotonicMs();
    attempt.release("finished");
    const late = (): void =>
      attempt.onStalled(
        new DynamoError("first-token-timeout", "the prefill worker did not hand its blocks over in time"),
      );
    // Its engine may be in a long step of other prompts: waiting is worth as long as computing the prompt again would take.
    const { handoffTimeoutMs, advisor } = this.#run.model;
    const againMs = this.#request.tokenIds.length * advisor.decodeMsPerToken;
    split.guard(clock.setTimer(Math.max(handoffTimeoutMs, againMs), late));
  }

  /** The descriptor: whoever decodes gets it with the tokens so far. */
  #onHandoff(offered: OfferedHandoff): void {
    const split = this.#split;
    const attempt = this.#attempt;
    if (offered.isDraft && split?.phase === "prefill") {
      this.#beginEarly(split, offered.bytes.toString("base64"));
      return;
    }
    // Some engines' first token is the decode engine's to tell: the handoff is all that comes from the other one.
    if (!offered.isDraft && split?.phase === "prefill" && this.#count === 0 && attempt !== undefined) {
      split.phase = "handoff";
      split.firstTokenMs = this.#run.planes.clock.monotonicMs();
      attempt.release("finished");
    }
    if (offered.isDraft || split?.phase !== "handoff" || attempt === undefined) {
      this.#end(new DynamoError("engine-failed", "the worker handed blocks over that nobody asked for"));
      return;
    }
    this.#trace?.ended("finished", this.#count, this.#run.planes.clock.monotonicMs());
    this.#attempt = undefined;
    split.offer(offered, attempt);
    this.dispatch();
  }

  /** What is computed of the prompt travels while the rest is. Whatever becomes of it shows when the handoff is taken. */
  #beginEarly(split: SplitStage, handoff: string): void {
    const { model, planes, requestId, deadlineMs } = this.#run;
    split.begin(({ address }) =>
      planes.request.client.open(
        address,
        encodeRequest({ ...this.#request, handoff }),
        {
          endpoint: model.earlyPullEndpoint,
          requestId,
          traceparent: "",
          timeoutMs: Math.max(1, deadlineMs - planes.clock.monotonicMs()),
        },
        { onItem: () => undefined, onTurnEnd: () => undefined, onEnd: () => undefined },
      ),
    );
  }

  /** The decode worker has the blocks, or computes what is missing. */
  #onPull(pull: PullResult): void {
    // The prompt is there: what is missing is a step.
    if (pull.outcome === "pulled") this.#attempt?.began();
    const split = this.#split;
    if (split === undefined) return;
    split.settled(pull);
    const { metrics } = this.#run.model;
    metrics.handoffBytes(pull.backend === "" ? "none" : pull.backend, pull.byteCount);
    if (pull.outcome !== "pulled") this.#tellFallback(pull.outcome, this.instanceId);
  }

  /** No prefill worker after all: the decode pool computes the prompt, or the rest of it. Costs no migration. */
  #fallBack(error: DynamoError): void {
    const split = this.#split!;
    const { model } = this.#run;
    if (this.#attempt !== undefined) {
      const { instanceId } = this.#attempt.decision;
      if (isWorkerFault(error.reason)) model.prefill?.router.inhibit(instanceId);
      this.#attempt.abandon(error.reason, error);
      this.#trace?.ended(error.reason, this.#count, this.#run.planes.clock.monotonicMs());
      this.#attempt = undefined;
    }
    this.#tellFallback(error.reason, split.prefillWorker, error.diagnostic);
    split.fallBack(error.reason);
    this.dispatch();
  }

  #tellFallback(reason: string, worker: string, diagnostic?: string): void {
    this.#run.model.metrics.disaggregationFallback(reason);
    this.#run.planes.logger.warn(
      { x_request_id: this.#run.requestId, choice: this.index, worker, reason, diagnostic, tokens: this.#count },
      "the prompt is computed by the decode worker",
    );
  }

  #collect(tokenIds: Uint32Array, count: number): void {
    this.#attempt?.began();
    const needed = this.#count + count;
    // An engine that did not go on where it was told to would begin its budget anew. One whose tokens are not ours counts its own.
    if (needed > this.#request.stop.maxTokens && !this.isEstimated) {
      this.#end(
        new DynamoError("engine-failed", "the engine generated more tokens than it was asked for", {
          diagnostic: `${needed} of ${this.#request.stop.maxTokens}`,
        }),
      );
      return;
    }
    if (needed > this.#tokens.length) {
      const grown = new Uint32Array(Math.max(needed, this.#tokens.length * 2));
      grown.set(this.#tokens.subarray(0, this.#count));
      this.#tokens = grown;
    }
    for (let i = 0; i < count; i++) this.#tokens[this.#count + i] = tokenIds[i]!;
    this.#count = needed;
  }

  /** Steps 8 and 9 for the tokens of this turn. */
  #emitTurn(): void {
    if (this.#count === this.#written && this.#finish === undefined && this.#logprobs?.hasPrompt !== true) return;
    const { clock } = this.#run.planes;
    const nowMs = clock.monotonicMs();
    if (this.#count > this.#written) this.#observeTokens(nowMs);
    // Step 8: detokenize + stop.
    let text = this.#detokenize();
    const stopped = this.#stop.matched;
    const finish = stopped ? "stop" : this.#finish;
    if (finish !== undefined && !stopped) text += this.#flushText();
    const logprobs = this.#logprobs?.take(finish !== undefined, stopped);
    this.detokenizeMs += clock.monotonicMs() - nowMs;
    // Step 9: SSE.
    const { writer } = this.#run;
    if (text !== "" || (logprobs !== undefined && logprobs.length > 0)) writer.delta(this.index, text, logprobs);
    if (finish === "stop" || finish === "length") {
      if (stopped) this.#attempt?.abandon("finished");
      this.#close("finished");
      if (this.#run.model.prefill !== undefined) this.#run.model.advisor.sawOutput(this.tokenCount);
      writer.finish(this.index, finish);
      this.#run.choiceFinished(this);
    } else writer.flush();
  }

  #detokenize(): string {
    const from = this.#written;
    const count = this.#count - from;
    this.#written = this.#count;
    if (this.#logprobs === undefined && this.#stop.isEmpty) {
      this.tokenCount += count;
      return this.#detokenizer.push(this.#tokens, count, from);
    }
    // One by one: tokens after a stop match are not looked at and not counted, however many came in this turn.
    let text = "";
    for (let i = from; i < this.#count && !this.#stop.matched; i++) {
      this.tokenCount++;
      const piece = this.#detokenizer.push(this.#tokens, 1, i);
      const shown = this.#stop.push(piece);
      text += shown;
      this.#logprobs?.advance(this.#tokens[i]!, piece.length, shown.length);
    }
    return text;
  }

  #flushText(): string {
    return this.#stop.push(this.#detokenizer.flush()) + (this.#stop.matched ? "" : this.#stop.flush());
  }

  #observeTokens(nowMs: number): void {
    const { metrics, workerGauges } = this.#run.model;
    const count = this.#count - this.#written;
    if (this.firstTokenMs < 0) {
      this.firstTokenMs = nowMs;
      this.#run.onFirstToken(nowMs, this.instanceId, this.#request.tokenIds.length);
    } else {
      const seconds = (nowMs - this.#lastTokenMs) / 1_000 / count;
      metrics.interTokenLatency.observe(seconds, count);
      this.#learnStep(seconds * 1_000);
      workerGauges.get(this.instanceId)?.lastInterTokenLatency.set(seconds);
    }
    this.#attempt?.decision.addTokens(count);
    this.#lastTokenMs = nowMs;
    metrics.outputTokensTotal.add(count);
  }

  /** The attempt is over, not by its engine's finish. What it brought counts; the rest is another worker's. */
  #onFailure(error: DynamoError): void {
    this.#emitTurn();
    const attempt = this.#attempt;
    if (this.#ended || attempt === undefined) return;
    if (this.#isWithPrefillWorker && !isOwnFault(error)) {
      this.#fallBack(error);
      return;
    }
    const { decision } = attempt;
    if (isWorkerFault(error.reason)) {
      this.#run.model.router.inhibit(decision.instanceId);
      this.#hasLostWorker = true;
    }
    if (!this.#mayMove(error.reason, decision.instanceId)) {
      this.#end(error);
      return;
    }
    attempt.abandon(error.reason, error);
    this.#trace?.ended(error.reason, this.#count, this.#run.planes.clock.monotonicMs());
    this.#attempt = undefined;
    this.#leaveOut(decision.instanceId, error.reason);
    this.#lastFailure = error;
    if (REFUSALS.has(error.reason)) this.#refusal = error;
    const { clock, logger } = this.#run.planes;
    if (this.#migratingSinceMs < 0) this.#migratingSinceMs = clock.monotonicMs();
    this.#run.model.metrics.migration(this.#count > 0 ? "ongoing_request" : "new_request");
    logger.info(
      {
        x_request_id: this.#run.requestId,
        choice: this.index,
        from: decision.instanceId,
        reason: error.reason,
        diagnostic: error.diagnostic,
        tokens: this.#count,
      },
      "request goes on with another worker",
    );
    // A turn later: whatever cut this connection may have cut others too (this process was frozen, a switch went), and by
    // then the sockets have said so. Else one break after the other would use up all workers within a millisecond.
    this.#run.planes.clock.nextTurn(() => this.#dispatchAgain());
  }

  #leaveOut(instanceId: string, reason: Reason): void {
    this.#excluded.add(instanceId);
    if (!CONNECTION_FAULTS.has(reason) || this.#triedAgain.has(instanceId)) return;
    // Until then the plane does not try to connect again.
    const waitMs = reason === "worker-unreachable" ? FIRST_BACK_OFF_MS : 0;
    this.#secondChances.push({ instanceId, fromMs: this.#run.planes.clock.monotonicMs() + waitMs });
  }

  /** Counts it when it may. */
  #mayMove(reason: Reason, instanceId: string): boolean {
    // Named by the caller: there is no other.
    if (this.#promptRoute.pinned !== undefined) return false;
    const { limit, maxSequenceTokens } = this.#run.model.migration;
    if (limit === 0) return false;
    if (REFUSALS.has(reason)) return ++this.#refusals < MAX_REFUSALS;
    // Of the request perhaps, not of the worker: a second engine that fails with it proves it.
    if (reason === ENGINE_FAILED) {
      if (this.#hasEngineFailed) return false;
      this.#hasEngineFailed = true;
    } else if (!isWorkerFault(reason) && !STAGE_LIMITS.has(reason)) return false;
    if (this.#request.tokenIds.length + this.#count > maxSequenceTokens) {
      this.#run.model.metrics.migrationTooLong.add();
      return false;
    }
    // Asked again and not even reached: the request cannot have harmed it, and the next one may be well.
    if (reason === "worker-unreachable" && this.#triedAgain.has(instanceId)) return true;
    if (this.migrations === limit) return false;
    this.migrations++;
    return true;
  }

  #migrated(outcome: "success" | "failure"): void {
    const { clock } = this.#run.planes;
    this.#run.model.metrics.migrationDuration(outcome, (clock.monotonicMs() - this.#migratingSinceMs) / 1_000);
    this.#migratingSinceMs = -1;
  }

  /** Fails: ends the choice and tells the run. */
  #end(error: DynamoError, outcome: string = error.reason): void {
    if (this.#ended) return;
    this.#attempt?.abandon(outcome, error);
    this.#close(outcome);
    // Some worker was full and the others are gone: full is what a client can do something about.
    this.#run.choiceFailed(this, isWorkerFault(error.reason) ? (this.#refusal ?? error) : error);
  }

  #close(outcome: string): void {
    assert(!this.#ended, "a choice ends once");
    this.#ended = true;
    if (this.#migratingSinceMs >= 0) this.#migrated("failure");
    this.#attempt?.leave(outcome);
    this.#split?.close();
    this.#trace?.ended(outcome, this.#count, this.#run.planes.clock.monotonicMs());
  }
}

/** Another worker would say the same, or there is no time for it. */
function isOwnFault({ class: errorClass, reason }: DynamoError): boolean {
  return errorClass === "invalid-request" || errorClass === "cancelled" || reason === "request-deadline";
}
