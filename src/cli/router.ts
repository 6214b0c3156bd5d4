import type { CommandContext } from "./commands.ts";
import { checkOnePolicy, loadPolicyModule } from "./policy-module.ts";
import { resolveOptions } from "./resolve-options.ts";
import { routerServiceConfig } from "./role-config.ts";
import { runRole } from "./run-role.ts";

/** `dynamo router` */
export async function run({ argv, env }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "router", argv, env });
  checkOnePolicy(resolved);
  const routerMode = await loadPolicyModule(resolved.values["router-policy-module"]);
  const { startRouter } = await import("../router-service/index.ts");
  const facts: Record<string, string | number> = {};
  return runRole({
    role: "router",
    resolved,
    shown: ["namespace", "discovery-backend", "file-kv", "router-mode"],
    start: async (planes, signal) => {
      const role = await startRouter(routerServiceConfig(resolved.values, routerMode), planes, signal);
      facts.instance = role.instanceId;
      facts.address = role.address;
      if (role.systemPort !== undefined) facts.systemPort = role.systemPort;
      return role;
    },
    facts: () => facts,
  });
}
