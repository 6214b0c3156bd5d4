import { extname } from "node:path";
import { setFlagsFromString } from "node:v8";
import { DynamoError } from "../errors/index.ts";
import { findPolicy } from "../router/index.ts";
import type { CommandContext } from "./commands.ts";
import type { FrontendThreadData } from "./frontend-thread.ts";
import type { OptionValues } from "./options.ts";
import { checkOnePolicy, loadPolicyModule } from "./policy-module.ts";
import { resolveOptions } from "./resolve-options.ts";
import { frontendConfig } from "./role-config.ts";
import { runRole } from "./run-role.ts";
import { urlHost } from "./url-host.ts";

/** `dynamo frontend` */
export async function run({ argv, env }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "frontend", argv, env });
  checkOnePolicy(resolved);
  const routerMode =
    (await loadPolicyModule(resolved.values["router-policy-module"])) ?? resolved.values["router-mode"];
  checkThreads(resolved.values, findPolicy(routerMode)?.usesOverlap === true);
  // Collect garbage when the heap has doubled, not at several times its size: less resident. Earlier costs CPU: see benchmarks/README.md.
  setFlagsFromString("--heap-growing-percent=100");
  const { startFrontend, startFrontendThreads } = await import("../frontend/index.ts");
  const threadCount = resolved.values["frontend-threads"];
  let port = 0;
  return runRole({
    role: "frontend",
    resolved,
    shown: ["http-host", "http-port", "namespace", "discovery-backend", "file-kv", "router-mode"],
    start: async (planes, signal) => {
      const config = frontendConfig(resolved.values, routerMode);
      const role =
        threadCount === 1
          ? await startFrontend(config, planes, signal)
          : await startFrontendThreads(config, planes, signal, {
              threadCount,
              entry: threadModule(),
              workerData: (seat, index): FrontendThreadData => ({ values: resolved.values, seat, index }),
            });
      port = role.port;
      return role;
    },
    facts: () => ({ address: `http://${urlHost(resolved.values["http-host"])}:${port}`, port }),
  });
}

/** Beside this file, as source or compiled. */
function threadModule(): URL {
  return new URL(`./frontend-thread${extname(import.meta.filename)}`, import.meta.url);
}

/** Threads share through the planes, the index and what they tell each other of their bookings; what needs more is refused. */
function checkThreads(values: OptionValues, usesOverlap: boolean): void {
  if (values["frontend-threads"] === 1) return;
  const problems: string[] = [];
  for (const name of ["discovery-backend", "request-plane", "event-plane"] as const) {
    if (values[name] === "memory") problems.push(`--${name}: memory is for one frontend thread alone`);
  }
  if (values["router-service"]) {
    problems.push("--router-service: a router service is asked by one frontend thread alone");
  }
  const usesDecisions = !values["router-kv-events"] || values["router-predicted-ttl-secs"] !== undefined;
  if (usesOverlap && usesDecisions && !values["router-assume-kv-reuse"]) {
    problems.push(
      "--no-router-assume-kv-reuse: with --no-router-kv-events or --router-predicted-ttl-secs for one frontend thread alone, as threads then do not tell each other which blocks they sent where",
    );
  }
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
}
