import { closeSync, mkdirSync, openSync, renameSync, statSync, writeSync } from "node:fs";
import { dirname } from "node:path";
import { DynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import { RestartBackOff, type Clock, type TimerHandle } from "../../std/index.ts";
import { EngineProcess, type EngineCommand, type EngineExit } from "./engine-process.ts";
import { LogRing } from "./log-ring.ts";

/**
 * An engine's server that this worker starts, over its lives: keeps its log (the newest lines here, all of it in a file),
 * says how its start goes, and starts it again after a crash, later each time. Whether it serves is for others to find out.
 */
export interface EngineServerOptions {
  /** `vLLM`, for messages. */
  readonly name: string;
  readonly launch: EngineCommand;
  readonly clock: Clock;
  readonly logger: Logger;
  /** All lines go there; at 64 MiB it becomes `PATH.1`. @default none */
  readonly logPath?: string;
  /** What a line says about the start: `loading weights`; undefined for lines that say nothing. */
  readonly phaseOf?: (line: string) => string | undefined;
  /** Lines that are not worth keeping, such as the log of our own scrapes. */
  readonly isNoise?: (line: string) => boolean;
  /** A life is over that `stop` did not end. */
  readonly onExit: (exit: EngineExit) => void;
}

const MAX_LOG_FILE_BYTES = 64 * 1024 * 1024;
/** Lines of an engine that does not start that are shown with the failure. */
const TAIL_LINES = 25;
/** vLLM takes about 2 s for its clean-up. */
const STOP_GRACE_MS = 20_000;

export class EngineServer {
  readonly log = new LogRing();
  readonly #options: EngineServerOptions;
  readonly #backOff = new RestartBackOff();
  #process: EngineProcess | undefined;
  #file: number | undefined;
  #fileBytes = 0;
  #restartTimer: TimerHandle | undefined;
  #isStopped = false;
  #phase: string | undefined;
  #isStarting = true;
  #lastMemory: { readonly bytes: number; readonly processes: number } | undefined;
  lives = 0;
  lastExit: string | undefined;

  constructor(options: EngineServerOptions) {
    this.#options = options;
  }

  get pid(): number | undefined {
    return this.#process?.pid;
  }

  get isRunning(): boolean {
    return this.#process !== undefined && !this.#process.hasExited;
  }

  /** Of this life. */
  get startedMs(): number {
    return this.#process?.startedMs ?? 0;
  }

  start(): void {
    if (this.#isStopped) return;
    const { launch, clock, logger, name, onExit } = this.#options;
    this.#openFile();
    this.lives++;
    this.#isStarting = true;
    this.#phase = undefined;
    const child = new EngineProcess({ ...launch, clock, onLine: (line) => this.#onLine(line) });
    this.#process = child;
    void child.pidKnown.then((pid) => {
      if (pid !== undefined)
        logger.info({ pid, command: [launch.command, ...launch.args].join(" ") }, `${name} is starting`);
    });
    void child.exited.then((exit) => {
      if (this.#process !== child || this.#isStopped) return;
      this.lastExit = exit.text;
      onExit(exit);
    });
  }

  /** It serves: how long it took and what it needs. */
  serves(): void {
    const { clock, logger, name } = this.#options;
    this.#isStarting = false;
    const child = this.#process;
    if (child === undefined) return;
    this.#lastMemory = child.memoryBytes();
    logger.info(
      {
        pid: child.pid,
        seconds: Number(((clock.monotonicMs() - child.startedMs) / 1_000).toFixed(1)),
        ...(this.#lastMemory === undefined
          ? {}
          : { memory_mb: Math.round(this.#lastMemory.bytes / 1e6), processes: this.#lastMemory.processes }),
      },
      `${name} serves`,
    );
  }

  /** Starts it again after the back-off; returns the pause. */
  restartLater(onStarted: () => void): number {
    const { clock } = this.#options;
    const pauseMs = this.#backOff.next(clock.monotonicMs() - this.startedMs);
    this.#restartTimer = clock.setTimer(pauseMs, () => {
      if (this.#isStopped) return;
      this.start();
      onStarted();
    });
    return pauseMs;
  }

  /** Ends this life; `onExit` follows. For an engine that hangs. */
  kill(): void {
    this.#process?.kill();
  }

  /** Where its start is, in words: phase, seconds, the newest line. */
  progress(): Readonly<Record<string, unknown>> {
    const { clock } = this.#options;
    return {
      seconds: Math.round((clock.monotonicMs() - this.startedMs) / 1_000),
      ...(this.#phase === undefined ? {} : { phase: this.#phase }),
      last_line: this.log.tail(1)[0] ?? "",
    };
  }

  /** What to do about it is in these lines, mostly. */
  failure(text: string): DynamoError {
    const { name, logPath, launch } = this.#options;
    const tail = this.log.tail(TAIL_LINES);
    const where = logPath === undefined ? "" : `; all of its log is in ${logPath}`;
    const lines = tail.length === 0 ? "It wrote nothing." : `Its last lines:\n  ${tail.join("\n  ")}`;
    return new DynamoError("engine-failed", `${name} ${text}${where}. ${lines}`, {
      diagnostic: `command: ${[launch.command, ...launch.args].join(" ")}`,
    });
  }

  describe(): Readonly<Record<string, unknown>> {
    return {
      pid: this.pid ?? null,
      lives: this.lives,
      last_exit: this.lastExit ?? null,
      log_path: this.#options.logPath ?? null,
      log_lines: this.log.lineCount,
      memory_bytes: this.#lastMemory?.bytes ?? null,
      processes: this.#lastMemory?.processes ?? null,
      ...(this.#isStarting ? { starting: this.progress() } : {}),
    };
  }

  async stop(): Promise<void> {
    this.#isStopped = true;
    this.#restartTimer?.cancel();
    await this.#process?.stop(STOP_GRACE_MS);
    if (this.#file !== undefined) closeSync(this.#file);
    this.#file = undefined;
  }

  #onLine(line: string): void {
    const { logger, name, phaseOf, isNoise } = this.#options;
    if (isNoise?.(line) === true) return;
    const kept = this.log.push(line);
    this.#write(kept);
    logger.debug({ engine_log: kept }, "engine");
    if (!this.#isStarting) return;
    const phase = phaseOf?.(kept);
    if (phase === undefined || phase === this.#phase) return;
    this.#phase = phase;
    const seconds = Math.round((this.#options.clock.monotonicMs() - this.startedMs) / 1_000);
    logger.info({ seconds }, `${name}: ${phase}`);
  }

  #openFile(): void {
    const { logPath } = this.#options;
    if (logPath === undefined || this.#file !== undefined) return;
    try {
      mkdirSync(dirname(logPath), { recursive: true });
      this.#file = openSync(logPath, "a", 0o600);
      this.#fileBytes = statSync(logPath).size;
    } catch (cause) {
      throw new DynamoError("invalid-config", `--engine-log-file: ${(cause as Error).message}`, { cause });
    }
  }

  /** A full disk must not end the worker: the lines are in the ring too. */
  #write(line: string): void {
    const { logPath, logger } = this.#options;
    if (this.#file === undefined || logPath === undefined) return;
    try {
      this.#fileBytes += writeSync(this.#file, `${line}\n`);
      if (this.#fileBytes < MAX_LOG_FILE_BYTES) return;
      closeSync(this.#file);
      this.#file = undefined;
      renameSync(logPath, `${logPath}.1`);
      this.#file = openSync(logPath, "a", 0o600);
      this.#fileBytes = 0;
    } catch (thrown) {
      logger.warn({ diagnostic: (thrown as Error).message }, `the engine's log cannot be written to ${logPath}`);
      this.#file = undefined;
    }
  }
}
