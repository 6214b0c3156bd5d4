import { spawn, type ChildProcess } from "node:child_process";
import { readFileSync, readdirSync } from "node:fs";
import { constants } from "node:os";
import type { Readable } from "node:stream";
import { LineSplitter, type Clock } from "../../std/index.ts";

/**
 * One life of an engine's server as a child of this process, in a process group and session of its own: its helpers are in
 * it, a Ctrl-C of the terminal does not reach it, and nothing of it is left when it ends or when we do, by whatever signal.
 *
 * A shell of two lines stands between. It holds the reading end of a pipe whose writing end only we have: when that closes,
 * we are gone, and it ends the engine (SIGTERM, then SIGKILL for the group). Nothing else is asked of it.
 */
export interface EngineCommand {
  readonly command: string;
  readonly args: readonly string[];
  readonly env: NodeJS.ProcessEnv;
}

export interface EngineProcessOptions extends EngineCommand {
  readonly clock: Clock;
  /** A line on stdout or stderr. */
  readonly onLine: (line: string) => void;
}

export interface EngineExit {
  readonly code: number | undefined;
  readonly signal: string | undefined;
  /** `ended with exit code 1`, `was ended by SIGKILL`, `could not be started: ...`. */
  readonly text: string;
  /** The command itself was not there or not executable: starting it again is of no use. */
  readonly isMissing: boolean;
}

/** What is left of an engine after a SIGKILL of ours gets so long for its own clean-up. */
const ORPHAN_GRACE_SECONDS = 10;
/** `$1` seconds of grace, then the command. fd 4: our pipe; fd 3: where the engine's process id goes. */
const KEEPER = `
grace=$1; shift
exec 4<&0 </dev/null
"$@" 3>&- 4<&- &
engine=$!
echo "$engine" >&3
exec 3>&-
(
  read -r _ <&4
  trap '' TERM
  kill -TERM "$engine" 2>/dev/null
  tenths=$((grace * 10))
  while [ "$tenths" -gt 0 ] && kill -0 "$engine" 2>/dev/null; do sleep 0.1; tenths=$((tenths - 1)); done
  kill -KILL -$$ 2>/dev/null
) &
exec 4<&-
trap : TERM
while :; do
  wait "$engine"; code=$?
  kill -0 "$engine" 2>/dev/null || exit "$code"
done
`;

export class EngineProcess {
  readonly startedMs: number;
  readonly exited: Promise<EngineExit>;
  readonly #child: ChildProcess;
  readonly #clock: Clock;
  readonly #pid = Promise.withResolvers<number | undefined>();
  #enginePid: number | undefined;
  #exit: EngineExit | undefined;

  constructor({ command, args, env, clock, onLine }: EngineProcessOptions) {
    this.#clock = clock;
    this.startedMs = clock.monotonicMs();
    const child = spawn("/bin/sh", ["-c", KEEPER, "sh", String(ORPHAN_GRACE_SECONDS), command, ...args], {
      env,
      detached: true,
      stdio: ["pipe", "pipe", "pipe", "pipe"],
    });
    this.#child = child;
    for (const stream of [child.stdout, child.stderr]) {
      const lines = new LineSplitter(onLine);
      stream?.on("data", (bytes: Buffer) => lines.push(bytes)).on("end", () => lines.end());
    }
    // The pipe breaks with the shell; there is nothing to do about it.
    child.stdin?.on("error", () => undefined);
    (child.stdio[3] as Readable).on("data", (bytes: Buffer) => {
      const pid = Number(bytes.toString("latin1").trim());
      if (Number.isInteger(pid) && pid > 0) this.#enginePid ??= pid;
      this.#pid.resolve(this.#enginePid);
    });
    this.exited = this.#watch(child);
  }

  /** The engine's own process, once it is known. */
  get pid(): number | undefined {
    return this.#enginePid;
  }

  /** Undefined when it could not be started. */
  get pidKnown(): Promise<number | undefined> {
    return this.#pid.promise;
  }

  get hasExited(): boolean {
    return this.#exit !== undefined;
  }

  /** SIGTERM to the engine, SIGKILL to all of it after `graceMs`. Resolves when it is gone. Idempotent. */
  async stop(graceMs: number): Promise<void> {
    if (this.#exit !== undefined) return;
    await this.#pid.promise;
    this.signal("SIGTERM");
    const timer = this.#clock.setTimer(graceMs, () => this.kill());
    await this.exited;
    timer.cancel();
  }

  /** To the engine's process alone. */
  signal(signal: NodeJS.Signals): void {
    if (this.#enginePid !== undefined && this.#exit === undefined) trySignal(this.#enginePid, signal);
  }

  kill(): void {
    if (this.#child.pid !== undefined && this.#exit === undefined) trySignal(-this.#child.pid, "SIGKILL");
  }

  /** Memory of all its processes, shared pages counted in parts; undefined where the system does not tell (not Linux). */
  memoryBytes(): { readonly bytes: number; readonly processes: number } | undefined {
    if (this.#child.pid === undefined) return undefined;
    try {
      const members = groupMembers(this.#child.pid).filter((pid) => pid !== this.#child.pid);
      let bytes = 0;
      for (const pid of members) bytes += proportionalBytes(pid);
      return bytes === 0 ? undefined : { bytes, processes: members.length };
    } catch {
      return undefined;
    }
  }

  #watch(child: ChildProcess): Promise<EngineExit> {
    const { promise, resolve } = Promise.withResolvers<EngineExit>();
    const end = (exit: EngineExit): void => {
      this.#exit = exit;
      this.#pid.resolve(this.#enginePid);
      resolve(exit);
    };
    child.once("error", (error) => {
      if (child.pid === undefined)
        end({ code: undefined, signal: undefined, text: `could not be started: ${error.message}`, isMissing: true });
    });
    let exit: EngineExit | undefined;
    child.once("exit", (code, signal) => {
      exit = exitOf(code, signal);
      // Helpers that outlived it hold its port and its memory.
      if (child.pid !== undefined) trySignal(-child.pid, "SIGKILL");
      child.stdin?.end();
    });
    // `close` and not `exit`: its last lines were read by then.
    child.once("close", () => {
      if (exit !== undefined) end(exit);
    });
    return promise;
  }
}

function exitOf(code: number | null, signal: NodeJS.Signals | null): EngineExit {
  if (signal !== null) return { code: undefined, signal, text: `was ended by ${signal}`, isMissing: false };
  if (code === 127 || code === 126) {
    return { code, signal: undefined, text: "could not be started: the command is not there", isMissing: true };
  }
  // The shell's way to tell a signal.
  const name = code === null ? undefined : signalName(code - 128);
  if (name !== undefined) return { code: undefined, signal: name, text: `was ended by ${name}`, isMissing: false };
  return { code: code ?? undefined, signal: undefined, text: `ended with exit code ${code}`, isMissing: false };
}

function signalName(number: number): string | undefined {
  return Object.entries(constants.signals).find(([, value]) => value === number)?.[0];
}

function trySignal(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch {
    // Gone already.
  }
}

function groupMembers(group: number): number[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => groupOf(pid) === group);
}

/** Fifth field of `stat`; the second, in brackets, may hold anything. */
function groupOf(pid: number): number | undefined {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, "latin1");
    return Number(text.slice(text.lastIndexOf(")") + 2).split(" ")[2]);
  } catch {
    return undefined;
  }
}

function proportionalBytes(pid: number): number {
  try {
    const pss = /^Pss:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/smaps_rollup`, "latin1"));
    return pss === null ? 0 : Number(pss[1]) * 1024;
  } catch {
    return 0;
  }
}
