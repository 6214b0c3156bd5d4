import type { CounterChild, GaugeChild, HistogramChild, Metrics } from "../observability/index.ts";
import type { ModelCard } from "../protocol/index.ts";
import type { SplitChoice } from "../router/index.ts";
import type { TextCacheUse } from "./preprocess/index.ts";

export type Endpoint = "chat_completions" | "completions";
export type RequestType = "stream" | "unary";
const STAGES = ["preprocess", "route", "dispatch"] as const;
export type Stage = (typeof STAGES)[number];

/** Children of the frontend's per-model metrics, resolved once per model; labels follow metric-names.ts. */
export class ModelMetrics {
  readonly #metrics: Metrics;
  readonly #model: string;
  readonly duration: HistogramChild;
  readonly active: GaugeChild;
  readonly inflight: GaugeChild;
  readonly inputTokens: HistogramChild;
  readonly outputTokens: HistogramChild;
  readonly outputTokensTotal: CounterChild;
  readonly cachedTokens: HistogramChild;
  readonly timeToFirstToken: HistogramChild;
  readonly interTokenLatency: HistogramChild;
  readonly tokenize: HistogramChild;
  readonly template: HistogramChild;
  readonly disconnected: CounterChild;
  readonly migrationTooLong: CounterChild;

  constructor(metrics: Metrics, model: string) {
    this.#metrics = metrics;
    this.#model = model;
    this.duration = metrics.histogram("dynamo_frontend_request_duration_seconds").labels(model);
    this.active = metrics.gauge("dynamo_frontend_active_requests").labels(model);
    this.inflight = metrics.gauge("dynamo_frontend_inflight_requests").labels(model);
    this.inputTokens = metrics.histogram("dynamo_frontend_input_sequence_tokens").labels(model);
    this.outputTokens = metrics.histogram("dynamo_frontend_output_sequence_tokens").labels(model);
    this.outputTokensTotal = metrics.counter("dynamo_frontend_output_tokens_total").labels(model);
    this.cachedTokens = metrics.histogram("dynamo_frontend_cached_tokens").labels(model);
    this.timeToFirstToken = metrics.histogram("dynamo_frontend_time_to_first_token_seconds").labels(model);
    this.interTokenLatency = metrics.histogram("dynamo_frontend_inter_token_latency_seconds").labels(model);
    this.tokenize = metrics.histogram("dynamo_frontend_tokenize_seconds").labels(model);
    this.template = metrics.histogram("dynamo_frontend_template_seconds").labels(model);
    this.disconnected = metrics.counter("dynamo_frontend_disconnected_clients").labels(model);
    this.migrationTooLong = metrics.counter("dynamo_frontend_model_migration_max_seq_len_exceeded_total").labels(model);
  }

  setCard(card: ModelCard): void {
    const set = (name: Parameters<Metrics["gauge"]>[0], value: number): void =>
      this.#metrics.gauge(name).labels(this.#model).set(value);
    set("dynamo_frontend_model_total_kv_blocks", card.totalBlocks);
    set("dynamo_frontend_model_max_num_seqs", card.maxSequences);
    set("dynamo_frontend_model_max_num_batched_tokens", card.maxBatchedTokens);
    set("dynamo_frontend_model_context_length", card.contextLength);
    set("dynamo_frontend_model_kv_cache_block_size", card.blockSizeTokens);
  }

