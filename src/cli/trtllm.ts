import { engineWorker } from "./engine-worker.ts";

/** `dynamo trtllm` */
export const run = engineWorker("trtllm");
