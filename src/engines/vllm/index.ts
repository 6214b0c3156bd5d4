export { createVllmEngine } from "./vllm-engine.ts";
export { flagValue } from "./vllm-launch.ts";
