import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import type { DecisionExplanation } from "../../src/router/index.ts";
import { until, workersJoined } from "../helpers/in-process-cluster.ts";
import { startOtlpReceiver, type OtlpReceiver, type ReceivedSpan } from "../helpers/otlp-receiver.ts";
import { startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";

/** What a collector gets of a cluster of real processes: the walk of docs/walk.md as spans. */
const TRACE_ID = "0af7651916cd43dd8448eb211c80319c";
const PROMPT = "a prompt that is long enough for several blocks; ".repeat(4);

describe("traces of a cluster", { timeout: 60_000 }, () => {
  let receiver: OtlpReceiver;
  let cluster: ProcessCluster;

  before(async () => {
    receiver = await startOtlpReceiver();
    cluster = await startProcessCluster(["--engine=echo", "--workers=2"], {
      OTEL_EXPORTER_OTLP_ENDPOINT: receiver.endpoint,
    });
    await workersJoined(cluster.baseUrl, 2);
  });
  after(async () => {
    await cluster.stop("SIGKILL");
    await receiver.close();
  });

  async function complete(body: object, headers: Record<string, string>): Promise<number> {
    const answer = await fetch(`${cluster.baseUrl}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json", ...headers },
      body: JSON.stringify(body),
    });
    await answer.text();
    return answer.status;
  }

  /** Waits for the batch that has them. */
  async function spansOf(traceId: string, count: number): Promise<ReceivedSpan[]> {
    const found = (): ReceivedSpan[] => receiver.spans.filter((span) => span.traceId === traceId);
    await until(() => found().length >= count, `${count} spans of ${traceId}`);
    assert.equal(
      found().length,
      count,
      found()
        .map(({ name }) => name)
        .join(),
    );
    return found();
  }

  test("a span per arrow, under the caller's span, over both processes, with the explanation on the route", async () => {
    assert.equal(await complete({ model: "echo", prompt: PROMPT, max_tokens: 3 }, {}), 200);
    const caller = "b7ad6b7169203331";
    const headers = { traceparent: `00-${TRACE_ID}-${caller}-01`, "x-request-id": "traced" };
    assert.equal(await complete({ model: "echo", prompt: PROMPT, max_tokens: 3, stream: true }, headers), 200);
    const spans = await spansOf(TRACE_ID, 7);
    const named = (name: string): ReceivedSpan => {
      const found = spans.filter((span) => span.name === name);
      assert.equal(found.length, 1, name);
      return found[0]!;
    };
    const root = named("http-request");
    assert.equal(root.parentSpanId, caller);
    assert.equal(root.service, "dynamo-frontend");
    assert.equal(root.attributes["dynamo.request_id"], "traced");
    assert.equal(root.attributes["dynamo.completion_tokens"], 3);
    for (const name of ["validate", "preprocess", "route", "decode", "sse"]) {
      const span = named(name);
      assert.equal(span.parentSpanId, root.spanId, name);
      assert.ok(span.startNs >= root.startNs && span.endNs <= root.endNs && span.endNs >= span.startNs, name);
    }
    assert.deepEqual(named("decode").events, ["first_token"]);
    const worker = named("handle_payload");
    assert.equal(worker.parentSpanId, named("decode").spanId);
    assert.equal(worker.service, "dynamo-worker");
    assert.equal(worker.attributes["dynamo.prompt_tokens"], root.attributes["dynamo.prompt_tokens"]);
    assert.deepEqual(worker.events, ["first_output"]);
    assert.ok(spans.every((span) => !span.isError));

    const explained = await fetch(`${cluster.baseUrl}/v1/route/explain/traced`);
    const decision = ((await explained.json()) as { decisions: DecisionExplanation[] }).decisions[0]!;
    const { attributes } = named("route");
    const chosen = decision.candidates.find((candidate) => candidate.chosen)!;
    assert.ok(decision.actual!.cached_tokens > 0, "the second request reuses blocks of the first");
    assert.deepEqual(
      {
        policy: attributes["dynamo.route.policy"],
        reason: attributes["dynamo.route.reason"],
        worker: attributes["dynamo.worker.instance_id"],
        candidates: attributes["dynamo.route.candidates"],
        cost: attributes["dynamo.route.cost"],
        device: attributes["dynamo.route.overlap_blocks.device"],
        degradations: attributes["dynamo.route.degradations"],
        predicted: attributes["dynamo.route.predicted_cached_tokens"],
        reused: attributes["dynamo.route.reused_tokens"],
      },
      {
        policy: "kv",
        reason: decision.reason,
        worker: decision.worker.instance_id,
        candidates: 2,
        cost: chosen.cost.total,
        device: chosen.overlap_blocks.device,
        degradations: decision.degradations,
        predicted: decision.predicted.cached_tokens,
        reused: decision.actual!.cached_tokens,
      },
    );
  });

  test("a refused request has a span that says why; a caller that does not sample gets none", async () => {
    const traceId = "1af7651916cd43dd8448eb211c80319c";
    const traceparent = `00-${traceId}-b7ad6b7169203331-01`;
    assert.equal(await complete({ model: "nobody", prompt: "x" }, { traceparent }), 404);
    const [span] = await spansOf(traceId, 1);
    assert.equal(span!.isError, true);
    assert.equal(span!.attributes["error.type"], "model-not-found");
    const unsampled = "2af7651916cd43dd8448eb211c80319c";
    const quiet = { traceparent: `00-${unsampled}-b7ad6b7169203331-00` };
    assert.equal(await complete({ model: "echo", prompt: "x", max_tokens: 1 }, quiet), 200);
    // Later spans of the same processes came, so those would have too.
    const last = "3af7651916cd43dd8448eb211c80319c";
    const loud = { traceparent: `00-${last}-b7ad6b7169203331-01` };
    assert.equal(await complete({ model: "echo", prompt: "x", max_tokens: 1 }, loud), 200);
    await spansOf(last, 7);
    assert.equal(receiver.spans.filter((one) => one.traceId === unsampled).length, 0);
  });

  test("a malformed trace context begins a new trace, and what is left is sent on the way out", async () => {
    const headers = { traceparent: `00-${"0".repeat(32)}-b7ad6b7169203331-01`, "x-request-id": "malformed" };
    assert.equal(await complete({ model: "echo", prompt: "x", max_tokens: 1 }, headers), 200);
    assert.equal(await cluster.stop("SIGTERM"), 0);
    const root = receiver.spans.find((span) => span.attributes["dynamo.request_id"] === "malformed");
    assert.equal(root!.parentSpanId, "");
    assert.match(cluster.output(), /traces are exported/);
  });
});
