export { createLlamaServerEngine } from "./llama-server-engine.ts";
