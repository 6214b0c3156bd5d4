import { spawn, type ChildProcess } from "node:child_process";
import { randomInt } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { until } from "./in-process-cluster.ts";

const ROOT = resolve(import.meta.dirname, "../..");
const COMMAND = join(ROOT, "bin/dynamo.mjs");

export interface ProcessCluster {
  readonly baseUrl: string;
  readonly port: number;
  readonly child: ChildProcess;
  /** Everything printed so far. */
  readonly output: () => string;
  /** pids of the cluster's child processes whose command line holds `role`. */
  pids(role: string): number[];
  /** Sends the signal to the leader, waits for its end, checks that nothing is left; returns the exit code. */
  stop(signal?: NodeJS.Signals): Promise<number | null>;
}

/** `dynamo local` as a user starts it: real processes, file discovery, TCP and ZMQ planes. Waits until a model is listed. */
export async function startProcessCluster(
  flags: readonly string[],
  environment: NodeJS.ProcessEnv = {},
  startTimeoutMs = 60_000,
): Promise<ProcessCluster> {
  const port = await freePort();
  const root = mkdtempSync(join(tmpdir(), "dynamo-e2e-"));
  let text = "";
  const child = spawn(process.execPath, [COMMAND, "local", "--http-port", String(port), ...flags], {
    cwd: ROOT,
    env: { ...process.env, DYN_FILE_KV: join(root, "discovery"), ...environment },
    stdio: ["ignore", "pipe", "pipe"],
  });
  // A test process that fails half-way leaves nothing: the cluster's own children leave when their parent is gone.
  const killAtExit = (): void => void child.kill("SIGKILL");
  process.once("exit", killAtExit);
  child.once("exit", () => process.off("exit", killAtExit));
  child.stdout!.on("data", (chunk: Buffer) => (text += chunk.toString()));
  child.stderr!.on("data", (chunk: Buffer) => (text += chunk.toString()));
  const exited = new Promise<number | null>((resolveExit) => child.once("exit", (code) => resolveExit(code)));
  const baseUrl = `http://127.0.0.1:${port}`;
  const pids = (role: string): number[] => descendants(child.pid!).filter((pid) => commandLine(pid).includes(role));
  try {
    await until(
      async () => {
        if (child.exitCode !== null) throw new Error(`dynamo local ended with ${child.exitCode}:\n${text}`);
        const answer = await fetch(`${baseUrl}/v1/models`).catch(() => undefined);
        if (answer === undefined || !answer.ok) return false;
        return ((await answer.json()) as { data: unknown[] }).data.length > 0;
      },
      "a model to be listed",
      startTimeoutMs,
    );
  } catch (error) {
    child.kill("SIGKILL");
    rmSync(root, { recursive: true, force: true });
    throw error;
  }
  return {
    baseUrl,
    port,
    child,
    output: () => text,
    pids,
    async stop(signal = "SIGINT") {
      const left = descendants(child.pid!);
      child.kill(signal);
      const code = await exited;
      await until(() => left.every((pid) => !alive(pid)), `children ${left.join(", ")} to end`);
      rmSync(root, { recursive: true, force: true });
      return code;
    },
  };
}

/** Below the range from which systems give out ports by themselves: nothing else takes it until its user listens. */
const PORTS_FROM = 15_000;
const PORTS_UNTIL = 32_000;

/** A port of this machine that nobody listens on, for a process that is told its port. */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = randomInt(PORTS_FROM, PORTS_UNTIL);
    const server = createServer();
    const isFree = await new Promise<boolean>((resolve) => {
      server.once("error", () => resolve(false));
      server.listen(port, "127.0.0.1", () => server.close(() => resolve(true)));
    });
    if (isFree) return port;
  }
}

export function alive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return !readProc(pid, "stat").includes(") Z ");
  } catch {
    return false;
  }
}

function descendants(pid: number): number[] {
  const children = readProc(pid, `task/${pid}/children`).split(" ").filter(Boolean).map(Number);
  return children.flatMap((child) => [child, ...descendants(child)]);
}

function commandLine(pid: number): string {
  return readProc(pid, "cmdline").replaceAll("\u0000", " ");
}

function readProc(pid: number, file: string): string {
  try {
    return readFileSync(`/proc/${pid}/${file}`, "utf8");
  } catch {
    return "";
  }
}
