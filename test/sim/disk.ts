import { DynamoError } from "../../src/errors/index.ts";
import type { ObjectStore, TierFile, TierFiles } from "../../src/kvbm/index.ts";
import { SharedLinks } from "../../src/perf-model/index.ts";
import { randomHexId, type Random } from "../../src/std/index.ts";
import type { Fabric } from "./fabric.ts";
import { SimNetwork } from "./network.ts";
import type { SimProcess, World } from "./world.ts";

/**
 * The disk of one simulated host: it outlives the processes that write to it. A call takes the time of its bytes, which
 * calls under way share, and goes wrong as disks do:
 *
 *     full        ENOSPC, or fewer bytes written than asked for
 *     slow        a thousandth of its speed        hangs   nothing comes back until it is over
 *     fails       EIO                             flip    bits change where they lie
 *     lost file   the names are gone, open files go on
 *     killed      of a write under way a part is there, nobody knows which     power   of those just done, too
 */
interface Inode {
  readonly ino: number;
  bytes: Buffer;
  mtimeMs: number;
}

interface Write {
  readonly process: SimProcess;
  readonly inode: Inode;
  readonly position: number;
  readonly bytes: Buffer;
  doneMs: number;
}

export type DiskState = "well" | "full" | "hangs" | "fails";

const CALL_MS = 0.05;
const SLOW = 1_000;
/** Not synced by then: what a host without power may not have on its disk. */
const UNSYNCED_MS = 2_000;

export class SimDisk {
  readonly #world: World;
  readonly #random: Random;
  readonly #links: SharedLinks;
  readonly #link: { bytesPerMs: number };
  readonly #names = new Map<string, Inode>();
  readonly #processes = new Map<number, SimProcess>();
  #inodes = 0;
  #writes: Write[] = [];
  #state: DiskState = "well";
  #waiting: (() => void)[] = [];
  /** A write has begun, and will take so long. */
  onWrite: ((process: SimProcess) => void) | undefined = undefined;

  constructor(world: World, bytesPerMs: number) {
    this.#world = world;
    this.#random = world.fork();
    this.#link = { bytesPerMs };
    this.#links = new SharedLinks({ monotonicMs: () => world.nowMs, setTimer: (ms, run) => world.timer(ms, run) });
  }

