export { checkMockerConfig, mockerConfig, schedulerConfig } from "./mocker-config.ts";
export { MockerEngine, type BlockLink, type MockerEngineOptions } from "./mocker-engine.ts";
export { MockScheduler, type PassObserver } from "./mock-scheduler.ts";
export * from "./scheduler-config.ts";
export { Sequence, type SequenceEnd, type SequenceOptions } from "./sequence.ts";
export { TokenSource, type ReasoningSpan, type TokenSourceOptions } from "./token-source.ts";
export { MOCK_BLOCK_BYTES, isBlockPayload, writeBlockPayload } from "./block-payload.ts";
