import { DynamoError, toDynamoError } from "../errors/index.ts";
import { parseTraceparent, type Metrics, type Span } from "../observability/index.ts";
import { featuresOf, lackOf, type EngineFeature, type PreprocessedRequest } from "../protocol/index.ts";
import type { ChatRequest, CompletionRequest, GenerationOptions } from "../protocol/openai/index.ts";
import type { Planes } from "../runtime/component/index.ts";
import { randomId64 } from "../std/index.ts";
import { AdmissionGate } from "./admission.ts";
import type { FrontendConfig } from "./config.ts";
import { StageMetrics, countRequest, type Endpoint, type RequestType } from "./frontend-metrics.ts";
import { GenerationRun, type GenerationPlan, type PlannedPrompt } from "./generation-run.ts";
import type { Exchange } from "./http/index.ts";
import { LiveRequests, tenantOf, type LiveRequest } from "./live-requests.ts";
import type { ModelRegistry, ServedModel } from "./model-registry.ts";
import {
  ChatStreamWriter,
  ChatWholeWriter,
  CompletionStreamWriter,
  CompletionWholeWriter,
  isObject,
  readChatRequest,
  readCompletionRequest,
  type AnswerDetails,
  type Nvext,
} from "./openai/index.ts";
import type { Operators } from "./operator.ts";
import type { ResponseWriter } from "./response-writer.ts";
import { nvextJson } from "./route-api.ts";
import { readRequestTimeout, readRoutingHints, type RoutingHints } from "./routing-hints.ts";

/**
 * The walk of one request, one call per arrow: HTTP -> validate -> template + tokenize -> route -> decode ->
 * detokenize + stop -> SSE. docs/walk.md tells it with the error, metric and way back of each arrow; a test compares the
 * step marks here and in choice-stream.ts with that page.
 */
export class Pipeline {
  readonly #planes: Planes;
  readonly #config: FrontendConfig;
  readonly #models: ModelRegistry;
  readonly #stages: StageMetrics;
  /** In any step of the walk. */
  readonly live: LiveRequests;
  readonly #operators: Operators;
  #draining = false;
  /** Answer ids: unique within this process by count, among processes by prefix. */
  readonly #idPrefix: string;
  #answers = 0;

  constructor(planes: Planes, config: FrontendConfig, models: ModelRegistry, operators: Operators) {
    this.#planes = planes;
    this.#idPrefix = `${randomId64(planes.random).toString(36)}-`;
    this.#config = config;
    this.#models = models;
    this.#operators = operators;
    this.#stages = new StageMetrics(planes.metrics);
    const gate = new AdmissionGate({
      limit: config.limits.concurrentRequests,
      queueLimit: config.limits.queuedRequests,
      clock: planes.clock,
      queuedGauge: planes.metrics.gauge("dynamo_frontend_queued_requests").labels(),
    });
    models.onCapacity = () => gate.drain();
    this.live = new LiveRequests({ clock: planes.clock, gate, limits: config.limits, metrics: planes.metrics });
  }

  /** From now on new requests get `draining`. */
  beginDrain(): void {
    this.#draining = true;
  }

