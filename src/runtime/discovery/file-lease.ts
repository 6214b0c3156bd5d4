import { DynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import { randomHexId, type Clock, type TimerHandle } from "../../std/index.ts";
import type { JsonValue, Lease } from "./base.ts";
import type { Holder } from "./holder.ts";
import { seal } from "./sealed-record.ts";
import { SerialQueue } from "./serial-queue.ts";
import { checkKey, encodeValue } from "./store-key.ts";
import {
  entryName,
  hashKey,
  isMissing,
  parseEntryName,
  unavailable,
  type FileStamp,
  type StoreFolder,
} from "./store-folder.ts";

/** Keys one lease holds at most; a worker has about ten. */
export const MAX_KEYS_PER_LEASE = 4_096;
/** Three renewals may fail or come late before a watcher gives the lease up. */
const RENEWALS_PER_TTL = 4;

interface HeldKey {
  readonly keyHash: string;
  readonly value: JsonValue;
  readonly version: number;
  readonly stamp: FileStamp;
}

interface FileLeaseOptions {
  readonly folder: StoreFolder;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly holder: Holder;
  readonly ttlMs: number;
  /** Called after each change that reached the disk, and when the lease ended. */
  readonly onChange: () => void;
  readonly onEnd: (lease: FileLease) => void;
}

/**
 * A holder's side of a lease in the file store. It renews by one rename, four times per TTL by the monotonic
 * clock, and at each renewal checks that its files are still what it wrote: a deleted folder or a damaged file is put
 * back, a key that another lease took over is let go. It ends as lost when no renewal succeeded for a TTL, or when
 * somebody made its tombstone.
 *
 * Of two writers of a key the later wins: versions count up from the highest in the store, ties go to the higher lease
 * id, and the winner takes the loser's file away. All steps of one lease run one after another.
 */
export class FileLease implements Lease {
  readonly id = randomHexId();
  readonly lost: Promise<void>;
  readonly #options: FileLeaseOptions;
  readonly #keys = new Map<string, HeldKey>();
  readonly #steps = new SerialQueue();
  readonly #settleLost: () => void;
  #open = true;
  #isLost = false;
  #renewedMs: number;
  #beatCount = 0;
  #leaseStamp: FileStamp | undefined;
  #timer: TimerHandle | undefined;
  #failure: string | undefined;
  #closing: Promise<void> | undefined;

  private constructor(options: FileLeaseOptions) {
    this.#options = options;
    this.#renewedMs = options.clock.monotonicMs();
    const { promise, resolve } = Promise.withResolvers<void>();
    this.lost = promise;
    this.#settleLost = resolve;
  }

  static async open(options: FileLeaseOptions): Promise<FileLease> {
    const lease = new FileLease(options);
    try {
      await lease.#writeAll();
    } catch (error) {
      await options.folder.closeLease(lease.id).catch(() => undefined);
      throw unavailable("written", error);
    }
    lease.#scheduleRenewal();
    options.onChange();
    return lease;
  }

  /** It ended without `close`. */
  get isLost(): boolean {
    return this.#isLost;
  }

  /** Why the last renewal failed; undefined when it did not. */
  get failure(): string | undefined {
    return this.#failure;
  }

  put(key: string, value: JsonValue): Promise<void> {
    return this.#steps.run(async () => {
      checkKey(key);
      // A copy: the caller may change its object before a renewal writes it again.
      const copy = JSON.parse(encodeValue(key, value)) as JsonValue;
      this.#requireOpen();
      if (!this.#keys.has(key) && this.#keys.size >= MAX_KEYS_PER_LEASE) {
        throw new DynamoError("discovery-unavailable", `the discovery lease is full: ${MAX_KEYS_PER_LEASE} keys`);
      }
      try {
        await this.#write(key, copy).catch(async (error: unknown) => {
          if (!isMissing(error)) throw error;
          await this.#restore();
          this.#requireOpen();
          await this.#write(key, copy);
        });
      } catch (error) {
        throw unavailable("written", error);
      }
      this.#options.onChange();
    });
  }

  delete(key: string): Promise<void> {
    return this.#steps.run(async () => {
      checkKey(key);
      const held = this.#keys.get(key);
      if (!this.#open || held === undefined) return;
      const { folder } = this.#options;
      try {
        this.#keys.delete(key);
        await folder.removeEntry(this.id, entryName(held.keyHash, held.version));
        await folder.logChange([this.id]);
      } catch (error) {
        if (isMissing(error)) return; // The store is gone, and the key with it.
        throw unavailable("written", error);
      }
      this.#options.onChange();
    });
  }

  close(): Promise<void> {
    this.#closing ??= this.#end();
    return this.#closing;
  }

  /** Ends here at once; the rest, in order after the steps that run. */
  async #end(): Promise<void> {
    const { folder, logger, onChange, onEnd } = this.#options;
    this.#open = false;
    this.#timer?.cancel();
    await this.#steps.run(async () => {
      try {
        await folder.closeLease(this.id);
        await folder.logChange([this.id]);
      } catch (error) {
        // Nothing more to do for who leaves: without renewals the keys vanish within the TTL.
        if (!isMissing(error))
          logger.warn({ err: error, leaseId: this.id }, "discovery lease not removed, left to expire");
      }
    });
    onEnd(this);
    onChange();
  }

  #requireOpen(): void {
    if (!this.#open) throw new DynamoError("lease-lost", "the discovery lease has ended");
  }

  // ---- renewal ----

  #scheduleRenewal(): void {
    if (!this.#open) return;
    const { clock, ttlMs } = this.#options;
    this.#timer = clock.setTimer(ttlMs / RENEWALS_PER_TTL, () => {
      void this.#steps.run(() => this.#renew()).then(() => this.#scheduleRenewal());
    });
  }

  /** Never throws. */
  async #renew(): Promise<void> {
    if (!this.#open) return;
    const { clock, folder, logger, ttlMs } = this.#options;
    const startMs = clock.monotonicMs();
    if (startMs - this.#renewedMs > ttlMs) {
      return this.#lose(this.#failure ?? "the process was stopped or too busy to renew it");
    }
    try {
      if (await folder.beat(this.id, this.#beatCount)) {
        this.#beatCount++;
        await this.#repair();
      } else {
        await this.#restore();
      }
      if (this.#failure !== undefined) logger.info({ leaseId: this.id }, "discovery lease renewed again");
      this.#failure = undefined;
      this.#renewedMs = startMs;
    } catch (error) {
      const text = error instanceof Error ? error.message : String(error);
      if (this.#failure === undefined) logger.warn({ leaseId: this.id, error: text }, "discovery lease not renewed");
      this.#failure = text;
      // The next try would come after the end: end now.
      if (clock.monotonicMs() - this.#renewedMs >= ttlMs) this.#lose(text);
    }
  }

  #lose(why: string): void {
    if (!this.#open) return;
    this.#isLost = true;
    this.#options.logger.error({ leaseId: this.id, why }, "discovery lease lost");
    this.#settleLost();
    // Not awaited: it queues behind the step that runs this.
    void this.close();
  }

  /** The folder or the heartbeat is gone: revoked, when there is a tombstone; else deleted by accident, so put it back. */
  async #restore(): Promise<void> {
    if (await this.#options.folder.isClosed(this.id)) return this.#lose("revoked by another process");
    this.#options.logger.warn({ leaseId: this.id }, "discovery lease's files were deleted; writing them again");
    await this.#writeAll();
    this.#options.onChange();
  }

  async #writeAll(): Promise<void> {
    const { folder } = this.#options;
    await folder.prepare();
    await folder.createLease(this.id);
    await this.#writeLease();
    for (const [key, held] of this.#keys) await this.#rewrite(key, held);
    await folder.createBeat(this.id, ++this.#beatCount);
    await folder.logChange([this.id]);
  }

  async #writeLease(): Promise<void> {
    const { folder, holder, ttlMs } = this.#options;
    this.#leaseStamp = await folder.writeFile(this.id, "lease", seal("lease", { leaseId: this.id, ttlMs, holder }));
  }

  /** Puts back what others damaged or deleted, and lets go what another lease took over. */
  async #repair(): Promise<void> {
    const { folder, logger } = this.#options;
    let changed = false;
    const leaseStamp = await folder.stamp(this.id, "lease");
    if (leaseStamp === undefined) return this.#restore();
    if (!sameStamp(leaseStamp, this.#leaseStamp)) {
      await this.#writeLease();
      changed = true;
    }
    for (const [key, held] of this.#keys) {
      const name = entryName(held.keyHash, held.version);
      const stamp = await folder.stamp(this.id, name);
      if (sameStamp(stamp, held.stamp)) continue;
      if (stamp === undefined && (await folder.isSuperseded(this.id, name))) {
        await folder.removeEntry(this.id, name);
        this.#keys.delete(key);
        continue;
      }
      logger.warn({ leaseId: this.id, key }, "discovery entry was damaged or deleted; writing it again");
      await this.#rewrite(key, held);
      changed = true;
    }
    if (!changed) return;
    await folder.logChange([this.id]);
    this.#options.onChange();
  }

  // ---- keys ----

  /** The same version again: whoever superseded it meanwhile still wins. */
  async #rewrite(key: string, held: HeldKey): Promise<void> {
    const stamp = await this.#writeEntry(key, held.keyHash, held.version, held.value);
    this.#keys.set(key, { ...held, stamp });
  }

  async #write(key: string, value: JsonValue): Promise<void> {
    const { folder } = this.#options;
    const keyHash = hashKey(key);
    const before = this.#keys.get(key);
    let version = (before?.version ?? 0) + 1;
    for (const rival of await this.#rivals(keyHash)) version = Math.max(version, rival.version + 1);
    const stamp = await this.#writeEntry(key, keyHash, version, value);
    this.#keys.set(key, { keyHash, value, version, stamp });
    if (before !== undefined) await folder.removeEntry(this.id, entryName(keyHash, before.version));
    await folder.logChange([this.id, ...(await this.#settle(key, keyHash, version))]);
  }

  /** After writing: takes away what this version beats, or gives way to what beats it. Both writers do so; one stays. */
  async #settle(key: string, keyHash: string, version: number): Promise<string[]> {
    const { folder } = this.#options;
    const touched: string[] = [];
    for (const rival of await this.#rivals(keyHash)) {
      if (rival.version > version || (rival.version === version && rival.leaseId > this.id)) {
        this.#keys.delete(key);
        await folder.removeEntry(this.id, entryName(keyHash, version));
      } else {
        await folder.supersede(rival.leaseId, rival.name);
        touched.push(rival.leaseId);
      }
    }
    return touched;
  }

  /** Files of this key in other leases' folders. Costs one directory read per lease; puts are rare. */
  async #rivals(keyHash: string): Promise<{ leaseId: string; name: string; version: number }[]> {
    const { folder } = this.#options;
    const rivals: { leaseId: string; name: string; version: number }[] = [];
    for (const leaseId of await folder.leaseIds()) {
      if (leaseId === this.id) continue;
      for (const name of (await folder.leaseFiles(leaseId)) ?? []) {
        const parsed = name.startsWith(keyHash) ? parseEntryName(name) : undefined;
        if (parsed !== undefined) rivals.push({ leaseId, name, version: parsed.version });
      }
    }
    return rivals;
  }

  #writeEntry(key: string, keyHash: string, version: number, value: JsonValue): Promise<FileStamp> {
    const bytes = seal("entry", { key, leaseId: this.id, version, value });
    return this.#options.folder.writeFile(this.id, entryName(keyHash, version), bytes);
  }
}

function sameStamp(a: FileStamp | undefined, b: FileStamp | undefined): boolean {
  return a?.bytes === b?.bytes && a?.modifiedMs === b?.modifiedMs;
}