  setState(state: DiskState): void {
    this.#state = state;
    if (state === "hangs") return;
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const go of waiting) go();
  }

  slowDown(isSlow: boolean): void {
    const { bytesPerMs } = this.#link;
    this.#link.bytesPerMs = isSlow ? bytesPerMs / SLOW : bytesPerMs * SLOW;
    this.#links.changed();
  }

  loseNames(): boolean {
    const had = this.#names.size > 0;
    this.#names.clear();
    return had;
  }

  /** Of what is written: one bit each at `count` places. Returns how many places had something. */
  flip(count: number): number {
    const inodes = [...this.#names.values()].filter(({ bytes }) => bytes.length > 0);
    let flipped = 0;
    for (let i = 0; i < count && inodes.length > 0; i++) {
      const { bytes } = inodes[this.#random.nextU32() % inodes.length]!;
      // Where entries are: at the head of each page.
      const page = this.#random.nextU32() % Math.ceil(bytes.length / PAGE_BYTES);
      const at = page * PAGE_BYTES + (this.#random.nextU32() % ENTRY_BYTES);
      if (at >= bytes.length || bytes[page * PAGE_BYTES] === 0) continue;
      bytes[at]! ^= 1 << (this.#random.nextU32() % 8);
      flipped++;
    }
    return flipped;
  }

  /** The process is dead; `isSilent`: its host lost power. */
  lost(process: SimProcess, isSilent: boolean): void {
    const { nowMs } = this.#world;
    for (const write of this.#writes) {
      if (write.process !== process) continue;
      const isUnderWay = write.doneMs === Infinity;
      if (isUnderWay || (isSilent && nowMs - write.doneMs < UNSYNCED_MS && this.#random.nextFloat() < 0.5)) {
        this.#tear(write, isUnderWay);
      }
    }
    this.#writes = this.#writes.filter((write) => write.process !== process);
  }

  #tear({ inode, position, bytes }: Write, isUnderWay: boolean): void {
    const kept = this.#random.nextU32() % (bytes.length + 1);
    if (isUnderWay) put(inode, position, bytes.subarray(0, kept));
    else inode.bytes.fill(0, position + kept, position + bytes.length);
    if (kept > 0 && kept < bytes.length) this.#world.marks.mark("write torn");
  }

  /** As one of its processes sees it. */
  filesOf(process: SimProcess): TierFiles {
    this.#processes.set(process.id, process);
    const call = <T>(bytes: number, run: () => T): Promise<T> => this.#call(process, bytes, run);
    return {
      self: { host: "host", pid: process.id },
      startOf: (pid) => ((this.#processes.get(pid)?.state ?? "dead") === "dead" ? "none" : "1"),
      uniqueId: () => randomHexId(process.random),
      own: new Set(),
      makeFolder: () => call(0, () => undefined),
      list: (folder) =>
        call(0, () =>
          [...this.#names.keys()]
            .filter((path) => path.startsWith(`${folder}/`))
            .map((path) => path.slice(folder.length + 1)),
        ),
      rename: (from, to) =>
        call(0, () => {
          this.#names.set(to, this.#find(from));
          this.#names.delete(from);
        }),
      stat: (path) => call(0, () => ({ ino: this.#find(path).ino, mtimeMs: this.#find(path).mtimeMs })),
      open: (path, flags) =>
        call(0, () => {
          if (flags === "r+") return this.#file(process, this.#find(path));
          const inode = { ino: ++this.#inodes, bytes: Buffer.alloc(0), mtimeMs: process.clock.wallMs() };
          this.#names.set(path, inode);
          return this.#file(process, inode);
        }),
    };
  }

  #file(process: SimProcess, inode: Inode): TierFile {
    return {
      writev: (pieces, position) => this.#write(process, inode, position, Buffer.concat(pieces)),
      readv: (pieces, position) =>
        this.#call(process, byteCount(pieces), () => {
          let at = position;
          for (const piece of pieces) {
            piece.set(inode.bytes.subarray(at, at + piece.length));
            at += piece.length;
          }
          return { bytesRead: Math.max(0, Math.min(byteCount(pieces), inode.bytes.length - position)) };
        }),
      stat: () => this.#call(process, 0, () => ({ ino: inode.ino, size: inode.bytes.length })),
      truncate: (length) =>
        this.#call(process, 0, () => {
          inode.bytes = Buffer.from(inode.bytes.subarray(0, length));
        }),
      close: () => this.#call(process, 0, () => undefined),
    };
  }

  async #write(
    process: SimProcess,
    inode: Inode,
    position: number,
    bytes: Buffer,
  ): Promise<{ readonly bytesWritten: number }> {
    const write: Write = { process, inode, position, bytes, doneMs: Infinity };
    this.#writes = this.#writes.filter(({ doneMs }) => doneMs === Infinity || doneMs > this.#world.nowMs - UNSYNCED_MS);
    this.#writes.push(write);
    this.onWrite?.(process);
    try {
      return await this.#call(process, bytes.length, () => {
        if (this.#state === "full") {
          this.#world.marks.mark("disk full");
          if (this.#random.nextFloat() < 0.5) throw failure("ENOSPC");
          const bytesWritten = this.#random.nextU32() % bytes.length;
          put(inode, position, bytes.subarray(0, bytesWritten));
          return { bytesWritten };
        }
        put(inode, position, bytes);
        inode.mtimeMs = process.clock.wallMs();
        write.doneMs = this.#world.nowMs;
        return { bytesWritten: bytes.length };
      });
    } finally {
      if (write.doneMs === Infinity) this.#writes = this.#writes.filter((other) => other !== write);
    }
  }

  /** Resolves on the process's loop, when the disk has done it. */
  #call<T>(process: SimProcess, bytes: number, run: () => T): Promise<T> {
    return new Promise((resolve, reject) => {
      const finish = (): void => {
        if (process.state === "dead") return;
        if (this.#state === "hangs") {
          this.#world.marks.mark("disk hung");
          this.#waiting.push(finish);
          return;
        }
        let outcome: () => void;
        try {
          if (this.#state === "fails") throw failure("EIO");
          const result = run();
          outcome = () => resolve(result);
        } catch (thrown) {
          outcome = () => reject(thrown as Error);
        }
        process.enqueue(outcome);
      };
      this.#world.timer(CALL_MS, () => {
        if (bytes === 0) finish();
        else this.#links.move(bytes, [this.#link], finish);
      });
    });
  }

  #find(path: string): Inode {
    const inode = this.#names.get(path);
    if (inode === undefined) throw failure("ENOENT");
    return inode;
  }
}

