import { createHash, randomBytes } from "node:crypto";
import { constants } from "node:fs";
import { mkdir, open, readdir, rename, rm, stat, unlink, type FileHandle } from "node:fs/promises";
import { join } from "node:path";
import { DynamoError } from "../../errors/index.ts";
import { isLeaseId } from "./store-key.ts";

/**
 * The disk layout of the file store and its single steps; no time and no policy here.
 *
 *     root/                        0700: whoever writes here registers workers
 *       changes                    a log of the ids of changed leases, 17 bytes each: tells pollers where to look
 *       beats/<leaseId>.<count>    empty; the name is the heartbeat, renamed at each renewal: one directory read tells all
 *       leases/<leaseId>/
 *         lease                    who holds it and for how long; written once
 *         <key hash>.<version>     one key; immutable: a new value is a new version, the old file goes
 *         <...>.superseded         left for the holder when another lease took the key over
 *         *.tmp                    being written
 *       closed/<leaseId>/          tombstone of a lease that ended in order or was swept
 *
 * A file becomes visible whole, by rename; a lease ends at once, by rename of its folder. Nothing is synced to disk: a
 * record means something only while its holder lives, and no holder survives what loses unsynced data.
 */
export interface EntryName {
  readonly name: string;
  readonly keyHash: string;
  readonly version: number;
}

export interface FileStamp {
  readonly bytes: number;
  readonly modifiedMs: number;
}

const BEAT_NAME = /^([0-9a-f]{16})\.(\d{1,15})$/;
const ENTRY_NAME = /^([0-9a-f]{32})\.([1-9]\d{0,14})$/;
const SUPERSEDED = ".superseded";
const FILE_MODE = 0o600;
const FOLDER_MODE = 0o700;
const NO_BYTES = Buffer.alloc(0);
const CHANGE_RECORD_BYTES = 17;
/** At this size the log starts over; whoever was behind reads everything once. */
const MAX_CHANGE_LOG_BYTES = 64 * 1024;

export function hashKey(key: string): string {
  return createHash("sha256").update(key).digest("hex").slice(0, 32);
}

export function entryName(keyHash: string, version: number): string {
  return `${keyHash}.${version}`;
}

export function parseEntryName(name: string): EntryName | undefined {
  const match = ENTRY_NAME.exec(name);
  return match === null ? undefined : { name, keyHash: match[1]!, version: Number(match[2]) };
}

/** Not there, or something on the way to it is no folder. */
export function isMissing(error: unknown): boolean {
  const { code } = error as NodeJS.ErrnoException;
  return code === "ENOENT" || code === "ENOTDIR";
}

/** `fs` errors as ours, with path and code for operators. */
export function unavailable(what: string, cause: unknown): DynamoError {
  if (cause instanceof DynamoError) return cause;
  return new DynamoError("discovery-unavailable", `the discovery store cannot be ${what}`, {
    diagnostic: cause instanceof Error ? cause.message : String(cause),
    cause,
  });
}

export class StoreFolder {
  readonly root: string;
  readonly #beats: string;
  readonly #leases: string;
  readonly #closed: string;
  readonly #changes: string;

  constructor(root: string) {
    this.root = root;
    this.#beats = join(root, "beats");
    this.#leases = join(root, "leases");
    this.#closed = join(root, "closed");
    this.#changes = join(root, "changes");
  }

