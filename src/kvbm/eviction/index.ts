import type { EvictionPolicy, PoolView } from "./base.ts";
import { FrequencyEviction } from "./frequency-eviction.ts";
import { LineageEviction } from "./lineage-eviction.ts";
import { LruEviction } from "./lru-eviction.ts";

export type { EvictionPolicy, PoolView } from "./base.ts";
export { FrequencySketch } from "./frequency-sketch.ts";

/** `lineage`: leaves first; `lru`; `frequency`: rarely used first. */
export const EVICTION_NAMES = ["lineage", "lru", "frequency"] as const;
export type EvictionName = (typeof EVICTION_NAMES)[number];

export function createEviction(name: EvictionName, view: PoolView): EvictionPolicy {
  if (name === "lru") return new LruEviction(view);
  if (name === "frequency") return new FrequencyEviction(view);
  return new LineageEviction(view);
}
