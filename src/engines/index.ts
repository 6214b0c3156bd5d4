export type { Engine, EngineInfo, EngineSink, ExportedBlocks, ImportedBlocks } from "./base.ts";
export type { EchoEngineConfig, EngineConfig, LlamaEngineConfig, MockerEngineConfig } from "./config.ts";
export { loadEngine, type EngineOptions } from "./load-engine.ts";