  /** Makes what is missing. Refuses a root that everybody may write to: registering is a privileged act. */
  async prepare(): Promise<void> {
    await mkdir(this.root, { recursive: true, mode: FOLDER_MODE });
    const { mode } = await stat(this.root);
    if ((mode & 0o002) !== 0) {
      throw new DynamoError(
        "invalid-config",
        `discovery folder: expected one that only its owner or group may write to`,
        {
          diagnostic: `${this.root} has mode ${(mode & 0o7777).toString(8)}`,
        },
      );
    }
    await mkdir(this.#beats, { recursive: true, mode: FOLDER_MODE });
    await mkdir(this.#leases, { recursive: true, mode: FOLDER_MODE });
    await mkdir(this.#closed, { recursive: true, mode: FOLDER_MODE });
  }

  // ---- reading ----

  /** Ids of the leases, sorted. Throws when the store cannot be read. */
  async leaseIds(): Promise<string[]> {
    return (await readdir(this.#leases)).filter(isLeaseId).sort();
  }

  async closedIds(): Promise<string[]> {
    try {
      return (await readdir(this.#closed)).filter(isLeaseId);
    } catch (error) {
      if (isMissing(error)) return [];
      throw error;
    }
  }

  async isClosed(leaseId: string): Promise<boolean> {
    return (await missingAsUndefined(stat(join(this.#closed, leaseId)))) !== undefined;
  }

  /** The names in a lease's folder; undefined when there is none. */
  leaseFiles(leaseId: string): Promise<string[] | undefined> {
    return missingAsUndefined(readdir(join(this.#leases, leaseId)));
  }

  /** Heartbeat counts by lease id. Throws when they cannot be read: no heartbeat seen is not silence then. */
  async beats(): Promise<Map<string, number>> {
    const counts = new Map<string, number>();
    for (const name of await readdir(this.#beats)) {
      const match = BEAT_NAME.exec(name);
      if (match === null) continue;
      const count = Number(match[2]);
      if (count > (counts.get(match[1]!) ?? -1)) counts.set(match[1]!, count);
    }
    return counts;
  }

  async stamp(leaseId: string, name: string): Promise<FileStamp | undefined> {
    const stats = await missingAsUndefined(stat(join(this.#leases, leaseId, name)));
    return stats === undefined ? undefined : { bytes: stats.size, modifiedMs: stats.mtimeMs };
  }

  /**
   * The file's bytes; undefined when it is gone. Empty when it is longer than `maxBytes` or no plain file: a named pipe
   * would block the reader, a link could lead anywhere.
   */
  async readFile(leaseId: string, name: string, maxBytes: number): Promise<Buffer | undefined> {
    const flags = constants.O_RDONLY | constants.O_NONBLOCK | constants.O_NOFOLLOW;
    let file: FileHandle;
    try {
      file = await open(join(this.#leases, leaseId, name), flags);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === "ENOENT") return undefined;
      if (code === "ELOOP" || code === "ENXIO") return NO_BYTES;
      throw error;
    }
    try {
      const stats = await file.stat();
      if (!stats.isFile() || stats.size > maxBytes) return NO_BYTES;
      const bytes = Buffer.allocUnsafe(stats.size);
      const { bytesRead } = await file.read(bytes, 0, stats.size, 0);
      return bytes.subarray(0, bytesRead);
    } finally {
      await file.close();
    }
  }

  /** Bytes in the change log; 0 when it is not there yet. */
  async changeLogBytes(): Promise<number> {
    return (await missingAsUndefined(stat(this.#changes)))?.size ?? 0;
  }

  /** Ids of the leases that changed between two sizes of the log; undefined when that cannot be told from it. */
  async changedLeases(fromBytes: number, toBytes: number): Promise<Set<string> | undefined> {
    const length = toBytes - fromBytes;
    if (length < 0 || length > MAX_CHANGE_LOG_BYTES || length % CHANGE_RECORD_BYTES !== 0) return undefined;
    const file = await missingAsUndefined(open(this.#changes, constants.O_RDONLY | constants.O_NONBLOCK));
    if (file === undefined) return undefined;
    try {
      const { buffer, bytesRead } = await file.read(Buffer.allocUnsafe(length), 0, length, fromBytes);
      if (bytesRead !== length) return undefined;
      const ids = new Set<string>();
      for (const line of buffer.toString("latin1").split("\n").slice(0, -1)) {
        if (!isLeaseId(line)) return undefined;
        ids.add(line);
      }
      return ids;
    } finally {
      await file.close();
    }
  }

  // ---- writing ----

  async createLease(leaseId: string): Promise<void> {
    await mkdir(join(this.#leases, leaseId), { recursive: true, mode: FOLDER_MODE });
  }

  /** Replaces or creates a file of a lease whole. Throws ENOENT when the folder is gone. */
  async writeFile(leaseId: string, name: string, bytes: Buffer): Promise<FileStamp> {
    const path = join(this.#leases, leaseId, name);
    const temporary = `${path}.${randomBytes(6).toString("hex")}.tmp`;
    try {
      const file = await open(temporary, "wx", FILE_MODE);
      let stamp: FileStamp;
      try {
        await file.writeFile(bytes);
        const stats = await file.stat();
        stamp = { bytes: stats.size, modifiedMs: stats.mtimeMs };
      } finally {
        await file.close();
      }
      await rename(temporary, path);
      return stamp;
    } catch (error) {
      await unlink(temporary).catch(() => undefined);
      throw error;
    }
  }

  /** Removes a key's file, and the note if another lease took it over meanwhile. */
  async removeEntry(leaseId: string, name: string): Promise<void> {
    const path = join(this.#leases, leaseId, name);
    await missingAsUndefined(unlink(path));
    await missingAsUndefined(unlink(path + SUPERSEDED));
  }

  /** Takes a key's file from another lease, leaving its holder a note. */
  async supersede(leaseId: string, name: string): Promise<void> {
    const path = join(this.#leases, leaseId, name);
    await missingAsUndefined(rename(path, path + SUPERSEDED));
  }

  /** True when another lease took over this file's key. */
  async isSuperseded(leaseId: string, name: string): Promise<boolean> {
    return (await this.stamp(leaseId, name + SUPERSEDED)) !== undefined;
  }

  async createBeat(leaseId: string, count: number): Promise<void> {
    const file = await open(join(this.#beats, `${leaseId}.${count}`), "a", FILE_MODE);
    await file.close();
  }

  /**
   * One heartbeat, from `count` to the next. Needs no room on the disk. False when the last one is gone: it is not made
   * anew here, for that is how a deleted store or a revoked lease shows.
   */
  async beat(leaseId: string, count: number): Promise<boolean> {
    const path = join(this.#beats, leaseId);
    return (await missingAsUndefined(rename(`${path}.${count}`, `${path}.${count + 1}`).then(() => true))) ?? false;
  }

  /** All of a lease's; there is one, unless somebody meddled. */
  async removeBeats(leaseId: string): Promise<void> {
    for (const name of (await missingAsUndefined(readdir(this.#beats))) ?? []) {
      if (name.startsWith(leaseId)) await missingAsUndefined(unlink(join(this.#beats, name)));
    }
  }

  /** Tells pollers to look at these leases. */
  async logChange(leaseIds: readonly string[]): Promise<void> {
    const file = await open(this.#changes, "a", FILE_MODE);
    try {
      const records = leaseIds.map((id) => `${id}\n`).join("");
      if ((await file.stat()).size >= MAX_CHANGE_LOG_BYTES) await file.truncate(0);
      await file.write(records);
    } finally {
      await file.close();
    }
  }

  /** Ends a lease in one step for all readers, then frees its files. The empty tombstone stays for `removeLeftover`. */
  async closeLease(leaseId: string): Promise<void> {
    const tombstone = join(this.#closed, leaseId);
    const folder = join(this.#leases, leaseId);
    // A store that somebody deleted is not made anew by those who leave it.
    if ((await missingAsUndefined(stat(folder))) !== undefined) {
      await mkdir(this.#closed, { recursive: true, mode: FOLDER_MODE });
      await missingAsUndefined(rename(folder, tombstone));
      for (const name of (await missingAsUndefined(readdir(tombstone))) ?? []) {
        await rm(join(tombstone, name), { force: true, recursive: true });
      }
    }
    await this.removeBeats(leaseId);
  }

  /** A tombstone that everybody has seen, or the heartbeat of a lease that is not there. */
  async removeLeftover(leaseId: string): Promise<void> {
    await this.removeBeats(leaseId);
    await rm(join(this.#closed, leaseId), { force: true, recursive: true });
  }

  /** For people and diagnostics. */
  pathOf(leaseId: string, name: string): string {
    return join(this.#leases, leaseId, name);
  }
}

async function missingAsUndefined<T>(step: Promise<T>): Promise<T | undefined> {
  try {
    return await step;
  } catch (error) {
    if (isMissing(error)) return undefined;
    throw error;
  }
}
