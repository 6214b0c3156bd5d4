import { DynamoError, toDynamoError, type Reason } from "../errors/index.ts";
import type {
  DecisionExplanation,
  PoolOutlook,
  RouteRequest,
  Router,
  RoutingDecision,
  WaitingRoute,
} from "../router/index.ts";
import type { Instance } from "../runtime/component/index.ts";
import type { ClientStream, ClientStreamHandler, StreamEnd } from "../runtime/request-plane/index.ts";
import type { TimerHandle } from "../std/index.ts";
import { blockHashSeed, hashBlocks } from "../tokens/index.ts";
import {
  EXPLAIN_ENDPOINT,
  OUTLOOK_ENDPOINT,
  PREVIEW_ENDPOINT,
  ROUTE_ENDPOINT,
  decodeExplanations,
  decodeOutlooks,
  decodeRouteAnswer,
  encodeJson,
  type RouteAnswer,
} from "./messages.ts";
import { RemoteDecision } from "./remote-decision.ts";
import { encodeRouteQuery, type RouteQuery } from "./route-query.ts";
import type { RouterServiceClient } from "./router-service-client.ts";

/**
 * One model's router, in another process. Asks a router service, then the next one, and when none decides falls back to
 * the frontend's own router, never in silence: a metric, one log line, and a mark in the request's explanation. What a
 * service decides about the request itself (full, too late, a wrong hint) is its answer and stands.
 */
export interface RemoteRouterOptions {
  readonly link: RouterServiceClient;
  readonly local: Router;
  readonly model: string;
  readonly blockSizeTokens: number;
}

/** Answers about the request. Any other error is one of the service, and somebody else is asked. */
const ANSWERS: ReadonlySet<Reason> = new Set<Reason>([
  "worker-full",
  "too-many-requests",
  "invalid-field",
  "request-deadline",
  "cancelled",
]);
/** The service lives, but knows less than this frontend: no reason to leave it out for other requests. */
const BEHIND: ReadonlySet<Reason> = new Set<Reason>(["no-workers"]);
/** Requests whose explanation came with the decision: for the end of the answer that asked for it. */
const MAX_KEPT = 1_024;
/** When the request has no deadline of its own. */
const LONGEST_MS = 3_600_000;

export class RemoteRouter {
  readonly link: RouterServiceClient;
  readonly model: string;
  readonly #local: Router;
  /** The frontend's own router of the workers that prefill for others, set when there are some. */
  prefill: Router | undefined = undefined;
  readonly #blockSizeTokens: number;
  readonly #decided = new Map<string, RemoteDecision[]>();

  constructor({ link, local, model, blockSizeTokens }: RemoteRouterOptions) {
    this.link = link;
    this.model = model;
    this.#local = local;
    this.#blockSizeTokens = blockSizeTokens;
  }

