export { BlockPool, BlockState, NO_BLOCK, type BlockPoolOptions, type PoolCounters } from "./block-pool.ts";
export { EVICTION_NAMES, FrequencySketch, type EvictionName } from "./eviction/index.ts";
export {
  HostTier,
  SightFilter,
  TieredCache,
  type CachePort,
  type HostTierOptions,
  type LowerTier,
  type ReadOptions,
  type TieredCacheOptions,
  type TierFailure,
  type TierMatch,
  type TierMeters,
  type TierName,
} from "./tiers/index.ts";
