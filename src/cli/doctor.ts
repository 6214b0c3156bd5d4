import { accessSync, constants, existsSync, statfsSync } from "node:fs";
import { availableParallelism } from "node:os";
import { dirname } from "node:path";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { VllmEngineConfig } from "../engines/index.ts";
import { readGguf, type ModelStore } from "../model/index.ts";
import { systemClock } from "../std/index.ts";
import type { CommandContext } from "./commands.ts";
import { defaultDiscoveryFolder, type OptionValues } from "./options.ts";
import { checkPortFree } from "./port-check.ts";
import { resolveOptions, type ResolvedOptions } from "./resolve-options.ts";
import { openStore, wantedModel, isTokenEngine } from "./role-config.ts";

/** `dynamo doctor`: what could keep `dynamo local` with the same options from working, each with what to do. */
export interface Finding {
  readonly check: string;
  readonly result: "ok" | "warn" | "fail";
  readonly detail: string;
  /** What to do; always there unless ok. */
  readonly fix?: string;
}

type Check = () => Finding | Promise<Finding>;

/** Exit code 1 when something failed; warnings do not count. */
export async function run({ argv, env, out }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "doctor", argv, env });
  const { engine } = resolved.values;
  if (resolved.engineArgs.length > 0 && engine !== "vllm") {
    throw new DynamoError(
      "invalid-config",
      `--: the ${engine} engine has no command line of its own, got ${resolved.engineArgs.join(" ")}`,
    );
  }
  const findings = await examine(resolved.values, openStore(resolved.values, env));
  if (engine === "vllm") findings.push(...(await examineEngine(resolved, env)));
  if (resolved.values.json) out(`${JSON.stringify(findings)}\n`);
  else for (const finding of findings) out(findingText(finding));
  return findings.some(({ result }) => result === "fail") ? 1 : 0;
}

export async function examine(values: OptionValues, store: ModelStore): Promise<Finding[]> {
  const checks: Record<string, Check> = {
    node: checkNode,
    ...(values.engine === "llama" ? { libllama: checkLibrary } : {}),
    ...(values.engine === "vllm" ? {} : { cpu: () => checkCpu(values.workers) }),
    port: () => checkPort(values["http-host"], values["http-port"]),
    disk: () => checkDisk(store),
    model: () => checkModel(values, store),
    discovery: () => checkDiscovery(values["file-kv"] ?? defaultDiscoveryFolder()),
  };
  const findings: Finding[] = [];
  for (const [name, check] of Object.entries(checks)) {
    try {
      findings.push(await check());
    } catch (thrown) {
      // A check that breaks is a finding too; the others go on.
      findings.push(fail(name, toDynamoError(thrown).diagnostic ?? String(thrown), "report this text as a defect"));
    }
  }
  return findings;
}

/** Beside an engine that is a process of its own, which needs no cores of ours but has much that can be wrong. */
async function examineEngine(resolved: ResolvedOptions, env: NodeJS.ProcessEnv): Promise<readonly Finding[]> {
  try {
    const { tokenEngineConfig } = await import("./vllm-config.ts");
    const { examineVllm } = await import("../engines/vllm/index.ts");
    const config = (await tokenEngineConfig(resolved, env, "vllm")) as VllmEngineConfig;
    return await examineVllm({ config, env, clock: systemClock, isSplit: isSplit(resolved.values) });
  } catch (thrown) {
    // What is wrong with the model has its own line.
    const text = toDynamoError(thrown).publicMessage;
    return [fail("engine", text, "put this right first; the engine's checks come after it")];
  }
}

function isSplit(values: OptionValues): boolean {
  return values["disaggregation-mode"] !== "agg" || values.prefill > 0;
}

const MIN_NODE_MAJOR = 24;

function checkNode(): Finding {
  const major = Number(process.versions.node.split(".")[0]);
  const detail = `Node ${process.versions.node}`;
  if (major >= MIN_NODE_MAJOR) return ok("node", detail);
  return fail("node", detail, `install Node ${MIN_NODE_MAJOR} or later, or run "npm ci" to get one beside the package`);
}

async function checkLibrary(): Promise<Finding> {
  try {
    const { probeLibllama } = await import("../engines/llama/index.ts");
    const { version, path } = probeLibllama();
    return ok("libllama", `${version} at ${path}`);
  } catch (thrown) {
    const error = toDynamoError(thrown, "library-unavailable");
    const fix = 'run "npm ci" without --omit=optional, or use --engine echo on a platform without the library';
    return fail("libllama", (error.diagnostic ?? error.publicMessage).split("\n")[0]!, fix);
  }
}