  // Step 1: HTTP.
  chat(exchange: Exchange): Promise<void> {
    return this.#serve(exchange, "chat_completions", (body) => {
      // Step 2: validate.
      const request = readChatRequest(body, this.#config.limits);
      const Writer = request.options.stream ? ChatStreamWriter : ChatWholeWriter;
      return {
        options: request.options,
        model: request.model,
        prompts: 1,
        nvext: request.nvext,
        plan: (model, hints) => this.#planChat(model, request, exchange.requestId, hints),
        writer: (details) => new Writer(details),
      };
    });
  }

  /** `POST /v1/route`: where the prompt of a chat or completion request would go now; nothing is run or booked. */
  async previewRoute(exchange: Exchange): Promise<void> {
    this.#operators.check(exchange);
    const { body } = exchange;
    const isChat = isObject(body) && body["messages"] !== undefined;
    const request = isChat
      ? readChatRequest(body, this.#config.limits)
      : readCompletionRequest(body, this.#config.limits);
    const hints = readRoutingHints(exchange, request.nvext, this.#operators);
    const model = this.#find(request.model, isChat ? "chat_completions" : "completions");
    const prompts =
      "messages" in request
        ? await this.#planChat(model, request, exchange.requestId, hints)
        : await this.#planCompletion(model, request, exchange.requestId, hints);
    const decisions = await Promise.all(
      prompts.map(async ({ request: prompt }) =>
        (model.remote ?? model.router).preview({
          ...hints.route,
          requestId: prompt.requestId,
          tokenIds: prompt.tokenIds,
          cacheNamespace: hints.cacheNamespace,
        }),
      ),
    );
    exchange.json(200, { object: "route.preview", model: model.name, decisions });
  }

  completions(exchange: Exchange): Promise<void> {
    return this.#serve(exchange, "completions", (body) => {
      const request = readCompletionRequest(body, this.#config.limits);
      const Writer = request.options.stream ? CompletionStreamWriter : CompletionWholeWriter;
      return {
        options: request.options,
        model: request.model,
        prompts: request.prompts.length,
        nvext: request.nvext,
        plan: (model, hints) => this.#planCompletion(model, request, exchange.requestId, hints),
        writer: (details) => new Writer(details),
      };
    });
  }

  async #serve(exchange: Exchange, endpoint: Endpoint, read: (body: unknown) => FamilyRequest): Promise<void> {
    let live: LiveRequest | undefined;
    let type: RequestType = "unary";
    let served: ServedModel | undefined;
    const { clock } = this.#planes;
    const traceparent = traceparentOf(exchange);
    const span = this.#planes.tracing?.span("http-request", traceparent, {
      kind: "server",
      startMs: exchange.arrivalMs,
      attributes: {
        "http.request.method": "POST",
        "http.route": exchange.path,
        "dynamo.request_id": exchange.requestId,
      },
    });
    try {
      if (this.#draining) throw new DynamoError("draining", "the server is shutting down");
      const request = read(exchange.body);
      // The exchange lives as long as the answer; the prompt must not.
      exchange.body = undefined;
      type = request.options.stream ? "stream" : "unary";
      const hints = readRoutingHints(exchange, request.nvext, this.#operators);
      const model = this.#find(request.model, endpoint);
      served = model;
      live = this.#enter(exchange, endpoint, request, model, hints);
      if (live.admittedMs < 0) await live.admission;
      this.#stages.enter("preprocess");
      span?.child("validate", { startMs: exchange.arrivalMs }).end(live.admittedMs);
      let prompts: readonly PlannedPrompt[];
      let nowMs: number;
      try {
        // Step 3: template + tokenize.
        prompts = await request.plan(served, hints);
      } finally {
        nowMs = clock.monotonicMs();
        this.#stages.leave("preprocess", nowMs - live.admittedMs);
        span?.child("preprocess", { startMs: live.admittedMs }).end(nowMs);
      }
      live.check(nowMs);
      const plan: GenerationPlan = { endpoint, model: served, options: request.options, prompts, hints };
      const writer = request.writer({
        exchange,
        id: `${this.#idPrefix}${(this.#answers++).toString(36)}`,
        model: served.name,
        created: Math.floor(clock.wallMs() / 1_000),
        choices: prompts.length * request.options.n,
        includeUsage: request.options.includeUsage,
        ...(hints.extraFields.length === 0
          ? {}
          : { nvext: () => nvextJson(model.remote ?? model.router, exchange.requestId, hints.extraFields) }),
      });
      this.#run(live, plan, writer, nowMs, { span, traceparent });
    } catch (thrown) {
      live?.release();
      const error = toDynamoError(thrown);
      span?.fail(error.reason);
      span?.end(clock.monotonicMs());
      this.#refuse(exchange, error, endpoint, type, served);
    }
  }

  /** At the gate: with its places, or waiting for them. */
  #enter(
    exchange: Exchange,
    endpoint: Endpoint,
    { options, prompts, nvext }: FamilyRequest,
    model: ServedModel,
    { route }: RoutingHints,
  ): LiveRequest {
    const timeoutMs = Math.min(this.#config.limits.requestTimeoutMs, readRequestTimeout(exchange, nvext));
    const live = this.live.enter({
      exchange,
      endpoint,
      model,
      isStream: options.stream,
      tenant: tenantOf(exchange, this.#operators),
      strictPriority: route.strictPriority ?? 0,
      priorityJump: route.priorityJump ?? 0,
      choices: prompts * options.n,
      deadlineMs: exchange.arrivalMs + timeoutMs,
    });
    exchange.onGone = (reason) => live.abandon(new DynamoError(reason, GONE[reason]));
    return live;
  }

  #run(
    live: LiveRequest,
    plan: GenerationPlan,
    writer: ResponseWriter,
    nowMs: number,
    trace: { readonly span: Span | undefined; readonly traceparent: string },
  ): void {
    const { exchange } = live;
    const run = new GenerationRun(plan, {
      planes: this.#planes,
      stages: this.#stages,
      requestId: exchange.requestId,
      ...trace,
      arrivalMs: exchange.arrivalMs,
      admittedMs: live.admittedMs,
      deadlineMs: live.deadlineMs,
      permit: live,
      window: live.cost,
      writer,
    });
    this.live.start(live, run, nowMs);
    // Steps 4 to 9 happen per choice, in choice-stream.ts.
    run.start();
  }

  #find(name: string, endpoint: Endpoint): ServedModel {
    const model = this.#models.find(name);
    if (model === undefined) {
      throw new DynamoError("model-not-found", `The model \`${name.slice(0, 200)}\` does not exist`, {
        param: "model",
      });
    }
    if (endpoint === "chat_completions" && !model.card.types.includes("chat")) {
      throw new DynamoError("unsupported-field", `The model \`${name}\` has no chat template; use /v1/completions`, {
        param: "model",
      });
    }
    return model;
  }

  async #planChat(
    model: ServedModel,
    request: ChatRequest,
    requestId: string,
    hints: RoutingHints,
  ): Promise<PlannedPrompt[]> {
    const { preprocessor } = model;
    const { tokenIds, templateMs, tokenizeMs } = await preprocessor.chatSliced(request);
    model.metrics.template.observe(templateMs / 1_000);
    model.metrics.tokenize.observe(tokenizeMs / 1_000);
    return [{ request: this.#engineRequest(model, request.options, tokenIds, requestId, true, hints), echoText: "" }];
  }

  async #planCompletion(
    model: ServedModel,
    request: CompletionRequest,
    requestId: string,
    hints: RoutingHints,
  ): Promise<PlannedPrompt[]> {
    const planned: PlannedPrompt[] = [];
    for (const [index, prompt] of request.prompts.entries()) {
      const startMs = this.#planes.clock.monotonicMs();
      const tokenIds = await model.preprocessor.encodePromptSliced(prompt);
      model.metrics.tokenize.observe((this.#planes.clock.monotonicMs() - startMs) / 1_000);
      const id = index === 0 ? requestId : `${requestId}-p${index}`;
      const engineRequest = this.#engineRequest(model, request.options, tokenIds, id, false, hints);
      const wantsPromptLogprobs = request.echo && request.options.topLogprobs >= 0;
      const output = { ...engineRequest.output, promptLogprobs: wantsPromptLogprobs };
      let echoText = "";
      if (request.echo) echoText = typeof prompt === "string" ? prompt : model.preprocessor.decode(prompt);
      planned.push({ request: { ...engineRequest, output }, echoText });
    }
    return planned;
  }

  #engineRequest(
    model: ServedModel,
    options: GenerationOptions,
    tokenIds: Uint32Array,
    requestId: string,
    isChat: boolean,
    hints: RoutingHints,
  ): PreprocessedRequest {
    const { preprocessor } = model;
    const request: PreprocessedRequest = {
      requestId,
      model: model.name,
      tokenIds,
      sampling: options.sampling,
      stop: {
        maxTokens: preprocessor.resolveMaxTokens(tokenIds.length, options.maxTokens, isChat),
        minTokens: options.minTokens,
        stopTokenIds: preprocessor.stopTokenIds(options),
        ignoreEos: options.ignoreEos,
      },
      output: { topLogprobs: options.topLogprobs, promptLogprobs: false },
      priority: hints.route.priorityJump ?? 0,
      ...(options.answerForm === undefined ? {} : { answerForm: options.answerForm }),
      cacheNamespace: hints.cacheNamespace,
    };
    checkFeatures(model, request);
    return request;
  }

  /** A request that ended before it had a run: answered, counted, logged. */
  #refuse(
    exchange: Exchange,
    error: DynamoError,
    endpoint: Endpoint,
    type: RequestType,
    model: ServedModel | undefined,
  ): void {
    const { metrics, logger } = this.#planes;
    exchange.sendError(error);
    if (error.class === "capacity-exhausted") {
      model?.metrics.rejected(endpoint);
      countAdmissionRejection(metrics, model?.name ?? "unknown");
    }
    countRequest(metrics, { model: model?.name ?? "unknown", endpoint, type, status: "error", errorType: error.class });
    const line = {
      x_request_id: exchange.requestId,
      reason: error.reason,
      error: error.publicMessage,
      diagnostic: error.diagnostic,
    };
    if (error.class === "internal") logger.error(line, "request refused");
    else logger.info(line, "request refused");
  }
}

