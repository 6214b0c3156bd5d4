import type { CounterChild, GaugeChild, HistogramChild, Metrics } from "../observability/index.ts";

/** Children of the router's metrics for one model, resolved once. */
export class RouterMetrics {
  readonly #metrics: Metrics;
  readonly #model: string;
  readonly routed: CounterChild;
  readonly started: CounterChild;
  readonly workers: GaugeChild;
  // Time of one decision and of its parts, ms.
  readonly total: HistogramChild;
  readonly blockHashing: HistogramChild;
  readonly findMatches: HistogramChild;
  readonly scheduling: HistogramChild;
  // What the decisions were worth.
  readonly hitRate: HistogramChild;
  readonly nonMaxOverlap: CounterChild;
  readonly overlapLost: CounterChild;
  readonly inputTokens: HistogramChild;
  readonly outputTokens: HistogramChild;
  readonly timeToFirstToken: HistogramChild;
  readonly interTokenLatency: HistogramChild;
  // The queue.
  readonly queued: GaugeChild;
  readonly queuedTokens: GaugeChild;
  readonly queuedCachedTokens: GaugeChild;
  readonly #mode: string;

  constructor(metrics: Metrics, model: string, mode: string) {
    this.#metrics = metrics;
    this.#model = model;
    this.#mode = mode;
    this.routed = metrics.counter("dynamo_component_router_requests_total").labels(model, mode, "routed");
    this.started = metrics.counter("dynamo_component_router_requests_started_total").labels(model);
    this.workers = metrics.gauge("dynamo_frontend_router_workers").labels(model);
    this.total = metrics.histogram("dynamo_router_overhead_total").labels(model);
    this.blockHashing = metrics.histogram("dynamo_router_overhead_block_hashing").labels(model);
    this.findMatches = metrics.histogram("dynamo_router_overhead_indexer_find_matches").labels(model);
    this.scheduling = metrics.histogram("dynamo_router_overhead_scheduling").labels(model);
    this.hitRate = metrics.histogram("dynamo_component_router_kv_hit_rate").labels(model);
    this.nonMaxOverlap = metrics.counter("dynamo_component_router_non_max_overlap_selections_total").labels(model);
    this.overlapLost = metrics.counter("dynamo_component_router_overlap_blocks_lost").labels(model);
    this.inputTokens = metrics.histogram("dynamo_component_router_input_sequence_tokens").labels(model);
    this.outputTokens = metrics.histogram("dynamo_component_router_output_sequence_tokens").labels(model);
    this.timeToFirstToken = metrics.histogram("dynamo_component_router_time_to_first_token_seconds").labels(model);
    this.interTokenLatency = metrics.histogram("dynamo_component_router_inter_token_latency_seconds").labels(model);
    this.queued = metrics.gauge("dynamo_frontend_router_queue_pending_requests").labels(model);
    this.queuedTokens = metrics.gauge("dynamo_frontend_router_queue_pending_isl_tokens").labels(model);
    this.queuedCachedTokens = metrics.gauge("dynamo_frontend_router_queue_pending_cached_tokens").labels(model);
  }

  /** `outcome`: the reason of the error. */
  refused(outcome: string): void {
    this.#metrics.counter("dynamo_component_router_requests_total").labels(this.#model, this.#mode, outcome).add();
  }

  backpressure(reason: string): void {
    this.#metrics.counter("dynamo_frontend_router_queue_backpressure_total").labels(this.#model, reason).add();
  }

  workerState(state: "eligible" | "inhibited" | "busy", reason: string, count: number): void {
    this.#metrics.gauge("dynamo_frontend_router_worker_state").labels(this.#model, state, reason).set(count);
  }
}
