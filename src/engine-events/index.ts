export { VllmEventMapper, type LeftOut, type VllmEventMapperOptions } from "./vllm-event-mapper.ts";
export { VllmEventSource, type ResetReason, type VllmEventSourceOptions } from "./vllm-event-source.ts";
export { decodeVllmBatch, decodeVllmMessage, type VllmBatch, type VllmEvent, type VllmMessage } from "./vllm-events.ts";
export { TrtllmEventAdapter, decodeTrtllmEvents, type TrtllmEvent } from "./trtllm-events.ts";
export { VllmHashCheck, type HashMismatch, type HashState, type VllmHashCheckOptions } from "./vllm-hash-check.ts";
