import { readFileSync, readlinkSync } from "node:fs";
import { hostname } from "node:os";

/**
 * Which process holds a lease, told so exactly that another process of the same machine can prove it gone without
 * waiting for the lease to expire. Linux only: elsewhere `machine` is empty and only the heartbeat counts.
 */
export interface Holder {
  readonly pid: number;
  /** For people. */
  readonly host: string;
  /**
   * Boot id and pid namespace: equal means that a pid means the same process. A host name would not do: two containers
   * may share it and not their pids. Empty when unknown.
   */
  readonly machine: string;
  /** Start of the process in clock ticks since boot: tells a reused pid. -1 when unknown. */
  readonly startTicks: number;
}

export function ownHolder(): Holder {
  const status = readProcessStatus("self");
  return { pid: process.pid, host: hostname(), machine: readMachine(), startTicks: status?.startTicks ?? -1 };
}

/** Validates what a lease file says. */
export function parseHolder(value: unknown): Holder | undefined {
  if (typeof value !== "object" || value === null) return undefined;
  const { pid, host, machine, startTicks } = value as Record<string, unknown>;
  if (!Number.isSafeInteger(pid) || (pid as number) < 1 || (pid as number) > 0x7fff_ffff) return undefined;
  if (typeof host !== "string" || typeof machine !== "string" || !Number.isSafeInteger(startTicks)) return undefined;
  return { pid: pid as number, host, machine, startTicks: startTicks as number };
}

/**
 * True only when the holder is certainly gone. The quick look is one signal-0 (1 us); `thorough` also reads the process
 * table (10 us, no disk) and so tells a reused pid and a zombie that nobody reaps.
 */
export function isGone(holder: Holder, own: Holder, thorough: boolean): boolean {
  if (holder.machine === "" || holder.machine !== own.machine) return false;
  try {
    process.kill(holder.pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "ESRCH";
  }
  if (!thorough || holder.startTicks < 0) return false;
  const status = readProcessStatus(String(holder.pid));
  if (status === undefined) return false; // Hidden from us, or gone since: the next look tells.
  return status.startTicks !== holder.startTicks || status.state === "Z" || status.state === "X";
}

function readMachine(): string {
  try {
    const bootId = readFileSync("/proc/sys/kernel/random/boot_id", "latin1").trim();
    return `${bootId}/${readlinkSync("/proc/self/ns/pid")}`;
  } catch {
    return "";
  }
}

/** State and start time from /proc/<pid>/stat; the command before them may hold spaces and parentheses. */
function readProcessStatus(pid: string): { state: string; startTicks: number } | undefined {
  try {
    const line = readFileSync(`/proc/${pid}/stat`, "latin1");
    const fields = line.slice(line.lastIndexOf(")") + 2).split(" ");
    const startTicks = Number(fields[19]); // Field 22 of the line; the slice starts at field 3.
    return Number.isSafeInteger(startTicks) ? { state: fields[0]!, startTicks } : undefined;
  } catch {
    return undefined;
  }
}
