import { DynamoError } from "../errors/index.ts";
import { CATALOGUE } from "../model/index.ts";
import type { CommandContext } from "./commands.ts";
import { pullWithProgress } from "./pull-with-progress.ts";
import { resolveOptions } from "./resolve-options.ts";
import { openStore } from "./role-config.ts";

/** `dynamo model pull NAME | list | rm NAME` */
export async function run({ argv, env, out, err }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "model", argv, env, maxPositionals: 2 });
  const { json } = resolved.values;
  const store = openStore(resolved.values, env);
  const [action, name] = resolved.positionals;
  switch (action) {
    case "list": {
      if (name !== undefined) throw new DynamoError("invalid-config", `${name}: unexpected word`);
      const stored = store.list();
      const missing = CATALOGUE.filter((known) => !stored.some((model) => model.name === known.name));
      if (json)
        out(
          `${JSON.stringify({ folder: store.folder, models: stored, available: missing.map((model) => model.name) })}\n`,
        );
      else {
        for (const model of stored) out(`${model.name}  ${megabytes(model.bytes)}  ${model.path}\n`);
        for (const model of missing)
          out(`${model.name}  ${megabytes(model.bytes)}  not pulled (dynamo model pull ${model.name})\n`);
      }
      return 0;
    }
    case "pull": {
      const stored = await pullWithProgress(store, wantedName(name, "pull"));
      out(json ? `${JSON.stringify(stored)}\n` : `${stored.name}  ${megabytes(stored.bytes)}  ${stored.path}\n`);
      return 0;
    }
    case "rm": {
      const wanted = wantedName(name, "rm");
      const removed = store.remove(wanted);
      if (json) out(`${JSON.stringify({ name: wanted, removed })}\n`);
      else if (removed) out(`${wanted} removed\n`);
      if (!removed && !json) err(`dynamo model: ${wanted} is not in ${store.folder}\n`);
      return removed ? 0 : 1;
    }
    default:
      throw new DynamoError("invalid-config", `expected pull, list or rm, got ${action ?? "nothing"}`);
  }
}

function wantedName(name: string | undefined, action: string): string {
  if (name !== undefined) return name;
  throw new DynamoError("invalid-config", `${action}: expected the name of a model, got nothing`);
}

function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
