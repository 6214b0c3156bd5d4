export type {
  BlockPort,
  Engine,
  EngineInfo,
  EngineProcessState,
  EngineSink,
  EngineTransfer,
  ExportedBlocks,
  ImportedBlocks,
  SharedBlocks,
  TransferTicket,
} from "./base.ts";
export type {
  EchoEngineConfig,
  EngineConfig,
  EngineMetricsMap,
  LlamaEngineConfig,
  LlamaServerEngineConfig,
  MockerEngineConfig,
  OpenAiEngineConfig,
  SglangEngineConfig,
  TrtllmEngineConfig,
  VllmEngineConfig,
} from "./config.ts";
export { KNOWN_BAD, versionRange } from "./foreign/known-bad.ts";
export type { EngineTokenizer, TokenizerSample } from "./foreign/foreign-config.ts";
export { loadEngine, type EngineOptions } from "./load-engine.ts";
