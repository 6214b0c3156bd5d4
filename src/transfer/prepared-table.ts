import type { BackendChoice, BackendName } from "./base.ts";
import type { Peer, TransferBackend } from "./backend.ts";
import type { Chosen } from "./choose-backend.ts";
import type { DescriptorList } from "./descriptor-list.ts";
import type { Region } from "./region.ts";

/**
 * Two descriptor lists that were checked once and the back end that moves between them (NIXL's prepared descriptor lists).
 * Transfers name blocks by index. Plain data: nothing to release. It goes stale when one of its regions is deregistered or
 * the peer starts anew, and transfers then fail with `transfer-stale`.
 */
export class PreparedTable implements BackendChoice {
  readonly peer: Peer;
  readonly local: DescriptorList;
  readonly remote: DescriptorList;
  readonly localRegions: readonly Region[];
  readonly remoteRegionIds: readonly number[];
  readonly backend: BackendName;
  readonly reason: string;
  readonly isSlowPath: boolean;
  readonly handler: TransferBackend;

  constructor(options: {
    readonly peer: Peer;
    readonly local: DescriptorList;
    readonly remote: DescriptorList;
    readonly localRegions: readonly Region[];
    readonly remoteRegionIds: readonly number[];
    readonly chosen: Chosen;
  }) {
    this.peer = options.peer;
    this.local = options.local;
    this.remote = options.remote;
    this.localRegions = options.localRegions;
    this.remoteRegionIds = options.remoteRegionIds;
    this.backend = options.chosen.backend;
    this.reason = options.chosen.reason;
    this.isSlowPath = options.chosen.isSlowPath;
    this.handler = options.chosen.handler;
  }
}
