import { join } from "node:path";
import type { TierFiles } from "./tier-files.ts";

/**
 * Which file in a folder is whose. A file's name says for what it is and who has it:
 *
 *     <kind>.<host>.<pid>.<start of that process>.<random>.kv
 *
 * A file whose owner is gone is taken over by renaming it, which only one of several can do. On another host's word
 * nobody can look up a process: its file is free when it was not written for a minute.
 */
const OTHER_HOST_STALE_MS = 60_000;

/** The path of a file of this kind that is ours from now on: another's that is gone, or a new name. */
export async function claimSlab(files: TierFiles, folder: string, kind: string, wallMs: number): Promise<string> {
  await files.makeFolder(folder);
  const { self, own } = files;
  const host = self.host.replaceAll(/[^\w-]/g, "_");
  const mine = join(folder, `${kind}.${host}.${self.pid}.${files.startOf(self.pid)}.${files.uniqueId()}.kv`);
  own.add(mine);
  for (const name of (await files.list(folder)).sort()) {
    if (!name.startsWith(`${kind}.`) || !name.endsWith(".kv")) continue;
    const path = join(folder, name);
    if (own.has(path) || !(await isFree(files, path, name.split("."), host, wallMs))) continue;
    try {
      await files.rename(path, mine);
      return mine;
    } catch (thrown) {
      // Somebody else was faster.
      if ((thrown as NodeJS.ErrnoException).code !== "ENOENT") throw thrown;
    }
  }
  return mine;
}

/** Its owner in this process has closed it. */
export function releaseSlab({ own }: TierFiles, path: string): void {
  own.delete(path);
}

async function isFree(
  files: TierFiles,
  path: string,
  parts: readonly string[],
  host: string,
  wallMs: number,
): Promise<boolean> {
  const [pid, start] = [Number(parts.at(-4)), parts.at(-3)];
  if (parts.at(-5) === host) {
    return !Number.isInteger(pid) || pid === files.self.pid || files.startOf(pid) !== start;
  }
  const { mtimeMs } = await files.stat(path).catch(() => ({ mtimeMs: Infinity }));
  return wallMs - mtimeMs > OTHER_HOST_STALE_MS;
}
