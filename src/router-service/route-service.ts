import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { CounterChild, GaugeChild, Metrics } from "../observability/index.ts";
import {
  isWorkerFault,
  type DecisionExplanation,
  type PoolOutlook,
  type RequestEnd,
  type Router,
  type RoutingDecision,
  type WaitingRoute,
} from "../router/index.ts";
import type { EndpointHandler, ServerStream, ServerStreamHandler } from "../runtime/request-plane/index.ts";
import {
  ADD_OUTPUT_ENDPOINT,
  EXPLAIN_ENDPOINT,
  FREE_ENDPOINT,
  MAX_ANSWER_BYTES,
  OUTLOOK_ENDPOINT,
  PREFILL_DONE_ENDPOINT,
  PREVIEW_ENDPOINT,
  ROUTE_ENDPOINT,
  STATE_ENDPOINT,
  decodeBookingUpdate,
  decodeRequestId,
  encodeJson,
  type BookingUpdate,
  type DecisionMessage,
  type Outlooks,
} from "./messages.ts";
import { decodeRouteQuery, type RouteQuery } from "./route-query.ts";
import type { RoutedModel, RoutedModels } from "./routed-models.ts";

/**
 * The router behind the request plane: a stream in becomes a booking, and the booking lives as long as the stream. Owns
 * the live bookings; each leaves exactly once: freed by its frontend, or with the stream when that frontend is gone, gave
 * up or ran out of time.
 */
export interface RouteServiceOptions {
  readonly models: RoutedModels;
  readonly metrics: Metrics;
  /** Of this service: part of the bookings' names, so that a restarted one knows none of its predecessor's. */
  readonly instanceId: string;
  readonly routerMode: string;
  /** Generated tokens are counted as blocks. */
  readonly trackOutputBlocks: boolean;
  /** Live bookings and waiting requests; one more is refused with `too-many-requests`. @default 65536 */
  readonly maxBookings?: number;
}

/** An explanation that travels with its decision; larger ones lose their candidates and are had by asking. */
const MAX_SENT_EXPLANATION_BYTES = 128 * 1024;
const CANDIDATES_LEFT_OUT = "explanation: candidates left out, ask for it by request id";

export class RouteService {
  readonly #options: RouteServiceOptions;
  readonly #held = new Map<string, HeldRoute>();
  readonly #maxBookings: number;
  readonly #gauge: GaugeChild;
  readonly #dropped: CounterChild;
  #count = 0;

  constructor(options: RouteServiceOptions) {
    this.#options = options;
    this.#maxBookings = options.maxBookings ?? 65_536;
    this.#gauge = options.metrics.gauge("dynamo_router_service_bookings").labels();
    this.#dropped = options.metrics.counter("dynamo_router_service_bookings_dropped_total").labels();
  }

  /** Bookings that are alive, and requests that wait for one. */
  get bookingCount(): number {
    return this.#held.size;
  }

