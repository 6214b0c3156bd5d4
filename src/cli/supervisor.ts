import { spawn, type ChildProcess } from "node:child_process";
import { DynamoError } from "../errors/index.ts";
import { LineSplitter, RestartBackOff, type Clock, type TimerHandle } from "../std/index.ts";

/**
 * Keeps one role running as a child process of this one:
 *
 *     start() -> running --crash--> waiting (back-off) -> running ...       stop() -> stopping -> ended
 *
 * The child says over its IPC channel when it serves; the same channel tells it when we are gone, even by SIGKILL. A child
 * that ends by itself before it ever served has a reason that a restart does not cure (a wrong file, a taken port): that
 * fails `ready`. One that a signal ended is started again in any case, and one that left in order: SIGTERM to it is a
 * restart, without the back-off of a crash.
 */
export interface SupervisedOptions {
  /** Shown in front of its lines: `worker-0`. */
  readonly name: string;
  readonly command: string;
  readonly args: readonly string[];
  readonly env: NodeJS.ProcessEnv;
  readonly clock: Clock;
  /** A line that the child wrote to stdout or stderr. */
  readonly onLine: (line: string) => void;
  /** One line about the child itself: crashed, restarted. */
  readonly onNotice: (notice: string) => void;
}

export type Facts = Readonly<Record<string, string | number>>;

/** Signals before the first ready that are taken for accidents; then they are a failure too. */
const MAX_START_CRASHES = 3;

export class SupervisedProcess {
  readonly name: string;
  /** The first time it serves. Rejects when it cannot. */
  readonly ready: Promise<Facts>;
  /** After `stop`: it is gone. */
  readonly ended: Promise<void>;
  readonly #options: SupervisedOptions;
  readonly #backOff = new RestartBackOff();
  readonly #ready = Promise.withResolvers<Facts>();
  readonly #ended = Promise.withResolvers<void>();
  #child: ChildProcess | undefined;
  #restartTimer: TimerHandle | undefined;
  #startedMs = 0;
  #startCrashes = 0;
  #wasReady = false;
  #stopping = false;

  constructor(options: SupervisedOptions) {
    this.#options = options;
    this.name = options.name;
    this.ready = this.#ready.promise;
    this.ended = this.#ended.promise;
    this.ready.catch(() => undefined);
  }

  /** Undefined while it waits for its restart or is gone. */
  get pid(): number | undefined {
    return this.#child?.pid;
  }

  start(): void {
    const { command, args, env, clock, onLine } = this.#options;
    this.#startedMs = clock.monotonicMs();
    const child = spawn(command, args, {
      env: { ...env, DYN_SUPERVISED: "1" },
      stdio: ["ignore", "pipe", "pipe", "ipc"],
    });
    this.#child = child;
    for (const stream of [child.stdout, child.stderr]) {
      const lines = new LineSplitter(onLine);
      stream?.on("data", (bytes: Buffer) => lines.push(bytes)).on("end", () => lines.end());
    }
    child.on("message", (message) => this.#onMessage(message));
    // Sending a signal to a child that is just gone is no error worth a word; not being able to start is.
    child.once("error", (error) => {
      if (child.pid === undefined)
        this.#onEnd(child, `could not be started: ${error.message}`, { bySignal: false, inOrder: false });
    });
    // `close` and not `exit`: its last lines were read by then.
    child.once("close", (code, signal) => {
      const how = signal === null ? `ended with exit code ${code}` : `was ended by ${signal}`;
      this.#onEnd(child, how, { bySignal: signal !== null, inOrder: code === 0 });
    });
  }

  /** Asks the child to leave; it is not started again. Idempotent; a later call may be more forceful. */
  stop(signal: "SIGTERM" | "SIGKILL"): void {
    this.#stopping = true;
    this.#restartTimer?.cancel();
    if (this.#child === undefined) this.#ended.resolve();
    else this.#child.kill(signal);
  }

  #onMessage(message: unknown): void {
    const ready = message as { type?: unknown; facts?: Facts } | null;
    if (ready?.type !== "ready" || ready.facts === undefined) return;
    if (this.#wasReady) this.#options.onNotice(`${this.name} serves again (pid ${this.pid})`);
    this.#wasReady = true;
    this.#ready.resolve(ready.facts);
  }

  #onEnd(child: ChildProcess, how: string, { bySignal, inOrder }: { bySignal: boolean; inOrder: boolean }): void {
    if (this.#child !== child) return;
    this.#child = undefined;
    if (this.#stopping) {
      this.#ready.reject(new DynamoError("cancelled", `${this.name} was stopped`));
      this.#ended.resolve();
      return;
    }
    if (!this.#wasReady && (!bySignal || ++this.#startCrashes >= MAX_START_CRASHES)) {
      this.#stopping = true;
      this.#ready.reject(new DynamoError("engine-failed", `${this.name} did not start: it ${how}`));
      this.#ended.resolve();
      return;
    }
    const { clock, onNotice } = this.#options;
    // Somebody told it to leave, and it finished what it had: a restart that was asked for is no crash.
    const pauseMs = this.#backOff.next(inOrder ? Infinity : clock.monotonicMs() - this.#startedMs);
    onNotice(`${this.name} (pid ${child.pid}) ${how}; restarting in ${pauseMs / 1_000} s`);
    this.#restartTimer = clock.setTimer(pauseMs, () => this.start());
  }
}

/**
 * Stops processes: SIGTERM, and SIGKILL for those still there after `graceMs`. Resolves when all are gone.
 */
export async function stopAll(processes: readonly SupervisedProcess[], clock: Clock, graceMs: number): Promise<void> {
  for (const child of processes) child.stop("SIGTERM");
  const timer = clock.setTimer(graceMs, () => {
    for (const child of processes) child.stop("SIGKILL");
  });
  await Promise.all(processes.map((child) => child.ended));
  timer.cancel();
}
