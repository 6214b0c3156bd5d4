export { DiskTier, diskSlotBytes, type DiskTierOptions } from "./disk-tier.ts";
export { systemFiles, type TierFile, type TierFiles } from "./tier-files.ts";
export type { EntryFormat } from "./entry.ts";
export { HostTier, type HostTierOptions } from "./host-tier.ts";
export { BucketStore, FolderStore, type ObjectStore } from "./object-store.ts";
export { MAX_MIN_FREQUENCY, offloadFilter } from "./offload-filter.ts";
export { ObjectTier, type ObjectTierOptions } from "./object-tier.ts";
export { SightFilter, type OffloadFilter } from "./sight-filter.ts";
export {
  TieredCache,
  type CachePort,
  type RestoredFrom,
  type TieredCacheOptions,
  type TierMatch,
} from "./tiered-cache.ts";
export type { LowerTier, ReadOptions, TierFailure, TierMeters, TierName } from "./tier.ts";
