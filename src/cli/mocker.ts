import { setTimeout as sleep } from "node:timers/promises";
import { mockerConfig } from "../engines/mocker/index.ts";
import type { MockerEngineConfig } from "../engines/index.ts";
import { DynamoError } from "../errors/index.ts";
import { artifactFromPath, unknownModel, vocabularySizeOf, type StoredModel } from "../model/index.ts";
import type { Planes, RunningRole } from "../runtime/component/index.ts";
import { loadServedTokenizer, startWorker, type RunningWorker, type WorkerConfig } from "../worker/index.ts";
import type { CommandContext } from "./commands.ts";
import { parseReasoningFlag, readEngineArgs } from "./mocker-engine-args.ts";
import type { OptionName } from "./options.ts";
import { buildPlanes, type BuiltPlanes } from "./planes.ts";
import { resolveOptions, type ResolvedOptions } from "./resolve-options.ts";
import { handoffConfig, milliseconds, openStore } from "./role-config.ts";
import { runRole } from "./run-role.ts";

/**
 * `dynamo mocker`: workers with the mock engine, any number of them in one process. Each has planes and an instance id of
 * its own, so that nobody can tell them from processes; only the log, the process id and the tokenizer are shared.
 */
export async function run({ argv, env }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "mocker", argv, env });
  const { values } = resolved;
  checkPlanes(resolved);
  const model = storedModel(resolved, env);
  const config: WorkerConfig = {
    namespace: values.namespace,
    component: values.component,
    engine: await mockEngineConfig(resolved, model),
    modelName: values["model-name"] ?? model?.name ?? "mocker",
    engineStallMs: milliseconds(values["engine-stall-timeout-secs"]),
    ...(values["engine-request-limit"] === undefined ? {} : { maxEngineRequests: values["engine-request-limit"] }),
    maxQueuedRequests: values["request-queue-limit"],
    role: values["disaggregation-mode"],
    handoff: handoffConfig(values),
    drainTimeoutMs: milliseconds(values["graceful-shutdown-timeout-secs"]),
    systemPort: values["system-port"],
  };
  const instances: string[] = [];
  return runRole({
    role: "worker",
    resolved,
    shown: ["engine-type", "num-workers", "speedup-ratio", "namespace", "discovery-backend", "file-kv"],
    start: async (planes, signal) => {
      const workers = await startWorkers(config, resolved, planes, signal);
      instances.push(...workers.instanceIds);
      return workers.role;
    },
    facts: () => ({ workers: instances.length, instances: instances.join(" "), model: config.modelName }),
  });
}

interface StartedWorkers {
  readonly instanceIds: readonly string[];
  readonly role: RunningRole;
}

/** The first worker runs on the role's own planes, the others on planes made for them. After a failure nothing is left. */
async function startWorkers(
  config: WorkerConfig,
  { values }: ResolvedOptions,
  first: Planes,
  signal: AbortSignal,
): Promise<StartedWorkers> {
  const tokenizer = await loadServedTokenizer(config, first.logger);
  const workers: RunningWorker[] = [];
  const ownPlanes: BuiltPlanes[] = [];
  const leave = async (): Promise<void> => {
    await Promise.all(workers.map((worker) => worker.stop()));
    await Promise.all(ownPlanes.map((planes) => planes.close()));
  };
  try {
    while (workers.length < values["num-workers"]) {
      if (workers.length > 0 && values["stagger-delay"] > 0) {
        await sleep(milliseconds(values["stagger-delay"]), undefined, { signal });
      }
      let planes = first;
      if (workers.length > 0) {
        const made = await buildPlanes(values, first.logger, { shared: first.tracing });
        ownPlanes.push(made);
        planes = made;
      }
      workers.push(await startWorker(config, planes, signal, { tokenizer }));
    }
  } catch (thrown) {
    await leave();
    throw thrown;
  }
  const role: RunningRole = {
    // One that fails takes the others with it, as a process would.
    done: Promise.all(workers.map((worker) => worker.done)).then(() => undefined),
    drain: async (timeoutMs) => {
      await Promise.all(workers.map((worker) => worker.drain(timeoutMs)));
    },
    stop: leave,
  };
  return { instanceIds: workers.map(({ instanceId }) => instanceId), role };
}

