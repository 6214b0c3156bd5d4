import {
  ROOT_CONTEXT,
  SpanKind,
  SpanStatusCode,
  trace,
  type Attributes,
  type Context,
  type HrTime,
  type Span as OtelSpan,
  type Tracer,
} from "@opentelemetry/api";
import { OTLPTraceExporter } from "@opentelemetry/exporter-trace-otlp-proto";
import { resourceFromAttributes } from "@opentelemetry/resources";
import {
  BatchSpanProcessor,
  ParentBasedSampler,
  TraceIdRatioBasedSampler,
  TracerProvider,
  type ReadableSpan,
  type SpanExporter,
} from "@opentelemetry/sdk-trace";
import { packageVersion, type Clock } from "../std/index.ts";
import type { Logger } from "./log.ts";
import type { Metrics } from "./metrics.ts";
import { parseTraceparent, type Span, type SpanAttributes, type SpanOptions, type Tracing } from "./tracing.ts";
import type { TraceSettings } from "./trace-settings.ts";

/**
 * Spans through the OpenTelemetry SDK to an OTLP/HTTP receiver, in batches beside the work: a receiver that is slow or
 * gone costs spans, never requests. At most 8,192 spans wait; further ones are dropped and, as those of a failed export,
 * counted (`dynamo_trace_spans_total`), with one line for the first. Loads the SDK: import it lazily.
 */
export interface TracingOptions extends TraceSettings {
  readonly clock: Clock;
  readonly logger: Logger;
  readonly metrics: Metrics;
  /** Of the process. */
  readonly instanceId: string;
}

const MAX_QUEUED_SPANS = 8_192;
const BATCH_SPANS = 512;
const BATCH_MS = 1_000;
const EXPORT_MS = 5_000;
/** How long leaving may wait for the receiver. */
const CLOSE_MS = 3_000;
const KINDS = { server: SpanKind.SERVER, client: SpanKind.CLIENT, internal: SpanKind.INTERNAL };

export function startTracing(options: TracingOptions): Tracing {
  const { clock } = options;
  const exporter = new CountingExporter(new OTLPTraceExporter({ url: options.url, timeoutMillis: EXPORT_MS }), options);
  const processor = new BatchSpanProcessor({
    exporter,
    maxQueueSize: MAX_QUEUED_SPANS,
    maxExportBatchSize: BATCH_SPANS,
    scheduledDelayMillis: BATCH_MS,
    exportTimeoutMillis: EXPORT_MS,
  });
  const provider = new TracerProvider({
    resource: resourceFromAttributes({
      "service.name": options.serviceName,
      "service.version": packageVersion(),
      "service.instance.id": options.instanceId,
      "process.pid": process.pid,
    }),
    sampler: new ParentBasedSampler({ root: new TraceIdRatioBasedSampler(options.sampleRatio) }),
    spanProcessors: [
      {
        onStart: (span, context) => processor.onStart(span, context),
        onEnd: (span) => {
          if (exporter.hasRoom(MAX_QUEUED_SPANS)) processor.onEnd(span);
          else exporter.dropped(1, "dropped", "more spans than the receiver takes");
        },
        forceFlush: () => processor.forceFlush(),
        shutdown: () => processor.shutdown(),
      },
    ],
  });
  const tracer = provider.getTracer("dynamo-ts", packageVersion());
  return {
    span(name, traceparent, spanOptions) {
      const parent = parseTraceparent(traceparent);
      const context =
        parent === undefined
          ? ROOT_CONTEXT
          : trace.setSpanContext(ROOT_CONTEXT, { ...parent, traceFlags: parent.flags & 1, isRemote: true });
      // One offset for the whole tree: the wall clock has whole milliseconds, and may jump.
      return new TracedSpan(tracer, clock.wallMs() - clock.monotonicMs(), name, context, spanOptions);
    },
    async close() {
      const timeout = Promise.withResolvers<void>();
      const timer = clock.setTimer(CLOSE_MS, () => timeout.resolve());
      // A receiver that is gone is no reason to fail on the way out; the exporter has counted and said it.
      await Promise.race([provider.shutdown().catch(() => undefined), timeout.promise]);
      timer.cancel();
    },
  };
}

