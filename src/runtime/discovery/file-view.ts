import type { Logger } from "../../observability/index.ts";
import type { Clock } from "../../std/index.ts";
import type { JsonValue } from "./base.ts";
import { MAX_KEYS_PER_LEASE } from "./file-lease.ts";
import { isGone, parseHolder, type Holder } from "./holder.ts";
import { unseal } from "./sealed-record.ts";
import { SerialQueue } from "./serial-queue.ts";
import { hashKey, parseEntryName, unavailable, type EntryName, type StoreFolder } from "./store-folder.ts";
import {
  DEFAULT_TTL_MS,
  isStoreKey,
  isTtl,
  MAX_ENTRIES,
  MAX_KEY_LENGTH,
  MAX_VALUE_BYTES,
  sameEntry,
  type StoredEntry,
} from "./store-key.ts";

/** Leases read at most; further ones (by id) are left out, and health says so. */
const MAX_LEASES = 10_000;
/** Bytes of all values together that one process keeps. */
const MAX_TABLE_BYTES = 256 * 1024 * 1024;
/** The value, its key, and the record around them. */
const MAX_ENTRY_FILE_BYTES = MAX_VALUE_BYTES + MAX_KEY_LENGTH + 1024;
const MAX_LEASE_FILE_BYTES = 4096;

/** A lease is given up after this part of its TTL without a heartbeat, so that with the look itself it stays under one TTL. */
const SILENCE_OF_TTL = 0.75;
const BEAT_LOOKS_PER_TTL = 10;
const MAX_BEAT_LOOK_MS = 1_000;
/** Every look at the heartbeats re-reads one of so many folders whole: finds what no log record told. */
const FOLDERS_PER_RELIST = 8;

/** Others get this long to see a holder's death by themselves before its files go. */
const SWEEP_DEAD_AFTER_MS = 5_000;
const SWEEP_SILENT_AFTER_TTLS = 3;
const SWEEP_UNREADABLE_AFTER_MS = 60_000;
const LEFTOVER_MS = 30_000;
const MAX_SWEEPS_PER_LOOK = 16;

interface KeyFile extends StoredEntry {
  readonly version: number;
}

/** What this process knows of one lease. */
interface LeaseRecord {
  readonly id: string;
  /** Undefined until its `lease` file could be read. */
  terms: { readonly ttlMs: number; readonly holder: Holder } | undefined;
  /** By file name; undefined is a file that could not be read: tried again at every look. */
  readonly files: Map<string, KeyFile | undefined>;
  unreadableCount: number;
  /** Key files not read because the table is full. */
  leftOutCount: number;
  /** Its folder is not there, without a tombstone: deleted by accident or about to be written again. */
  missing: boolean;
  /** Key files that vanished while no log record spoke of this lease, with `beatMoves` when that was seen. */
  readonly vanished: Map<string, number>;
  /** The heartbeat's count at the last look. */
  beat: number | undefined;
  /** How often the heartbeat was seen to move. */
  beatMoves: number;
  /** How long the heartbeat stood still while we looked. */
  silentMs: number;
  /** Its process is proven gone. */
  gone: boolean;
  live: boolean;
}

interface FileViewOptions {
  readonly folder: StoreFolder;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly own: Holder;
  /** `expired`: see `DiscoveryChange`. */
  readonly onChanged: (key: string, stored: StoredEntry | undefined, expired: boolean) => void;
  /** @default MAX_ENTRIES */
  readonly maxEntries?: number;
}

/**
 * A watcher's picture of the file store, brought up to date by `refresh`. Who is alive is judged by what this process
 * saw: a lease whose heartbeat stood still for three quarters of its TTL, counted on our monotonic clock and only while
 * we looked (a stall of ours or an unreadable store is nobody's silence), or whose process is proven gone. No clock of
 * another process and no file time is ever compared.
 *
 * A key disappears when its file does and the log told so, or its lease ended with a tombstone, or died. A file or folder that just
 * vanished is not an end: its holder writes it again. While the store cannot be read, nothing changes.
 *
 * Cost of an idle refresh: one `stat`, and one signal-0 per local process; once per second three directory reads, and
 * one for an eighth of the leases.
 */
