import type { Engine } from "../engines/index.ts";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { Logger, Span, Tracing } from "../observability/index.ts";
import {
  EngineOutput,
  decodeEngineOutput,
  decodeRequest,
  encodePullItem,
  forEachStepEntry,
  type PreprocessedRequest,
} from "../protocol/index.ts";
import type {
  EndpointHandler,
  RequestPlaneServer,
  ServerStream,
  ServerStreamHandler,
} from "../runtime/request-plane/index.ts";
import { ServiceRate, type Clock } from "../std/index.ts";
import { EngineLeg } from "./engine-leg.ts";
import type { EngineHandoffs } from "./engine-handoffs.ts";
import type { HandoffDraft } from "./handoff-draft.ts";
import type { WorkerHandoffs } from "./handoffs.ts";
import type { WorkerMetrics } from "./worker-metrics.ts";

/**
 * The bridge between the request plane and the engine: a stream in becomes a submission, a step out becomes one item per
 * touched stream and one flush. Payloads pass through as bytes. Owns the map from engine stream id to plane stream;
 * every stream leaves it exactly once, with the engine's final entry, also when its caller went away before.
 *
 * Disaggregated, two things are added: a request with a handoff is submitted after its blocks were fetched, and one that
 * only prefills is followed by its own handoff, for which its stream (not its place in the engine) stays open.
 */
interface ActiveStream {
  readonly stream: ServerStream;
  /** Of one that prefills for another worker: its blocks on their way out. */
  readonly draft: HandoffDraft | undefined;
  /** A part of a request whose blocks its engine moves itself. */
  leg: EngineLeg | undefined;
  /** For its caller's cancel. */
  cancel: () => void;
  readonly startMs: number;
  sawOutput: boolean;
  /** `handle_payload`, as in Dynamo; undefined when no traces are exported. */
  readonly span: Span | undefined;
}

export interface GenerateServiceOptions {
  readonly engine: Engine;
  readonly server: RequestPlaneServer;
  readonly metrics: WorkerMetrics;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly tracing?: Tracing | undefined;
}

/** A refused request is tried on another worker at once; the time is for when all of them refused. */
const RETRY_LIMITS = { minMs: 100, maxMs: 60_000 };
/** A change of role takes seconds. */
const SETTLE_LOOK_MS = 20;

export class GenerateService {
  readonly #rate = new ServiceRate(RETRY_LIMITS);
  readonly #options: GenerateServiceOptions;
  readonly #active = new Map<number, ActiveStream>();
  #nextId = 1;
  /**
   * Streams taken at once, running and waiting; above it `worker-full`. Continuations may go up to twice as many. Set once
   * the engine has said how many it runs.
   */
  maxStreams = 0;
  /** Set when this worker has, or gets, a role in handoffs. */
  handoffs: WorkerHandoffs | undefined = undefined;
  /** The same of an engine that moves the blocks itself. */
  engineHandoffs: EngineHandoffs | undefined = undefined;

  constructor(options: GenerateServiceOptions) {
    this.#options = options;
  }

  get activeStreamCount(): number {
    return this.#active.size;
  }

