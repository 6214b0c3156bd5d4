import { engineWorker } from "./engine-worker.ts";

/** `dynamo sglang` */
export const run = engineWorker("sglang");
