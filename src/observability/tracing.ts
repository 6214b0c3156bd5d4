/**
 * Traces as the code that makes them sees them: a tree of spans per request, with W3C trace context between processes.
 * The OpenTelemetry SDK is behind it (otel-tracing.ts), loaded only when traces are exported; without it there is no
 * `Tracing` and no span, and what would make one does nothing: `tracing?.span(...)`. All times are milliseconds of the
 * monotonic clock. Attributes carry numbers, ids and reasons, never prompts, outputs or keys.
 */
export type SpanAttributes = Readonly<Record<string, string | number | boolean | readonly string[]>>;

export interface SpanOptions {
  readonly startMs: number;
  /** @default internal */
  readonly kind?: "server" | "client" | "internal";
  readonly attributes?: SpanAttributes;
}

export interface Span {
  readonly traceId: string;
  /** To hand on: the span as the parent of what another process does. */
  readonly traceparent: string;
  /** False when the trace is not sampled: attributes need not be worked out. */
  readonly isRecording: boolean;
  child(name: string, options: SpanOptions): Span;
  set(attributes: SpanAttributes): void;
  event(name: string, atMs: number): void;
  /** Marks it as failed; `reason` is one of docs/errors.md. `end` must follow. */
  fail(reason: string): void;
  /** Must be called once; nothing may be set afterwards. */
  end(atMs: number): void;
}

export interface Tracing {
  /** The first span of this process in a trace; `traceparent` is what came from outside, empty or malformed = none. */
  span(name: string, traceparent: string, options: SpanOptions): Span;
  /** Sends what is left, for at most `CLOSE_MS`. */
  close(): Promise<void>;
}

export interface TraceParent {
  readonly traceId: string;
  readonly spanId: string;
  readonly flags: number;
}

const TRACEPARENT = /^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?$/;

/** By W3C Trace Context, level 1: later versions may have more fields. */
export function parseTraceparent(text: string): TraceParent | undefined {
  const match = text.length > 128 ? null : TRACEPARENT.exec(text);
  if (match === null) return undefined;
  const [, version, traceId, spanId, flags, more] = match;
  if (version === "ff" || (version === "00" && more !== undefined)) return undefined;
  if (/^0+$/.test(traceId!) || /^0+$/.test(spanId!)) return undefined;
  return { traceId: traceId!, spanId: spanId!, flags: Number.parseInt(flags!, 16) };
}
