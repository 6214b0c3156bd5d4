import { createHash } from "node:crypto";
import { DynamoError } from "../errors/index.ts";
import type { CounterChild, Metrics } from "../observability/index.ts";
import { TimerWheel, WheelTimer, type Clock, type Expiring } from "../std/index.ts";
import type { AdmissionGate, GateEntry } from "./admission.ts";
import type { ChoiceStream } from "./choice-stream.ts";
import type { FrontendLimits } from "./config.ts";
import type { Endpoint } from "./frontend-metrics.ts";
import type { GenerationRun } from "./generation-run.ts";
import type { Exchange } from "./http/index.ts";
import type { ServedModel } from "./model-registry.ts";
import type { Operators } from "./operator.ts";

/**
 * Every request from the moment it is valid to its end: its places at the gate, its deadline, its stage limits, and what
 * operators see of it. One object and one timer of a wheel each; nothing here runs per token. When the timer fires, the
 * times that the request's parts keep anyway are looked at, and it is set anew for the next moment that could matter.
 *
 *     gate_queue ──> preprocess ──> route_queue ──> dispatch ──> decode ──> (gone)
 *         │ --queue-timeout-secs        │ the same      │             │ --stream-idle-timeout-secs
 *         └ 529                         └ 529           │             └ another worker, or 504
 *                                                       └ --first-token-timeout-secs: another worker, or 504
 *
 * Whatever the stage, at the deadline the request ends with `request-deadline`. A stream whose client does not read
 * (`write`) has no idle limit: its worker is not to blame, and the HTTP server has limits of its own for that.
 */
export type RequestStage = "gate_queue" | "preprocess" | "route_queue" | "dispatch" | "decode" | "write";

export interface LiveRequestDetails {
  readonly exchange: Exchange;
  readonly endpoint: Endpoint;
  readonly model: ServedModel;
  readonly isStream: boolean;
  readonly tenant: string;
  readonly strictPriority: number;
  readonly priorityJump: number;
  /** Answers it asks for. */
  readonly choices: number;
  readonly deadlineMs: number;
}

/** A request as operators see it; times are milliseconds. */
export interface LiveRequestView {
  readonly id: string;
  readonly model: string;
  readonly endpoint: string;
  readonly stream: boolean;
  readonly tenant: string;
  readonly age_ms: number;
  readonly deadline_in_ms: number;
  /** Of the choice that is furthest behind. */
  readonly stage: RequestStage;
  /** Who has it: `frontend`, `router`, `client`, or a worker's instance id. */
  readonly owner: string;
  /** Since it entered the stage; while decoding, since the last token. */
  readonly stage_ms: number;
  readonly choices: number;
  readonly prompt_tokens: number;
  readonly output_tokens: number;
}

export class LiveRequest implements GateEntry, Expiring {
  readonly exchange: Exchange;
  readonly endpoint: Endpoint;
  readonly model: ServedModel;
  readonly isStream: boolean;
  readonly deadlineMs: number;
  readonly tenant: string;
  readonly strictPriority: number;
  readonly priorityJump: number;
  readonly choices: number;
  readonly cost: number;
  patienceMs = Infinity;
  readonly timer = new WheelTimer(this);
  /** When it was let in; -1 = it waits. */
  admittedMs = -1;
  run: GenerationRun | undefined = undefined;
  order = 0;
  key = 0;
  position = -1;
  readonly #owner: LiveRequests;
  #admission: PromiseWithResolvers<void> | undefined = undefined;
  /** Ended from outside while nothing could be told. */
  #cancelled: DynamoError | undefined = undefined;
  #isOver = false;

  constructor(owner: LiveRequests, details: LiveRequestDetails) {
    this.#owner = owner;
    this.exchange = details.exchange;
    this.endpoint = details.endpoint;
    this.model = details.model;
    this.isStream = details.isStream;
    this.tenant = details.tenant;
    this.strictPriority = details.strictPriority;
    this.priorityJump = details.priorityJump;
    this.choices = details.choices;
    this.deadlineMs = details.deadlineMs;
    this.cost = details.choices === 1 ? 1 : Math.max(1, Math.min(details.choices, details.model.places.limit));
  }