function checkCpu(workers: number): Finding {
  const cores = availableParallelism();
  const detail = `${cores} cores for ${workers} workers`;
  if (cores >= workers) return ok("cpu", `${detail}: ${Math.floor(cores / workers)} threads each`);
  return warn("cpu", detail, `use --workers ${cores}: workers that share a core slow each other down`);
}

async function checkPort(host: string, port: number): Promise<Finding> {
  try {
    await checkPortFree(host, port);
    return ok("port", port === 0 ? "any free port" : `${port} on ${host} is free`);
  } catch (thrown) {
    const text = toDynamoError(thrown).publicMessage;
    const [what, fix] = text.split("; ");
    return fail("port", what ?? text, fix ?? "choose another --http-host");
  }
}

/** Room for a small model and the archive it may come in. */
const LITTLE_BYTES = 500e6;

function checkDisk(store: ModelStore): Finding {
  const folder = nearestExisting(store.folder);
  const { bavail, bsize } = statfsSync(folder);
  const detail = `${((bavail * bsize) / 1e9).toFixed(1)} GB free for ${store.folder}`;
  const fix = "free some space, or set DYN_MODEL_DIR to a folder on another disk";
  if (!isWritable(folder)) return fail("disk", `${folder} is not writable`, "set DYN_MODEL_DIR to a folder of yours");
  return bavail * bsize >= LITTLE_BYTES ? ok("disk", detail) : warn("disk", detail, fix);
}

async function checkModelFolder(values: OptionValues): Promise<Finding> {
  try {
    const { modelFolder } = await import("./vllm-config.ts");
    return ok("model", `${await modelFolder(values, process.env)}, a folder with a tokenizer`);
  } catch (thrown) {
    return fail("model", toDynamoError(thrown).publicMessage, "give the folder of the model as --model");
  }
}

async function checkModel(values: OptionValues, store: ModelStore): Promise<Finding> {
  if (isTokenEngine(values.engine)) return checkModelFolder(values);
  if (values.engine === "openai") return ok("model", "the openai engine has its own");
  const wanted = wantedModel(values);
  if (wanted === undefined) return ok("model", "the echo engine needs none");
  const stored = store.resolve(wanted);
  if (stored === undefined) {
    return store.canPull(wanted)
      ? warn(
          "model",
          `${wanted} is not on this machine`,
          `run "dynamo model pull ${wanted}"; dynamo local does it by itself`,
        )
      : fail(
          "model",
          `no model ${wanted}`,
          "name one of `dynamo model list`, hf:owner/repository/file.gguf, or a GGUF file",
        );
  }
  const again = `run "dynamo model rm ${wanted}" and "dynamo model pull ${wanted}"`;
  try {
    readGguf(stored.path);
  } catch (thrown) {
    return fail("model", toDynamoError(thrown).publicMessage, store.canPull(wanted) ? again : "copy the file again");
  }
  const verified = await store.verify(stored);
  if (verified === false) return fail("model", `${stored.path} has a wrong checksum`, again);
  return ok("model", `${stored.path}${verified === true ? ", checksum right" : ", head readable; no checksum known"}`);
}

function checkDiscovery(folder: string): Finding {
  const existing = nearestExisting(folder);
  if (!isWritable(existing))
    return fail("discovery", `${existing} is not writable`, "set --file-kv to a folder of yours");
  return ok("discovery", existing === folder ? `${folder} is writable` : `${folder} can be made`);
}

function nearestExisting(folder: string): string {
  let existing = folder;
  while (!existsSync(existing) && dirname(existing) !== existing) existing = dirname(existing);
  return existing;
}

function isWritable(folder: string): boolean {
  try {
    accessSync(folder, constants.W_OK | constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

export function findingText({ check, result, detail, fix }: Finding): string {
  return `${result.padEnd(4)}  ${check.padEnd(9)}  ${detail}\n${fix === undefined ? "" : `                 fix: ${fix}\n`}`;
}

function ok(check: string, detail: string): Finding {
  return { check, result: "ok", detail };
}

function warn(check: string, detail: string, fix: string): Finding {
  return { check, result: "warn", detail, fix };
}

function fail(check: string, detail: string, fix: string): Finding {
  return { check, result: "fail", detail, fix };
}
