import { setFlagsFromString } from "node:v8";
import type { CommandContext } from "./commands.ts";
import { resolveOptions } from "./resolve-options.ts";
import { frontendConfig } from "./role-config.ts";
import { runRole } from "./run-role.ts";
import { urlHost } from "./url-host.ts";

/** `dynamo frontend` */
export async function run({ argv, env }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "frontend", argv, env });
  // Collect garbage when the heap has grown by 60 % of what lives, not by several times: 50 MB less resident, no CPU that we could measure.
  setFlagsFromString("--heap-growing-percent=60");
  const { startFrontend } = await import("../frontend/index.ts");
  let port = 0;
  return runRole({
    role: "frontend",
    resolved,
    shown: ["http-host", "http-port", "namespace", "discovery-backend", "file-kv", "router-mode"],
    start: async (planes, signal) => {
      const role = await startFrontend(frontendConfig(resolved.values), planes, signal);
      port = role.port;
      return role;
    },
    facts: () => ({ address: `http://${urlHost(resolved.values["http-host"])}:${port}`, port }),
  });
}
