import type { S3Options } from "../../transfer/s3/index.ts";

/** The tiers of one worker; `cli/` fills it. Bytes are budgets of KV data. */
export interface KvTiersConfig {
  /** 0 = only what reading from below needs. */
  readonly hostBytes: number;
  /** In place of `hostBytes`. */
  readonly hostBlocks?: number;
  /** Sights before a block is copied to host memory, and so to anything below; 0 and 1 = at once. @default 0 */
  readonly hostMinFrequency?: number;
  readonly disk?: KvDiskConfig;
  readonly object?: KvObjectConfig;
}

export interface KvDiskConfig {
  readonly bytes: number;
  /** In place of `bytes`. */
  readonly blocks?: number;
  readonly folder: string;
  /** Sights (doubling, as in `SightFilter`) before a block is written; 1 = at once. @default 2 */
  readonly minSights?: number;
  /** Sights, plainly counted, in place of `minSights`. */
  readonly minFrequency?: number;
}

export interface KvObjectConfig {
  readonly store: { readonly kind: "s3"; readonly bucket: string; readonly s3: S3Options } | FolderStoreConfig;
  /** @default 1 */
  readonly minSights?: number;
  /** Sights, plainly counted, in place of `minSights`. */
  readonly minFrequency?: number;
}

export interface FolderStoreConfig {
  readonly kind: "folder";
  readonly folder: string;
}
