import { DynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import type { Clock } from "../../std/index.ts";
import { BlockState, NO_BLOCK } from "../block-pool.ts";
import { inChains, type BlockIdentity } from "./block-identity.ts";
import { HEADER_BYTES, decodeHeader, encodeHeader, entryFault, type EntryFormat } from "./entry.ts";
import { claimSlab, releaseSlab } from "./slab-owner.ts";
import { SlotIndex } from "./slot-index.ts";
import { systemFiles, type TierFile, type TierFiles } from "./tier-files.ts";
import { TierHealth } from "./tier-health.ts";
import type { LowerTier, TierMeters } from "./tier.ts";

/**
 * G3: blocks in one file of a local folder, slot `i` at `i * stride`: header and bytes, written in one call. The headers
 * are the index: at the start they are read (64 bytes of each slot, some 20 us), and what the last life left is there
 * again. Nothing is synced: after a power failure an entry may be torn, which its checksums tell when it is read.
 *
 * Disk full, read-only, folder gone: the tier is degraded and tried again (`tier-health.ts`); what it has can still be read.
 */
export interface DiskTierOptions {
  readonly folder: string;
  /** Of file space. */
  readonly bytes: number;
  readonly format: EntryFormat;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly meters: TierMeters;
  /** For tests of a disk that fails. @default the system's */
  readonly files?: TierFiles;
}

/** Neighbours share no page, so that a write never reads first. */
const PAGE_BYTES = 4_096;
const SCAN_READS_AT_A_TIME = 32;
/** How often it is looked whether the file still has its name. */
const LOOK_EVERY_MS = 1_000;

/** What a block takes of the file. */
export function diskSlotBytes(blockBytes: number): number {
  return Math.ceil((HEADER_BYTES + blockBytes) / PAGE_BYTES) * PAGE_BYTES;
}

export class DiskTier implements LowerTier {
  readonly name = "disk";
  readonly #options: DiskTierOptions;
  readonly #health: TierHealth;
  readonly #files: TierFiles;
  readonly #stride: number;
  readonly #slotCount: number;
  #index: SlotIndex;
  #file: TierFile | undefined = undefined;
  #path = "";
  #opening: Promise<void> | undefined = undefined;
  #lookedMs = -Infinity;
  #generation = 1;
  #stored: BlockIdentity[] = [];
  /** (lo, hi) of what was lost with a file. */
  #lost: number[] = [];

  constructor(options: DiskTierOptions) {
    this.#options = options;
    this.#files = options.files ?? systemFiles;
    this.#health = new TierHealth({ ...options, tier: "disk" });
    this.#stride = diskSlotBytes(options.format.blockBytes);
    this.#slotCount = Math.floor(options.bytes / this.#stride);
    if (this.#slotCount < 1) {
      throw new DynamoError(
        "invalid-config",
        `disk space for KV blocks: expected at least ${this.#stride} bytes, one block of this model, got ${options.bytes}`,
      );
    }
    this.#index = new SlotIndex(this.#slotCount, "lineage");
  }

  get usedBytes(): number {
    return this.#index.pool.registeredCount * this.#options.format.blockBytes;
  }

  get capacityBytes(): number {
    return this.#slotCount * this.#options.format.blockBytes;
  }

  /** The file; empty before the first success of `open`. */
  get path(): string {
    return this.#path;
  }

  /** What it has, and who uses it; for tests. */
  get index(): SlotIndex {
    return this.#index;
  }

  async open(): Promise<void> {
    await this.#ensureOpen();
  }

  has(lo: number, hi: number): boolean {
    return this.#index.pool.find(lo, hi) !== NO_BLOCK;
  }

  isWritable(): boolean {
    return this.#health.mayTry();
  }

  readonly maxRunBlocks = 1;

  runLength(): number {
    return 1;
  }

  async write([block]: readonly BlockIdentity[], [data]: readonly Uint8Array[]): Promise<boolean> {
    return block !== undefined && data !== undefined && this.#write(block, data);
  }

  async read(run: readonly BlockIdentity[], into: readonly Uint8Array[]): Promise<readonly boolean[]> {
    return Promise.all(run.map((block, i) => this.#read(block, into[i]!)));
  }

  async #write(block: BlockIdentity, data: Uint8Array): Promise<boolean> {
    const { meters, format } = this.#options;
    const file = await this.#ensureOpen();
    if (file === undefined) {
      meters.failed("disk", "degraded");
      return false;
    }
    const index = this.#index;
    const slot = index.take();
    if (slot === NO_BLOCK) {
      meters.failed("disk", "no-room");
      return false;
    }
    try {
      const header = encodeHeader(format, block, data, this.#generation++ >>> 0);
      const { bytesWritten } = await file.writev([header, data], slot * this.#stride);
      if (bytesWritten < HEADER_BYTES + data.length) throw new Error(`no room: ${bytesWritten} bytes were written`);
    } catch (thrown) {
      index.pool.free(slot);
      meters.failed("disk", "write-failed");
      this.#health.failed(thrown);
      return false;
    }
    const held = index.fill(slot, block);
    index.pool.release(held);
    if (held === slot && index === this.#index) this.#stored.push(block);
    this.#health.worked();
    return true;
  }

  async #read(block: BlockIdentity, into: Uint8Array): Promise<boolean> {
    const { meters, format } = this.#options;
    const index = this.#index;
    const file = this.#file;
    const slot = index.pool.find(block.lo, block.hi);
    if (slot === NO_BLOCK || file === undefined) {
      meters.failed("disk", "gone");
      return false;
    }
    index.pool.retain(slot);
    const header = Buffer.alloc(HEADER_BYTES);
    let fault: "corrupt" | "foreign" | "read-failed" | undefined;
    try {
      const { bytesRead } = await file.readv([header, into], slot * this.#stride);
      fault = bytesRead < HEADER_BYTES + into.length ? "corrupt" : entryFault(format, block, header, into);
    } catch {
      fault = "read-failed";
    }
    index.pool.release(slot);
    if (fault === undefined) return true;
    meters.failed("disk", fault);
    // Nobody holds it, or another read finds the same and forgets it.
    if (index.pool.stateOf(slot) === BlockState.registered) index.pool.drop(slot);
    return false;
  }

  /** What was evicted before it could be told is left out: removals are told first. */
  takeStored(): BlockIdentity[] {
    return this.#stored.splice(0).filter((block) => this.#index.has(block));
  }

  takeRemoved(): Uint32Array {
    const evicted = this.#index.pool.takeEvicted();
    return this.#lost.length === 0 ? evicted : Uint32Array.from([...this.#lost.splice(0), ...evicted]);
  }

  async clear(): Promise<number> {
    const count = this.#index.pool.clear();
    // With every entry gone, none may be found again.
    if (this.#index.pool.registeredCount === 0) await this.#file?.truncate(0).catch(() => undefined);
    return count;
  }

  async close(): Promise<void> {
    await this.#opening;
    const file = this.#file;
    this.#file = undefined;
    await file?.close().catch(() => undefined);
    releaseSlab(this.#files, this.#path);
  }

  /** The open file, or undefined when there is none and it is not the time to try. */
  async #ensureOpen(): Promise<TierFile | undefined> {
    if (this.#file !== undefined) await this.#checkStillThere(this.#file);
    if (this.#file !== undefined || !this.#health.mayTry()) return this.#file;
    this.#opening ??= this.#open().finally(() => {
      this.#opening = undefined;
    });
    await this.#opening;
    return this.#file;
  }

  async #open(): Promise<void> {
    const { folder, format, clock } = this.#options;
    try {
      const [lo, hi] = format.fingerprint;
      const kind = `${hex(hi)}${hex(lo)}-${format.blockBytes}`;
      releaseSlab(this.#files, this.#path);
      this.#path = await claimSlab(this.#files, folder, kind, clock.wallMs());
      const file = await this.#files.open(this.#path, "r+").catch((thrown: NodeJS.ErrnoException) => {
        if (thrown.code !== "ENOENT") throw thrown;
        return this.#files.open(this.#path, "wx+");
      });
      try {
        const { size } = await file.stat();
        if (size > this.#slotCount * this.#stride) await file.truncate(this.#slotCount * this.#stride);
        await this.#scan(file, Math.min(this.#slotCount, Math.ceil(size / this.#stride)));
      } catch (thrown) {
        await file.close();
        throw thrown;
      }
      this.#file = file;
      this.#lookedMs = clock.monotonicMs();
      this.#health.worked();
    } catch (thrown) {
      this.#health.failed(thrown);
    }
  }

  /** Registers what the headers of the first `slotCount` slots say. */
  async #scan(file: TierFile, slotCount: number): Promise<void> {
    const { format, meters } = this.#options;
    const index = new SlotIndex(this.#slotCount, "lineage");
    const found = new Map<number, BlockIdentity>();
    let next = 0;
    const lane = async (): Promise<void> => {
      const header = Buffer.alloc(HEADER_BYTES);
      for (let slot = next++; slot < slotCount; slot = next++) {
        const { bytesRead } = await file.readv([header], slot * this.#stride);
        const reading = decodeHeader(format, header.fill(0, bytesRead));
        if (typeof reading !== "string") found.set(slot, reading.block);
        else if (reading !== "empty") meters.failed("disk", reading);
      }
    };
    await Promise.all(Array.from({ length: SCAN_READS_AT_A_TIME }, lane));
    // Slot by slot, so that each block stays where it is.
    const blocks: BlockIdentity[] = [];
    const free: number[] = [];
    while (index.pool.resetCount > 0) {
      const slot = index.take();
      const block = found.get(slot);
      if (block === undefined || index.has(block)) {
        free.push(slot);
        continue;
      }
      index.pool.release(index.fill(slot, block));
      blocks.push(block);
    }
    // The lowest is taken first again: the file grows with what is in it, and a scan reads no more than that.
    for (const slot of free.reverse()) index.pool.free(slot);
    this.#index = index;
    this.#stored = inChains(blocks);
  }

  /** A file that lost its name is written for nobody: the next life would not find it. */
  async #checkStillThere(file: TierFile): Promise<void> {
    const nowMs = this.#options.clock.monotonicMs();
    if (nowMs - this.#lookedMs < LOOK_EVERY_MS) return;
    this.#lookedMs = nowMs;
    const [named, opened] = await Promise.all([
      this.#files.stat(this.#path).catch(() => undefined),
      // A disk that does not even say so: what comes next finds out.
      file.stat().catch(() => undefined),
    ]);
    if (opened === undefined || named?.ino === opened.ino || this.#file !== file) return;
    this.#file = undefined;
    const { pool } = this.#index;
    for (let slot = 0; slot < this.#slotCount; slot++) {
      if (pool.stateOf(slot) === BlockState.registered) this.#lost.push(...pool.hashOf(slot));
    }
    this.#lost.push(...pool.takeEvicted());
    this.#stored = [];
    this.#index = new SlotIndex(this.#slotCount, "lineage");
    this.#health.failed(new Error(`${this.#path} is gone`));
    await file.close().catch(() => undefined);
  }
}

function hex(word: number): string {
  return word.toString(16).padStart(8, "0");
}
