import { randomBytes } from "node:crypto";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { extname, join } from "node:path";
import { DynamoError } from "../errors/index.ts";
import { unknownModel, type StoredModel } from "../model/index.ts";
import type { WorkerRole } from "../protocol/index.ts";
import { systemClock } from "../std/index.ts";
import type { CommandContext } from "./commands.ts";
import { urlHost } from "./url-host.ts";
import type { OptionValues } from "./options.ts";
import { checkOnePolicy } from "./policy-module.ts";
import { checkPortFree } from "./port-check.ts";
import { pullWithProgress } from "./pull-with-progress.ts";
import { describeOptions, forwardedFlags, resolveOptions, type ResolvedOptions } from "./resolve-options.ts";
import {
  foreignName,
  isForeignEngine,
  isTokenEngine,
  milliseconds,
  openStore,
  servedName,
  wantedModel,
} from "./role-config.ts";
import { SupervisedProcess, stopAll, type Facts } from "./supervisor.ts";
import { waitUntilListed } from "./wait-until-listed.ts";

/**
 * `dynamo local`: one frontend and several workers as child processes, from checks to clean-up. The order matters:
 *
 *     configuration -> port free? -> model there, else pulled -> folder, secret -> children, all at once -> model listed
 *     Ctrl-C -> frontend finishes what runs -> workers -> folder gone
 *
 * Nothing is started before the checks are through, and nothing is left after the end: a second Ctrl-C kills, and children
 * leave by themselves when this process is killed.
 */
export async function run({ argv, env, err }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "local", argv, env });
  const { values } = resolved;
  for (const warning of resolved.warnings) err(`${warning}\n`);
  checkOnePolicy(resolved);
  await checkPortFree(values["http-host"], values["http-port"]);
  checkEngineShare(resolved);
  const model = await presentModel(values, env);
  err(`configuration: ${describeOptions(resolved, ["engine", "workers", "http-port", "router-mode"]).join(" ")}\n`);
  const cluster = new LocalCluster(resolved, model, env, err);
  return cluster.run();
}

/** Several workers cannot have the one engine that is named. */
function checkEngineShare(resolved: ResolvedOptions): void {
  const { values } = resolved;
  const count = workerRoles({ ...values, workers: workerCount(resolved) }).length;
  if (!isForeignEngine(values.engine) || count === 1) return;
  for (const name of ["engine-url", "engine-port"] as const) {
    if (values[name] === undefined || values[name] === 0) continue;
    throw new DynamoError("invalid-config", `--${name}: names one engine, and there are ${count} workers`);
  }
}

async function presentModel(values: OptionValues, env: NodeJS.ProcessEnv): Promise<StoredModel | undefined> {
  if (isTokenEngine(values.engine)) {
    const { modelFolder } = await import("./vllm-config.ts");
    const path = await modelFolder(values, env);
    return { name: foreignName(values, { modelPath: path }), path, bytes: 0 };
  }
  if (values.engine === "openai" || (values.engine === "llama-server" && values["engine-url"] !== undefined)) {
    const { modelOfServer } = await import("./text-engine-config.ts");
    return modelOfServer(values, env);
  }
  const wanted = wantedModel(values);
  if (wanted === undefined) return undefined;
  const store = openStore(values, env);
  const stored = store.resolve(wanted);
  if (stored !== undefined) return stored;
  if (!store.canPull(wanted)) throw unknownModel(wanted);
  return pullWithProgress(store, wanted);
}

/**
 * A small young generation costs a frontend nothing measurable (what a request allocates dies with it) and saves 50 MB
 * against V8's default of three times 16 MB; benchmarks/frontend.ts.
 */
const FRONTEND_NODE_FLAGS = ["--max-semi-space-size=4"];

class LocalCluster {
  readonly #resolved: ResolvedOptions;
  readonly #values: OptionValues;
  readonly #modelName: string;
  readonly #err: (text: string) => void;
  /** Ours to delete, unless the user named one. */
  readonly #ownFolder: string | undefined;
  readonly #folder: string;
  readonly #frontend: SupervisedProcess;
  readonly #workers: readonly SupervisedProcess[];
  #interrupts = 0;
  readonly #interrupted = Promise.withResolvers<void>();

