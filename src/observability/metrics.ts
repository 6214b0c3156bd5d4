import { AggregatorRegistry, Registry, type MetricObjectWithValues, type MetricValue } from "prom-client";
import { METRICS, type MetricName } from "./metric-names.ts";

/**
 * Metrics with a hot path of typed-array increments. A family is made once per process and name; `labels(...)` resolves
 * a child once (per model, per worker), and its `add`, `set` and `observe` cost 10 to 30 ns. The prom-client registry
 * only collects and renders at scrape time. Names, types, labels and help stand in `metric-names.ts`.
 */
export class CounterChild {
  value = 0;
  add(amount = 1): void {
    this.value += amount;
  }
}

export class GaugeChild {
  value = 0;
  set(value: number): void {
    this.value = value;
  }
  add(amount = 1): void {
    this.value += amount;
  }
}

export class HistogramChild {
  readonly bounds: Float64Array;
  /** One more than bounds: the last is +Inf. Not cumulative. */
  readonly counts: Float64Array;
  sum = 0;

  constructor(bounds: Float64Array) {
    this.bounds = bounds;
    this.counts = new Float64Array(bounds.length + 1);
  }

  observe(value: number, times = 1): void {
    const bounds = this.bounds;
    let low = 0;
    let high = bounds.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (value <= bounds[middle]!) high = middle;
      else low = middle + 1;
    }
    this.counts[low] = this.counts[low]! + times;
    this.sum += value * times;
  }
}

type Child = CounterChild | GaugeChild | HistogramChild;

interface Sample {
  value: number;
  labels: Record<string, string>;
  metricName?: string;
}

/** A child never goes away by itself: `remove` it when its worker or model left, so that the map stays bounded. */
export class Family<C extends Child> {
  readonly name: MetricName;
  readonly #labelNames: readonly string[];
  readonly #make: () => C;
  readonly #children = new Map<string, { labels: Record<string, string>; child: C }>();
  /** Above this many label sets further ones share one child labelled `other`: outside input must not grow memory. */
  readonly #maxChildren = 2_000;

  constructor(name: MetricName, labelNames: readonly string[], make: () => C) {
    this.name = name;
    this.#labelNames = labelNames;
    this.#make = make;
  }

  /** Values in the order of the label names in `metric-names.ts`. */
  labels(...values: readonly string[]): C {
    if (values.length !== this.#labelNames.length) {
      throw new Error(`${this.name} has labels ${this.#labelNames.join(", ")}, got ${values.length} values`);
    }
    let key = values.join("\u0000");
    let entry = this.#children.get(key);
    if (entry === undefined) {
      let shown = values;
      if (this.#children.size >= this.#maxChildren) {
        shown = values.map(() => "other");
        key = shown.join("\u0000");
        entry = this.#children.get(key);
        if (entry !== undefined) return entry.child;
      }
      const labels: Record<string, string> = {};
      this.#labelNames.forEach((name, index) => (labels[name] = shown[index]!));
      entry = { labels, child: this.#make() };
      this.#children.set(key, entry);
    }
    return entry.child;
  }

  remove(...values: readonly string[]): void {
    this.#children.delete(values.join("\u0000"));
  }

  samples(): Sample[] {
    const samples: Sample[] = [];
    for (const { labels, child } of this.#children.values()) {
      if (child instanceof HistogramChild) histogramSamples(this.name, labels, child, samples);
      else samples.push({ value: child.value, labels });
    }
    return samples;
  }
}

function histogramSamples(name: string, labels: Record<string, string>, child: HistogramChild, into: Sample[]): void {
  let cumulative = 0;
  for (let i = 0; i <= child.bounds.length; i++) {
    cumulative += child.counts[i]!;
    const le = i < child.bounds.length ? String(child.bounds[i]) : "+Inf";
    into.push({ value: cumulative, labels: { le, ...labels }, metricName: `${name}_bucket` });
  }
  into.push({ value: child.sum, labels, metricName: `${name}_sum` });
  into.push({ value: cumulative, labels, metricName: `${name}_count` });
}

/** Seconds, from 1 ms to 2 minutes: request, first-token and inter-token times. */
const SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120];
/** Powers of two up to 128 k: tokens per request. */
const TOKENS = Array.from({ length: 18 }, (_, i) => 2 ** i);
const MILLISECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000];
/** Parts of a whole, 0 to 1. */
const RATIO = Array.from({ length: 21 }, (_, i) => i / 20);
/** Shared by all histograms: nobody writes to them. */
const BUCKETS = {
  seconds: Float64Array.from(SECONDS),
  tokens: Float64Array.from(TOKENS),
  milliseconds: Float64Array.from(MILLISECONDS),
  ratio: Float64Array.from(RATIO),
} as const;

