export { createTrtllmEngine } from "./trtllm-engine.ts";