  constructor(
    resolved: ResolvedOptions,
    model: StoredModel | undefined,
    env: NodeJS.ProcessEnv,
    err: (text: string) => void,
  ) {
    this.#resolved = resolved;
    this.#values = { ...resolved.values, workers: workerCount(resolved) };
    this.#modelName = servedName(resolved.values, model);
    this.#err = err;
    const named = resolved.values["file-kv"];
    this.#ownFolder = named === undefined ? mkdtempSync(join(tmpdir(), "dynamo-local-")) : undefined;
    this.#folder = named ?? this.#ownFolder!;
    const roles = workerRoles(this.#values);
    const threads = this.#values.threads || Math.max(1, Math.floor(availableParallelism() / roles.length));
    const workerFlags = [`--threads=${threads}`, `--model-name=${this.#modelName}`];
    if (model !== undefined) workerFlags.push(`--model=${model.path}`);
    // Not the frontend's own default; a policy of one's own is in place of it.
    const frontendFlags = this.#values["router-policy-module"] === undefined ? [`--router-mode=${this.#routing}`] : [];
    this.#frontend = this.#child("frontend", "frontend", frontendFlags, env);
    this.#workers = roles.map(({ name, mode }) =>
      this.#child("worker", name, [...workerFlags, `--disaggregation-mode=${mode}`], env, resolved.engineArgs),
    );
  }

