import { DynamoError, type Reason } from "../errors/index.ts";
import {
  EngineOutput,
  decodeEngineOutput,
  encodeRequest,
  type FinishReason,
  type PreprocessedRequest,
  type TokenLogprob,
} from "../protocol/index.ts";
import type { RouteRequest, RoutingDecision, WaitingRoute } from "../router/index.ts";
import type { ClientStream, ClientStreamHandler, StreamEnd } from "../runtime/request-plane/index.ts";
import type { GenerationRun } from "./generation-run.ts";
import type { WorkerGauges } from "./frontend-metrics.ts";
import { Detokenizer, StopMatcher } from "./postprocess/index.ts";
import type { LogprobEntry } from "./response-writer.ts";
import type { RoutingHints } from "./routing-hints.ts";

/**
 * One choice of a request: routed to a worker, its items turned into text, written once per loop turn. Items only
 * collect token ids; detokenizing, stop matching and writing happen at the end of the turn, so that a stream that is
 * behind makes one larger write instead of many.
 *
 * A failure before the first token is tried again on another worker without a trace for the client; after it the
 * request fails at once.
 */

/** Shared: a payload is decoded and used before the next one is looked at. */
const OUTPUT = new EngineOutput();
const MAX_ATTEMPTS = 3;
/** Reasons another worker may not have. A broken or unreachable worker is avoided for a while, a full one is not to blame. */
const RETRIED: ReadonlySet<Reason> = new Set<Reason>([
  "worker-unreachable",
  "worker-lost",
  "worker-full",
  "draining",
  "engine-stopped",
  "endpoint-not-found",
  "stream-limit",
  "connect-timeout",
]);
/** Above this many unread bytes at the client, the worker gets no new credit for the stream. */
const CREDIT_PAUSE_BYTES = 64 * 1024;

export interface ChoiceOptions {
  readonly stops: readonly string[];
  readonly hints: RoutingHints;
  /** The first choice of the same prompt: its blocks are hashed once for all of them. */
  readonly sibling: ChoiceStream | undefined;
}

export class ChoiceStream implements ClientStreamHandler {
  readonly index: number;
  readonly #run: GenerationRun;
  readonly #request: PreprocessedRequest;
  readonly #detokenizer: Detokenizer;
  readonly #stop: StopMatcher;
  readonly #logprobs: LogprobCollector | undefined;
  readonly #excluded = new Set<string>();
  /** Kept for all attempts: it remembers the hashes of the prompt. */
  readonly #route: RouteRequest;
  readonly #sibling: ChoiceStream | undefined;
  #attempts = 0;
  /** In the router's queue. */
  #waiting: WaitingRoute | undefined;
  #decision: RoutingDecision | undefined;
  #gauges: WorkerGauges | undefined;
  #stream: ClientStream | undefined;
  #turnIds = new Uint32Array(16);
  #turnCount = 0;
  #ungranted = 0;
  #finish: FinishReason | undefined;
  #ended = false;
  tokenCount = 0;
  cachedTokens = 0;
  queueMs = 0;
  prefillMs = 0;
  decodeMs = 0;
  detokenizeMs = 0;
  firstTokenMs = -1;
  #lastTokenMs = -1;

