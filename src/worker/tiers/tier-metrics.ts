import type { Metrics } from "../../observability/index.ts";
import type { KvTierUse } from "../../protocol/index.ts";
import type { TierFailure, TierMeters, TierName } from "../../kvbm/index.ts";

/**
 * The tiers' numbers under KVBM's names: d = device, h = host, d2d = disk to device, o = object store. Hit rates are of
 * the blocks that requests asked for beyond the device's, since the start.
 */
const TIER_NAMES: readonly TierName[] = ["host", "disk", "object"];
const HIT_RATE = {
  host: "kvbm_host_cache_hit_rate",
  disk: "kvbm_disk_cache_hit_rate",
  object: "kvbm_object_cache_hit_rate",
} as const;

export class TierMetrics implements TierMeters {
  readonly #metrics: Metrics;
  readonly #blockSizeTokens: number;
  readonly #found: Record<TierName, number> = { host: 0, disk: 0, object: 0 };
  readonly #restored: Record<TierName, number> = { host: 0, disk: 0, object: 0 };
  /** Of the tiers that are there, nearest first. */
  readonly #sizes = new Map<TierName, { readonly usedBytes: number; readonly capacityBytes: number }>();
  readonly #degraded = new Set<TierName>();
  #lookedUp = 0;

  constructor(metrics: Metrics, blockSizeTokens: number) {
    this.#metrics = metrics;
    this.#blockSizeTokens = blockSizeTokens;
  }

  /** The same numbers for `dynamo status`. */
  use(): readonly KvTierUse[] {
    return TIER_NAMES.filter((tier) => this.#sizes.has(tier)).map((tier) => {
      const { usedBytes, capacityBytes } = this.#sizes.get(tier)!;
      return {
        tier,
        usedBytes,
        ...(Number.isFinite(capacityBytes) ? { capacityBytes } : {}),
        hitBlocks: this.#found[tier],
        lookedUpBlocks: this.#lookedUp,
        restoredBlocks: this.#restored[tier],
        isDegraded: this.#degraded.has(tier),
      };
    });
  }

  offloaded(to: TierName, blocks: number): void {
    const name = {
      host: "kvbm_offload_blocks_d2h",
      disk: "kvbm_offload_blocks_h2d",
      object: "kvbm_offload_blocks_d2o",
    } as const;
    this.#metrics.counter(name[to]).labels().add(blocks);
  }

  onboarded(from: TierName, blocks: number): void {
    this.#restored[from] += blocks;
    const name = {
      host: "kvbm_onboard_blocks_h2d",
      disk: "kvbm_onboard_blocks_d2d",
      object: "kvbm_onboard_blocks_o2d",
    } as const;
    this.#metrics.counter(name[from]).labels().add(blocks);
  }

  matched(lookedUp: number, found: Readonly<Record<TierName, number>>): void {
    this.#lookedUp += lookedUp;
    let blocks = 0;
    for (const tier of TIER_NAMES) {
      blocks += found[tier];
      this.#found[tier] += found[tier];
      const rate = this.#lookedUp === 0 ? 0 : this.#found[tier] / this.#lookedUp;
      this.#metrics.gauge(HIT_RATE[tier]).labels().set(rate);
    }
    this.#metrics
      .counter("kvbm_matched_tokens")
      .labels()
      .add(blocks * this.#blockSizeTokens);
  }

  parked(ms: number, outcome: "restored" | "late"): void {
    this.#metrics
      .histogram("kvbm_onboard_wait_seconds")
      .labels(outcome)
      .observe(ms / 1_000);
  }

  failed(tier: TierName, failure: TierFailure, blocks = 1): void {
    this.#metrics.counter("kvbm_blocks_failed_total").labels(tier, failure).add(blocks);
  }

  used(tier: TierName, bytes: number, capacityBytes: number): void {
    this.#sizes.set(tier, { usedBytes: bytes, capacityBytes });
    this.#metrics.gauge("kvbm_tier_used_bytes").labels(tier).set(bytes);
    this.#metrics.gauge("kvbm_tier_capacity_bytes").labels(tier).set(capacityBytes);
  }

  degraded(tier: TierName, isDegraded: boolean): void {
    if (isDegraded) this.#degraded.add(tier);
    else this.#degraded.delete(tier);
    this.#metrics
      .gauge("kvbm_tier_degraded")
      .labels(tier)
      .set(isDegraded ? 1 : 0);
  }

  waiting(tier: TierName, blocks: number): void {
    this.#metrics.gauge("kvbm_offload_queue_blocks").labels(tier).set(blocks);
  }
}