  endpoints(): { readonly name: string; readonly handler: EndpointHandler }[] {
    return [
      { name: ROUTE_ENDPOINT, handler: (stream, payload) => this.#route(stream, payload) },
      { name: PREFILL_DONE_ENDPOINT, handler: this.#update((held, update) => held.firstToken(update)) },
      { name: ADD_OUTPUT_ENDPOINT, handler: this.#update((held, { tokens }) => held.addTokens(tokens)) },
      { name: FREE_ENDPOINT, handler: this.#update((held, { outcome, tokens }) => held.free(outcome, tokens)) },
      { name: OUTLOOK_ENDPOINT, handler: unary((payload) => this.#outlook(payload)) },
      { name: PREVIEW_ENDPOINT, handler: unary((payload) => this.#preview(payload)) },
      { name: EXPLAIN_ENDPOINT, handler: unary((payload) => ({ decisions: this.#explain(decodeRequestId(payload)) })) },
      { name: STATE_ENDPOINT, handler: unary(() => this.state()) },
    ];
  }

  /** What runs where, as this router sees it. */
  state(): Record<string, unknown> {
    return {
      object: "router.state",
      instance_id: this.#options.instanceId,
      router_mode: this.#options.routerMode,
      bookings: this.#held.size,
      models: this.#options.models.all().map(modelState),
    };
  }

  /** The booking is gone, freed or not; called by it, once. */
  left(held: HeldRoute, isDropped: boolean): void {
    if (!this.#held.delete(held.booking)) return;
    this.#gauge.set(this.#held.size);
    if (isDropped) this.#dropped.add();
  }

  #model(query: RouteQuery): RoutedModel {
    const model = this.#options.models.find(query.model);
    if (model === undefined) {
      throw new DynamoError("no-workers", "the router knows no worker that serves the model", {
        diagnostic: `model ${query.model}`,
      });
    }
    const { blockSizeTokens } = model.card;
    if (query.prompt === "hashes" && query.blockSizeTokens !== blockSizeTokens) {
      throw new DynamoError("malformed-frame", "the question to the router has another block size than the model", {
        diagnostic: `expected ${blockSizeTokens}, got ${query.blockSizeTokens}`,
      });
    }
    return model;
  }

  #route(stream: ServerStream, payload: Uint8Array): ServerStreamHandler {
    if (this.#held.size >= this.#maxBookings) {
      throw new DynamoError("too-many-requests", `the router holds ${this.#held.size} bookings already`, {
        retryAfterMs: 1_000,
      });
    }
    const query = decodeRouteQuery(payload);
    const model = this.#model(query);
    const router = poolOf(model, query);
    const routed = router.routeWhenReady({ ...query.request, deadlineMs: stream.deadlineMs });
    const booking = `${this.#options.instanceId}-${(this.#count++).toString(36)}`;
    const explainedId = query.request.explain === true ? query.request.requestId : undefined;
    const held = new HeldRoute(this, { booking, stream, model, router, explainedId });
    this.#held.set(booking, held);
    this.#gauge.set(this.#held.size);
    if ("instanceId" in routed) held.place(routed);
    else held.wait(routed);
    return held;
  }

  decisionMessage(held: HeldRoute, decision: RoutingDecision): DecisionMessage {
    const { instanceId, address, dpRank, policy, reason, candidateCount, overlapBlocks, queuedMs } = decision;
    const { explainedId, model } = held;
    const explanation = explainedId === undefined ? undefined : model.router.explain(explainedId).at(-1);
    return {
      type: "decision",
      booking: held.booking,
      instanceId,
      address,
      dpRank,
      policy,
      reason,
      candidateCount,
      overlapBlocks,
      queuedMs,
      outputStepTokens: this.#options.trackOutputBlocks ? model.card.blockSizeTokens : 0,
      ...(explanation === undefined ? {} : { explanation: withinBytes(explanation) }),
    };
  }

  #update(apply: (held: HeldRoute, update: BookingUpdate) => void): EndpointHandler {
    return unary((payload) => {
      const update = decodeBookingUpdate(payload);
      const held = this.#held.get(update.booking);
      if (held !== undefined) apply(held, update);
      return { known: held !== undefined };
    });
  }

  #preview(payload: Uint8Array): Record<string, unknown> {
    const query = decodeRouteQuery(payload);
    return { decisions: [withinBytes(poolOf(this.#model(query), query).preview(query.request))] };
  }

  #outlook(payload: Uint8Array): Outlooks {
    const query = decodeRouteQuery(payload);
    const { router, prefill } = this.#model(query);
    const of = (pool: Router | undefined): PoolOutlook | null => {
      try {
        return pool?.outlook(query.request) ?? null;
      } catch {
        // Nobody there could take it.
        return null;
      }
    };
    return { decode: of(router), prefill: of(prefill?.router) };
  }

  /** The newest that fit into one answer, oldest first. */
  #explain(requestId: string): DecisionExplanation[] {
    for (const { router } of this.#options.models.all()) {
      const found = router.explain(requestId).toReversed();
      if (found.length === 0) continue;
      let left = MAX_ANSWER_BYTES - 1024;
      const fitting: DecisionExplanation[] = [];
      for (const one of found) {
        const explanation = withinBytes(one);
        left -= encodeJson(explanation).length + 1;
        if (left < 0) break;
        fitting.push(explanation);
      }
      return fitting.toReversed();
    }
    return [];
  }
}

interface HeldRouteDetails {
  readonly booking: string;
  readonly stream: ServerStream;
  readonly model: RoutedModel;
  /** Of the model, or of its prefill workers. */
  readonly router: Router;
  readonly explainedId: string | undefined;
}

/** Throws `no-workers` when there are no prefill workers to choose from. */
function poolOf({ name, router, prefill }: RoutedModel, { request }: RouteQuery): Router {
  if (request.pool !== "prefill") return router;
  if (prefill !== undefined) return prefill.router;
  throw new DynamoError("no-workers", `the router knows no worker that prefills for others of ${name}`);
}

/** One request on its way through the router: waiting, then booked, then gone. */
class HeldRoute implements ServerStreamHandler {
  readonly booking: string;
  readonly model: RoutedModel;
  /** The request id, when its frontend wants the explanation along with the decision. */
  readonly explainedId: string | undefined;
  readonly #router: Router;
  readonly #service: RouteService;
  readonly #stream: ServerStream;
  #waiting: WaitingRoute | undefined;
  #decision: RoutingDecision | undefined;
  #isGone = false;

  constructor(service: RouteService, { booking, stream, model, router, explainedId }: HeldRouteDetails) {
    this.#service = service;
    this.booking = booking;
    this.model = model;
    this.#router = router;
    this.explainedId = explainedId;
    this.#stream = stream;
  }

  /** The router's queue has it; the frontend is told, so that it does not take the silence for a dead router. */
  wait(waiting: WaitingRoute): void {
    this.#waiting = waiting;
    this.#stream.write(encodeJson({ type: "queued" }));
    waiting.decision.then(
      (decision) => this.place(decision),
      (thrown: unknown) => {
        this.#leave(false);
        this.#stream.end(toDynamoError(thrown));
      },
    );
  }

  place(decision: RoutingDecision): void {
    this.#waiting = undefined;
    // The frontend left between the router's choice and this turn of the loop.
    if (this.#isGone) {
      decision.release({ outcome: "cancelled" });
      return;
    }
    this.#decision = decision;
    this.#stream.write(encodeJson(this.#service.decisionMessage(this, decision)));
  }

  firstToken({ cachedTokens, restored }: BookingUpdate): void {
    if (restored !== undefined) this.#decision?.restored(restored);
    this.#decision?.firstToken(cachedTokens);
  }

  addTokens(tokens: number): void {
    this.#decision?.addTokens(tokens);
  }

  /** The frontend says how it ended; `tokens` are those it has not told yet. */
  free(outcome: string, tokens: number): void {
    const decision = this.#decision;
    if (decision === undefined) return;
    if (isWorkerFault(outcome)) this.#router.inhibit(decision.instanceId);
    decision.addTokens(tokens);
    this.#release({ outcome });
    this.#leave(false);
    this.#stream.end();
  }

  /** The frontend is gone, or gave up, or its time is over. */
  onCancel(error: DynamoError): void {
    this.#leave(true);
    this.#waiting?.cancel(error);
    this.#release({ outcome: error.reason === "worker-lost" ? "cancelled" : error.reason });
  }

  #release(end: RequestEnd): void {
    this.#decision?.release(end);
    this.#decision = undefined;
  }

  #leave(isDropped: boolean): void {
    this.#isGone = true;
    this.#service.left(this, isDropped);
  }
}

function modelState({ name, card, router, prefill }: RoutedModel): Record<string, unknown> {
  return {
    model: name,
    block_size: card.blockSizeTokens,
    workers: router.workers.map(workerState),
    prefill_workers: prefill?.router.workers.map(workerState) ?? [],
  };
}

function workerState(worker: Router["workers"][number]): Record<string, unknown> {
  const { reportedLoad } = worker;
  return {
    instance_id: worker.instanceId,
    address: worker.address,
    ranks: worker.ranks.map((rank) => ({
      dp_rank: rank.dpRank,
      active_requests: rank.activeRequests,
      prefill_tokens: rank.prefillTokens,
      decode_blocks: rank.decodeBlocks,
    })),
    reported: {
      running_requests: reportedLoad.runningRequests,
      waiting_requests: reportedLoad.waitingRequests,
      active_blocks: reportedLoad.activeBlocks,
      pending_prefill_tokens: reportedLoad.pendingPrefillTokens,
    },
  };
}

function withinBytes(explanation: DecisionExplanation): DecisionExplanation {
  // A candidate takes about 450 bytes: most explanations are far from the limit and need no measuring.
  if (explanation.candidates.length < 128) return explanation;
  if (encodeJson(explanation).length <= MAX_SENT_EXPLANATION_BYTES) return explanation;
  return { ...explanation, candidates: [], degradations: [...explanation.degradations, CANDIDATES_LEFT_OUT] };
}

/** One question, one answer of JSON. */
function unary(answer: (payload: Uint8Array) => unknown): EndpointHandler {
  return (stream, payload) => {
    const bytes = encodeJson(answer(payload));
    if (bytes.length > MAX_ANSWER_BYTES) {
      throw new DynamoError("body-too-large", `the answer of ${bytes.length} bytes is over ${MAX_ANSWER_BYTES}`);
    }
    stream.write(bytes);
    stream.end();
    return { onCancel: () => undefined };
  };
}