export class FileView {
  readonly #options: FileViewOptions;
  readonly #maxEntries: number;
  readonly #steps = new SerialQueue();
  readonly #leases = new Map<string, LeaseRecord>();
  /** When we first saw a tombstone, or a heartbeat without a lease. */
  readonly #leftoverSeenMs = new Map<string, number>();
  #table: ReadonlyMap<string, StoredEntry> = new Map();
  readonly #changedIds = new Set<string>();
  /** Leases that nobody ended and nobody renews, as of the last look. */
  readonly #silentIds = new Set<string>();
  /** Those of them that the change log named. */
  readonly #loggedIds = new Set<string>();
  /** Logged as unreadable. */
  readonly #unreadableIds = new Set<string>();
  #everything = true;
  #logBytes = -1;
  #beatsSeenMs: number | undefined;
  #relistAt = 0;
  #tableBytes = 0;
  #unreadable: string | undefined;
  #leasesLeftOut = 0;
  /** Readable key files that are kept. */
  #fileCount = 0;
  /** Something that the table is made from changed. */
  #stale = true;
  #startedMs: number | undefined;

  constructor(options: FileViewOptions) {
    this.#options = options;
    this.#maxEntries = options.maxEntries ?? MAX_ENTRIES;
  }

  /** The live entries as of the last refresh. */
  get table(): ReadonlyMap<string, StoredEntry> {
    return this.#table;
  }

  /** As of the last refresh. */
  get isUnreadable(): boolean {
    return this.#unreadable !== undefined;
  }

  /** What is wrong with the store as this process sees it. */
  get trouble(): string | undefined {
    if (this.#unreadable !== undefined) return this.#unreadable;
    const { clock } = this.#options;
    if (this.#startedMs !== undefined && clock.monotonicMs() - this.#startedMs > 5_000)
      return "the store does not answer";
    if (this.#leasesLeftOut > 0) return `more than ${MAX_LEASES} leases: ${this.#leasesLeftOut} left out`;
    let leftOut = 0;
    for (const lease of this.#leases.values()) leftOut += lease.leftOutCount;
    return leftOut === 0 ? undefined : `more than ${this.#maxEntries} entries: ${leftOut} left out`;
  }

  /**
   * Looks at what changed; with `relist` at everything. Throws `discovery-unavailable` when the store cannot be read, and
   * then leaves the table as it was. `sweep` also clears away what dead processes left.
   */
  refresh(options: { readonly relist: boolean; readonly sweep: boolean }): Promise<void> {
    return this.#steps.run(async () => {
      this.#startedMs = this.#options.clock.monotonicMs();
      try {
        await this.#look(options.relist, options.sweep);
        if (this.#unreadable !== undefined) this.#options.logger.info("discovery store is readable again");
        this.#unreadable = undefined;
      } catch (error) {
        // Whatever was half seen is seen again, whole.
        this.#everything = true;
        const text = error instanceof Error ? error.message : String(error);
        if (this.#unreadable === undefined) {
          this.#options.logger.warn({ error: text }, "discovery store is unreadable, keeping the last known set");
        }
        this.#unreadable = text;
        throw unavailable("read", error);
      } finally {
        this.#startedMs = undefined;
      }
    });
  }

  async #look(relist: boolean, sweep: boolean): Promise<void> {
    const nowMs = this.#options.clock.monotonicMs();
    if (relist) this.#everything = true;
    await this.#readLog();
    const lookAtBeats = this.#everything || nowMs - (this.#beatsSeenMs ?? -Infinity) >= this.#beatLookMs();
    if (lookAtBeats) await this.#lookAtBeats(nowMs);
    for (const id of this.#changedIds) {
      // One folder that cannot be read is no reason to doubt the rest: what was known of it stays.
      await this.#readLease(id).then(
        () => this.#unreadableIds.delete(id),
        (error: unknown) => this.#reportUnreadable(id, error),
      );
      this.#changedIds.delete(id);
    }
    this.#loggedIds.clear();
    this.#judge();
    this.#publish();
    if (sweep && lookAtBeats) await this.#sweep(nowMs);
  }

  /** Finds which leases changed since the last look. */
  async #readLog(): Promise<void> {
    const { folder } = this.#options;
    const bytes = await folder.changeLogBytes();
    const before = this.#logBytes;
    this.#logBytes = bytes;
    if (bytes === before || before < 0) return;
    const ids = await folder.changedLeases(before, bytes);
    if (ids === undefined) this.#everything = true;
    else {
      for (const id of ids) {
        this.#changedIds.add(id);
        this.#loggedIds.add(id);
      }
    }
  }

