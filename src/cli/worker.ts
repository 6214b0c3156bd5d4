import type { CommandContext } from "./commands.ts";
import { resolveOptions } from "./resolve-options.ts";
import { openStore, workerConfig } from "./role-config.ts";
import { runRole } from "./run-role.ts";

/** `dynamo worker` */
export async function run({ argv, env }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "worker", argv, env });
  const config = workerConfig(resolved.values, openStore(resolved.values, env), env);
  const { startWorker } = await import("../worker/index.ts");
  let instanceId = "";
  return runRole({
    role: "worker",
    resolved,
    shown: ["engine", "model", "namespace", "discovery-backend", "file-kv", "threads"],
    start: async (planes, signal) => {
      const role = await startWorker(config, planes, signal);
      instanceId = role.instanceId;
      return role;
    },
    facts: () => ({ instance: instanceId, model: config.modelName }),
  });
}
