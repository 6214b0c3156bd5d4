export { createVllmEngine } from "./vllm-engine.ts";
export { examineVllm, type VllmFinding } from "./vllm-examine.ts";
