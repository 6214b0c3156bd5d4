import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { until } from "../helpers/in-process-cluster.ts";
import { freePort } from "../helpers/process-cluster.ts";
import { ChaosProcess, leftOver } from "./chaos-process.ts";
import { FaultProxy } from "./fault-proxy.ts";

export interface ChaosClusterOptions {
  readonly workers: number;
  readonly frontends: number;
  /** A GGUF file: llama workers; without one mock workers. */
  readonly modelPath: string | undefined;
  /** Of the mock engine; 1 is a large GPU. */
  readonly speedupRatio: number;
  /** Of every process. @default warn */
  readonly logLevel?: string;
  readonly onLine: (line: string) => void;
}

export interface ChaosWorker {
  readonly process: ChaosProcess;
  readonly proxy: FaultProxy;
}

const DISCOVERY_DISK_BYTES = 512 * 1024;

/**
 * Frontends and workers as real processes on file discovery, TCP and ZMQ, every worker behind a fault proxy of its own
 * (it advertises the proxy's port). The discovery folder lies on a small disk of its own where this process may mount
 * one, so that it can be filled.
 */
export class ChaosCluster {
  readonly workers: ChaosWorker[] = [];
  readonly frontends: { readonly process: ChaosProcess; readonly port: number }[] = [];
  readonly pids = new Set<number>();
  readonly model: string;
  readonly discoveryRoot: string;
  /** Why there is no disk to fill. */
  readonly noDiskReason: string | undefined;
  readonly #parent: string;
  readonly #disk: string;

