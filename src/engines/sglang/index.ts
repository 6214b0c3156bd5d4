export { createSglangEngine } from "./sglang-engine.ts";
