import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { cpus, homedir, totalmem } from "node:os";
import { join } from "node:path";

/**
 * What benchmarks share: the line that says where they ran, paired measurement, the kernel's accounting of another
 * process, and a table. Figures are ratios of two things measured in the same run: on a shared machine absolute times
 * say little, and a median of ratios of neighbouring rounds survives a noisy neighbour.
 */

/** CPU, cores, memory, runtime and commit in one line. */
export function machineLine(): string {
  const cores = cpus();
  const model = cores[0]?.model.trim() ?? "unknown CPU";
  const memoryGib = Math.round(totalmem() / 2 ** 30);
  return `${model} · ${cores.length} cores · ${memoryGib} GiB · node ${process.version} · commit ${commit()}`;
}

function commit(): string {
  const git = (...args: string[]) =>
    execFileSync("git", args, {
      cwd: import.meta.dirname,
      encoding: "utf8",
      stdio: ["ignore", "pipe", "ignore"],
    }).trim();
  try {
    // Without optional locks: a benchmark only looks.
    const isChanged = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no") !== "";
    return git("rev-parse", "--short", "HEAD") + (isChanged ? " with changes" : "");
  } catch {
    return "unknown";
  }
}

/** One round: returns what it measured, lower or higher as the caller means it, in the caller's unit. */
export type Measure = () => number | Promise<number>;

export interface Paired {
  readonly a: readonly number[];
  readonly b: readonly number[];
  readonly medianA: number;
  readonly medianB: number;
  /** Median of a / b over the rounds. */
  readonly ratio: number;
  /** Smallest and largest ratio of a round. */
  readonly ratioRange: readonly [number, number];
}

/** Runs both once as warm-up, then `rounds` times each in alternating order (ab, ba, ...), and compares round by round. */
export async function paired(
  a: Measure,
  b: Measure,
  { rounds = 7 }: { readonly rounds?: number } = {},
): Promise<Paired> {
  await a();
  await b();
  const valuesA: number[] = [];
  const valuesB: number[] = [];
  for (let round = 0; round < rounds; round++) {
    if (round % 2 === 0) valuesA.push(await a());
    valuesB.push(await b());
    if (round % 2 === 1) valuesA.push(await a());
  }
  const ratios = valuesA.map((value, round) => value / valuesB[round]!);
  return {
    a: valuesA,
    b: valuesB,
    medianA: median(valuesA),
    medianB: median(valuesB),
    ratio: median(ratios),
    ratioRange: [Math.min(...ratios), Math.max(...ratios)],
  };
}

/** Milliseconds that `body` takes. */
export async function timeMs(body: () => void | Promise<void>): Promise<number> {
  const startedMs = performance.now();
  await body();
  return performance.now() - startedMs;
}

export function median(values: readonly number[]): number {
  if (values.length === 0) return Number.NaN;
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** Where `race` keeps the real Dynamo 1.4.2. */
export const RACE_FOLDER = process.env["RACE_FOLDER"] ?? join(homedir(), ".cache/dynamo-ts/race");
export const DYNAMO_PYTHON = join(RACE_FOLDER, "dynamo/bin/python");

/** The kernel counts in ticks of 1/100 s on every Linux that Node runs on: measure over seconds, not milliseconds. */
const TICK_MS = 10;

/** CPU time of all threads of a process since it started, ended threads included. Linux only. */
export function cpuTimeOf(pid: number): { readonly userMs: number; readonly systemMs: number } {
  const stat = procFile(pid, "stat");
  // The command in parentheses may contain spaces and parentheses itself; fields count from behind it.
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return { userMs: Number(fields[11]) * TICK_MS, systemMs: Number(fields[12]) * TICK_MS };
}

/** Memory of a process that is in RAM now. Linux only. */
export function residentBytes(pid: number): number {
  const line = /^VmRSS:\s+(\d+) kB$/m.exec(procFile(pid, "status"));
  if (line === null) throw new Error(`process ${pid} has no resident memory`);
  return Number(line[1]) * 1024;
}

function procFile(pid: number, name: string): string {
  try {
    return readFileSync(`/proc/${pid}/${name}`, "utf8");
  } catch (cause) {
    throw new Error(`no accounting of process ${pid}: it is gone, or this is not Linux`, { cause });
  }
}

/** Rows as aligned columns: text to the left, numbers (shown with at most `digits` decimals) to the right. */
export function table(rows: readonly Readonly<Record<string, string | number>>[], digits = 2): string {
  const names = Object.keys(rows[0] ?? {});
  const shown = rows.map((row) => names.map((name) => cellText(row[name], digits)));
  const widths = names.map((name, column) => Math.max(name.length, ...shown.map((cells) => cells[column]!.length)));
  const isNumeric = names.map((name) => rows.every((row) => typeof row[name] === "number"));
  const line = (cells: readonly string[]) =>
    cells
      .map((cell, column) => (isNumeric[column] ? cell.padStart(widths[column]!) : cell.padEnd(widths[column]!)))
      .join("  ")
      .trimEnd();
  return [line(names), line(widths.map((width) => "-".repeat(width))), ...shown.map(line)].join("\n");
}

function cellText(value: string | number | undefined, digits: number): string {
  if (typeof value !== "number") return value ?? "";
  return Number.isInteger(value) ? String(value) : value.toFixed(digits);
}
