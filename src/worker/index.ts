export * from "./config.ts";
export { loadServedTokenizer, type ServedTokenizer } from "./served-tokenizer.ts";
export type { FolderStoreConfig, KvDiskConfig, KvObjectConfig, KvTiersConfig } from "./tiers/index.ts";
export * from "./worker.ts";