export class Metrics {
  readonly registry = new Registry();
  readonly #families = new Map<MetricName, Family<Child>>();
  readonly #collectors: (() => void)[] = [];

  #family<C extends Child>(name: MetricName, type: "counter" | "gauge" | "histogram", make: () => C): Family<C> {
    const known = this.#families.get(name);
    if (known !== undefined) return known as unknown as Family<C>;
    const { help, labels, type: declared } = METRICS[name];
    if (declared !== type) throw new Error(`${name} is declared as ${declared}, asked for as ${type}`);
    const family = new Family(name, labels, make);
    this.#families.set(name, family as unknown as Family<Child>);
    const aggregator = SAME_IN_ALL_THREADS.has(name) ? "max" : "sum";
    const metric = {
      name,
      help,
      type,
      aggregator,
      get: () => Promise.resolve({ name, help, type, aggregator, values: family.samples() }),
      reset: () => undefined,
    };
    this.registry.registerMetric(metric as never);
    return family;
  }

  counter(name: MetricName): Family<CounterChild> {
    return this.#family(name, "counter", () => new CounterChild());
  }

  gauge(name: MetricName): Family<GaugeChild> {
    return this.#family(name, "gauge", () => new GaugeChild());
  }

  histogram(name: MetricName): Family<HistogramChild> {
    const unit = (METRICS[name] as { buckets?: keyof typeof BUCKETS }).buckets ?? "seconds";
    const bounds = BUCKETS[unit];
    return this.#family(name, "histogram", () => new HistogramChild(bounds));
  }

  /** Runs before each scrape: for gauges that are cheaper to read than to keep. */
  onCollect(collect: () => void): void {
    this.#collectors.push(collect);
  }

  /** Prometheus text format 0.0.4. */
  async render(): Promise<string> {
    for (const collect of this.#collectors) collect();
    return this.registry.metrics();
  }

  /** What a scrape would show, as plain data that another thread can merge with its own. */
  async snapshot(): Promise<MetricsSnapshot> {
    for (const collect of this.#collectors) collect();
    return this.registry.getMetricsAsJSON();
  }
}

export type MetricsSnapshot = MetricObjectWithValues<MetricValue<string>>[];

/**
 * Gauges that each thread of a process has a view of: the sum would be false. The largest is shown, which is the same
 * when all agree, and the worst when they do not.
 */
const SAME_IN_ALL_THREADS: ReadonlySet<MetricName> = new Set<MetricName>([
  "dynamo_frontend_event_loop_delay_seconds",
  "dynamo_frontend_model_ready",
  "dynamo_frontend_model_excluded_workers",
  "dynamo_frontend_model_total_kv_blocks",
  "dynamo_frontend_model_max_num_seqs",
  "dynamo_frontend_model_max_num_batched_tokens",
  "dynamo_frontend_model_context_length",
  "dynamo_frontend_model_kv_cache_block_size",
  "dynamo_frontend_worker_active_decode_blocks",
  "dynamo_frontend_worker_active_prefill_tokens",
  "dynamo_frontend_worker_last_time_to_first_token_seconds",
  "dynamo_frontend_worker_last_input_sequence_tokens",
  "dynamo_frontend_worker_last_inter_token_latency_seconds",
  "dynamo_frontend_router_workers",
  "dynamo_frontend_kept_workers",
  "dynamo_frontend_router_worker_state",
]);

/** One scrape of a process out of those of its threads, in Prometheus text format: sums, but for the gauges above. */
export function renderMerged(snapshots: readonly MetricsSnapshot[]): Promise<string> {
  return AggregatorRegistry.aggregate(snapshots as MetricsSnapshot[]).metrics();
}