function checkPlanes({ values }: ResolvedOptions): void {
  if (values["num-workers"] === 1) return;
  const problems: string[] = [];
  for (const name of ["discovery-backend", "request-plane", "event-plane"] as const) {
    if (values[name] === "memory") problems.push(`--${name}: memory is for one worker alone`);
  }
  for (const name of ["tcp-rpc-port", "tcp-rpc-advertise-port", "system-port"] as const) {
    if ((values[name] ?? 0) !== 0) problems.push(`--${name}: expected 0 with several workers, got ${values[name]}`);
  }
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
}

/** Only its tokenizer is used; bytes are tokens without one. */
function storedModel({ values }: ResolvedOptions, env: NodeJS.ProcessEnv): StoredModel | undefined {
  if (values.model === undefined) return undefined;
  const store = openStore(values, env);
  const stored = store.resolve(values.model);
  if (stored !== undefined) return stored;
  if (!store.canPull(values.model)) throw unknownModel(values.model);
  throw new DynamoError(
    "model-unavailable",
    `${values.model} is not in ${store.folder}; run "dynamo model pull ${values.model}" first`,
  );
}

/** Flags, variables and file go before `--extra-engine-args`, those before the mocker's defaults. */
export async function mockEngineConfig(
  { values, sources }: ResolvedOptions,
  model: StoredModel | undefined,
): Promise<MockerEngineConfig> {
  const path = values["extra-engine-args"];
  const given = <Value>(name: OptionName, key: string, value: Value): Record<string, Value> =>
    sources[name] === "default" ? {} : { [key]: value };
  const vocabulary = model === undefined ? undefined : vocabularySizeOf(artifactFromPath(model.path));
  return mockerConfig({
    ...(path === undefined ? {} : await readEngineArgs(path)),
    ...given("engine-type", "engineType", values["engine-type"]),
    ...(values["context-length"] === 0 ? {} : { contextLength: values["context-length"] }),
    ...given("kv-cache-block-size", "blockSizeTokens", values["kv-cache-block-size"]),
    ...given("num-gpu-blocks-override", "totalBlocks", values["num-gpu-blocks-override"]),
    ...given("max-num-seqs", "maxSequences", values["max-num-seqs"]),
    ...given("max-num-batched-tokens", "maxBatchedTokens", values["max-num-batched-tokens"]),
    ...given("enable-prefix-caching", "prefixCaching", values["enable-prefix-caching"]),
    ...given("enable-chunked-prefill", "chunkedPrefill", values["enable-chunked-prefill"]),
    ...given("preemption-mode", "preemptionMode", values["preemption-mode"]),
    ...given("speedup-ratio", "speedupRatio", values["speedup-ratio"]),
    ...given("decode-speedup-ratio", "decodeSpeedupRatio", values["decode-speedup-ratio"]),
    ...given("startup-time", "startupTimeMs", milliseconds(values["startup-time"])),
    ...given("data-parallel-size", "dataParallelSize", values["data-parallel-size"]),
    ...given("kv-transfer-bandwidth", "kvTransferBandwidthBytesPerSecond", values["kv-transfer-bandwidth"] * 1e9),
    ...(values["planner-profile-data"] === undefined ? {} : { profilePath: values["planner-profile-data"] }),
    ...(values.reasoning === undefined ? {} : { reasoning: parseReasoningFlag(values.reasoning) }),
    ...(model === undefined ? {} : { modelPath: model.path }),
    ...(vocabulary === undefined ? {} : { vocabularySize: vocabulary }),
  });
}
