export { KvEventFeed, KvFeedHealth, type FedWorkerOptions, type KvEventFeedOptions } from "./kv-event-feed.ts";
export { ReplicaSync, type ReplicaSyncOptions, type SyncedRouter } from "./replica-sync.ts";
