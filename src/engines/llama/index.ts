export { probeLibllama } from "./libllama.ts";
export { LlamaEngine, type LlamaEngineOptions } from "./llama-engine.ts";
