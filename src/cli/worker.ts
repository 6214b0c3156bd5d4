import type { EngineConfig } from "../engines/index.ts";
import { DynamoError } from "../errors/index.ts";
import type { CommandContext } from "./commands.ts";
import { resolveOptions, type ResolvedOptions } from "./resolve-options.ts";
import { isTokenEngine, openStore, workerConfig } from "./role-config.ts";
import { runRole } from "./run-role.ts";

/** The configuration of an engine that is a process of its own; undefined for those that are not. */
export async function foreignEngine(
  resolved: ResolvedOptions,
  env: NodeJS.ProcessEnv,
): Promise<EngineConfig | undefined> {
  if (isTokenEngine(resolved.values.engine)) {
    const { tokenEngineConfig } = await import("./vllm-config.ts");
    return tokenEngineConfig(resolved, env, resolved.values.engine);
  }
  if (resolved.values.engine === "llama-server" || resolved.values.engine === "openai") {
    const { llamaServerConfig, openAiConfig } = await import("./text-engine-config.ts");
    return resolved.values.engine === "openai" ? openAiConfig(resolved, env) : llamaServerConfig(resolved, env);
  }
  if (resolved.engineArgs.length === 0) return undefined;
  throw new DynamoError(
    "invalid-config",
    `--: the ${resolved.values.engine} engine has no command line of its own, got ${resolved.engineArgs.join(" ")}`,
  );
}

/** `dynamo worker` */
export async function run({ argv, env }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "worker", argv, env });
  const config = workerConfig(
    resolved.values,
    openStore(resolved.values, env),
    env,
    await foreignEngine(resolved, env),
  );
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
