import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { Span } from "../observability/index.ts";
import type { PreprocessedRequest } from "../protocol/index.ts";
import type { GenerationOptions, Usage } from "../protocol/openai/index.ts";
import type { Planes } from "../runtime/component/index.ts";
import type { Random } from "../std/index.ts";
import type { Permit } from "./admission.ts";
import { CREDIT_PAUSE_BYTES, ChoiceStream } from "./choice-stream.ts";
import { countRequest, type Endpoint, type RequestType, type StageMetrics } from "./frontend-metrics.ts";
import type { ServedModel } from "./model-registry.ts";
import type { ResponseWriter } from "./response-writer.ts";
import type { RoutingHints } from "./routing-hints.ts";

/**
 * One client request from the moment its tokens are known to its end: owns its choices, its place at the gate and its
 * writer. It ends exactly once: completed, failed, or left by its client. On the way out it counts, logs one line with
 * the time spent at each step, and gives the place back.
 */
export interface GenerationPlan {
  readonly endpoint: Endpoint;
  readonly model: ServedModel;
  readonly options: GenerationOptions;
  /** One per prompt; each is answered `options.n` times. */
  readonly prompts: readonly PlannedPrompt[];
  readonly hints: RoutingHints;
}

export interface PlannedPrompt {
  readonly request: PreprocessedRequest;
  /** Put in front of each answer. */
  readonly echoText: string;
}

export interface RunContext {
  readonly planes: Planes;
  readonly stages: StageMetrics;
  readonly requestId: string;
  /** For the worker, when this process makes no spans of its own. */
  readonly traceparent: string;
  /** Of the whole request; the run ends it. */
  readonly span: Span | undefined;
  readonly arrivalMs: number;
  /** When the body was parsed, checked and let in. */
  readonly admittedMs: number;
  readonly deadlineMs: number;
  readonly permit: Permit;
  /** Choices that may be on workers at a time; the others follow as these end. */
  readonly window: number;
  readonly writer: ResponseWriter;
}

export class GenerationRun {
  readonly planes: Planes;
  readonly stages: StageMetrics;
  readonly model: ServedModel;
  readonly writer: ResponseWriter;
  readonly requestId: string;
  readonly traceparent: string;
  readonly span: Span | undefined;
  readonly deadlineMs: number;
  /** When the client had last taken all that was written. */
  drainedMs = -Infinity;
  readonly #context: RunContext;
  readonly #plan: GenerationPlan;
  readonly #choices: ChoiceStream[] = [];
  readonly #dispatchedMs: number;
  #running = 0;
  #dispatched = 0;
  #firstTokenMs = -1;
  #ended = false;