const GONE = {
  "client-gone": "the client closed the connection before its answer was complete",
  "slow-reader": "the client left too many bytes unread and was cut off",
} as const;

/** What validation makes of a body, whichever API family it belongs to. */
interface FamilyRequest {
  readonly model: string;
  readonly options: GenerationOptions;
  readonly prompts: number;
  readonly nvext: Nvext | undefined;
  plan(model: ServedModel, hints: RoutingHints): Promise<readonly PlannedPrompt[]>;
  writer(details: AnswerDetails): ResponseWriter;
}

/** The client's trace context, handed on as it is when no spans are made here; what W3C calls invalid is left out. */
function traceparentOf(exchange: Exchange): string {
  const header = exchange.header("traceparent");
  return header === undefined || parseTraceparent(header) === undefined ? "" : header;
}

function countAdmissionRejection(metrics: Metrics, model: string): void {
  metrics.counter("dynamo_frontend_admission_rejection_total").labels("request_concurrency", model).add();
}

/** Throws `unsupported-field` for what none of the model's workers can do; some of them is enough. */
function checkFeatures(model: ServedModel, request: PreprocessedRequest): void {
  const features = featuresOf(request);
  if (features.length === 0 || model.cards.size === 0) return;
  let lack: EngineFeature | undefined;
  for (const card of model.cards.values()) {
    if (card.role === "prefill") continue;
    lack = lackOf(card, features);
    if (lack === undefined) return;
  }
  if (lack === undefined) return;
  const { param, text } = LACKS[lack];
  throw new DynamoError("unsupported-field", text(model), { param });
}

const LACKS: Readonly<Record<EngineFeature, { readonly param: string; readonly text: (model: ServedModel) => string }>> = {
  "answer-forms": { param: "response_format", text: ({ name }) => `response_format: the engine of ${name} serves only {"type": "text"}` },
  logprobs: { param: "logprobs", text: ({ name, card }) => `logprobs: the ${card.engine} engine of ${name} tells none` },
  "prompt-logprobs": { param: "echo", text: ({ name, card }) => `echo: the ${card.engine} engine of ${name} tells no logprobs of prompts` },
  "cache-namespaces": { param: "nvext.cache_salt", text: ({ name, card }) => `nvext.cache_salt: the ${card.engine} engine of ${name} cannot keep caches apart` },
  "min-tokens": { param: "min_tokens", text: ({ name, card }) => `min_tokens: the ${card.engine} engine of ${name} does not know it` },
}; // prettier-ignore
