import type { Engine, EngineInfo } from "../../engines/index.ts";
import { HostTier, TieredCache } from "../../kvbm/index.ts";
import type { Logger, Metrics } from "../../observability/index.ts";
import type { Clock } from "../../std/index.ts";
import type { KvTiersConfig } from "./tier-config.ts";
import { TierMetrics } from "./tier-metrics.ts";
import { TieredEngine } from "./tiered-engine.ts";

/** The engine with the tiers that the configuration names. */
export interface WithTiersOptions {
  readonly engine: Engine;
  /** Told apart by its content: blocks of one model are never found by another. */
  readonly modelPath: string;
  readonly config: KvTiersConfig;
  readonly metrics: Metrics;
  readonly clock: Clock;
  readonly logger: Logger;
}

/** Without a host budget of its own: room for 4,000 tokens of SmolLM2 on their way from a lower tier. */
const STAGING_BYTES = 96 * 1024 * 1024;

export function withTiers({ engine, config, metrics, clock, logger }: WithTiersOptions): Engine {
  let meters: TierMetrics | undefined;
  return new TieredEngine({
    engine,
    clock,
    onParkingFull: () => meters?.failed("host", "busy"),
    makeCache: async (info: EngineInfo, { attach, ...hooks }) => {
      const host = new HostTier({ bytes: config.hostBytes || STAGING_BYTES, blockBytes: info.blockBytes });
      attach(host.memory);
      meters = new TierMetrics(metrics, info.blockSizeTokens);
      await Promise.resolve();
      return new TieredCache({
        ...hooks,
        blockSizeTokens: info.blockSizeTokens,
        totalBlocks: info.totalBlocks,
        host,
        lower: [],
        clock,
        logger,
        meters,
      });
    },
  });
}
