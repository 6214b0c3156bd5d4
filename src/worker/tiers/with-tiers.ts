import type { Engine, EngineInfo } from "../../engines/index.ts";
import {
  BucketStore,
  DiskTier,
  FolderStore,
  HostTier,
  ObjectTier,
  TieredCache,
  diskSlotBytes,
  offloadFilter,
  type EntryFormat,
  type ObjectStore,
  type TieredCacheOptions,
} from "../../kvbm/index.ts";
import type { Logger, Metrics } from "../../observability/index.ts";
import type { KvTierUse } from "../../protocol/index.ts";
import { systemRandom, type Clock } from "../../std/index.ts";
import { modelFingerprint } from "./model-fingerprint.ts";
import type { KvObjectConfig, KvTiersConfig } from "./tier-config.ts";
import { TierMetrics } from "./tier-metrics.ts";
import { TieredEngine, type CacheHooks } from "./tiered-engine.ts";

/** The engine with the tiers that the configuration names. */
export interface WithTiersOptions {
  readonly engine: Engine;
  /** Told apart by its content: blocks of one model are never found by another. */
  readonly modelPath: string | undefined;
  readonly config: KvTiersConfig;
  readonly metrics: Metrics;
  readonly clock: Clock;
  readonly logger: Logger;
}

export interface EngineWithTiers {
  readonly engine: Engine;
  /** Empty before the engine has started. */
  readonly use: () => readonly KvTierUse[];
}

/** Without a host budget of its own: room for 4,000 tokens of SmolLM2 on their way from a lower tier. */
const STAGING_BYTES = 96 * 1024 * 1024;
/** Twice asked for, in the filter's doubling count. */
const DISK_MIN_SIGHTS = 2;

export function withTiers(options: WithTiersOptions): EngineWithTiers {
  let meters: TierMetrics | undefined;
  const engine = new TieredEngine({
    engine: options.engine,
    clock: options.clock,
    onParkingFull: () => meters?.failed("host", "busy"),
    makeCache: (info, hooks) => {
      meters = new TierMetrics(options.metrics, info.blockSizeTokens);
      return makeCache(options, info, hooks, meters);
    },
  });
  return { engine, use: () => meters?.use() ?? [] };
}

async function makeCache(
  { modelPath, config, clock, logger }: WithTiersOptions,
  info: EngineInfo,
  { attach, ...hooks }: CacheHooks,
  meters: TierMetrics,
): Promise<TieredCache> {
  const { hostBlocks = 0, hostBytes } = config;
  const bytes = hostBlocks * info.blockBytes || hostBytes || STAGING_BYTES;
  const host = new HostTier({ bytes, blockBytes: info.blockBytes });
  attach(host.memory);
  const lower: TieredCacheOptions["lower"][number][] = [];
  const { disk, object } = config;
  const shared = { clock, logger, meters };
  if (disk !== undefined || object !== undefined) {
    const format: EntryFormat = {
      fingerprint: await modelFingerprint(modelPath, info),
      blockBytes: info.blockBytes,
    };
    if (disk !== undefined) {
      const bytes = disk.blocks === undefined ? disk.bytes : disk.blocks * diskSlotBytes(info.blockBytes);
      const tier = new DiskTier({ ...shared, folder: disk.folder, bytes, format });
      lower.push({ tier, filter: offloadFilter({ minSights: DISK_MIN_SIGHTS, ...disk }) });
    }
    if (object !== undefined) {
      const tier = new ObjectTier({ ...shared, store: await openStore(object, clock), format });
      lower.push({ tier, filter: offloadFilter(object) });
    }
  }
  const { blockSizeTokens, totalBlocks } = info;
  const { hostMinFrequency = 0 } = config;
  const hostFilter = hostMinFrequency > 1 ? offloadFilter({ minFrequency: hostMinFrequency }) : undefined;
  return new TieredCache({ hostFilter, ...hooks, ...shared, blockSizeTokens, totalBlocks, host, lower });
}

/** The S3 client comes with a package of its own: loaded by those who have a bucket. */
async function openStore({ store }: KvObjectConfig, clock: Clock): Promise<ObjectStore> {
  if (store.kind === "folder") return new FolderStore(store.folder);
  const { S3Client } = await import("../../transfer/s3/index.ts");
  return new BucketStore(new S3Client(store.s3, { clock, random: systemRandom }), store.bucket);
}
