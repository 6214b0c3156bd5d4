import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { METRICS, type MetricName } from "./metric-names.ts";
import { HistogramChild, Metrics, renderMerged } from "./metrics.ts";

interface ParsedSample {
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}

/** A reader of the Prometheus text format, strict about what we write: HELP, TYPE, samples. */
function parse(text: string): Map<string, ParsedSample[]> {
  const samples = new Map<string, ParsedSample[]>();
  for (const line of text.split("\n")) {
    if (line === "" || /^# (HELP [a-z][a-z0-9_]* .+|TYPE [a-z][a-z0-9_]* (counter|gauge|histogram))$/.test(line))
      continue;
    const match = /^([a-z][a-z0-9_]*)(?:\{(.*)\})? (\S+)$/s.exec(line);
    assert.ok(match, `not a sample: ${line}`);
    const [, name, labelText = "", value] = match;
    const labels: Record<string, string> = {};
    const rest = labelText.replaceAll(/([a-z_]+)="((?:[^"\\]|\\.)*)",?/g, (_, label: string, escaped: string) => {
      labels[label] = JSON.parse(`"${escaped}"`) as string;
      return "";
    });
    assert.equal(rest, "", `labels of ${line}`);
    const list = samples.get(name!) ?? [];
    samples.set(name!, list);
    list.push({ labels, value: value === "+Inf" ? Infinity : Number(value) });
    assert.ok(!Number.isNaN(list.at(-1)!.value), `a number in ${line}`);
  }
  return samples;
}

void test("histogram: counts and sum are those of the plain definition, borders included", () => {
  const bounds = [0.5, 1, 2, 8];
  const aValue = fc.oneof(fc.constantFrom(...bounds, 0, -1), fc.double({ min: -1, max: 20, noNaN: true }));
  fc.assert(
    fc.property(fc.array(fc.tuple(aValue, fc.integer({ min: 1, max: 5 })), { maxLength: 50 }), (observations) => {
      const histogram = new HistogramChild(Float64Array.from(bounds));
      for (const [value, times] of observations) histogram.observe(value, times);
      const countUpTo = (bound: number): number =>
        observations.filter(([value]) => value <= bound).reduce((count, [, times]) => count + times, 0);
      let cumulative = 0;
      [...bounds, Infinity].forEach((bound, i) => {
        cumulative += histogram.counts[i]!;
        assert.equal(cumulative, countUpTo(bound));
      });
      const sum = observations.reduce((total, [value, times]) => total + value * times, 0);
      assert.ok(Math.abs(histogram.sum - sum) < 1e-9);
    }),
  );
});

void test("metrics: the scrape is text that a parser reads back, with cumulative buckets", async () => {
  const metrics = new Metrics();
  const histogram = metrics.histogram("dynamo_frontend_output_sequence_tokens").labels("m");
  for (const value of [1, 3, 3, 1_000_000]) histogram.observe(value);
  metrics.counter("dynamo_frontend_output_tokens_total").labels("m").add(41);
  metrics.counter("dynamo_frontend_output_tokens_total").labels("m").add();
  const gauge = metrics.gauge("dynamo_frontend_active_requests").labels("m");
  gauge.set(5);
  gauge.add(-2);
  const samples = parse(await metrics.render());
  assert.deepEqual(samples.get("dynamo_frontend_output_tokens_total"), [{ labels: { model: "m" }, value: 42 }]);
  assert.deepEqual(samples.get("dynamo_frontend_active_requests"), [{ labels: { model: "m" }, value: 3 }]);
  const buckets = samples.get("dynamo_frontend_output_sequence_tokens_bucket")!;
  assert.deepEqual(
    buckets
      .map(({ labels, value }) => [labels["le"], value])
      .filter(([le]) => ["1", "2", "4", "+Inf"].includes(String(le))),
    [
      ["1", 1],
      ["2", 1],
      ["4", 3],
      ["+Inf", 4],
    ],
  );
  assert.deepEqual(samples.get("dynamo_frontend_output_sequence_tokens_count"), [{ labels: { model: "m" }, value: 4 }]);
  assert.deepEqual(samples.get("dynamo_frontend_output_sequence_tokens_sum")?.[0]?.value, 1_000_007);
});

void test("metrics: every declared metric can be made and rendered with all its labels", async () => {
  const metrics = new Metrics();
  for (const name of Object.keys(METRICS) as MetricName[]) {
    const { type, labels } = METRICS[name];
    metrics[type](name).labels(...labels.map((label) => `${label} value`));
  }
  const samples = parse(await metrics.render());
  for (const name of Object.keys(METRICS) as MetricName[]) {
    const { type, labels } = METRICS[name];
    const [sample] = samples.get(type === "histogram" ? `${name}_count` : name) ?? [];
    assert.deepEqual(Object.keys(sample?.labels ?? {}), [...labels], name);
  }
});