class TracedSpan implements Span {
  readonly #tracer: Tracer;
  /** From the monotonic clock to Unix time. */
  readonly #offsetMs: number;
  readonly #span: OtelSpan;
  readonly #context: Context;

  constructor(
    tracer: Tracer,
    offsetMs: number,
    name: string,
    parent: Context,
    { startMs, kind = "internal", attributes }: SpanOptions,
  ) {
    this.#tracer = tracer;
    this.#offsetMs = offsetMs;
    const startTime = unixTime(startMs + offsetMs);
    this.#span = tracer.startSpan(name, { kind: KINDS[kind], startTime }, parent);
    this.#context = trace.setSpan(parent, this.#span);
    if (attributes !== undefined) this.set(attributes);
  }

  get traceId(): string {
    return this.#span.spanContext().traceId;
  }

  get traceparent(): string {
    const { traceId, spanId, traceFlags } = this.#span.spanContext();
    return `00-${traceId}-${spanId}-${traceFlags.toString(16).padStart(2, "0")}`;
  }

  get isRecording(): boolean {
    return this.#span.isRecording();
  }

  child(name: string, options: SpanOptions): Span {
    return new TracedSpan(this.#tracer, this.#offsetMs, name, this.#context, options);
  }

  set(attributes: SpanAttributes): void {
    this.#span.setAttributes(attributes as Attributes);
  }

  event(name: string, atMs: number): void {
    this.#span.addEvent(name, unixTime(atMs + this.#offsetMs));
  }

  fail(reason: string): void {
    this.#span.setAttribute("error.type", reason);
    this.#span.setStatus({ code: SpanStatusCode.ERROR, message: reason });
  }

  end(atMs: number): void {
    this.#span.end(unixTime(atMs + this.#offsetMs));
  }
}

/** As seconds and nanoseconds. */
function unixTime(ms: number): HrTime {
  const seconds = Math.floor(ms / 1_000);
  return [seconds, Math.round((ms - seconds * 1_000) * 1e6)];
}

/** Knows how many spans wait, and says what became of each. */
class CountingExporter implements SpanExporter {
  readonly #inner: SpanExporter;
  readonly #logger: Logger;
  readonly #url: string;
  readonly #count: (outcome: string, spans: number) => void;
  #waiting = 0;
  #hasLogged = false;

  constructor(inner: SpanExporter, { logger, metrics, url }: TracingOptions) {
    this.#inner = inner;
    this.#logger = logger;
    this.#url = url;
    const counter = metrics.counter("dynamo_trace_spans_total");
    this.#count = (outcome, spans) => counter.labels(outcome).add(spans);
  }

  /** Takes the place of one more span that ended. */
  hasRoom(limit: number): boolean {
    if (this.#waiting >= limit) return false;
    this.#waiting++;
    return true;
  }

  dropped(spans: number, outcome: string, why: string): void {
    this.#count(outcome, spans);
    if (this.#hasLogged) return;
    this.#hasLogged = true;
    this.#logger.warn({ url: this.#url, why }, "traces are lost; further ones are only counted");
  }

  export(spans: ReadableSpan[], done: Parameters<SpanExporter["export"]>[1]): void {
    this.#inner.export(spans, (result) => {
      this.#waiting -= spans.length;
      // 0 is success in every release; the enumeration is in a package that we would need for this alone.
      if (result.code === 0) this.#count("exported", spans.length);
      else this.dropped(spans.length, "failed", result.error?.message ?? "the export failed");
      done({ code: 0 });
    });
  }

  forceFlush(): Promise<void> {
    return this.#inner.forceFlush?.() ?? Promise.resolve();
  }

  shutdown(): Promise<void> {
    return this.#inner.shutdown();
  }
}