  setReady(ready: boolean): void {
    this.#metrics
      .gauge("dynamo_frontend_model_ready")
      .labels(this.#model)
      .set(ready ? 1 : 0);
  }

  setExcludedWorkers(count: number): void {
    this.#metrics.gauge("dynamo_frontend_model_excluded_workers").labels(this.#model).set(count);
  }

  setMigrationLimit(limit: number): void {
    this.#metrics.gauge("dynamo_frontend_model_migration_limit").labels(this.#model).set(limit);
  }

  migration(type: "new_request" | "ongoing_request"): void {
    this.#metrics.counter("dynamo_frontend_model_migration_total").labels(this.#model, type).add();
  }

  /** From the failure to the next worker's first word, or to the error. */
  migrationDuration(outcome: "success" | "failure", seconds: number): void {
    this.#metrics.histogram("dynamo_frontend_model_migration_duration_seconds").labels(outcome).observe(seconds);
  }

  /** What was decided for a choice, where there are prefill workers. */
  disaggregation(choice: SplitChoice): void {
    this.#metrics.counter("dynamo_frontend_disagg_choices_total").labels(this.#model, choice).add();
  }

  /** A choice that was to be split, or was, but its prompt is computed by the decode worker. */
  disaggregationFallback(reason: string): void {
    this.#metrics.counter("dynamo_frontend_disagg_fallbacks_total").labels(this.#model, reason).add();
  }

  /** One more, or one less, that waits for a decode worker before its prompt is computed. */
  disaggregationWaiting(change: 1 | -1): void {
    this.#metrics.gauge("dynamo_frontend_disagg_waiting").labels(this.#model).add(change);
  }

  handoffBytes(backend: string, byteCount: number): void {
    this.#metrics.counter("dynamo_frontend_disagg_handoff_bytes_total").labels(this.#model, backend).add(byteCount);
  }

  handoffSeconds(seconds: number): void {
    this.#metrics.histogram("dynamo_frontend_disagg_handoff_seconds").labels(this.#model).observe(seconds);
  }

  setTokenizerCache(use: TextCacheUse | undefined): void {
    if (use === undefined) return;
    const counter = (name: Parameters<Metrics["counter"]>[0]): CounterChild =>
      this.#metrics.counter(name).labels(this.#model);
    counter("dynamo_frontend_tokenizer_cache_hits_total").value = use.hits;
    counter("dynamo_frontend_tokenizer_cache_misses_total").value = use.misses;
    counter("dynamo_frontend_tokenizer_cache_cached_tokens_total").value = use.cachedTokens;
    counter("dynamo_frontend_tokenizer_cache_uncached_tokens_total").value = use.uncachedTokens;
    this.#metrics.gauge("dynamo_frontend_tokenizer_cache_bytes").labels(this.#model).set(use.bytes);
  }

  cancelled(endpoint: Endpoint, type: RequestType): void {
    this.#metrics.counter("dynamo_frontend_model_cancellation_total").labels(this.#model, endpoint, type).add();
  }

  rejected(endpoint: Endpoint): void {
    this.#metrics.counter("dynamo_frontend_model_rejection_total").labels(this.#model, endpoint).add();
  }
}

/** Counts a request that ended; `model` is `unknown` for names that are not served, so that labels stay bounded. */
export function countRequest(
  metrics: Metrics,
  labels: { model: string; endpoint: Endpoint; type: RequestType; status: "success" | "error"; errorType: string },
): void {
  metrics
    .counter("dynamo_frontend_requests_total")
    .labels(labels.model, labels.endpoint, labels.type, labels.status, labels.errorType)
    .add();
}

/** How many requests are in each stage of the walk, and how long they stay there. */
export class StageMetrics {
  readonly #counts: Record<Stage, GaugeChild>;
  readonly #durations: Record<Stage, HistogramChild>;

  constructor(metrics: Metrics) {
    const counts = metrics.gauge("dynamo_frontend_stage_requests");
    const durations = metrics.histogram("dynamo_frontend_stage_duration_seconds");
    const make = <T>(child: (stage: Stage) => T): Record<Stage, T> =>
      Object.fromEntries(STAGES.map((stage) => [stage, child(stage)])) as Record<Stage, T>;
    this.#counts = make((stage) => counts.labels(stage, "aggregated"));
    this.#durations = make((stage) => durations.labels(stage));
  }

  enter(stage: Stage): void {
    this.#counts[stage].add(1);
  }

  leave(stage: Stage, durationMs: number): void {
    this.#counts[stage].add(-1);
    this.#durations[stage].observe(durationMs / 1_000);
  }
}

/** What this frontend knows of one worker, as gauges; removed when the worker leaves. */
export class WorkerGauges {
  readonly #metrics: Metrics;
  readonly #labels: readonly [string, string, string];
  readonly activeBlocks: GaugeChild;
  readonly prefillTokens: GaugeChild;
  readonly lastTimeToFirstToken: GaugeChild;
  readonly lastInputTokens: GaugeChild;
  readonly lastInterTokenLatency: GaugeChild;

  constructor(metrics: Metrics, instanceId: string) {
    this.#metrics = metrics;
    this.#labels = [instanceId, "0", "aggregated"];
    const child = (name: (typeof WORKER_GAUGES)[number]): GaugeChild => metrics.gauge(name).labels(...this.#labels);
    this.activeBlocks = child(WORKER_GAUGES[0]);
    this.prefillTokens = child(WORKER_GAUGES[1]);
    this.lastTimeToFirstToken = child(WORKER_GAUGES[2]);
    this.lastInputTokens = child(WORKER_GAUGES[3]);
    this.lastInterTokenLatency = child(WORKER_GAUGES[4]);
  }

  remove(): void {
    for (const name of WORKER_GAUGES) this.#metrics.gauge(name).remove(...this.#labels);
  }
}

const WORKER_GAUGES = [
  "dynamo_frontend_worker_active_decode_blocks",
  "dynamo_frontend_worker_active_prefill_tokens",
  "dynamo_frontend_worker_last_time_to_first_token_seconds",
  "dynamo_frontend_worker_last_input_sequence_tokens",
  "dynamo_frontend_worker_last_inter_token_latency_seconds",
] as const;