  constructor(
    run: GenerationRun,
    index: number,
    request: PreprocessedRequest,
    { stops, hints, sibling }: ChoiceOptions,
  ) {
    this.index = index;
    this.#run = run;
    this.#request = request;
    this.#detokenizer = new Detokenizer(run.model.preprocessor.tokenizer, { skipSpecialTokens: true });
    this.#stop = new StopMatcher(stops);
    this.#sibling = sibling;
    this.#route = {
      ...hints.route,
      requestId: request.requestId,
      tokenIds: request.tokenIds,
      cacheNamespace: request.cacheNamespace,
      deadlineMs: run.deadlineMs,
      excluded: this.#excluded,
    };
    this.#logprobs = request.output.topLogprobs >= 0 ? new LogprobCollector(run) : undefined;
  }

  get ended(): boolean {
    return this.#ended;
  }

  /** Of the prompt's blocks, once it was routed. */
  get hashes(): RouteRequest["hashes"] {
    return this.#route.hashes;
  }

  /** The worker of the last attempt, for the log line. */
  get instanceId(): string {
    return this.#decision?.instanceId ?? "";
  }

  /** Routes and sends, at once or when the router's queue has its turn; on failure tells the run. */
  dispatch(): void {
    const { model, planes, stages } = this.#run;
    const startMs = planes.clock.monotonicMs();
    stages.enter("route");
    try {
      // Step 4: route.
      if (this.#sibling?.hashes !== undefined) this.#route.hashes ??= this.#sibling.hashes;
      const routed = (model.remote ?? model.router).routeWhenReady(this.#route);
      if ("instanceId" in routed) this.#send(routed, startMs);
      else void this.#await(routed, startMs);
    } catch (thrown) {
      this.#routeFailed(thrown, startMs);
    }
  }

  async #await(waiting: WaitingRoute, startMs: number): Promise<void> {
    this.#waiting = waiting;
    try {
      const decision = await waiting.decision;
      this.#waiting = undefined;
      // Cancelled between the router's decision and this turn of the loop.
      if (this.#ended) {
        decision.release({ outcome: "cancelled" });
        this.#run.stages.leave("route", this.#run.planes.clock.monotonicMs() - startMs);
      } else this.#send(decision, startMs);
    } catch (thrown) {
      this.#waiting = undefined;
      this.#routeFailed(thrown, startMs);
    }
  }

  #routeFailed(thrown: unknown, startMs: number): void {
    this.#run.stages.leave("route", this.#run.planes.clock.monotonicMs() - startMs);
    if (this.#ended) return;
    this.#close("route-failed");
    this.#run.choiceFailed(this, thrown);
  }

  #send(decision: RoutingDecision, startMs: number): void {
    const { model, planes, stages } = this.#run;
    stages.leave("route", planes.clock.monotonicMs() - startMs);
    this.#decision = decision;
    this.#gauges = model.workerGauges.get(decision.instanceId);
    const hasRanks = model.card.dataParallelSize > 1;
    try {
      // Step 5: decode.
      this.#attempts++;
      this.#stream = planes.request.client.open(
        decision.address,
        encodeRequest(hasRanks ? { ...this.#request, dpRank: decision.dpRank } : this.#request),
        {
          endpoint: model.generateEndpoint,
          requestId: this.#run.requestId,
          traceparent: this.#run.traceparent,
          timeoutMs: Math.max(1, this.#run.deadlineMs - planes.clock.monotonicMs()),
        },
        this,
      );
    } catch (thrown) {
      this.#close(reasonOf(thrown));
      this.#run.choiceFailed(this, thrown);
    }
  }

  /** Stops the worker's work for this choice; the run is not told. */
  cancel(error: DynamoError): void {
    if (this.#ended) return;
    this.#close(error.reason);
    this.#waiting?.cancel(error);
    this.#stream?.cancel(error);
  }

  /** Text put in front of the answer (`echo`). */
  prime(text: string): void {
    this.#run.writer.delta(this.index, text, undefined);
  }

  onItem(bytes: Uint8Array, start: number, end: number): void {
    if (this.#ended) return;
    this.#ungranted += end - start;
    try {
      decodeEngineOutput(bytes, start, end, OUTPUT);
    } catch (thrown) {
      this.#failNow(thrown);
      return;
    }
    if (OUTPUT.hasFirst) {
      this.cachedTokens = OUTPUT.cachedTokens;
      this.queueMs = OUTPUT.queueMs;
      this.prefillMs = OUTPUT.prefillMs;
      this.#decision?.firstToken(OUTPUT.cachedTokens);
    }
    if (OUTPUT.tokenCount > 0) this.#collect(OUTPUT.tokenIds, OUTPUT.tokenCount);
    if (OUTPUT.promptLogprobs !== undefined) this.#logprobs?.addPrompt(OUTPUT.promptLogprobs, this.#request.tokenIds);
    if (OUTPUT.logprobs !== undefined) this.#logprobs?.add(OUTPUT.logprobs);
    if (OUTPUT.finish !== undefined) {
      this.#finish = OUTPUT.finish;
      this.decodeMs = OUTPUT.decodeMs;
      if (OUTPUT.error !== undefined) this.#onFailure(OUTPUT.error);
      // The engine only cancels by itself when it is being stopped.
      else if (OUTPUT.finish === "cancelled")
        this.#onFailure(new DynamoError("engine-stopped", "the engine stopped while the request ran"));
    }
  }

  onTurnEnd(): void {
    if (this.#ended) return;
    this.#emitTurn();
    if (!this.#ended) this.returnCredit();
  }

  onEnd(end: StreamEnd): void {
    if (this.#ended) return;
    if (end === undefined) {
      this.#emitTurn();
      if (this.#ended) return;
      // A clean end without a finish reason: the answer is cut off, and nobody must take it for whole.
      this.#onFailure(new DynamoError("worker-lost", "the worker ended the stream without finishing the answer"));
    } else this.#onFailure(end);
  }

  /** Gives the worker credit for what the client has taken; called again when its socket drained. */
  returnCredit(): void {
    if (this.#ungranted === 0 || this.#ended || this.#run.writer.bufferedBytes > CREDIT_PAUSE_BYTES) return;
    this.#stream?.grant(this.#ungranted);
    this.#ungranted = 0;
  }

  #collect(tokenIds: Uint32Array, count: number): void {
    const needed = this.#turnCount + count;
    if (needed > this.#turnIds.length) {
      const grown = new Uint32Array(Math.max(needed, this.#turnIds.length * 2));
      grown.set(this.#turnIds.subarray(0, this.#turnCount));
      this.#turnIds = grown;
    }
    for (let i = 0; i < count; i++) this.#turnIds[this.#turnCount + i] = tokenIds[i]!;
    this.#turnCount = needed;
  }

  /** Steps 6 and 7 for the tokens of this turn. */
  #emitTurn(): void {
    if (this.#turnCount === 0 && this.#finish === undefined && this.#logprobs?.hasPrompt !== true) return;
    const { clock } = this.#run.planes;
    const nowMs = clock.monotonicMs();
    if (this.#turnCount > 0) this.#observeTokens(nowMs);
    // Step 6: detokenize + stop.
    let text = this.#detokenize();
    const stopped = this.#stop.matched;
    const finish = stopped ? "stop" : this.#finish;
    if (finish !== undefined && !stopped) text += this.#flushText();
    const logprobs = this.#logprobs?.take(finish !== undefined, stopped);
    this.detokenizeMs += clock.monotonicMs() - nowMs;
    // Step 7: SSE.
    const { writer } = this.#run;
    if (text !== "" || (logprobs !== undefined && logprobs.length > 0)) writer.delta(this.index, text, logprobs);
    if (finish === "stop" || finish === "length") {
      this.#close("finished");
      if (stopped) this.#stream?.cancel();
      writer.finish(this.index, finish);
      this.#run.choiceFinished(this);
    } else writer.flush();
  }

  #detokenize(): string {
    const count = this.#turnCount;
    this.#turnCount = 0;
    if (this.#logprobs === undefined) {
      // Tokens after a stop match in the same turn are not looked at and not counted.
      this.tokenCount += count;
      return this.#stop.push(this.#detokenizer.push(this.#turnIds, count));
    }
    let text = "";
    const one = new Uint32Array(1);
    for (let i = 0; i < count && !this.#stop.matched; i++) {
      one[0] = this.#turnIds[i]!;
      this.tokenCount++;
      const piece = this.#detokenizer.push(one, 1);
      const shown = this.#stop.push(piece);
      text += shown;
      this.#logprobs.advance(one[0], piece.length, shown.length);
    }
    return text;
  }

  #flushText(): string {
    return this.#stop.push(this.#detokenizer.flush()) + (this.#stop.matched ? "" : this.#stop.flush());
  }

  #observeTokens(nowMs: number): void {
    const { metrics } = this.#run.model;
    const count = this.#turnCount;
    if (this.firstTokenMs < 0) {
      this.firstTokenMs = nowMs;
      this.#run.onFirstToken(nowMs, this.instanceId, this.#request.tokenIds.length);
    } else {
      const seconds = (nowMs - this.#lastTokenMs) / 1_000 / count;
      metrics.interTokenLatency.observe(seconds, count);
      this.#gauges?.lastInterTokenLatency.set(seconds);
    }
    this.#decision?.addTokens(count);
    this.#lastTokenMs = nowMs;
    metrics.outputTokensTotal.add(count);
  }

  #failNow(thrown: unknown): void {
    this.#close(reasonOf(thrown));
    this.#stream?.cancel();
    this.#run.choiceFailed(this, thrown);
  }

  #onFailure(error: DynamoError): void {
    const { router } = this.#run.model;
    const decision = this.#decision;
    if (decision !== undefined && (error.reason === "worker-lost" || error.reason === "worker-unreachable")) {
      router.inhibit(decision.instanceId);
    }
    const untouched = this.tokenCount === 0 && this.#turnCount === 0;
    const isBound = this.#route.pinned !== undefined;
    if (
      decision === undefined ||
      isBound ||
      !untouched ||
      !RETRIED.has(error.reason) ||
      this.#attempts >= MAX_ATTEMPTS
    ) {
      this.#failNow(error);
      return;
    }
    this.#excluded.add(decision.instanceId);
    const others = router.workers.some((worker) => !this.#excluded.has(worker.instanceId));
    if (!others) {
      this.#failNow(error);
      return;
    }
    decision.release({ outcome: error.reason });
    this.#decision = undefined;
    this.#finish = undefined;
    this.#ungranted = 0;
    this.#logprobs?.reset();
    this.dispatch();
  }

  #close(outcome: string): void {
    this.#ended = true;
    this.#decision?.release({ outcome });
  }
}

function reasonOf(thrown: unknown): Reason {
  return thrown instanceof DynamoError ? thrown.reason : "internal";
}

/**
 * Pairs logprob records with text: a token's record goes out with the chunk that completes its text, and the records of
 * a stop string's tokens do not go out at all.
 */
class LogprobCollector {
  readonly #run: GenerationRun;
  #records: TokenLogprob[] = [];
  #waiting: { entry: LogprobEntry; startAt: number; endAt: number }[] = [];
  #prompt: LogprobEntry[] = [];
  /** Characters decoded, and characters shown, since the start. */
  #decoded = 0;
  #shown = 0;

  constructor(run: GenerationRun) {
    this.#run = run;
  }

  get hasPrompt(): boolean {
    return this.#prompt.length > 0;
  }

  reset(): void {
    this.#records = [];
    this.#waiting = [];
    this.#prompt = [];
  }

  add(records: readonly TokenLogprob[]): void {
    this.#records.push(...records);
  }

  /** The prompt's first token has nothing to be predicted from: its logprob is NaN, rendered as null. */
  addPrompt(records: readonly TokenLogprob[], tokenIds: Uint32Array): void {
    this.#prompt.push(this.#entry(tokenIds[0]!, { logprob: Number.NaN, topIds: [], topLogprobs: [] }));
    records.forEach((record, i) => this.#prompt.push(this.#entry(tokenIds[i + 1]!, record)));
  }

  /** One token was decoded to `decoded` more characters, of which (or of earlier ones) `shown` more went out. */
  advance(tokenId: number, decoded: number, shown: number): void {
    const record = this.#records.shift();
    const startAt = this.#decoded;
    this.#decoded += decoded;
    this.#shown += shown;
    if (record !== undefined)
      this.#waiting.push({ entry: this.#entry(tokenId, record), startAt, endAt: this.#decoded });
  }

  /** What may go out now. At the end everything does, but after a stop match only tokens that have shown text. */
  take(atEnd: boolean, stopped: boolean): LogprobEntry[] {
    const ready = this.#prompt;
    this.#prompt = [];
    let count = 0;
    for (const { startAt, endAt } of this.#waiting) {
      const out = stopped ? startAt < this.#shown : atEnd || endAt <= this.#shown;
      if (!out) break;
      count++;
    }
    for (const { entry } of this.#waiting.splice(0, count)) ready.push(entry);
    return ready;
  }

  #entry(tokenId: number, record: TokenLogprob): LogprobEntry {
    const top = record.topIds.map((id, i) => ({ ...this.#text(id), logprob: record.topLogprobs[i]! }));
    return { ...this.#text(tokenId), logprob: record.logprob, top };
  }

  #text(tokenId: number): { token: string; bytes: number[] } {
    const bytes = this.#run.model.preprocessor.tokenizer.tokenBytes(tokenId);
    return { token: Buffer.from(bytes).toString("utf8"), bytes: [...bytes] };
  }
}
