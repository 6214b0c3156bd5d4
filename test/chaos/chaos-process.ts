import { spawn, type ChildProcess } from "node:child_process";
import { join, resolve } from "node:path";
import { LineSplitter } from "../../src/std/line-splitter.ts";
import { alive } from "../helpers/process-cluster.ts";

const ROOT = resolve(import.meta.dirname, "../..");
const MAIN = join(ROOT, "src/cli/main.ts");

export interface ChaosProcessOptions {
  readonly name: string;
  readonly args: readonly string[];
  readonly env: NodeJS.ProcessEnv;
  /** Every pid that ever was, for the check that none is left. */
  readonly onPid: (pid: number) => void;
  readonly onLine: (line: string) => void;
}

/** Start failures and crashes come back after this, as a supervisor of the real world does it. */
const RESTART_MS = 200;

/**
 * One role as a real process under the supervision of the chaos run: started again whenever it ends without being asked
 * to, so that a fault is only ever the signal. A role that ends by itself with an error while nothing was done to it is
 * told to `onUnasked`.
 */
export class ChaosProcess {
  readonly name: string;
  readonly #options: ChaosProcessOptions;
  #child: ChildProcess | undefined;
  #ready = Promise.withResolvers<void>();
  #isReady = false;
  #instanceId = "";
  #isLeaving = false;
  #timer: NodeJS.Timeout | undefined;
  #exited = Promise.withResolvers<number | null>();
  restartCount = 0;
  /** Ends that no signal of ours explains. */
  readonly unasked: { readonly atMs: number; readonly wasReady: boolean; readonly text: string }[] = [];
  #signalled = false;

  constructor(options: ChaosProcessOptions) {
    this.name = options.name;
    this.#options = options;
  }

  get pid(): number | undefined {
    return this.#child?.pid;
  }

  /** Of a worker that serves; its present or last life's. */
  get instanceId(): string {
    return this.#instanceId;
  }

  get isReady(): boolean {
    return this.#isReady;
  }

  /** Serves, for the present or next life. */
  get ready(): Promise<void> {
    return this.#ready.promise;
  }

  start(): void {
    const { args, env, onPid, onLine, name } = this.#options;
    const child = spawn(process.execPath, [MAIN, ...args], {
      cwd: ROOT,
      env: { ...env, DYN_SUPERVISED: "1" },
      stdio: ["ignore", "pipe", "pipe", "ipc"],
    });
    this.#child = child;
    this.#signalled = false;
    if (child.pid !== undefined) onPid(child.pid);
    for (const stream of [child.stdout, child.stderr]) {
      const lines = new LineSplitter((line) => onLine(`[${name}] ${line}`));
      stream?.on("data", (bytes: Buffer) => lines.push(bytes)).on("end", () => lines.end());
    }
    child.on("message", (message) => {
      const { type, facts } = message as { type?: unknown; facts?: { instance?: string; instances?: string } };
      if (type !== "ready") return;
      this.#instanceId = facts?.instance ?? facts?.instances ?? "";
      this.#isReady = true;
      this.#ready.resolve();
    });
    child.on("error", () => undefined);
    child.once("close", (code, signal) => this.#onEnd(code, signal));
  }

  kill(signal: NodeJS.Signals): void {
    if (signal === "SIGKILL" || signal === "SIGTERM") this.#signalled = true;
    this.#child?.kill(signal);
  }

  /** SIGTERM, the orderly end, and a new life. Resolves with the exit code of the old one. */
  async restart(): Promise<number | null> {
    const exited = this.#exited.promise;
    this.kill("SIGTERM");
    return exited;
  }

  /** SIGTERM and no new life. Resolves with the exit code. */
  async leave(): Promise<number | null> {
    this.#isLeaving = true;
    clearTimeout(this.#timer);
    const exited = this.#exited.promise;
    if (this.#child === undefined) return 0;
    this.kill("SIGTERM");
    return exited;
  }

  killForGood(): void {
    this.#isLeaving = true;
    clearTimeout(this.#timer);
    this.kill("SIGKILL");
  }

  #onEnd(code: number | null, signal: NodeJS.Signals | null): void {
    const pid = this.#child?.pid;
    if (!this.#signalled && !this.#isLeaving) {
      const text = `pid ${pid} ended with ${signal ?? code}`;
      this.unasked.push({ atMs: performance.now(), wasReady: this.#isReady, text });
    }
    this.#child = undefined;
    if (this.#isReady) this.#ready = Promise.withResolvers<void>();
    this.#isReady = false;
    const ended = this.#exited;
    this.#exited = Promise.withResolvers<number | null>();
    ended.resolve(code);
    if (this.#isLeaving) return;
    this.restartCount++;
    this.#timer = setTimeout(() => this.start(), RESTART_MS);
  }
}

/** pids of these that are still alive after `graceMs`. */
export async function leftOver(pids: Iterable<number>, graceMs = 3_000): Promise<number[]> {
  const endMs = performance.now() + graceMs;
  for (;;) {
    const left = [...pids].filter((pid) => alive(pid));
    if (left.length === 0 || performance.now() > endMs) return left;
    await new Promise((resolved) => setTimeout(resolved, 20));
  }
}
