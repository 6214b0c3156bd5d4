export { createVllmEngine } from "./vllm-engine.ts";