  #beatLookMs(): number {
    let ttlMs = DEFAULT_TTL_MS;
    for (const lease of this.#leases.values()) ttlMs = Math.min(ttlMs, lease.terms?.ttlMs ?? ttlMs);
    return Math.min(MAX_BEAT_LOOK_MS, ttlMs / BEAT_LOOKS_PER_TTL);
  }

  /** Which leases there are, whose heartbeat moved, and whose folders to read. */
  async #lookAtBeats(nowMs: number): Promise<void> {
    const { folder, own } = this.#options;
    const everything = this.#everything;
    const present = await folder.leaseIds();
    const beats = await folder.beats();
    this.#leasesLeftOut = Math.max(0, present.length - MAX_LEASES);
    present.length = Math.min(present.length, MAX_LEASES);
    for (const id of present) if (!this.#leases.has(id)) this.#changedIds.add(id);
    const presentIds = new Set(present);
    // A pause of our own (a stall, an unreadable store) is not the holders' silence. When the store is back they get their
    // whole time: they could not write it either.
    const isBack = this.#unreadable !== undefined;
    const elapsedMs = this.#beatsSeenMs === undefined ? 0 : Math.min(nowMs - this.#beatsSeenMs, 2 * this.#beatLookMs());
    let index = 0;
    for (const lease of this.#leases.values()) {
      const beat = beats.get(lease.id);
      if (beat !== undefined && beat !== lease.beat) {
        lease.silentMs = 0;
        lease.beatMoves++;
      } else if (isBack) lease.silentMs = 0;
      else lease.silentMs += elapsedMs;
      lease.beat = beat;
      const isTurn = index++ % FOLDERS_PER_RELIST === this.#relistAt;
      if (isTurn && lease.terms !== undefined) lease.gone ||= isGone(lease.terms.holder, own, true);
      const doubtful =
        lease.missing || lease.terms === undefined || lease.unreadableCount > 0 || lease.vanished.size > 0;
      if (everything || isTurn || doubtful || !presentIds.has(lease.id)) this.#changedIds.add(lease.id);
    }
    this.#relistAt = (this.#relistAt + 1) % FOLDERS_PER_RELIST;
    this.#beatsSeenMs = nowMs;
    this.#everything = false;
  }