  /** As the router's own; a decision at once only when there is no service to ask. Throws then as the router does. */
  routeWhenReady(request: RouteRequest): RoutingDecision | WaitingRoute {
    if (this.link.pick(new Set()) === undefined) return this.fallBack(request, this.#absence());
    return new RemoteRoute(this, request);
  }

  /**
   * How the decode and the prefill pool would take the request; undefined when one of them has nobody for it. Without an
   * answer of a service, as this frontend knows it: `isOwn`.
   */
  async outlooks(
    request: RouteRequest,
  ): Promise<{ decode: PoolOutlook; prefill: PoolOutlook; isOwn: boolean } | undefined> {
    const instance = this.link.pick(new Set());
    try {
      if (instance !== undefined) {
        const payload = encodeRouteQuery(this.query(request));
        const { address } = instance;
        const { answerTimeoutMs } = this.link;
        const { decode, prefill } = decodeOutlooks(
          await this.link.ask(address, OUTLOOK_ENDPOINT, payload, answerTimeoutMs),
        );
        return decode === null || prefill === null ? undefined : { decode, prefill, isOwn: false };
      }
    } catch (thrown) {
      // The route that follows asks the next one.
      if (!BEHIND.has(toDynamoError(thrown).reason)) this.link.avoid(instance!.instanceId);
    }
    try {
      const prefill = this.prefill?.outlook(request);
      return prefill === undefined ? undefined : { decode: this.#local.outlook(request), prefill, isOwn: true };
    } catch {
      return undefined;
    }
  }

  /** Where the request would go now; nothing is booked. */
  async preview(request: RouteRequest): Promise<DecisionExplanation> {
    const instance = this.link.pick(new Set());
    let reason = this.#absence();
    try {
      if (instance !== undefined) {
        const payload = encodeRouteQuery(this.query(request));
        const answer = await this.link.ask(instance.address, PREVIEW_ENDPOINT, payload);
        const [decision] = decodeExplanations(answer);
        if (decision !== undefined) return decision;
        reason = "malformed-frame";
      }
    } catch (thrown) {
      const error = toDynamoError(thrown);
      if (ANSWERS.has(error.reason)) throw error;
      reason = error.reason;
    }
    return this.#localFor(request).preview({ ...request, degradation: degradation(reason) });
  }

  /** What is known here of the decisions for a request: those that came with their explanation, and the fallbacks. */
  explain(requestId: string): DecisionExplanation[] {
    const decided = (this.#decided.get(requestId) ?? []).flatMap((decision) => decision.explain() ?? []);
    return inOrder([...decided, ...this.#local.explain(requestId)]);
  }

  /** The same with what the services know. Rejects when nothing is known here and no service answered. */
  async explainFully(requestId: string): Promise<DecisionExplanation[]> {
    const payload = encodeJson({ requestId });
    const answers = await Promise.allSettled(
      this.link.instances.map(async ({ address }) =>
        decodeExplanations(await this.link.ask(address, EXPLAIN_ENDPOINT, payload)),
      ),
    );
    const told = answers.flatMap((answer) => (answer.status === "fulfilled" ? answer.value : []));
    const found = told.length > 0 ? inOrder([...told, ...this.#local.explain(requestId)]) : this.explain(requestId);
    const failed = answers.find((answer) => answer.status === "rejected");
    if (found.length === 0 && failed !== undefined) throw toDynamoError(failed.reason);
    return found;
  }

  /** The prompt as hashes, made once per request. */
  query(request: RouteRequest): RouteQuery {
    const { cacheNamespace } = request;
    const isShared = cacheNamespace === undefined || cacheNamespace === "";
    request.hashes ??= hashBlocks(
      request.tokenIds,
      this.#blockSizeTokens,
      isShared ? SHARED_SEED : blockHashSeed({ cacheNamespace }),
    );
    return { model: this.model, prompt: "hashes", blockSizeTokens: this.#blockSizeTokens, request };
  }

  /** The frontend's own choice, marked and counted. Throws as the router does. */
  fallBack(request: RouteRequest, reason: string): RoutingDecision {
    this.link.fellBack(this.model, reason);
    return this.#localFor(request).route({ ...request, degradation: degradation(reason) });
  }

  #localFor({ pool }: RouteRequest): Router {
    return pool === "prefill" && this.prefill !== undefined ? this.prefill : this.#local;
  }

  keep(requestId: string, decision: RemoteDecision): void {
    const kept = this.#decided.get(requestId);
    if (kept !== undefined) {
      kept.push(decision);
      return;
    }
    if (this.#decided.size >= MAX_KEPT) this.#decided.delete(this.#decided.keys().next().value!);
    this.#decided.set(requestId, [decision]);
  }

  #absence(): string {
    return this.link.instances.length === 0 ? "absent" : "avoided";
  }
}

const SHARED_SEED = blockHashSeed();

function degradation(reason: string): string {
  return `router service: ${reason}, chosen by the frontend itself`;
}

function inOrder(decisions: readonly DecisionExplanation[]): DecisionExplanation[] {
  return decisions.toSorted((a, b) => (a.at < b.at ? -1 : a.at > b.at ? 1 : 0));
}

/** One request on its way to a decision. */
class RemoteRoute implements WaitingRoute, ClientStreamHandler {
  readonly decision: Promise<RoutingDecision>;
  readonly #router: RemoteRouter;
  readonly #request: RouteRequest;
  readonly #settle: {
    readonly resolve: (decision: RoutingDecision) => void;
    readonly reject: (error: unknown) => void;
  };
  readonly #tried = new Set<string>();
  #instance: Instance | undefined;
  #stream: ClientStream | undefined;
  #answerTimer: TimerHandle | undefined;
  #decided: RemoteDecision | undefined;
  #isSettled = false;

  constructor(router: RemoteRouter, request: RouteRequest) {
    this.#router = router;
    this.#request = request;
    const { promise, resolve, reject } = Promise.withResolvers<RoutingDecision>();
    this.decision = promise;
    this.#settle = { resolve, reject };
    this.#next("absent");
  }

  cancel(error: DynamoError): void {
    if (this.#isSettled) return;
    this.#isSettled = true;
    this.#answerTimer?.cancel();
    this.#stream?.cancel(error);
    this.#settle.reject(error);
  }

  onItem(bytes: Uint8Array, start: number, end: number): void {
    if (this.#isSettled) return;
    this.#answerTimer?.cancel();
    let answer: RouteAnswer;
    try {
      answer = decodeRouteAnswer(bytes.subarray(start, end));
    } catch (thrown) {
      this.#stream?.cancel(toDynamoError(thrown));
      return;
    }
    if (answer.type === "queued") return;
    this.#isSettled = true;
    const { link } = this.#router;
    link.answered();
    this.#decided = new RemoteDecision(link, this.#instance!.address, this.#stream!, answer);
    if (answer.explanation !== undefined) this.#router.keep(this.#request.requestId ?? "", this.#decided);
    this.#settle.resolve(this.#decided);
  }

  onTurnEnd(): void {
    // Nothing is collected.
  }

  onEnd(end: StreamEnd): void {
    this.#answerTimer?.cancel();
    if (this.#decided !== undefined) this.#decided.onServiceGone();
    if (this.#isSettled) return;
    const error = end ?? new DynamoError("malformed-frame", "the router service ended without a decision");
    if (ANSWERS.has(error.reason)) {
      this.#isSettled = true;
      this.#router.link.answered();
      this.#settle.reject(error);
      return;
    }
    if (!BEHIND.has(error.reason)) this.#router.link.avoid(this.#instance!.instanceId);
    this.#next(error.reason);
  }

  /** Asks the next service; without one the frontend chooses, `reason` being why the last one did not. */
  #next(reason: string): void {
    const { link } = this.#router;
    const instance = link.pick(this.#tried);
    if (instance === undefined) {
      this.#isSettled = true;
      try {
        this.#settle.resolve(this.#router.fallBack(this.#request, reason));
      } catch (thrown) {
        this.#settle.reject(thrown);
      }
      return;
    }
    this.#instance = instance;
    this.#tried.add(instance.instanceId);
    const { clock, request } = link.planes;
    const leftMs = (this.#request.deadlineMs ?? Infinity) - clock.monotonicMs();
    const { requestId = "" } = this.#request;
    const payload = encodeRouteQuery(this.#router.query(this.#request));
    const stream = request.client.open(
      instance.address,
      payload,
      {
        endpoint: link.endpoint(ROUTE_ENDPOINT),
        requestId,
        traceparent: "",
        timeoutMs: Math.max(1, Math.min(LONGEST_MS, leftMs)),
        autoCredit: true,
      },
      this,
    );
    this.#stream = stream;
    this.#answerTimer = clock.setTimer(link.answerTimeoutMs, () =>
      stream.cancel(new DynamoError("connect-timeout", "the router service did not answer in time")),
    );
  }
}
