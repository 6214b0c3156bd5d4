import { engineWorker } from "./engine-worker.ts";

/** `dynamo vllm` */
export const run = engineWorker("vllm");
