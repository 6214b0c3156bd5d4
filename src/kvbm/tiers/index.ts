export { HostTier, type HostTierOptions } from "./host-tier.ts";
export { SightFilter } from "./sight-filter.ts";
export { TieredCache, type CachePort, type TieredCacheOptions, type TierMatch } from "./tiered-cache.ts";
export type { LowerTier, ReadOptions, TierFailure, TierMeters, TierName } from "./tier.ts";
