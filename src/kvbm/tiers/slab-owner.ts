import { readFileSync } from "node:fs";
import { mkdir, readdir, rename, stat } from "node:fs/promises";
import { hostname } from "node:os";
import { join } from "node:path";
import { randomId64 } from "../../std/index.ts";

/**
 * Which file in a folder is whose. A file's name says for what it is and who has it:
 *
 *     <kind>.<host>.<pid>.<start of that process>.<random>.kv
 *
 * A file whose owner is gone is taken over by renaming it, which only one of several can do. On another host's word
 * nobody can look up a process: its file is free when it was not written for a minute.
 */
const OTHER_HOST_STALE_MS = 60_000;
/** Files that this process has, which its own id does not tell apart from a predecessor's. */
const own = new Set<string>();

/** The path of a file of this kind that is ours from now on: another's that is gone, or a new name. */
export async function claimSlab(folder: string, kind: string, wallMs: number): Promise<string> {
  await mkdir(folder, { recursive: true });
  const host = hostname().replaceAll(/[^\w-]/g, "_");
  const mine = join(
    folder,
    `${kind}.${host}.${process.pid}.${startOf(process.pid)}.${randomId64().toString(16).padStart(16, "0")}.kv`,
  );
  own.add(mine);
  for (const name of (await readdir(folder)).sort()) {
    if (!name.startsWith(`${kind}.`) || !name.endsWith(".kv")) continue;
    const path = join(folder, name);
    if (own.has(path) || !(await isFree(path, name.split("."), host, wallMs))) continue;
    try {
      await rename(path, mine);
      return mine;
    } catch (thrown) {
      // Somebody else was faster.
      if ((thrown as NodeJS.ErrnoException).code !== "ENOENT") throw thrown;
    }
  }
  return mine;
}

/** Its owner in this process has closed it. */
export function releaseSlab(path: string): void {
  own.delete(path);
}

async function isFree(path: string, parts: readonly string[], host: string, wallMs: number): Promise<boolean> {
  const [pid, start] = [Number(parts.at(-4)), parts.at(-3)];
  if (parts.at(-5) === host) return !Number.isInteger(pid) || pid === process.pid || startOf(pid) !== start;
  const { mtimeMs } = await stat(path).catch(() => ({ mtimeMs: Infinity }));
  return wallMs - mtimeMs > OTHER_HOST_STALE_MS;
}

/** When a process began, in the kernel's ticks; "0" where that cannot be read but it lives, "none" when it is gone. */
function startOf(pid: number): string {
  try {
    // The name, in parentheses, may have spaces.
    return readFileSync(`/proc/${pid}/stat`, "utf8").split(") ").at(-1)!.split(" ")[19]!;
  } catch {
    try {
      process.kill(pid, 0);
      return "0";
    } catch (thrown) {
      return (thrown as NodeJS.ErrnoException).code === "EPERM" ? "0" : "none";
    }
  }
}
