import type { EngineProcessState } from "../engines/index.ts";
import type { CounterChild, GaugeChild, HistogramChild, Metrics } from "../observability/index.ts";

/** The worker's metric children, resolved once: the labels are fixed for a worker's life. */
export class WorkerMetrics {
  readonly requests: CounterChild;
  readonly duration: HistogramChild;
  readonly inflight: GaugeChild;
  readonly requestBytes: CounterChild;
  readonly responseBytes: CounterChild;
  readonly cancellations: CounterChild;
  readonly firstResponse: HistogramChild;
  readonly uptime: GaugeChild;
  readonly totalBlocks: GaugeChild;
  readonly cacheUsage: GaugeChild;
  readonly loadTime: GaugeChild;
  readonly droppedKvEvents: CounterChild;
  readonly #errors: (errorType: string) => CounterChild;

  /** `labels`: namespace, component, endpoint, worker id, model. */
  constructor(metrics: Metrics, labels: readonly [string, string, string, string, string]) {
    this.requests = metrics.counter("dynamo_component_requests_total").labels(...labels);
    this.duration = metrics.histogram("dynamo_component_request_duration_seconds").labels(...labels);
    this.inflight = metrics.gauge("dynamo_component_inflight_requests").labels(...labels);
    this.requestBytes = metrics.counter("dynamo_component_request_bytes_total").labels(...labels);
    this.responseBytes = metrics.counter("dynamo_component_response_bytes_total").labels(...labels);
    this.cancellations = metrics.counter("dynamo_component_cancellation_total").labels(...labels);
    this.firstResponse = metrics.histogram("dynamo_component_time_to_first_response_seconds").labels(...labels);
    this.uptime = metrics.gauge("dynamo_component_uptime_seconds").labels(...labels);
    this.totalBlocks = metrics.gauge("dynamo_component_total_blocks").labels(...labels);
    this.cacheUsage = metrics.gauge("dynamo_component_gpu_cache_usage_percent").labels(...labels);
    this.loadTime = metrics.gauge("dynamo_component_model_load_time_seconds").labels(...labels);
    this.droppedKvEvents = metrics
      .counter("dynamo_component_kv_publisher_engines_dropped_events_total")
      .labels(...labels);
    const errors = metrics.counter("dynamo_component_errors_total");
    this.#errors = (errorType) => errors.labels(...labels, errorType);
  }

  /** Of an engine that is a process of its own: read when somebody scrapes. */
  followEngine(
    metrics: Metrics,
    labels: readonly [string, string, string, string, string],
    state: () => EngineProcessState,
  ): void {
    const up = metrics.gauge("dynamo_component_engine_up").labels(...labels);
    const restarts = metrics.counter("dynamo_component_engine_restarts_total").labels(...labels);
    const age = metrics.gauge("dynamo_component_engine_metrics_age_seconds").labels(...labels);
    const mispredicted = metrics.counter("dynamo_component_engine_mispredicted_requests_total").labels(...labels);
    const hashes = metrics.counter("dynamo_component_engine_block_hash_mismatches_total").labels(...labels);
    const whole = metrics.gauge("dynamo_component_engine_kv_events_whole").labels(...labels);
    metrics.onCollect(() => {
      const now = state();
      up.set(Number(now.isUp));
      restarts.value = now.restarts;
      age.set(now.metricsAgeSeconds);
      mispredicted.value = now.mispredictedRequests;
      hashes.value = now.hashMismatches;
      whole.set(Number(now.isKvWhole));
    });
  }

  failed(errorType: string): void {
    this.#errors(errorType).add();
  }
}
