import { linkSync, readFileSync, renameSync, rmSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { hostname } from "node:os";
import { setTimeout as delay } from "node:timers/promises";
import { randomBytes } from "node:crypto";

/**
 * One process at a time fetches a file into a folder that several may share. The lock is a file that names its holder; a
 * holder that died (same machine: its pid is gone; any machine: the file was not touched for a minute) is replaced. The
 * lock saves work, it does not guard truth: what was fetched is checked by checksum and moved into place in one step.
 */
export interface PullLock {
  release(): void;
}

const TOUCH_MS = 10_000;
const STALE_MS = 60_000;
const POLL_MS = 200;

export interface PullLockOptions {
  readonly signal: AbortSignal;
  /** Called once if another process holds the lock. */
  readonly onWait?: (holder: string) => void;
  /** Checked while waiting: true ends the wait, because the other process has done the work. */
  readonly isDone: () => boolean;
}

/** The lock, or undefined when `isDone` came true while another process held it. */
export async function takePullLock(path: string, options: PullLockOptions): Promise<PullLock | undefined> {
  const token = `${process.pid} ${hostname()} ${randomBytes(8).toString("hex")}`;
  for (let waited = false; ;) {
    if (options.isDone()) return undefined;
    try {
      writeFileSync(path, token, { flag: "wx" });
      return heldLock(path, token);
    } catch (error) {
      if ((error as { code?: unknown }).code !== "EEXIST") throw error;
    }
    const holder = readHolder(path);
    if (holder !== undefined && isStale(path, holder)) {
      removeExactly(path, holder);
      continue;
    }
    if (!waited && holder !== undefined) {
      waited = true;
      options.onWait?.(holder);
    }
    await delay(POLL_MS, undefined, { signal: options.signal });
  }
}

function heldLock(path: string, token: string): PullLock {
  const touch = setInterval(() => {
    try {
      utimesSync(path, new Date(), new Date());
    } catch {
      // Somebody took the lock away; the final checksum and the atomic rename keep the result right.
    }
  }, TOUCH_MS);
  touch.unref();
  return {
    release() {
      clearInterval(touch);
      if (readHolder(path) === token) rmSync(path, { force: true });
    },
  };
}

function readHolder(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return undefined; // Released between our two looks.
  }
}

function isStale(path: string, holder: string): boolean {
  const touched = statSync(path, { throwIfNoEntry: false })?.mtimeMs;
  if (touched === undefined) return false;
  if (Date.now() - touched > STALE_MS) return true;
  const [pid, host] = holder.split(" ");
  if (host !== hostname() || !/^\d+$/.test(pid ?? "")) return false;
  try {
    process.kill(Number(pid), 0);
    return false;
  } catch (error) {
    return (error as { code?: unknown }).code === "ESRCH";
  }
}

/** Removes the lock only if it still is the dead holder's; a new holder's, caught by accident, is put back. */
function removeExactly(path: string, holder: string): void {
  const aside = `${path}.${randomBytes(6).toString("hex")}`;
  try {
    renameSync(path, aside);
  } catch {
    return;
  }
  if (readHolder(aside) !== holder) {
    try {
      linkSync(aside, path);
    } catch {
      // A third process was faster; it holds the lock now.
    }
  }
  rmSync(aside, { force: true });
}