  #reportUnreadable(id: string, error: unknown): void {
    if (this.#unreadableIds.has(id) || this.#unreadableIds.size >= MAX_LEASES) return;
    this.#unreadableIds.add(id);
    this.#options.logger.warn(
      { leaseId: id, err: error },
      "discovery lease is unreadable, keeping what was known of it",
    );
  }

  // ---- one lease ----

  async #readLease(id: string): Promise<void> {
    const { folder, own } = this.#options;
    const names = await folder.leaseFiles(id);
    let lease = this.#leases.get(id);
    if (names === undefined) {
      if (lease === undefined) return;
      lease.missing = true;
      if (await folder.isClosed(id)) this.#forget(lease);
      return;
    }
    if (lease === undefined) {
      if (this.#leases.size >= MAX_LEASES) return;
      lease = {
        id,
        terms: undefined,
        files: new Map(),
        unreadableCount: 0,
        leftOutCount: 0,
        missing: false,
        vanished: new Map(),
        beat: undefined,
        beatMoves: 0,
        silentMs: 0,
        gone: false,
        live: false,
      };
      this.#leases.set(id, lease);
    }
    lease.missing = false;
    if (lease.terms === undefined) {
      lease.terms = await this.#readTerms(id);
      if (lease.terms !== undefined) lease.gone = isGone(lease.terms.holder, own, true);
    }
    await this.#readKeys(lease, names);
  }

  async #readTerms(id: string): Promise<LeaseRecord["terms"]> {
    const bytes = await this.#options.folder.readFile(id, "lease", MAX_LEASE_FILE_BYTES);
    const record = bytes === undefined ? undefined : unseal("lease", bytes);
    const holder = parseHolder(record?.["holder"]);
    const ttlMs = record?.["ttlMs"];
    if (record?.["leaseId"] !== id || typeof ttlMs !== "number" || !isTtl(ttlMs) || holder === undefined)
      return undefined;
    return { ttlMs, holder };
  }

  async #readKeys(lease: LeaseRecord, names: readonly string[]): Promise<void> {
    const { folder, logger } = this.#options;
    const there = new Map<string, EntryName>();
    for (const name of names) {
      const parsed = there.size < MAX_KEYS_PER_LEASE ? parseEntryName(name) : undefined;
      if (parsed !== undefined) there.set(name, parsed);
    }
    // What went makes room before what came is read.
    const isTold = this.#loggedIds.has(lease.id);
    for (const [name, file] of lease.files) {
      if (there.has(name)) lease.vanished.delete(name);
      else if (isTold || file === undefined || this.#isGoneForGood(lease, name)) this.#forgetFile(lease, name);
    }
    lease.unreadableCount = 0;
    lease.leftOutCount = 0;
    for (const [name, parsed] of there) {
      if (lease.files.get(name) !== undefined) continue; // Immutable under its name.
      if (this.#fileCount >= this.#maxEntries || this.#tableBytes >= MAX_TABLE_BYTES) {
        lease.leftOutCount++;
        continue;
      }
      const bytes = await folder.readFile(lease.id, name, MAX_ENTRY_FILE_BYTES);
      const file = bytes === undefined ? undefined : parseKeyFile(lease.id, parsed, bytes);
      if (file !== undefined) {
        this.#fileCount++;
        this.#tableBytes += file.encoded.length;
        lease.files.set(name, file);
        this.#stale = true;
        continue;
      }
      lease.unreadableCount++;
      if (bytes === undefined || lease.files.has(name)) continue; // Replaced while we read; or logged before.
      lease.files.set(name, undefined);
      logger.warn({ file: folder.pathOf(lease.id, name) }, "discovery entry is unreadable, ignored for now");
    }
  }

  /**
   * Who removes a key says so in the log. A file that went without a word was deleted by somebody else, the folder perhaps
   * with it: the holder writes it again at its next renewal, so it is gone when the heartbeat moved twice without that.
   */
  #isGoneForGood(lease: LeaseRecord, name: string): boolean {
    const sinceMoves = lease.vanished.get(name);
    if (sinceMoves === undefined) lease.vanished.set(name, lease.beatMoves);
    return sinceMoves !== undefined && lease.beatMoves - sinceMoves >= 2;
  }

  #forgetFile(lease: LeaseRecord, name: string): void {
    lease.vanished.delete(name);
    const file = lease.files.get(name);
    if (file !== undefined) {
      this.#fileCount--;
      this.#tableBytes -= file.encoded.length;
    }
    lease.files.delete(name);
    this.#stale = true;
  }

  #forget(lease: LeaseRecord): void {
    for (const name of lease.files.keys()) this.#forgetFile(lease, name);
    this.#leases.delete(lease.id);
  }

  // ---- the whole ----

  /** Decides who is alive. */
  #judge(): void {
    const { own } = this.#options;
    const goneByPid = new Map<number, boolean>();
    this.#silentIds.clear();
    for (const lease of this.#leases.values()) {
      const { terms } = lease;
      if (terms !== undefined && !lease.gone && terms.holder.machine === own.machine) {
        const { pid } = terms.holder;
        const gone = goneByPid.get(pid) ?? isGone(terms.holder, own, false);
        goneByPid.set(pid, gone);
        lease.gone = gone;
      }
      const live = terms !== undefined && !lease.gone && lease.silentMs < terms.ttlMs * SILENCE_OF_TTL;
      if (live !== lease.live) this.#stale = true;
      lease.live = live;
      if (!live && !lease.gone) this.#silentIds.add(lease.id);
      if (lease.missing && !lease.live) this.#forget(lease);
    }
  }

  /** Merges the live leases: of several versions of a key the highest wins. Tells what became different. */
  #publish(): void {
    if (!this.#stale) return;
    this.#stale = false;
    const winners = new Map<string, KeyFile>();
    for (const lease of this.#leases.values()) {
      if (!lease.live) continue;
      for (const file of lease.files.values()) {
        if (file === undefined) continue;
        const rival = winners.get(file.entry.key);
        if (rival === undefined || beats(file, rival)) winners.set(file.entry.key, file);
      }
    }
    const before = this.#table;
    this.#table = winners;
    for (const [key, { entry }] of before)
      if (!winners.has(key)) this.#options.onChanged(key, undefined, this.#silentIds.has(entry.leaseId));
    for (const [key, stored] of winners) {
      if (!sameEntry(before.get(key), stored)) this.#options.onChanged(key, stored, false);
    }
  }

  // ---- what the dead leave ----

  /** Best effort: a failure is tried again at the next look. */
  async #sweep(nowMs: number): Promise<void> {
    const { folder, logger } = this.#options;
    try {
      let sweeps = 0;
      for (const lease of this.#leases.values()) {
        if (sweeps >= MAX_SWEEPS_PER_LOOK) break;
        if (lease.missing || !isSweepable(lease)) continue;
        sweeps++;
        await folder.closeLease(lease.id);
        this.#forget(lease);
        logger.info({ leaseId: lease.id, holder: lease.terms?.holder }, "discovery: removed what a dead process left");
      }
      const leftover = new Set(await folder.closedIds());
      for (const id of (await folder.beats()).keys()) if (!this.#leases.has(id)) leftover.add(id);
      for (const id of this.#leftoverSeenMs.keys()) if (!leftover.has(id)) this.#leftoverSeenMs.delete(id);
      for (const id of leftover) {
        const seenMs = this.#leftoverSeenMs.get(id);
        if (seenMs === undefined) {
          if (this.#leftoverSeenMs.size < MAX_LEASES) this.#leftoverSeenMs.set(id, nowMs);
        } else if (nowMs - seenMs >= LEFTOVER_MS && sweeps++ < MAX_SWEEPS_PER_LOOK) {
          await folder.removeLeftover(id);
        }
      }
    } catch (error) {
      logger.debug({ err: error }, "discovery: sweep failed");
    }
  }
}

function isSweepable(lease: LeaseRecord): boolean {
  if (lease.terms === undefined) return lease.silentMs >= SWEEP_UNREADABLE_AFTER_MS;
  if (lease.gone) return lease.silentMs >= SWEEP_DEAD_AFTER_MS;
  return lease.silentMs >= lease.terms.ttlMs * SWEEP_SILENT_AFTER_TTLS;
}

function beats(a: KeyFile, b: KeyFile): boolean {
  return a.version > b.version || (a.version === b.version && a.entry.leaseId > b.entry.leaseId);
}

/** The file's content if it is whole and says what its name says. */
function parseKeyFile(leaseId: string, name: EntryName, bytes: Buffer): KeyFile | undefined {
  const record = unseal("entry", bytes);
  if (record === undefined || record["leaseId"] !== leaseId || record["version"] !== name.version) return undefined;
  const { key, value } = record as { key?: unknown; value?: JsonValue };
  if (typeof key !== "string" || !isStoreKey(key) || hashKey(key) !== name.keyHash || value === undefined)
    return undefined;
  try {
    return { entry: { key, value, leaseId }, encoded: JSON.stringify(value), version: name.version };
  } catch {
    return undefined; // Nested too deep to be written again.
  }
}
