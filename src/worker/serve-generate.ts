import type { Engine } from "../engines/index.ts";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { Logger, Span, Tracing } from "../observability/index.ts";
import { EngineOutput, decodeEngineOutput, decodeRequest, forEachStepEntry } from "../protocol/index.ts";
import type {
  EndpointHandler,
  RequestPlaneServer,
  ServerStream,
  ServerStreamHandler,
} from "../runtime/request-plane/index.ts";
import { ServiceRate, type Clock } from "../std/index.ts";
import type { WorkerMetrics } from "./worker-metrics.ts";

/**
 * The bridge between the request plane and the engine: a stream in becomes a submission, a step out becomes one item per
 * touched stream and one flush. Payloads pass through as bytes. Owns the map from engine stream id to plane stream;
 * every stream leaves it exactly once, with the engine's final entry, also when its caller went away before.
 */
interface ActiveStream {
  readonly stream: ServerStream;
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
  /** Streams taken at once, running and waiting; above it `worker-full`. Continuations may go up to twice as many. */
  readonly maxStreams: number;
}

/** A refused request is tried on another worker at once; the time is for when all of them refused. */
const RETRY_LIMITS = { minMs: 100, maxMs: 60_000 };

export class GenerateService {
  readonly #rate = new ServiceRate(RETRY_LIMITS);
  readonly #options: GenerateServiceOptions;
  readonly #active = new Map<number, ActiveStream>();
  #nextId = 1;

  constructor(options: GenerateServiceOptions) {
    this.#options = options;
  }

  get activeStreamCount(): number {
    return this.#active.size;
  }

  readonly handle: EndpointHandler = (stream, payload): ServerStreamHandler => {
    const { engine, metrics, clock, maxStreams, logger } = this.#options;
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
    this.#active.set(id, { stream, startMs, sawOutput: false, span });
    metrics.inflight.add(1);
    logger.debug({ x_request_id: stream.requestId, prompt_tokens: request.tokenIds.length }, "request accepted");
    engine.submit(id, request);
    return {
      onCancel: (error) => {
        metrics.cancellations.add();
        logger.debug({ x_request_id: stream.requestId, reason: error.reason }, "request cancelled");
        engine.abort(id);
      },
    };
  };

  /** One engine step: an item per entry, then one flush. */
  onStep(step: Uint8Array): void {
    forEachStepEntry(step, (id, start, end, final) => {
      const active = this.#active.get(id);
      if (active === undefined) return;
      const { metrics, clock } = this.#options;
      active.stream.write(step.subarray(start, end));
      metrics.responseBytes.add(end - start);
      if (!active.sawOutput) {
        active.sawOutput = true;
        metrics.firstResponse.observe((clock.monotonicMs() - active.startMs) / 1_000);
      }
      if (final) {
        const nowMs = clock.monotonicMs();
        this.#rate.departed(nowMs, this.#active.size >= this.#options.maxStreams);
        this.#active.delete(id);
        metrics.inflight.add(-1);
        metrics.requests.add();
        metrics.duration.observe((nowMs - active.startMs) / 1_000);
        active.stream.end();
      }
      if (active.span !== undefined) traceEntry(active.span, step, start, end, clock.monotonicMs());
    });
    this.#options.server.flush();
  }

  /** The engine died without ending its streams: end them here. */
  failAll(thrown: unknown): void {
    const error = toDynamoError(thrown, "engine-stopped");
    for (const { stream, span } of this.#active.values()) {
      stream.end(error);
      span?.fail(error.reason);
      span?.end(this.#options.clock.monotonicMs());
    }
    this.#options.metrics.inflight.add(-this.#active.size);
    this.#active.clear();
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
