import { resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { ResolvedOptions } from "./resolve-options.ts";

/**
 * `--router-policy-module=FILE`: the default export of a JavaScript or TypeScript module is the routing policy, in place
 * of `--router-mode`. It runs in this process with all its rights, so it is the operator's own code, like a plug-in of any
 * server. Returns the mode to route by; undefined when no module is given. Throws `invalid-config`.
 */
export async function loadPolicyModule(path: string | undefined): Promise<string | undefined> {
  if (path === undefined) return undefined;
  const { registerPolicy, userPolicy } = await import("../router/index.ts");
  try {
    const module = (await import(pathToFileURL(resolve(path)).href)) as { readonly default?: unknown };
    if (module.default === undefined) throw new DynamoError("invalid-config", "it has no default export");
    const policy = userPolicy(module.default);
    registerPolicy(policy.name, policy);
    return policy.name;
  } catch (thrown) {
    const why = thrown instanceof Error ? toMessage(thrown) : String(thrown);
    throw new DynamoError("invalid-config", `--router-policy-module: ${path}: ${why}`, { cause: thrown });
  }
}

function toMessage(error: Error): string {
  return error instanceof DynamoError ? toDynamoError(error).publicMessage : (error.message.split("\n")[0] ?? "");
}

/** Who chooses must be said once. */
export function checkOnePolicy({ values, sources }: ResolvedOptions): void {
  if (values["router-policy-module"] === undefined) return;
  const problems: string[] = [];
  if (sources["router-mode"] !== "default") {
    problems.push("--router-policy-module: expected without --router-mode, as the module is the mode");
  }
  if (values["router-service"])
    problems.push("--router-policy-module: with --router-service, give it to dynamo router");
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
}