  get isOver(): boolean {
    return this.#isOver;
  }

  /** Resolves with its places at the gate; rejects when it is refused, late, cancelled or left by its client. */
  get admission(): Promise<void> {
    this.#admission ??= Promise.withResolvers<void>();
    return this.#admission.promise;
  }

  onAdmitted(): void {
    this.#owner.admitted(this);
    this.#admission?.resolve();
  }

  onRefused(error: DynamoError): void {
    this.#admission?.reject(error);
  }

  onExpire(): void {
    this.#owner.expired(this);
  }

  /** Ends it with an error, whatever its stage. */
  cancel(error: DynamoError): void {
    if (this.#isOver) return;
    if (this.position >= 0) {
      this.#owner.leaveGate(this);
      this.#admission?.reject(error);
    } else if (this.run === undefined) this.#cancelled ??= error;
    else this.run.fail(error);
  }

  /** Its client is gone, or does not read. */
  abandon(error: DynamoError): void {
    if (this.run === undefined) this.cancel(error);
    else this.run.abandon(error);
  }

  /** Between two steps: throws what it was cancelled with, or that its time is over. */
  check(nowMs: number): void {
    if (this.#cancelled !== undefined) throw this.#cancelled;
    if (nowMs >= this.deadlineMs) throw deadlinePassed("before its prompt was read");
  }

  /** It ended: its places are free again. The first call counts. */
  release(): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#owner.left(this);
  }
}

export interface LiveRequestsOptions {
  readonly clock: Clock;
  readonly gate: AdmissionGate;
  readonly limits: FrontendLimits;
  readonly metrics: Metrics;
}

export class LiveRequests {
  readonly #clock: Clock;
  readonly #gate: AdmissionGate;
  readonly #queueMs: number;
  readonly #firstTokenMs: number;
  readonly #idleMs: number;
  /** The shortest stage limit: how long a stage can change without being looked at. */
  readonly #shortestMs: number;
  readonly #timeouts: (model: string, stage: string) => CounterChild;
  readonly #wheel: TimerWheel;
  /** In the order in which they came. */
  readonly #requests = new Set<LiveRequest>();
  #idleWaiters: (() => void)[] = [];

  constructor({ clock, gate, limits, metrics }: LiveRequestsOptions) {
    this.#clock = clock;
    this.#gate = gate;
    this.#queueMs = orNever(limits.queueTimeoutMs);
    this.#firstTokenMs = orNever(limits.firstTokenTimeoutMs);
    this.#idleMs = orNever(limits.idleTimeoutMs);
    this.#shortestMs = Math.min(this.#queueMs, this.#firstTokenMs, this.#idleMs);
    const counter = metrics.counter("dynamo_frontend_stage_timeouts_total");
    this.#timeouts = (model, stage) => counter.labels(model, stage);
    this.#wheel = new TimerWheel({ clock });
  }

  get size(): number {
    return this.#requests.size;
  }

  /** Resolves when there is none. */
  async idle(): Promise<void> {
    while (this.#requests.size > 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#idleWaiters.push(resolve);
      await promise;
    }
  }

