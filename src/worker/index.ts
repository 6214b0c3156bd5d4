export * from "./config.ts";
export { DEFAULT_HANDOFF, type HandoffConfig } from "./handoffs.ts";
export { loadServedTokenizer, type ServedTokenizer } from "./served-tokenizer.ts";
export type { FolderStoreConfig, KvDiskConfig, KvObjectConfig, KvTiersConfig } from "./tiers/index.ts";
export * from "./worker.ts";