  async run(): Promise<number> {
    const onInterrupt = (): void => this.#onInterrupt();
    const signals = ["SIGINT", "SIGTERM", "SIGHUP", "disconnect"];
    for (const signal of signals) process.on(signal, onInterrupt);
    try {
      // One core starts one Node at a time: all at once is still the shortest way to the first answer.
      for (const child of this.#children()) child.start();
      const served = await Promise.race([this.#serves(), this.#interrupted.promise]);
      if (served !== undefined) this.#announce(served);
      await this.#interrupted.promise;
    } finally {
      await this.#leave();
      for (const signal of signals) process.off(signal, onInterrupt);
      if (this.#ownFolder !== undefined) rmSync(this.#ownFolder, { recursive: true, force: true });
    }
    return this.#interrupts > 1 ? 130 : 0;
  }

  #children(): SupervisedProcess[] {
    return [this.#frontend, ...this.#workers];
  }

  #child(
    command: "frontend" | "worker",
    name: string,
    flags: readonly string[],
    env: NodeJS.ProcessEnv,
    engineArgs: readonly string[] = [],
  ): SupervisedProcess {
    const own = ["--discovery-backend=file", "--request-plane=tcp", "--event-plane=zmq", `--file-kv=${this.#folder}`];
    const overridden = [...own, ...flags].map((flag) => flag.split("=", 1)[0]);
    const forwarded = forwardedFlags(this.#resolved, command).filter(
      (flag) => !overridden.includes(flag.split("=", 1)[0]),
    );
    const json = this.#values["logging-console-format"] === "jsonl";
    return new SupervisedProcess({
      name,
      command: process.execPath,
      args: [
        ...(command === "frontend" ? FRONTEND_NODE_FLAGS : []),
        mainModule(),
        command,
        ...forwarded,
        ...own,
        ...flags,
        ...(engineArgs.length === 0 ? [] : ["--", ...engineArgs]),
      ],
      env: childEnvironment(env, {
        DYN_CLUSTER_SECRET: this.#values["cluster-secret"] ?? this.#secret,
        ...(this.#values["engine-api-key"] === undefined ? {} : { DYN_ENGINE_API_KEY: this.#values["engine-api-key"] }),
        ...(this.#values["engine-headers"] === undefined ? {} : { DYN_ENGINE_HEADERS: this.#values["engine-headers"] }),
      }),
      clock: systemClock,
      // A prefix would break a JSON line; it names its role itself.
      onLine: (line) => this.#err(json ? `${line}\n` : `[${name}] ${line}\n`),
      onNotice: (notice) => this.#err(`dynamo local: ${notice}\n`),
    });
  }

  /** Keeps a stranger on this machine from talking to our workers. Never on a command line, where all can read it. */
  readonly #secret = randomBytes(32).toString("hex");

  get #routing(): string {
    return this.#values["router-policy-module"] ?? this.#values["router-mode"];
  }

  async #serves(): Promise<Facts> {
    const timeoutSeconds = startTimeoutSeconds(this.#resolved);
    const timeout = AbortSignal.timeout(milliseconds(timeoutSeconds));
    const timedOut = new Promise<never>((_, reject) => {
      const late = (): void =>
        reject(
          new DynamoError(
            "no-workers",
            `${this.#modelName} was not served within ${timeoutSeconds} s; see the lines above, or raise --start-timeout-secs`,
          ),
        );
      timeout.addEventListener("abort", late, { once: true });
    });
    const served = async (): Promise<Facts> => {
      const workers = Promise.all(this.#workers.map((worker) => worker.ready));
      const facts = await Promise.race([this.#frontend.ready, workers.then(() => this.#frontend.ready)]);
      await Promise.all([workers, waitUntilListed(String(facts.address), this.#modelName, timeout)]);
      return facts;
    };
    return Promise.race([served(), timedOut]);
  }

  #announce(frontend: Facts): void {
    const address = `http://${urlHost(this.#values["http-host"])}:${frontend.port}`;
    const workers = this.#workers
      .map((worker) => `  ${worker.name.padEnd(9)} pid ${worker.pid}  ${DUTIES[worker.name.split("-")[0]!]}`)
      .join("\n");
    this.#err(`
${this.#modelName} is served at ${address}

  frontend  pid ${this.#frontend.pid}  port ${frontend.port}: OpenAI API, tokenizer, router (${this.#routing})
${workers}

Try it:
  curl -N ${address}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"model":"${this.#modelName}","stream":true,"messages":[{"role":"user","content":"What is the capital of France?"}]}'

Look at it:  npx dynamo status --file-kv ${this.#folder}${this.#values.namespace === "dynamo" ? "" : ` --namespace ${this.#values.namespace}`}
Stop it:     Ctrl-C
`);
  }

  #onInterrupt(): void {
    this.#interrupts++;
    if (this.#interrupts === 1) {
      this.#err("dynamo local: finishing what runs; Ctrl-C again to force\n");
      this.#interrupted.resolve();
    } else for (const child of this.#children()) child.stop("SIGKILL");
  }

  /** The frontend first, so that what it serves can finish on the workers; each side has the drain time and a little more. */
  async #leave(): Promise<void> {
    const graceMs = milliseconds(this.#values["graceful-shutdown-timeout-secs"]) + LEAVE_EXTRA_MS;
    await stopAll([this.#frontend], systemClock, graceMs);
    await stopAll(this.#workers, systemClock, graceMs);
  }
}

/** An engine that is started has a limit of its own, which is the longer one. */
function startTimeoutSeconds({ values, sources }: ResolvedOptions): number {
  const own = values["start-timeout-secs"];
  if (!isForeignEngine(values.engine) || sources["start-timeout-secs"] !== "default") return own;
  return Math.max(own, values["engine-start-timeout-secs"] + 60);
}

const DUTIES: Readonly<Record<string, string>> = {
  worker: "runs the model",
  prefill: "computes prompts and hands their KV blocks over",
  decode: "fetches them and goes on with the answers",
};

/** A server that starts its own processes for each device is one on a machine, unless more are asked for. */
function workerCount({ values, sources }: ResolvedOptions): number {
  return isForeignEngine(values.engine) && sources.workers === "default" ? 1 : values.workers;
}

/** Two pools with `--prefill`, else workers that each do all of it. */
function workerRoles({
  prefill,
  decode,
  workers,
}: OptionValues): { readonly name: string; readonly mode: WorkerRole }[] {
  const pool = (count: number, prefix: string, mode: WorkerRole): { name: string; mode: WorkerRole }[] =>
    Array.from({ length: count }, (_, index) => ({ name: `${prefix}-${index}`, mode }));
  if (prefill === 0) return pool(workers, "worker", "agg");
  return [...pool(prefill, "prefill", "prefill"), ...pool(decode, "decode", "decode")];
}

/** For what a role does after its drain: close connections, unregister, exit. */
const LEAVE_EXTRA_MS = 3_000;

/** The options go as flags; what one process has and several cannot share (a fixed port) is taken out. */
function childEnvironment(env: NodeJS.ProcessEnv, secrets: Readonly<Record<string, string>>): NodeJS.ProcessEnv {
  const { DYN_CONFIG: _config, DYN_SYSTEM_PORT: _status, DYN_TCP_RPC_PORT: _port, ...others } = env;
  const { DYN_TCP_RPC_ADVERTISE_PORT: _advertised, ...rest } = others;
  return { ...rest, ...secrets };
}

/** `main.ts` in a checkout, `main.js` in the package. */
function mainModule(): string {
  const path = join(import.meta.dirname, `main${extname(import.meta.filename)}`);
  if (!existsSync(path)) throw new DynamoError("internal", `${path} is missing`);
  return path;
}
