export type {
  BlockPort,
  Engine,
  EngineInfo,
  EngineProcessState,
  EngineSink,
  ExportedBlocks,
  ImportedBlocks,
  SharedBlocks,
} from "./base.ts";
export type {
  EchoEngineConfig,
  EngineConfig,
  LlamaEngineConfig,
  MockerEngineConfig,
  VllmEngineConfig,
} from "./config.ts";
export { KNOWN_BAD, versionRange } from "./foreign/known-bad.ts";
export type { TokenizerSample } from "./foreign/foreign-config.ts";
export { loadEngine, type EngineOptions } from "./load-engine.ts";
