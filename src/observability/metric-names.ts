/**
 * Every metric of this project, in one place: name (Dynamo's where Dynamo has one, so that its dashboards work), type,
 * labels in order, help. `docs/metrics.md` lists the same; a test compares both. Rules: seconds and bytes as base units,
 * `_total` on counters, no prompt, key or request id in a label.
 */
interface MetricEntry {
  readonly type: "counter" | "gauge" | "histogram";
  readonly labels: readonly string[];
  readonly help: string;
  /** Histograms only. @default seconds */
  readonly buckets?: "seconds" | "tokens" | "milliseconds" | "ratio";
}

const REQUEST = ["model", "endpoint", "request_type"] as const;
const COMPONENT = ["dynamo_namespace", "dynamo_component", "dynamo_endpoint", "worker_id", "model"] as const;

export const METRICS = {
  // Frontend: requests.
  dynamo_frontend_requests_total: {
    type: "counter",
    labels: [...REQUEST, "status", "error_type"],
    help: "Requests ended, by outcome.",
  },
  dynamo_frontend_request_duration_seconds: {
    type: "histogram",
    labels: ["model"],
    help: "Time from request to its end.",
  },
  dynamo_frontend_active_requests: { type: "gauge", labels: ["model"], help: "Requests being served." },
  dynamo_frontend_inflight_requests: {
    type: "gauge",
    labels: ["model"],
    help: "Same as active_requests; Dynamo's older name.",
  },
  dynamo_frontend_queued_requests: {
    type: "gauge",
    labels: [],
    help: "Requests that wait for a place in the frontend.",
  },
  dynamo_frontend_stage_requests: {
    type: "gauge",
    labels: ["stage", "phase"],
    help: "Requests in a stage of the walk.",
  },
  dynamo_frontend_disconnected_clients: {
    type: "counter",
    labels: ["model"],
    help: "Clients that left before their answer was complete.",
  },
  dynamo_frontend_model_cancellation_total: {
    type: "counter",
    labels: REQUEST,
    help: "Requests cancelled, by the client or by a limit.",
  },
  dynamo_frontend_model_migration_total: {
    type: "counter",
    labels: ["model", "migration_type"],
    help: "Times a request went on with another worker: new_request before its first token, ongoing_request after it.",
  },
  dynamo_frontend_model_migration_duration_seconds: {
    type: "histogram",
    labels: ["outcome"],
    help: "Time from a worker's failure to the next one's first token, or to the error.",
  },
  dynamo_frontend_model_migration_max_seq_len_exceeded_total: {
    type: "counter",
    labels: ["model"],
    help: "Requests not moved as they were longer than --migration-max-seq-len.",
  },
  dynamo_frontend_model_migration_limit: {
    type: "gauge",
    labels: ["model"],
    help: "Times a request may go on with another worker.",
  },
  dynamo_frontend_disagg_choices_total: {
    type: "counter",
    labels: ["model", "choice"],
    help: "Answers by what was decided where there are prefill workers: split, or whole on a decode or prefill worker.",
  },
  dynamo_frontend_disagg_waiting: {
    type: "gauge",
    labels: ["model"],
    help: "Answers that are to be split and wait for a decode worker with a place and KV memory, before their prompt is computed.",
  },
  dynamo_frontend_disagg_fallbacks_total: {
    type: "counter",
    labels: ["model", "reason"],
    help: "Answers that were to be split and whose prompt the decode worker computed, by the reason.",
  },
  dynamo_frontend_disagg_handoff_bytes_total: {
    type: "counter",
    labels: ["model", "backend"],
    help: "Bytes of KV blocks moved from prefill to decode workers, by transfer back end.",
  },
  dynamo_frontend_disagg_handoff_seconds: {
    type: "histogram",
    labels: ["model"],
    help: "Time from the first token, of the prefill worker, to the decode worker's first.",
  },
  dynamo_frontend_model_rejection_total: {
    type: "counter",
    labels: ["model", "endpoint"],
    help: "Requests refused for capacity.",
  },
  dynamo_frontend_admission_rejection_total: {
    type: "counter",
    labels: ["gate", "model"],
    help: "Refusals per admission gate.",
  },
  dynamo_frontend_stage_timeouts_total: {
    type: "counter",
    labels: ["model", "stage"],
    help: "Stage limits that were over: queue, first_token, idle. The last two may have been saved by another worker.",
  },
  // Frontend: tokens and latency.
  dynamo_frontend_input_sequence_tokens: {
    type: "histogram",
    labels: ["model"],
    buckets: "tokens",
    help: "Prompt tokens per request.",
  },
  dynamo_frontend_output_sequence_tokens: {
    type: "histogram",
    labels: ["model"],
    buckets: "tokens",
    help: "Generated tokens per request.",
  },
  dynamo_frontend_output_tokens_total: { type: "counter", labels: ["model"], help: "Generated tokens." },
  dynamo_frontend_cached_tokens: {
    type: "histogram",
    labels: ["model"],
    buckets: "tokens",
    help: "Prompt tokens per request that came from the KV cache.",
  },
  dynamo_frontend_time_to_first_token_seconds: {
    type: "histogram",
    labels: ["model"],
    help: "Time from request to its first token.",
  },
  dynamo_frontend_inter_token_latency_seconds: {
    type: "histogram",
    labels: ["model"],
    help: "Time between tokens of a stream.",
  },
  dynamo_frontend_stage_duration_seconds: {
    type: "histogram",
    labels: ["stage"],
    help: "Time a request spent in a stage of the walk.",
  },
  dynamo_frontend_tokenize_seconds: { type: "histogram", labels: ["model"], help: "Time to tokenize a prompt." },
  dynamo_frontend_tokenizer_cache_hits_total: {
    type: "counter",
    labels: ["model"],
    help: "Prompts of which at least a part was in the tokenizer's text cache.",
  },
  dynamo_frontend_tokenizer_cache_misses_total: {
    type: "counter",
    labels: ["model"],
    help: "Prompts of which nothing was.",
  },
  dynamo_frontend_tokenizer_cache_cached_tokens_total: {
    type: "counter",
    labels: ["model"],
    help: "Prompt tokens that came from it.",
  },
  dynamo_frontend_tokenizer_cache_uncached_tokens_total: {
    type: "counter",
    labels: ["model"],
    help: "Prompt tokens that were computed.",
  },
  dynamo_frontend_tokenizer_cache_bytes: { type: "gauge", labels: ["model"], help: "Memory it holds." },
  dynamo_frontend_template_seconds: { type: "histogram", labels: ["model"], help: "Time to render a chat template." },
  dynamo_frontend_event_loop_delay_seconds: {
    type: "gauge",
    labels: ["quantile"],
    help: "Event loop delay since the last scrape.",
  },
  // Frontend: models.
  dynamo_frontend_model_ready: { type: "gauge", labels: ["model"], help: "1 when the model is listed and served." },
  dynamo_frontend_model_excluded_workers: {
    type: "gauge",
    labels: ["model"],
    help: "Workers of that name that are left out, because they do not agree with most others; /health says why.",
  },
  dynamo_frontend_model_total_kv_blocks: { type: "gauge", labels: ["model"], help: "KV blocks of one worker." },
  dynamo_frontend_model_max_num_seqs: { type: "gauge", labels: ["model"], help: "Sequences one worker runs at once." },
  dynamo_frontend_model_max_num_batched_tokens: {
    type: "gauge",
    labels: ["model"],
    help: "Tokens one engine step takes.",
  },
  dynamo_frontend_model_context_length: { type: "gauge", labels: ["model"], help: "Longest sequence." },
  dynamo_frontend_model_kv_cache_block_size: { type: "gauge", labels: ["model"], help: "Tokens per KV block." },
  // Frontend: its view of each worker.
  dynamo_frontend_worker_active_decode_blocks: {
    type: "gauge",
    labels: ["worker_id", "dp_rank", "worker_type"],
    help: "KV blocks the worker's running requests use.",
  },
  dynamo_frontend_worker_active_prefill_tokens: {
    type: "gauge",
    labels: ["worker_id", "dp_rank", "worker_type"],
    help: "Prompt tokens waiting on the worker.",
  },
  dynamo_frontend_worker_last_time_to_first_token_seconds: {
    type: "gauge",
    labels: ["worker_id", "dp_rank", "worker_type"],
    help: "Of the worker's newest request.",
  },
  dynamo_frontend_worker_last_input_sequence_tokens: {
    type: "gauge",
    labels: ["worker_id", "dp_rank", "worker_type"],
    help: "Of the worker's newest request.",
  },
  dynamo_frontend_worker_last_inter_token_latency_seconds: {
    type: "gauge",
    labels: ["worker_id", "dp_rank", "worker_type"],
    help: "Of the worker's newest tokens.",
  },
  dynamo_frontend_router_workers: { type: "gauge", labels: ["model"], help: "Workers the router can choose from." },
  dynamo_frontend_kept_workers: {
    type: "gauge",
    labels: [],
    help: "Workers whose discovery lease expired and that are routed to as long as their connection lives.",
  },
  dynamo_frontend_router_worker_state: {
    type: "gauge",
    labels: ["model", "state", "reason"],
    help: "Workers by what the router may do with them: eligible, inhibited, busy.",
  },
  dynamo_frontend_router_queue_pending_requests: {
    type: "gauge",
    labels: ["model"],
    help: "Requests that wait in the router for a worker.",
  },
  dynamo_frontend_router_queue_pending_isl_tokens: {
    type: "gauge",
    labels: ["model"],
    help: "Prompt tokens of the requests that wait in the router.",
  },
  dynamo_frontend_router_queue_pending_cached_tokens: {
    type: "gauge",
    labels: ["model"],
    help: "Those of them that some worker has cached.",
  },
  dynamo_frontend_router_queue_backpressure_total: {
    type: "counter",
    labels: ["model", "reason"],
    help: "Requests that the router's queue refused.",
  },
  // Router.
  dynamo_component_router_requests_total: {
    type: "counter",
    labels: ["model", "mode", "outcome"],
    help: "Routing decisions.",
  },
  dynamo_router_overhead_total: {
    type: "histogram",
    labels: ["router_id"],
    buckets: "milliseconds",
    help: "Time of one routing decision, ms.",
  },
  dynamo_router_overhead_block_hashing: {
    type: "histogram",
    labels: ["router_id"],
    buckets: "milliseconds",
    help: "Time to hash a prompt's blocks, ms.",
  },
  dynamo_router_overhead_indexer_find_matches: {
    type: "histogram",
    labels: ["router_id"],
    buckets: "milliseconds",
    help: "Time to look a prompt up in the index, ms.",
  },
  dynamo_router_overhead_scheduling: {
    type: "histogram",
    labels: ["router_id"],
    buckets: "milliseconds",
    help: "Time to choose and to book, ms.",
  },
  dynamo_component_router_requests_started_total: {
    type: "counter",
    labels: ["model"],
    help: "Requests the router began to place.",
  },
  dynamo_component_router_kv_hit_rate: {
    type: "histogram",
    labels: ["model"],
    buckets: "ratio",
    help: "Part of a prompt's blocks that the chosen worker should have, per request.",
  },
  dynamo_component_router_non_max_overlap_selections_total: {
    type: "counter",
    labels: ["model"],
    help: "Decisions for another worker than the one with the longest cached prefix.",
  },
  dynamo_component_router_overlap_blocks_lost: {
    type: "counter",
    labels: ["model"],
    help: "Cached blocks given up by those decisions.",
  },
  dynamo_component_router_input_sequence_tokens: {
    type: "histogram",
    labels: ["model"],
    buckets: "tokens",
    help: "Prompt tokens per routed request.",
  },
  dynamo_component_router_output_sequence_tokens: {
    type: "histogram",
    labels: ["model"],
    buckets: "tokens",
    help: "Generated tokens per routed request.",
  },
  dynamo_component_router_time_to_first_token_seconds: {
    type: "histogram",
    labels: ["model"],
    help: "Time from decision to the worker's first token.",
  },
  dynamo_component_router_inter_token_latency_seconds: {
    type: "histogram",
    labels: ["model"],
    help: "Time between tokens of a routed request.",
  },
  dynamo_router_degraded_decisions_total: {
    type: "counter",
    labels: ["model", "kind"],
    help: "Routing decisions that knew less than they should; their explanations say what.",
  },
  // Router: KV events.
  dynamo_component_kv_cache_events_applied: {
    type: "counter",
    labels: ["status", "event_type"],
    help: "KV events applied to the index.",
  },
  dynamo_router_kv_events_dropped_total: {
    type: "counter",
    labels: ["reason"],
    help: "KV events left out: malformed, duplicate, of a former life of the worker, or no room to keep them.",
  },
  dynamo_router_kv_events_lost_total: {
    type: "counter",
    labels: [],
    help: "KV event messages that the event plane lost; restored afterwards.",
  },
  dynamo_router_kv_restores_total: {
    type: "counter",
    labels: ["kind", "outcome"],
    help: "Queries to workers for KV events that were missed.",
  },
  dynamo_router_kv_ranks_recovering: {
    type: "gauge",
    labels: ["model"],
    help: "Ranks whose part of the index may be wrong right now.",
  },
  dynamo_kvindexer_models: { type: "gauge", labels: [], help: "Models whose KV index this process keeps." },
  dynamo_kvindexer_workers: { type: "gauge", labels: ["model"], help: "Workers that feed the model's KV index." },
  dynamo_kvindexer_blocks: { type: "gauge", labels: ["model"], help: "Distinct blocks in the KV index." },
  dynamo_kvindexer_memberships: {
    type: "gauge",
    labels: ["model"],
    help: "Blocks in the KV index, counted once for every rank and tier that holds them.",
  },
  dynamo_kvindexer_bytes: { type: "gauge", labels: ["model"], help: "Memory of the KV index." },
  dynamo_kvindexer_evicted_blocks_total: {
    type: "counter",
    labels: ["model"],
    help: "Blocks that the KV index forgot, or did not take, to keep within its memory.",
  },
  dynamo_kvindexer_events_behind: {
    type: "gauge",
    labels: ["model"],
    help: "KV events known of that are not applied yet, because earlier ones are missing.",
  },
  dynamo_kvindexer_starved_lookups_total: {
    type: "counter",
    labels: ["model"],
    help: "Lookups of other threads that found nothing because the index never stood still.",
  },
  dynamo_router_replica_sync_events_total: {
    type: "counter",
    labels: ["direction", "outcome"],
    help: "Active-load events to and from other routers.",
  },
  // Router service.
  dynamo_frontend_router_fallbacks_total: {
    type: "counter",
    labels: ["model", "reason"],
    help: "Requests that the frontend placed by itself, as no router service did.",
  },
  dynamo_router_service_bookings: {
    type: "gauge",
    labels: [],
    help: "Requests that a router service holds: on a worker, or waiting for one.",
  },
  dynamo_router_service_bookings_dropped_total: {
    type: "counter",
    labels: [],
    help: "Bookings that a router service freed because their frontend was gone or out of time.",
  },
  // Traces.
  dynamo_trace_spans_total: {
    type: "counter",
    labels: ["outcome"],
    help: "Spans by what became of them: exported, failed with their export, or dropped as too many waited.",
  },
  // Worker.
  dynamo_component_requests_total: { type: "counter", labels: COMPONENT, help: "Requests the worker ended." },
  dynamo_component_request_duration_seconds: {
    type: "histogram",
    labels: COMPONENT,
    help: "Time from arrival at the worker to the end.",
  },
  dynamo_component_inflight_requests: { type: "gauge", labels: COMPONENT, help: "Requests on the worker." },
  dynamo_component_request_bytes_total: { type: "counter", labels: COMPONENT, help: "Bytes of requests." },
  dynamo_component_response_bytes_total: { type: "counter", labels: COMPONENT, help: "Bytes of answers." },
  dynamo_component_errors_total: {
    type: "counter",
    labels: [...COMPONENT, "error_type"],
    help: "Requests that ended in an error.",
  },
  dynamo_component_cancellation_total: { type: "counter", labels: COMPONENT, help: "Requests the caller cancelled." },
  dynamo_component_time_to_first_response_seconds: {
    type: "histogram",
    labels: COMPONENT,
    help: "Time from arrival to the first answer.",
  },
  dynamo_component_uptime_seconds: { type: "gauge", labels: COMPONENT, help: "Time since the worker registered." },
  dynamo_component_total_blocks: { type: "gauge", labels: COMPONENT, help: "KV blocks of the engine." },
  dynamo_component_gpu_cache_usage_percent: {
    type: "gauge",
    labels: COMPONENT,
    help: "Part of the KV blocks that running requests use, 0 to 1.",
  },
  dynamo_component_model_load_time_seconds: {
    type: "gauge",
    labels: COMPONENT,
    help: "Time the engine took to start.",
  },
  dynamo_component_kv_publisher_engines_dropped_events_total: {
    type: "counter",
    labels: COMPONENT,
    help: "KV blocks and events of the engine that routers are not told of.",
  },
  // Engines that are processes of their own (`--engine vllm`). Their own metrics follow on the same page, as they are.
  dynamo_component_engine_up: {
    type: "gauge",
    labels: COMPONENT,
    help: "1 while the engine's server answers, 0 while it is away and the worker out of discovery.",
  },
  dynamo_component_engine_restarts_total: {
    type: "counter",
    labels: COMPONENT,
    help: "Starts of the engine's server after it had served: it crashed or hung.",
  },
  dynamo_component_engine_metrics_age_seconds: {
    type: "gauge",
    labels: COMPONENT,
    help: "Age of the newest scrape of the engine's metrics; what is too old counts for nothing and is not passed on.",
  },
  dynamo_component_engine_mispredicted_requests_total: {
    type: "counter",
    labels: COMPONENT,
    help: "Requests of which another part came from the engine's cache than its KV events let expect.",
  },
  dynamo_component_engine_block_hash_mismatches_total: {
    type: "counter",
    labels: COMPONENT,
    help: "Blocks looked at whose hash, as the engine tells it, is not the one computed from their tokens: another seed, algorithm or form of extra keys.",
  },
  dynamo_component_engine_kv_events_whole: {
    type: "gauge",
    labels: COMPONENT,
    help: "1 while all that can be known of the engine's KV cache is known; 0 while events are missing, or guessed.",
  },
  // KV tiers. Names as in KVBM: blocks from device to host, host to disk, host to object store, and back.
  kvbm_matched_tokens: {
    type: "counter",
    labels: [],
    help: "Prompt tokens whose KV blocks were found in host memory, on disk or in the object store.",
  },
  kvbm_offload_blocks_d2h: { type: "counter", labels: [], help: "KV blocks copied from the engine to host memory." },
  kvbm_offload_blocks_h2d: { type: "counter", labels: [], help: "KV blocks written from host memory to disk." },
  kvbm_offload_blocks_d2o: { type: "counter", labels: [], help: "KV blocks written to the object store." },
  kvbm_onboard_blocks_h2d: { type: "counter", labels: [], help: "KV blocks from host memory back into the engine." },
  kvbm_onboard_blocks_d2d: { type: "counter", labels: [], help: "KV blocks from disk back into the engine." },
  kvbm_onboard_blocks_o2d: {
    type: "counter",
    labels: [],
    help: "KV blocks from the object store back into the engine.",
  },
  kvbm_onboard_wait_seconds: {
    type: "histogram",
    labels: ["outcome"],
    buckets: "seconds",
    help: "Time a request waited for its blocks from disk or object store, before it computed the rest; late: for as long as it may.",
  },
  kvbm_host_cache_hit_rate: {
    type: "gauge",
    labels: [],
    help: "Of the prompt blocks that the engine did not have: share found in host memory, since the start.",
  },
  kvbm_disk_cache_hit_rate: {
    type: "gauge",
    labels: [],
    help: "Of the prompt blocks that the engine did not have: share found on disk, since the start.",
  },
  kvbm_object_cache_hit_rate: {
    type: "gauge",
    labels: [],
    help: "Of the prompt blocks that the engine did not have: share found in the object store, since the start.",
  },
  kvbm_blocks_failed_total: {
    type: "counter",
    labels: ["tier", "reason"],
    help: "KV blocks that a tier could not keep or give back; requests computed them instead.",
  },
  kvbm_tier_used_bytes: { type: "gauge", labels: ["tier"], help: "KV data in the tier." },
  kvbm_tier_capacity_bytes: { type: "gauge", labels: ["tier"], help: "KV data the tier may hold." },
  kvbm_tier_degraded: {
    type: "gauge",
    labels: ["tier"],
    help: "1 while the tier is left alone after a failure; it is tried again by itself.",
  },
  kvbm_offload_queue_blocks: { type: "gauge", labels: ["tier"], help: "KV blocks that wait to go to the tier." },
  // Handoffs between prefill and decode workers.
  dynamo_component_handoffs_total: {
    type: "counter",
    labels: [...COMPONENT, "outcome"],
    help: "Handoffs this worker offered, by how they ended: fetched, released unread, cancelled, expired.",
  },
  dynamo_component_handoff_blocks: {
    type: "gauge",
    labels: COMPONENT,
    help: "KV blocks that this worker keeps for decode workers.",
  },
  dynamo_component_handoff_pulls_total: {
    type: "counter",
    labels: [...COMPONENT, "outcome"],
    help: "Handoffs this worker was sent, by outcome: pulled, or the reason why it computed the blocks itself.",
  },
  dynamo_component_handoff_pulled_bytes_total: {
    type: "counter",
    labels: COMPONENT,
    help: "Bytes of KV blocks this worker fetched from prefill workers.",
  },
  dynamo_component_handoff_pull_seconds: {
    type: "histogram",
    labels: COMPONENT,
    help: "Time from a handoff's arrival to its blocks being in the engine's cache.",
  },
  // Planes.
  dynamo_plane_degraded: {
    type: "gauge",
    labels: ["plane"],
    help: "1 while the process goes on with what it last knew of that plane, which is out of reach.",
  },
  // Request plane.
  dynamo_request_plane_inflight: { type: "gauge", labels: [], help: "Streams this process has open to others." },
  dynamo_transport_tcp_bytes_sent_total: { type: "counter", labels: ["side"], help: "Request-plane bytes written." },
  dynamo_transport_tcp_bytes_received_total: { type: "counter", labels: ["side"], help: "Request-plane bytes read." },
  dynamo_transport_tcp_errors_total: {
    type: "counter",
    labels: ["side", "kind"],
    help: "Broken, refused or malformed request-plane connections.",
  },
  dynamo_transport_tcp_pool_active: { type: "gauge", labels: ["side"], help: "Open request-plane connections." },
  // Transfer library, after vLLM's nixl_* names.
  dynamo_transfer_xfer_time_seconds: {
    type: "histogram",
    labels: ["backend", "operation"],
    help: "Time from posting a transfer to its end.",
  },
  dynamo_transfer_bytes_transferred_total: {
    type: "counter",
    labels: ["backend", "operation"],
    help: "Bytes of completed transfers.",
  },
  dynamo_transfer_num_descriptors_total: {
    type: "counter",
    labels: ["backend", "operation"],
    help: "Descriptors of completed transfers.",
  },
  dynamo_transfer_num_failed_transfers_total: {
    type: "counter",
    labels: ["backend", "operation", "reason"],
    help: "Transfers that failed, were cancelled or ran out of time.",
  },
  dynamo_transfer_slow_paths_total: {
    type: "counter",
    labels: ["backend"],
    help: "Prepared tables that use a slower back end than both agents have.",
  },
  dynamo_transfer_registered_bytes: {
    type: "gauge",
    labels: ["kind"],
    help: "Bytes of registered memory.",
  },
} as const satisfies Record<string, MetricEntry>;

export type MetricName = keyof typeof METRICS;
