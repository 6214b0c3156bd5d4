import type { PolicySettings } from "./policies/index.ts";
import type { BusyThresholds } from "./scheduling/busy.ts";
import type { CostWeights } from "./scheduling/cost.ts";
import type { QueuePolicy } from "./scheduling/queue.ts";

/**
 * The router's settings. Names and defaults are Dynamo's (`--router-...` in the comments); times are milliseconds here.
 */
export interface RouterConfig extends CostWeights, PolicySettings {
  /** `--router-kv-events`: the index follows the workers' events; else own decisions with a TTL. */
  readonly kvEvents: boolean;
  /** `--router-ttl-secs`: how long a decision counts as cached without events. */
  readonly ttlMs: number;
  /** `--router-predicted-ttl-secs`: own decisions count beside the events for this long. undefined = off. */
  readonly predictedTtlMs: number | undefined;
  /** `--router-track-active-blocks`. Off: blocks of running requests do not count. */
  readonly trackActiveBlocks: boolean;
  /** `--router-track-output-blocks`: generated tokens count as blocks too. */
  readonly trackOutputBlocks: boolean;
  /** `--router-assume-kv-reuse`: prompts that run at the same time share their blocks. */
  readonly assumeKvReuse: boolean;
  /** `--router-queue-threshold`: requests wait while every worker has more than this many batches to prefill. undefined = never. */
  readonly queueThreshold: number | undefined;
  /** `--router-queue-policy`. */
  readonly queuePolicy: QueuePolicy;
  /** Waiting requests; one more is refused with `too-many-requests`. */
  readonly queueLimit: number;
  /** `DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS`: a request that waited this long gets its place by its overlap of now. 0 = never. */
  readonly overlapRefreshAfterMs: number;
  /** `--router-session-affinity-ttl-secs`. undefined = off. */
  readonly sessionAffinityTtlMs: number | undefined;
  /** `--active-decode-blocks-threshold`, `--active-prefill-tokens-threshold(-frac)`; `/busy_threshold` changes them. */
  readonly busyThresholds: BusyThresholds;
}

/** Most requests that may wait in one model's router; a waiting request costs about a kilobyte. */
const QUEUE_LIMIT = 4_096;

export const DEFAULT_ROUTER_CONFIG: RouterConfig = {
  overlapScoreCredit: 1,
  overlapScoreCreditDecay: 0,
  prefillLoadScale: 1,
  hostCacheHitWeight: 0.75,
  diskCacheHitWeight: 0.25,
  // Dynamo: 0.5, for a pool in the memory of its workers; ours is an object store or folder, further away than a disk.
  sharedCacheMultiplier: 0.1,
  decodeActiveRequestWeight: 0,
  trackPrefillTokens: true,
  temperature: 0,
  maxImbalance: 2,
  kvEvents: true,
  ttlMs: 120_000,
  predictedTtlMs: undefined,
  trackActiveBlocks: true,
  trackOutputBlocks: false,
  assumeKvReuse: true,
  queueThreshold: undefined,
  queuePolicy: "fcfs",
  queueLimit: QUEUE_LIMIT,
  overlapRefreshAfterMs: 10_000,
  sessionAffinityTtlMs: undefined,
  busyThresholds: {},
};