  constructor(plan: GenerationPlan, context: RunContext) {
    this.#plan = plan;
    this.#context = context;
    this.model = plan.model;
    this.planes = context.planes;
    this.stages = context.stages;
    this.writer = context.writer;
    this.requestId = context.requestId;
    this.traceparent = context.traceparent;
    this.span = context.span;
    this.deadlineMs = context.deadlineMs;
    this.#dispatchedMs = context.planes.clock.monotonicMs();
    const { n, stop } = plan.options;
    for (const prompt of plan.prompts) {
      let sibling: ChoiceStream | undefined;
      for (let copy = 0; copy < n; copy++) {
        const request = seeded(
          copy === 0 ? prompt.request : anotherSample(prompt.request, copy),
          context.planes.random,
        );
        const choice = new ChoiceStream(this, this.#choices.length, request, {
          stops: stop,
          hints: plan.hints,
          sibling,
        });
        sibling ??= choice;
        this.#choices.push(choice);
      }
    }
    this.#running = this.#choices.length;
  }

  start(): void {
    const { metrics } = this.model;
    metrics.active.add(1);
    metrics.inflight.add(1);
    this.stages.enter("dispatch");
    for (const { request } of this.#plan.prompts) metrics.inputTokens.observe(request.tokenIds.length);
    this.writer.onDrained = () => {
      this.drainedMs = this.planes.clock.monotonicMs();
      for (const choice of this.#choices) choice.returnCredit();
    };
    while (this.#dispatched < this.#context.window && this.#dispatchNext());
  }

  get choices(): readonly ChoiceStream[] {
    return this.#choices;
  }

  /** Whether the client has left so much unread that workers get no more credit. */
  get isBehind(): boolean {
    return this.writer.bufferedBytes > CREDIT_PAUSE_BYTES;
  }

  get promptTokens(): number {
    return this.#plan.prompts.reduce((sum, prompt) => sum + prompt.request.tokenIds.length, 0);
  }

  /** False when there is no further choice. */
  #dispatchNext(): boolean {
    const choice = this.#choices[this.#dispatched];
    if (choice === undefined || this.#ended) return false;
    const { echoText } = this.#plan.prompts[Math.floor(this.#dispatched / this.#plan.options.n)]!;
    this.#dispatched++;
    if (echoText !== "") choice.prime(echoText);
    if (!this.#ended) choice.dispatch();
    return true;
  }

  /** The client is gone, or does not read: stop all work for it. */
  abandon(error: DynamoError): void {
    if (this.#ended) return;
    this.#cancelChoices(error);
    const { metrics } = this.model;
    if (error.reason === "client-gone") metrics.disconnected.add();
    metrics.cancelled(this.#plan.endpoint, this.#type);
    this.#end("error", error);
  }

  onFirstToken(nowMs: number, instanceId: string, promptTokens: number): void {
    const gauges = this.model.workerGauges.get(instanceId);
    gauges?.lastTimeToFirstToken.set((nowMs - this.#dispatchedMs) / 1_000);
    gauges?.lastInputTokens.set(promptTokens);
    if (this.#firstTokenMs >= 0) return;
    this.#firstTokenMs = nowMs;
    this.stages.leave("dispatch", nowMs - this.#dispatchedMs);
    this.model.metrics.timeToFirstToken.observe((nowMs - this.#context.arrivalMs) / 1_000);
  }

  choiceFinished(_choice: ChoiceStream): void {
    if (this.#ended) return;
    this.#running--;
    if (this.#running > 0) {
      this.writer.flush();
      this.#dispatchNext();
      return;
    }
    this.writer.complete(this.#usage());
    this.#end("success", undefined);
  }

  choiceFailed(_choice: ChoiceStream, thrown: unknown): void {
    this.fail(toDynamoError(thrown));
  }

  /** Ends the whole request with an error that the client sees. */
  fail(error: DynamoError): void {
    if (this.#ended) return;
    this.#cancelChoices(new DynamoError("cancelled", "the request failed"));
    if (error.class === "capacity-exhausted") this.model.metrics.rejected(this.#plan.endpoint);
    this.writer.fail(error);
    this.#end("error", error);
  }

  get #type(): RequestType {
    return this.#plan.options.stream ? "stream" : "unary";
  }

  #cancelChoices(error: DynamoError): void {
    for (const choice of this.#choices) choice.cancel(error);
  }

  #usage(): Usage {
    let cachedTokens = 0;
    // Choices of one prompt share it: its first choice tells what came from the cache.
    for (let i = 0; i < this.#choices.length; i += this.#plan.options.n) cachedTokens += this.#choices[i]!.cachedTokens;
    const isEstimated = this.#choices.some((choice) => choice.isEstimated);
    const usage = { promptTokens: this.promptTokens, cachedTokens, completionTokens: this.#completionTokens() };
    return isEstimated ? { ...usage, isEstimated } : usage;
  }

  #completionTokens(): number {
    return this.#choices.reduce((sum, choice) => sum + choice.tokenCount, 0);
  }

  #end(status: "success" | "error", error: DynamoError | undefined): void {
    this.#ended = true;
    this.#context.permit.release();
    const { metrics, name } = this.model;
    const { planes, arrivalMs, admittedMs } = this.#context;
    const endMs = planes.clock.monotonicMs();
    if (this.#firstTokenMs < 0) this.stages.leave("dispatch", endMs - this.#dispatchedMs);
    metrics.active.add(-1);
    metrics.inflight.add(-1);
    metrics.duration.observe((endMs - arrivalMs) / 1_000);
    metrics.outputTokens.observe(this.#completionTokens());
    const first = this.#choices[0]!;
    if (status === "success") metrics.cachedTokens.observe(first.cachedTokens);
    countRequest(planes.metrics, {
      model: name,
      endpoint: this.#plan.endpoint,
      type: this.#type,
      status,
      errorType: error?.class ?? "",
    });
    this.#endSpan(error, endMs);
    const level = error === undefined || error.class === "cancelled" ? "info" : "warn";
    if (!planes.logger.isLevelEnabled(level)) return;
    planes.logger[level](
      {
        x_request_id: this.requestId,
        ...(this.span === undefined ? {} : { trace_id: this.span.traceId }),
        model: name,
        status,
        ...(error === undefined
          ? {}
          : { reason: error.reason, error: error.publicMessage, diagnostic: error.diagnostic }),
        worker: first.instanceId,
        prompt_tokens: this.promptTokens,
        completion_tokens: this.#completionTokens(),
        cached_tokens: first.cachedTokens,
        migrations: this.#choices.reduce((sum, choice) => sum + choice.migrations, 0),
        ms: {
          queue: round(admittedMs - arrivalMs),
          preprocess: round(this.#dispatchedMs - admittedMs),
          engine_queue: round(first.queueMs),
          prefill: round(first.prefillMs),
          first_token: round(this.#firstTokenMs < 0 ? -1 : this.#firstTokenMs - arrivalMs),
          decode: round(first.decodeMs),
          detokenize: round(this.#choices.reduce((sum, choice) => sum + choice.detokenizeMs, 0)),
          total: round(endMs - arrivalMs),
        },
      },
      "request ended",
    );
  }

  #endSpan(error: DynamoError | undefined, endMs: number): void {
    const { span } = this;
    if (span === undefined) return;
    if (this.#firstTokenMs >= 0) span.child("sse", { startMs: this.#firstTokenMs }).end(endMs);
    span.set({
      "dynamo.model": this.model.name,
      "dynamo.prompt_tokens": this.#plan.prompts.reduce((sum, prompt) => sum + prompt.request.tokenIds.length, 0),
      "dynamo.completion_tokens": this.#completionTokens(),
      "dynamo.cached_tokens": this.#choices[0]!.cachedTokens,
      "dynamo.detokenize_ms": round(this.#choices.reduce((sum, choice) => sum + choice.detokenizeMs, 0)),
    });
    if (error !== undefined) span.fail(error.reason);
    span.end(endMs);
  }
}

function round(milliseconds: number): number {
  return Math.round(milliseconds * 100) / 100;
}

/** A sampled answer has a seed in any case: another worker must be able to go on with it. */
function seeded(request: PreprocessedRequest, random: Random): PreprocessedRequest {
  const { sampling } = request;
  if (sampling.seed !== undefined || sampling.temperature === 0) return request;
  return { ...request, sampling: { ...sampling, seed: random.nextU32() } };
}

/** The k-th sample of the same prompt: its own seed, derived from the first one's so that a given seed stays repeatable. */
function anotherSample(request: PreprocessedRequest, copy: number): PreprocessedRequest {
  const { seed } = request.sampling;
  const sampling = seed === undefined ? request.sampling : { ...request.sampling, seed: (seed + copy) >>> 0 };
  return { ...request, requestId: `${request.requestId}-${copy}`, sampling };
}