  cancelAll(error: DynamoError): void {
    for (const request of this.#requests) request.cancel(error);
    this.#wheel.close();
  }

  /** With its places, or waiting for them: then `admission` must be awaited at once. Throws `too-many-requests`. */
  enter(details: LiveRequestDetails): LiveRequest {
    const request = new LiveRequest(this, details);
    const nowMs = this.#clock.monotonicMs();
    if (nowMs >= request.deadlineMs) throw deadlinePassed("before it was let in");
    if (this.#gate.tryEnter(request.model.places, request.cost)) request.admittedMs = nowMs;
    else {
      request.patienceMs = Math.min(this.#queueMs, request.deadlineMs - nowMs);
      this.#gate.enter(request.model.places, request);
      this.#wheel.add(request.timer, request.patienceMs);
    }
    this.#requests.add(request);
    return request;
  }

  /** From here on the stage limits count. */
  start(request: LiveRequest, run: GenerationRun, nowMs: number): void {
    request.run = run;
    this.#wheel.add(request.timer, Math.min(this.#shortestMs, request.deadlineMs - nowMs));
  }

  /** The oldest, oldest first. */
  view(limit: number): LiveRequestView[] {
    const nowMs = this.#clock.monotonicMs();
    const views: LiveRequestView[] = [];
    for (const request of this.#requests) {
      if (views.length === limit) break;
      views.push(viewOf(request, nowMs));
    }
    return views;
  }

  /** Ends those with that id with `error`; returns how many. */
  cancel(id: string, error: DynamoError): number {
    let count = 0;
    for (const request of this.#requests) {
      if (request.exchange.requestId !== id) continue;
      request.cancel(error);
      count++;
    }
    return count;
  }

  // ---- For requests ----

  admitted(request: LiveRequest): void {
    this.#wheel.cancel(request.timer);
    request.admittedMs = this.#clock.monotonicMs();
  }

  leaveGate(request: LiveRequest): void {
    this.#gate.leave(request.model.places, request);
  }

  left(request: LiveRequest): void {
    this.#wheel.cancel(request.timer);
    this.#requests.delete(request);
    if (request.admittedMs >= 0) this.#gate.release(request.model.places, request.cost);
    if (this.#requests.size > 0) return;
    const waiters = this.#idleWaiters;
    this.#idleWaiters = [];
    for (const resolve of waiters) resolve();
  }

  expired(request: LiveRequest): void {
    const nowMs = this.#clock.monotonicMs();
    if (nowMs >= request.deadlineMs) {
      request.cancel(deadlinePassed("before its answer was complete"));
      return;
    }
    if (request.run === undefined) {
      this.#timeouts(request.model.name, "queue").add();
      request.cancel(this.#queuedTooLong(request, nowMs));
      return;
    }
    let nextMs = Math.min(request.deadlineMs, nowMs + this.#shortestMs);
    for (const choice of request.run.choices) {
      if (!choice.ended) nextMs = Math.min(nextMs, this.#checkChoice(request, request.run, choice, nowMs));
      if (request.isOver) return;
    }
    this.#wheel.add(request.timer, nextMs - nowMs);
  }

  /** Acts on the limit of the choice's stage if it is over; returns when it will be. */
  #checkChoice(request: LiveRequest, run: GenerationRun, choice: ChoiceStream, nowMs: number): number {
    const stage = stageOf(run, choice);
    const sinceMs = stage === "decode" ? Math.max(choice.sinceMs, run.drainedMs) : choice.sinceMs;
    const limitMs = this.#limitOf(stage);
    if (nowMs < sinceMs + limitMs) return sinceMs + limitMs;
    const { name } = request.model;
    if (stage === "route_queue") {
      this.#timeouts(name, "queue").add();
      run.fail(this.#queuedTooLong(request, nowMs));
    } else if (stage === "dispatch") {
      this.#timeouts(name, "first_token").add();
      choice.overdue(
        new DynamoError("first-token-timeout", "the worker gave no first token in time", {
          diagnostic: `worker ${choice.instanceId}, ${limitMs} ms`,
        }),
      );
    } else {
      this.#timeouts(name, "idle").add();
      choice.overdue(
        new DynamoError("stream-idle-timeout", "the worker gave no further token in time", {
          diagnostic: `worker ${choice.instanceId}, ${limitMs} ms`,
        }),
      );
    }
    return nowMs + limitMs;
  }

  #limitOf(stage: RequestStage): number {
    if (stage === "route_queue") return this.#queueMs;
    if (stage === "dispatch") return this.#firstTokenMs;
    return stage === "decode" ? this.#idleMs : Infinity;
  }

  #queuedTooLong({ model }: LiveRequest, nowMs: number): DynamoError {
    return new DynamoError("queue-timeout", "the server is at capacity: the request waited too long for its turn", {
      diagnostic: `${this.#queueMs} ms`,
      retryAfterMs: model.places.rate.retryAfterMs(nowMs),
    });
  }
}

function orNever(limitMs: number): number {
  return limitMs === 0 ? Infinity : limitMs;
}

function deadlinePassed(when: string): DynamoError {
  return new DynamoError("request-deadline", `the request's deadline passed ${when}`);
}

/** Of one choice that has not ended. */
function stageOf(run: GenerationRun, choice: ChoiceStream): RequestStage {
  const stage = choice.stage;
  return stage === "decode" && run.isBehind ? "write" : stage;
}

const ORDER: readonly RequestStage[] = ["gate_queue", "preprocess", "route_queue", "dispatch", "decode", "write"];

function viewOf(request: LiveRequest, nowMs: number): LiveRequestView {
  const { exchange, model, run } = request;
  let stage: RequestStage = request.admittedMs < 0 ? "gate_queue" : "preprocess";
  let owner = "frontend";
  let sinceMs = request.admittedMs < 0 ? exchange.arrivalMs : request.admittedMs;
  let outputTokens = 0;
  if (run !== undefined) {
    stage = "write";
    owner = "client";
    sinceMs = run.drainedMs;
    for (const choice of run.choices) {
      outputTokens += choice.tokenCount;
      if (choice.sinceMs === Infinity) continue;
      const own = choice.ended ? "write" : stageOf(run, choice);
      if (ORDER.indexOf(own) > ORDER.indexOf(stage) || own === "write") continue;
      if (own === stage && sinceMs <= choice.sinceMs) continue;
      stage = own;
      sinceMs = choice.sinceMs;
      owner = own === "route_queue" ? "router" : choice.instanceId;
    }
  }
  return {
    id: exchange.requestId,
    model: model.name,
    endpoint: request.endpoint,
    stream: request.isStream,
    tenant: tenantLabel(request.tenant),
    age_ms: Math.round(nowMs - exchange.arrivalMs),
    deadline_in_ms: Math.round(request.deadlineMs - nowMs),
    stage,
    owner,
    stage_ms: Math.round(nowMs - Math.max(sinceMs, exchange.arrivalMs)),
    choices: request.choices,
    prompt_tokens: run?.promptTokens ?? 0,
    output_tokens: outputTokens,
  };
}

/** Keys are shown as hashes. */
function tenantLabel(tenant: string): string {
  if (tenant === "") return "default";
  if (!tenant.startsWith(KEY_PREFIX)) return tenant;
  return `key-${createHash("sha256").update(tenant.slice(KEY_PREFIX.length)).digest("hex").slice(0, 12)}`;
}

const KEY_PREFIX = "key ";

/**
 * Whose share of the gate a request takes: what a caller that may says (`x-tenant-id`), else the key it sent, else the one
 * tenant of all others. Kept in memory as it came and only compared; hashed where somebody looks.
 */
export function tenantOf(exchange: Exchange, operators: Operators): string {
  const named = exchange.header("x-tenant-id");
  if (named !== undefined && operators.includes(exchange)) {
    if (!TENANT_ID.test(named)) {
      throw new DynamoError("invalid-field", "x-tenant-id: expected 1 to 128 visible ASCII characters", {
        param: "x-tenant-id",
      });
    }
    return named;
  }
  const key = exchange.header("authorization");
  return key === undefined ? "" : `${KEY_PREFIX}${key}`;
}

const TENANT_ID = /^[\x21-\x7e]{1,128}$/;