/** Slots of mock blocks: a header and 64 bytes at the head of a page. */
const PAGE_BYTES = 4_096;
const ENTRY_BYTES = 128;
const BLOCK_BYTES = 64;

function put(inode: Inode, position: number, bytes: Uint8Array): void {
  const end = position + bytes.length;
  if (end > inode.bytes.length) inode.bytes = Buffer.concat([inode.bytes, Buffer.alloc(end - inode.bytes.length)]);
  inode.bytes.set(bytes, position);
}

function byteCount(pieces: readonly Uint8Array[]): number {
  return pieces.reduce((sum, piece) => sum + piece.length, 0);
}

function failure(code: string): NodeJS.ErrnoException {
  return Object.assign(new Error(code), { code });
}

export type StoreState = "well" | "down" | "hangs";

/** A bucket that all workers share. */
export class SimStore {
  readonly #world: World;
  readonly #random: Random;
  readonly #objects = new Map<string, Buffer>();
  readonly #fabric: Fabric;
  #waiting: (() => void)[] = [];
  #state: StoreState = "well";

  constructor(world: World, fabric: Fabric) {
    this.#world = world;
    this.#random = world.fork();
    this.#fabric = fabric;
  }

  /** At most: what objects hold, headers counted as blocks. */
  get blockCount(): number {
    let bytes = 0;
    for (const object of this.#objects.values()) bytes += object.length;
    return Math.ceil(bytes / BLOCK_BYTES);
  }

  setState(state: StoreState): void {
    this.#state = state;
    if (state === "hangs") return;
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const go of waiting) go();
  }

  /** Returns how many objects are no longer what was put. */
  corrupt(share: number): number {
    let count = 0;
    for (const object of this.#objects.values()) {
      if (this.#random.nextFloat() >= share) continue;
      object[this.#random.nextU32() % object.length]! ^= 1 << (this.#random.nextU32() % 8);
      count++;
    }
    return count;
  }

  clientOf(process: SimProcess): ObjectStore {
    return {
      put: (key, pieces, { signal }) =>
        this.#call(process, "out", byteCount(pieces), signal, () => {
          if (!this.#objects.has(key)) this.#objects.set(key, Buffer.concat(pieces));
        }),
      get: (key, start, into, { signal }) =>
        this.#call(process, "into", byteCount(into), signal, () => {
          const object = this.#objects.get(key);
          if (object === undefined) throw new DynamoError("object-not-found", "the object is not in the store");
          let at = start;
          for (const piece of into) {
            piece.set(object.subarray(at, at + piece.length));
            at += piece.length;
          }
        }),
      list: (prefix, after, { signal }) =>
        this.#call(process, "into", 0, signal, () =>
          [...this.#objects.keys()]
            .filter((key) => key.startsWith(prefix) && key > after)
            .toSorted()
            .slice(0, 100),
        ),
      close: () => Promise.resolve(),
    };
  }

  #call<T>(
    process: SimProcess,
    direction: "into" | "out",
    bytes: number,
    signal: AbortSignal,
    run: () => T,
  ): Promise<T> {
    const { links, store } = this.#fabric;
    const card = this.#fabric[direction](SimNetwork.hostOf(process));
    return new Promise((resolve, reject) => {
      const given = (): void => reject(new DynamoError("storage-failed", "the call was given up"));
      if (signal.aborted) return given();
      let isGiven = false;
      const onAbort = (): void => {
        isGiven = true;
        given();
      };
      signal.addEventListener("abort", onAbort, { once: true });
      const finish = (): void => {
        if (isGiven || process.state === "dead") return;
        if (this.#state === "hangs") {
          this.#world.marks.mark("store hung");
          this.#waiting.push(finish);
          return;
        }
        process.enqueue(() => {
          if (isGiven) return;
          signal.removeEventListener("abort", onAbort);
          try {
            if (this.#state === "down") throw new DynamoError("storage-failed", "the store does not answer");
            resolve(run());
          } catch (thrown) {
            reject(thrown as Error);
          }
        });
      };
      this.#world.timer(CALL_MS * 10, () => {
        if (bytes === 0) finish();
        else links.move(bytes, [store, card], finish);
      });
    });
  }
}
