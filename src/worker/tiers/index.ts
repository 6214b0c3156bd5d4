export type { FolderStoreConfig, KvDiskConfig, KvObjectConfig, KvTiersConfig } from "./tier-config.ts";
export { withTiers } from "./with-tiers.ts";
