export * from "./base.ts";
export { FlatKvIndex, MIN_INDEX_BYTES, type FlatKvIndexOptions } from "./flat-kv-index.ts";
export { FlatKvIndexReader } from "./flat-kv-index-reader.ts";
export type { FlatKvShare } from "./flat-kv-memory.ts";
export { NaiveKvIndex } from "./naive-kv-index.ts";
export { MAX_RANK_COUNT } from "./rank-table.ts";
export { SharedKvIndex } from "./shared-kv-index.ts";
