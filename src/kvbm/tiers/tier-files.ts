import { readFileSync } from "node:fs";
import { mkdir, open, readdir, rename, stat } from "node:fs/promises";
import { hostname } from "node:os";
import { randomId64 } from "../../std/index.ts";

/** The calls that the disk tier makes of a file system, and what it knows of the processes that use it with it. */
export interface TierFiles {
  readonly self: { readonly host: string; readonly pid: number };
  /** When a process of this host began, in any unit; "none" when it is gone. */
  startOf(pid: number): string;
  /** For names that are given once. */
  uniqueId(): string;
  /** Files that this process has, which its own id does not tell apart from a predecessor's. */
  readonly own: Set<string>;
  /** Makes it and those above it. */
  makeFolder(folder: string): Promise<void>;
  list(folder: string): Promise<string[]>;
  rename(from: string, to: string): Promise<void>;
  stat(path: string): Promise<{ readonly ino: number; readonly mtimeMs: number }>;
  /** `r+` must be there, `wx+` must not. */
  open(path: string, flags: "r+" | "wx+"): Promise<TierFile>;
}

/** Of node's `FileHandle`. */
export interface TierFile {
  writev(pieces: readonly Uint8Array[], position: number): Promise<{ readonly bytesWritten: number }>;
  readv(pieces: readonly Uint8Array[], position: number): Promise<{ readonly bytesRead: number }>;
  stat(): Promise<{ readonly ino: number; readonly size: number }>;
  truncate(byteLength: number): Promise<void>;
  close(): Promise<void>;
}

/** This machine's. */
export const systemFiles: TierFiles = {
  self: { host: hostname(), pid: process.pid },
  startOf,
  uniqueId: () => randomId64().toString(16).padStart(16, "0"),
  own: new Set(),
  makeFolder: async (folder) => void (await mkdir(folder, { recursive: true })),
  list: (folder) => readdir(folder),
  rename,
  stat,
  open,
};

/** In the kernel's ticks; "0" where that cannot be read but the process lives. */
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
