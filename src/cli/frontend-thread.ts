import { parentPort, workerData } from "node:worker_threads";
import { serveFrontendThread, type ThreadSeat } from "../frontend/index.ts";
import { createLogger } from "../observability/index.ts";
import type { OptionValues } from "./options.ts";
import { buildPlanes } from "./planes.ts";
import { loadPolicyModule } from "./policy-module.ts";
import { frontendConfig } from "./role-config.ts";

/** A thread of `dynamo frontend --frontend-threads`: planes of its own, and the frontend on them until the host ends it. */
export interface FrontendThreadData {
  readonly values: OptionValues;
  readonly seat: ThreadSeat;
  readonly index: number;
}

const { values, seat, index } = workerData as FrontendThreadData;
const logger = createLogger({
  level: values.log,
  format: values["logging-console-format"],
  fields: { role: "frontend", pid: process.pid, thread: index },
});
const planes = await buildPlanes(values, logger, { role: "frontend" });
const routerMode = await loadPolicyModule(values["router-policy-module"]);
await serveFrontendThread(frontendConfig(values, routerMode), planes, parentPort!, seat);
await planes.close();
