export { BlockPool, BlockState, NO_BLOCK, type BlockPoolOptions, type PoolCounters } from "./block-pool.ts";
export { EVICTION_NAMES, FrequencySketch, type EvictionName } from "./eviction/index.ts";
export * from "./tiers/index.ts";
