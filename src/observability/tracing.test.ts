import assert from "node:assert/strict";
import { createServer, type AddressInfo } from "node:net";
import { test } from "node:test";
import { SeededRandom, systemClock } from "../std/index.ts";
import { createLogger } from "./log.ts";
import { Metrics } from "./metrics.ts";
import { startTracing } from "./otel-tracing.ts";
import { readTraceSettings } from "./trace-settings.ts";
import { parseTraceparent } from "./tracing.ts";

const TRACE_ID = "0af7651916cd43dd8448eb211c80319c";
const SPAN_ID = "b7ad6b7169203331";

test("trace context: W3C's form is read, later versions too, and anything else is none", () => {
  const parent = { traceId: TRACE_ID, spanId: SPAN_ID, flags: 1 };
  assert.deepEqual(parseTraceparent(`00-${TRACE_ID}-${SPAN_ID}-01`), parent);
  assert.deepEqual(parseTraceparent(`cc-${TRACE_ID}-${SPAN_ID}-01-more`), parent);
  const wrong = [
    "",
    `00-${TRACE_ID}-${SPAN_ID}`,
    `00-${TRACE_ID}-${SPAN_ID}-01-more`,
    `ff-${TRACE_ID}-${SPAN_ID}-01`,
    `00-${"0".repeat(32)}-${SPAN_ID}-01`,
    `00-${TRACE_ID}-${"0".repeat(16)}-01`,
    `00-${TRACE_ID.toUpperCase()}-${SPAN_ID}-01`,
    ` 00-${TRACE_ID}-${SPAN_ID}-01`,
    `cc-${TRACE_ID}-${SPAN_ID}-01-${"x".repeat(100)}`,
  ];
  for (const text of wrong) assert.equal(parseTraceparent(text), undefined, text);
  const random = new SeededRandom(1);
  for (let i = 0; i < 2_000; i++) {
    const bytes = Buffer.from(`00-${TRACE_ID}-${SPAN_ID}-01`);
    bytes[random.nextU32() % bytes.length] = random.nextU32() % 128;
    const parsed = parseTraceparent(bytes.toString("latin1"));
    if (parsed !== undefined) assert.match(`${parsed.traceId}${parsed.spanId}`, /^[0-9a-f]{48}$/);
  }
});

test("trace settings: off by default, on by an endpoint or by the switch, and mistakes are named", () => {
  assert.equal(readTraceSettings({}, "frontend"), undefined);
  assert.deepEqual(readTraceSettings({ OTEL_EXPORTER_OTLP_ENDPOINT: "http://collector:4318/" }, "frontend"), {
    url: "http://collector:4318/v1/traces",
    serviceName: "dynamo-frontend",
    sampleRatio: 1,
  });
  const own = {
    OTEL_EXPORT_ENABLED: "true",
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: "https://collector/own",
    OTEL_SERVICE_NAME: "mine",
    OTEL_TRACES_SAMPLE_RATIO: "0.25",
    OTEL_EXPORTER_OTLP_PROTOCOL: "http/protobuf",
  };
  assert.deepEqual(readTraceSettings(own, "worker"), {
    url: "https://collector/own",
    serviceName: "mine",
    sampleRatio: 0.25,
  });
  assert.equal(readTraceSettings({ OTEL_EXPORT_ENABLED: "1" }, "worker")!.url, "http://localhost:4318/v1/traces");
  assert.equal(readTraceSettings({ ...own, OTEL_EXPORT_ENABLED: "false" }, "worker"), undefined);
  assert.equal(readTraceSettings({ ...own, OTEL_SDK_DISABLED: "true" }, "worker"), undefined);
  const wrong = {
    OTEL_EXPORT_ENABLED: "maybe",
    OTEL_EXPORTER_OTLP_ENDPOINT: "ftp://x",
    OTEL_TRACES_SAMPLE_RATIO: "2",
  };
  assert.throws(() => readTraceSettings(wrong, "worker"), {
    reason: "invalid-config",
    message:
      "OTEL_EXPORT_ENABLED: expected true or false, got maybe\n" +
      "OTEL_TRACES_SAMPLE_RATIO: expected a number from 0 to 1, got 2",
  });
  assert.throws(() => readTraceSettings({ OTEL_EXPORTER_OTLP_ENDPOINT: "ftp://x" }, "worker"), {
    message: "OTEL_EXPORTER_OTLP_ENDPOINT: expected an http or https URL, got ftp://x",
  });
  const grpc = { OTEL_EXPORT_ENABLED: "1", OTEL_EXPORTER_OTLP_PROTOCOL: "grpc" };
  assert.throws(() => readTraceSettings(grpc, "worker"), { message: /expected http\/protobuf, got grpc/ });
});

test("traces: a receiver that takes connections and never answers costs spans, counted and said once, and no time on the way out", async () => {
  const silent = createServer(() => undefined);
  await new Promise<void>((resolve) => silent.listen(0, "127.0.0.1", resolve));
  const lines: string[] = [];
  const metrics = new Metrics();
  const tracing = startTracing({
    url: `http://127.0.0.1:${(silent.address() as AddressInfo).port}/v1/traces`,
    serviceName: "test",
    sampleRatio: 1,
    clock: systemClock,
    logger: createLogger({ level: "info", format: "jsonl", write: (line) => lines.push(line) }),
    metrics,
    instanceId: "0",
  });
  for (let i = 0; i < 9_000; i++) tracing.span("one", "", { startMs: 0 }).end(1);
  assert.match(await metrics.render(), /dynamo_trace_spans_total\{outcome="dropped"\} 808\n/);
  assert.equal(lines.length, 1);
  assert.match(lines[0]!, /traces are lost/);
  const startMs = performance.now();
  await tracing.close();
  assert.ok(performance.now() - startMs < 4_000);
  silent.close();
});