void test("metrics: label values with quotes, backslashes and line ends survive", async () => {
  const metrics = new Metrics();
  const model = 'a"b\\c\nd';
  metrics.gauge("dynamo_frontend_active_requests").labels(model).set(1);
  const samples = parse(await metrics.render());
  assert.equal(samples.get("dynamo_frontend_active_requests")?.[0]?.labels["model"], model);
});

void test("metrics: beyond the cap label sets share one child, and removed ones make room", async () => {
  const metrics = new Metrics();
  const family = metrics.counter("dynamo_frontend_output_tokens_total");
  for (let i = 0; i < 5_000; i++) family.labels(`model-${i}`).add();
  const samples = parse(await metrics.render()).get("dynamo_frontend_output_tokens_total")!;
  assert.equal(samples.length, 2_001);
  assert.equal(samples.find(({ labels }) => labels["model"] === "other")?.value, 3_000);
  assert.equal(
    samples.reduce((sum, { value }) => sum + value, 0),
    5_000,
  );
  family.labels("model-7").add();
  assert.equal(family.labels("model-7").value, 2, "known sets keep their child");
  family.remove("model-7");
  family.remove("model-8");
  family.labels("new").add(9);
  assert.equal(family.labels("new").value, 9);
});

void test("metrics: the same name is the same family, a wrong type or label count is a defect", () => {
  const metrics = new Metrics();
  const family = metrics.counter("dynamo_frontend_output_tokens_total");
  assert.equal(metrics.counter("dynamo_frontend_output_tokens_total"), family);
  assert.equal(family.labels("m"), family.labels("m"));
  assert.throws(() => family.labels("m", "more"), /has labels model, got 2/);
  assert.throws(() => metrics.gauge("dynamo_frontend_requests_total"), /declared as counter/);
});

void test("metrics: collectors run before each scrape", async () => {
  const metrics = new Metrics();
  const gauge = metrics.gauge("dynamo_frontend_queued_requests").labels();
  let reading = 0;
  metrics.onCollect(() => gauge.set(++reading));
  await metrics.render();
  assert.equal(parse(await metrics.render()).get("dynamo_frontend_queued_requests")?.[0]?.value, 2);
});

test("metrics of several threads merge into one scrape: counts and histograms add up, shared views do not", async () => {
  const threads = [1, 2, 3].map((amount) => {
    const metrics = new Metrics();
    metrics.counter("dynamo_frontend_output_tokens_total").labels("m").add(amount);
    metrics.gauge("dynamo_frontend_active_requests").labels("m").set(amount);
    metrics.gauge("dynamo_frontend_router_workers").labels("m").set(4);
    metrics.histogram("dynamo_frontend_time_to_first_token_seconds").labels("m").observe(amount);
    // Known to one of them only.
    if (amount === 2) metrics.counter("dynamo_router_kv_events_lost_total").labels().add(9);
    metrics.onCollect(() => metrics.gauge("dynamo_frontend_queued_requests").labels().set(amount));
    return metrics;
  });
  const snapshots = await Promise.all(threads.map((metrics) => metrics.snapshot()));
  const merged = parse(await renderMerged(structuredClone(snapshots)));
  const value = (name: string, labels: Record<string, string>): number | undefined =>
    merged.get(name)?.find((sample) => Object.entries(labels).every(([key, text]) => sample.labels[key] === text))
      ?.value;
  assert.equal(value("dynamo_frontend_output_tokens_total", { model: "m" }), 6);
  assert.equal(value("dynamo_frontend_active_requests", { model: "m" }), 6);
  assert.equal(value("dynamo_frontend_queued_requests", {}), 6);
  assert.equal(value("dynamo_frontend_router_workers", { model: "m" }), 4);
  assert.equal(value("dynamo_router_kv_events_lost_total", {}), 9);
  const histogram = "dynamo_frontend_time_to_first_token_seconds";
  assert.equal(value(`${histogram}_bucket`, { model: "m", le: "1" }), 1);
  assert.equal(value(`${histogram}_bucket`, { model: "m", le: "2.5" }), 2);
  assert.equal(value(`${histogram}_bucket`, { model: "m", le: "+Inf" }), 3);
  assert.equal(value(`${histogram}_sum`, { model: "m" }), 6);
  assert.equal(value(`${histogram}_count`, { model: "m" }), 3);
  // One thread's scrape is what it renders itself.
  assert.deepEqual(parse(await renderMerged([snapshots[1]!])), parse(await threads[1]!.render()));
});
