export { KvEventFeed, KvFeedHealth, type FedWorkerOptions, type KvEventFeedOptions } from "./kv-event-feed.ts";
export { ReplicaSync, type ReplicaSyncOptions, type SyncedRouter } from "./replica-sync.ts";
export { VllmEventMapper, type LeftOut, type VllmEventMapperOptions } from "./vllm-event-mapper.ts";
export { decodeVllmBatch, decodeVllmMessage, type VllmBatch, type VllmEvent, type VllmMessage } from "./vllm-events.ts";