  readonly handle: EndpointHandler = (stream, payload): ServerStreamHandler => {
    const { engine, metrics, clock, logger } = this.#options;
    const { maxStreams } = this;
    metrics.requestBytes.add(payload.length);
    const request = decodeRequest(payload);
    // An answer that is under way was let in by another worker, which is gone: it has room of its own, as much again.
    const limit = request.resumedTokens === undefined ? maxStreams : 2 * maxStreams;
    if (this.#active.size >= limit) {
      metrics.failed("worker-full");
      throw new DynamoError("worker-full", `the worker already has ${this.#active.size} requests`, {
        retryAfterMs: this.#rate.retryAfterMs(clock.monotonicMs()),
      });
    }
    const id = this.#takeId();
    const startMs = clock.monotonicMs();
    const span = this.#options.tracing?.span("handle_payload", stream.traceparent, {
      kind: "server",
      startMs,
      attributes: { "dynamo.request_id": stream.requestId, "dynamo.prompt_tokens": request.tokenIds.length },
    });
    const active: ActiveStream = {
      stream,
      startMs,
      sawOutput: false,
      span,
      draft: request.prefillOnly === true ? this.handoffs?.draft(request, stream) : undefined,
      leg: undefined,
      cancel: () => engine.abort(id),
    };
    this.#active.set(id, active);
    metrics.inflight.add(1);
    logger.debug({ x_request_id: stream.requestId, prompt_tokens: request.tokenIds.length }, "request accepted");
    if (this.engineHandoffs !== undefined && (request.prefillOnly === true || request.handoff !== undefined)) {
      this.#beginLeg(id, active, request, this.engineHandoffs);
    } else if (request.handoff === undefined || this.handoffs === undefined) engine.submit(id, request);
    else void this.#pull(id, active, request, this.handoffs);
    return {
      onCancel: (error) => {
        metrics.cancellations.add();
        logger.debug({ x_request_id: stream.requestId, reason: error.reason }, "request cancelled");
        active.cancel();
      },
    };
  };

  /** The handed-off blocks first, whatever comes of it; then the engine. Never rejects. */
  async #pull(
    id: number,
    active: ActiveStream,
    { handoff, ...request }: PreprocessedRequest,
    handoffs: WorkerHandoffs,
  ): Promise<void> {
    const { engine, server } = this.#options;
    const abort = new AbortController();
    active.cancel = () => abort.abort();
    const pulled = await handoffs.pull({ ...request, ...(handoff === undefined ? {} : { handoff }) }, abort.signal);
    // Ended meanwhile, with all others.
    if (this.#active.get(id) !== active) return;
    if (abort.signal.aborted) {
      this.#left(id, active);
      return;
    }
    active.cancel = () => engine.abort(id);
    active.stream.write(encodePullItem(pulled));
    server.flush();
    try {
      engine.submit(id, request);
    } catch (thrown) {
      this.#left(id, active);
      active.stream.end(toDynamoError(thrown));
    }
  }

  /** Its engine moves the blocks itself. */
  #beginLeg(id: number, active: ActiveStream, request: PreprocessedRequest, handoffs: EngineHandoffs): void {
    const { engine, server, clock } = this.#options;
    const leg = new EngineLeg({
      id,
      request,
      stream: active.stream,
      engine,
      handoffs,
      clock,
      flush: () => server.flush(),
      isActive: () => this.#active.get(id) === active,
      left: () => this.#left(id, active),
    });
    active.leg = leg;
    active.cancel = () => leg.cancel();
    leg.begin();
  }

  /** One engine step: an item per entry, then one flush. */
  onStep(step: Uint8Array): void {
    forEachStepEntry(step, (id, start, end, final) => {
      const active = this.#active.get(id);
      if (active === undefined) return;
      const { metrics, clock } = this.#options;
      // What is kept back, told elsewhere, or submitted anew.
      if (active.leg?.takes(step, start, end, final) === true) return;
      if (active.leg === undefined || !final || !active.leg.hides(step, start, end)) {
        active.stream.write(step.subarray(start, end));
      }
      metrics.responseBytes.add(end - start);
      if (!active.sawOutput) {
        active.sawOutput = true;
        metrics.firstResponse.observe((clock.monotonicMs() - active.startMs) / 1_000);
      }
      if (final) {
        this.#left(id, active);
        if (active.leg?.ends(step, start, end) === true) {
          // Its stream stays open for the handoff.
        } else if (active.draft !== undefined && isPrefilled(step, start, end)) {
          void this.#offer(active, active.draft, this.handoffs!);
        } else {
          this.#abandon(active);
          active.stream.end();
        }
      }
      if (active.span !== undefined) traceEntry(active.span, step, start, end, clock.monotonicMs());
    });
    this.#options.server.flush();
  }

  /** The prompt's blocks for whoever goes on with it; the stream ends when they are gone. Never rejects. */
  async #offer(active: ActiveStream, draft: HandoffDraft, handoffs: WorkerHandoffs): Promise<void> {
    const { stream } = active;
    const abort = new AbortController();
    active.cancel = () => abort.abort();
    try {
      await handoffs.handOver(draft, stream, abort.signal);
      this.#options.server.flush();
    } catch (thrown) {
      const error = toDynamoError(thrown);
      this.#options.logger.warn(
        { x_request_id: stream.requestId, reason: error.reason, diagnostic: error.diagnostic },
        "the prompt's blocks were not handed over",
      );
      stream.end(error);
    }
  }

  #abandon({ draft }: ActiveStream): void {
    if (draft !== undefined) this.handoffs!.abandon(draft);
  }

  #left(id: number, active: ActiveStream): void {
    const { metrics, clock } = this.#options;
    const nowMs = clock.monotonicMs();
    this.#rate.departed(nowMs, this.#active.size >= this.maxStreams);
    this.#active.delete(id);
    metrics.inflight.add(-1);
    metrics.requests.add();
    metrics.duration.observe((nowMs - active.startMs) / 1_000);
  }

  /** The engine died without ending its streams: end them here. */
  failAll(thrown: unknown): void {
    const error = toDynamoError(thrown, "engine-stopped");
    for (const active of this.#active.values()) {
      const { stream, span } = active;
      this.#abandon(active);
      stream.end(error);
      span?.fail(error.reason);
      span?.end(this.#options.clock.monotonicMs());
    }
    this.#options.metrics.inflight.add(-this.#active.size);
    this.#active.clear();
    this.#options.server.flush();
  }

  /**
   * Resolves when no stream is left, handoffs that wait included; after `timeoutMs` what is left is handed over: it ends with
   * `draining` and goes on elsewhere.
   */
  async settle(timeoutMs: number): Promise<void> {
    const { clock } = this.#options;
    const deadlineMs = clock.monotonicMs() + timeoutMs;
    const held = (): number => (this.handoffs?.heldBlocks ?? 0) + (this.engineHandoffs?.heldBlocks ?? 0);
    while (this.#active.size > 0 || held() > 0) {
      if (clock.monotonicMs() >= deadlineMs) break;
      await new Promise<void>((resolve) => void clock.setTimer(SETTLE_LOOK_MS, resolve));
    }
    const error = new DynamoError("draining", "the worker changes its role");
    for (const { stream, cancel } of this.#active.values()) {
      stream.end(error);
      cancel();
    }
    this.#options.server.flush();
  }

  #takeId(): number {
    while (this.#active.has(this.#nextId)) this.#nextId = (this.#nextId % 0x7fffffff) + 1;
    const id = this.#nextId;
    this.#nextId = (id % 0x7fffffff) + 1;
    return id;
  }
}

const OUTPUT = new EngineOutput();

/** The answer does not end with its first token: somebody else goes on with it. */
function isPrefilled(step: Uint8Array, start: number, end: number): boolean {
  decodeEngineOutput(step, start, end, OUTPUT);
  return OUTPUT.finish === "length" && OUTPUT.tokenCount > 0;
}

function traceEntry(span: Span, step: Uint8Array, start: number, end: number, nowMs: number): void {
  decodeEngineOutput(step, start, end, OUTPUT);
  if (OUTPUT.hasFirst) {
    span.event("first_output", nowMs);
    span.set({
      "dynamo.cached_tokens": OUTPUT.cachedTokens,
      "dynamo.engine.queue_ms": OUTPUT.queueMs,
      "dynamo.engine.prefill_ms": OUTPUT.prefillMs,
    });
  }
  if (OUTPUT.finish === undefined) return;
  span.set({ "dynamo.outcome": OUTPUT.finish, "dynamo.engine.decode_ms": OUTPUT.decodeMs });
  if (OUTPUT.error !== undefined) span.fail(OUTPUT.error.reason);
  span.end(nowMs);
}