  private constructor(model: string) {
    this.model = model;
    this.#parent = mkdtempSync(join(tmpdir(), "dynamo-chaos-"));
    this.#disk = join(this.#parent, "disk");
    mkdirSync(this.#disk);
    this.noDiskReason = mountDisk(this.#disk);
    this.discoveryRoot = join(this.#disk, "discovery");
  }

  static async start(options: ChaosClusterOptions): Promise<ChaosCluster> {
    const cluster = new ChaosCluster(options.modelPath === undefined ? "mock" : "llama");
    try {
      await cluster.#start(options);
    } catch (thrown) {
      await cluster.stop();
      throw thrown;
    }
    return cluster;
  }

  get ports(): readonly number[] {
    return this.frontends.map(({ port }) => port);
  }

  get processes(): ChaosProcess[] {
    return [...this.frontends, ...this.workers].map((each) => each.process);
  }

  async #start({ workers, frontends, modelPath, speedupRatio, onLine, ...rest }: ChaosClusterOptions): Promise<void> {
    const kept = Object.entries(process.env).filter(([name]) => !name.startsWith("DYN_"));
    const env = { ...Object.fromEntries(kept), DYN_CLUSTER_SECRET: "chaos", DYN_LOG: rest.logLevel ?? "warn" };
    const onPid = (pid: number): void => void this.pids.add(pid);
    const planes = [`--file-kv=${this.discoveryRoot}`];
    for (let i = 0; i < workers; i++) {
      const port = await freePort();
      const proxy = await FaultProxy.listen(port);
      const name = `worker-${i}`;
      const engine =
        modelPath === undefined
          ? ["mocker", `--speedup-ratio=${speedupRatio}`, "--max-num-seqs=64"]
          : ["worker", `--model=${modelPath}`, "--threads=1", "--context-length=1024"];
      const args = [
        ...engine,
        `--model-name=${this.model}`,
        ...planes,
        `--tcp-rpc-port=${port}`,
        `--tcp-rpc-advertise-port=${proxy.port}`,
      ];
      this.workers.push({ process: new ChaosProcess({ name, args, env, onPid, onLine }), proxy });
    }
    for (let i = 0; i < frontends; i++) {
      const port = await freePort();
      const args = ["frontend", `--http-port=${port}`, "--router-mode=kv", ...planes];
      this.frontends.push({
        process: new ChaosProcess({ name: `frontend-${i}`, args, env, onPid, onLine }),
        port,
      });
    }
    for (const each of this.processes) each.start();
    await this.settled(120_000);
  }

  /** Every process serves, and every frontend routes to every worker of the present lives and to no other. */
  async settled(timeoutMs: number): Promise<void> {
    await until(
      async () => {
        if (!this.processes.every((each) => each.isReady)) return false;
        const wanted = this.workers.map((worker) => worker.process.instanceId).toSorted();
        for (const port of this.ports) {
          const health = await getJson<Health>(port, "/health");
          if (health === undefined || health.discovery !== "ok" || health.events !== "ok") return false;
          if (servingOf(health).toSorted().join() !== wanted.join()) return false;
        }
        return true;
      },
      "the cluster to settle",
      timeoutMs,
    );
  }

  /** Instance ids that a frontend routes to; none while it does not answer. */
  async servingInstances(port: number): Promise<string[]> {
    const health = await getJson<Health>(port, "/health");
    return health === undefined ? [] : servingOf(health);
  }

  // ---- What can be broken beside processes ----

  removeDiscovery(): void {
    rmSync(this.discoveryRoot, { recursive: true, force: true });
  }

  /** In its place lies a file: nobody can read, write or make the folder, root neither. */
  hideDiscovery(): void {
    renameSync(this.discoveryRoot, `${this.discoveryRoot}.aside`);
    writeFileSync(this.discoveryRoot, "in the way");
  }

  showDiscovery(): void {
    rmSync(this.discoveryRoot, { force: true });
    renameSync(`${this.discoveryRoot}.aside`, this.discoveryRoot);
  }

  fillDisk(): void {
    const path = join(this.#disk, "filler");
    for (const bytes of [64 * 1024, 4_096, 1]) {
      try {
        for (let i = 0; i < 4_096; i++) writeFileSync(path, Buffer.alloc(bytes), { flag: "a" });
      } catch {
        // Full at this size.
      }
    }
  }

  emptyDisk(): void {
    rmSync(join(this.#disk, "filler"), { force: true });
  }

  /** Asks all to leave; frontends first. Returns what went wrong on the way. */
  async leave(): Promise<string[]> {
    const problems: string[] = [];
    for (const group of [this.frontends, this.workers]) {
      await Promise.all(
        group.map(async ({ process: each }) => {
          const timer = setTimeout(() => each.killForGood(), 20_000);
          const code = await each.leave();
          clearTimeout(timer);
          if (code !== 0) problems.push(`${each.name} left with ${code ?? "a signal"} after SIGTERM`);
        }),
      );
    }
    return problems;
  }

  /** Ends whatever is left, by force. Returns the pids that had to be ended so. */
  async stop(): Promise<number[]> {
    for (const each of this.processes) each.killForGood();
    const left = await leftOver(this.pids);
    await Promise.all(this.workers.map(({ proxy }) => proxy.close()));
    if (this.noDiskReason === undefined) execFileSync("umount", ["-l", this.#disk]);
    rmSync(this.#parent, { recursive: true, force: true });
    return left;
  }
}

interface Health {
  readonly discovery: string;
  readonly events: string;
  readonly instances: readonly { readonly instance_id: string; readonly problem?: string }[];
}

function servingOf({ instances }: Health): string[] {
  return instances.flatMap((instance) => (instance.problem === undefined ? [instance.instance_id] : []));
}

/** A deadline that keeps the process alive until it comes: the timers of `AbortSignal.timeout` do not, nor do idle sockets. */
async function within<Value>(timeoutMs: number, run: (signal: AbortSignal) => Promise<Value>): Promise<Value> {
  const abort = new AbortController();
  const timer = setTimeout(() => abort.abort(new Error(`no answer within ${timeoutMs} ms`)), timeoutMs);
  try {
    return await run(abort.signal);
  } finally {
    clearTimeout(timer);
  }
}

/** Undefined when the frontend does not answer within two seconds. */
export async function getJson<Value>(port: number, path: string, body?: unknown): Promise<Value | undefined> {
  try {
    return (await postJson(port, path, body, 2_000)) as Value;
  } catch {
    return undefined;
  }
}

/** A GET without a body. Throws when there is no JSON answer in time. */
export function postJson(port: number, path: string, body: unknown, timeoutMs: number): Promise<unknown> {
  return within(timeoutMs, async (signal) => {
    const answer = await fetch(`http://127.0.0.1:${port}${path}`, {
      signal,
      ...(body === undefined
        ? {}
        : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) }),
    });
    return answer.json();
  });
}

export function getText(port: number, path: string): Promise<string> {
  return within(5_000, async (signal) => (await fetch(`http://127.0.0.1:${port}${path}`, { signal })).text());
}

/** A small file system in memory; the reason why not, where that is not allowed. */
function mountDisk(folder: string): string | undefined {
  if (process.platform !== "linux") return "only Linux has a file system in memory to mount";
  if (process.getuid?.() !== 0) return "mounting a small disk needs root";
  try {
    execFileSync("mount", ["-t", "tmpfs", "-o", `size=${DISCOVERY_DISK_BYTES},mode=700`, "tmpfs", folder], {
      stdio: "pipe",
    });
    return undefined;
  } catch (thrown) {
    return `mount failed: ${String((thrown as { stderr?: Buffer }).stderr ?? thrown).trim()}`;
  }
}
