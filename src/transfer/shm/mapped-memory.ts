import assert from "node:assert/strict";
import { closeSync, constants, fstatSync, ftruncateSync, openSync, unlinkSync } from "node:fs";
import { createRequire } from "node:module";
import type * as Koffi from "koffi";
import { DynamoError } from "../../errors/index.ts";

/**
 * A file of a tmpfs mapped into this process, so that another process that maps it sees the same bytes: Node has no mmap,
 * so libc is called through koffi. Page 0 is the header that both sides look at, the data follow.
 *
 *     i32 magic | i32 version | i32 live | i32 region id | i32 x 2 incarnation | f64 data bytes | ... | data from 4096
 *
 * Room is reserved before it is used (`posix_fallocate`): a full tmpfs is an error here and not a SIGBUS later. `free`
 * detaches the ArrayBuffer first, so that a stray view reads as empty instead of crashing.
 */
export const HEADER_BYTES = 4_096;
const MAGIC = 0x4d58_5444;
const VERSION = 1;
const AT = { magic: 0, version: 1, live: 2, regionId: 3, incarnationLow: 4, incarnationHigh: 5 } as const;
const BYTES_AT = 3;

const PROT_READ = 1;
const PROT_WRITE = 2;
const MAP_SHARED = 1;
const MAP_FAILED = 0xffff_ffff_ffff_ffffn;

interface Libc {
  readonly mmap: (
    at: null,
    bytes: number,
    protection: number,
    flags: number,
    fd: number,
    offset: number,
  ) => bigint | null;
  readonly munmap: (at: bigint, bytes: number) => number;
  readonly posixFallocate: (fd: number, offset: number, bytes: number) => number;
  readonly view: (address: bigint, bytes: number) => ArrayBuffer;
}

let libc: Libc | undefined;

/** Throws `library-unavailable`. Cost: a few milliseconds the first time. */
export function openLibc(): Libc {
  if (libc !== undefined) return libc;
  if (process.platform !== "linux") {
    throw new DynamoError(
      "library-unavailable",
      `shared memory between processes needs Linux, this is ${process.platform}`,
    );
  }
  try {
    const koffi = createRequire(import.meta.url)("koffi") as typeof Koffi;
    const library = koffi.load(null);
    const from = <T>(declaration: string): T => library.func(declaration) as T;
    libc = {
      mmap: from("void *mmap(void *, size_t, int, int, int, long)"),
      munmap: from("int munmap(uintptr_t, size_t)"),
      posixFallocate: from("int posix_fallocate(int, long, long)"),
      view: (address, bytes) => koffi.view(address, bytes),
    };
    return libc;
  } catch (cause) {
    throw new DynamoError("library-unavailable", "libc cannot be called through koffi", {
      diagnostic: String(cause),
      cause,
    });
  }
}

export interface MappedIdentity {
  readonly incarnation: bigint;
  readonly regionId: number;
}

export class MappedMemory {
  /** The data; empty after `free`. */
  readonly bytes: Buffer;
  /** Of the data, page-aligned. */
  readonly address: bigint;
  readonly #path: string | undefined;
  readonly #base: bigint;
  readonly #mappedBytes: number;
  readonly #buffer: ArrayBuffer;
  readonly #header: Int32Array;
  #freed = false;

  private constructor(
    fd: number,
    dataBytes: number,
    options: { readonly path: string | undefined; readonly writable: boolean },
  ) {
    const { mmap, view } = openLibc();
    this.#mappedBytes = HEADER_BYTES + dataBytes;
    const protection = options.writable ? PROT_READ | PROT_WRITE : PROT_READ;
    const base = mmap(null, this.#mappedBytes, protection, MAP_SHARED, fd, 0);
    if (base === null || base === MAP_FAILED) {
      throw new DynamoError("transfer-full", `${dataBytes} bytes of shared memory cannot be mapped`);
    }
    this.#base = base;
    this.#path = options.path;
    this.address = base + BigInt(HEADER_BYTES);
    this.#buffer = view(base, this.#mappedBytes);
    this.#header = new Int32Array(this.#buffer, 0, HEADER_BYTES / 4);
    this.bytes = Buffer.from(this.#buffer, HEADER_BYTES, dataBytes);
  }

  /** Makes the file, of this user only, and maps it. Throws `transfer-full` when the folder's tmpfs has no room. */
  static create(path: string, dataBytes: number): MappedMemory {
    const { O_RDWR, O_CREAT, O_EXCL, O_NOFOLLOW } = constants;
    const fd = openSync(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600);
    try {
      ftruncateSync(fd, HEADER_BYTES + dataBytes);
      const failed = openLibc().posixFallocate(fd, 0, HEADER_BYTES + dataBytes);
      if (failed !== 0) {
        throw new DynamoError(
          "transfer-full",
          `no room for ${dataBytes} bytes of shared memory: enlarge its tmpfs, or choose another folder`,
          {
            diagnostic: `${path}: posix_fallocate returned ${failed}`,
          },
        );
      }
      const mapped = new MappedMemory(fd, dataBytes, { path, writable: true });
      mapped.#header[AT.magic] = MAGIC;
      mapped.#header[AT.version] = VERSION;
      new Float64Array(mapped.#buffer, 0, HEADER_BYTES / 8)[BYTES_AT] = dataBytes;
      return mapped;
    } catch (thrown) {
      unlinkSync(path);
      throw thrown;
    } finally {
      closeSync(fd);
    }
  }

  /** Maps a file of a peer's. Throws `transfer-stale` when it is not what the metadata said. */
  static open(path: string, dataBytes: number, identity: MappedIdentity, writable: boolean): MappedMemory {
    let fd: number;
    try {
      fd = openSync(path, (writable ? constants.O_RDWR : constants.O_RDONLY) | constants.O_NOFOLLOW);
    } catch (cause) {
      throw new DynamoError("transfer-stale", "the peer's shared memory is not there", {
        diagnostic: (cause as Error).message,
      });
    }
    try {
      const stat = fstatSync(fd);
      if (!stat.isFile() || stat.uid !== process.getuid?.() || stat.size !== HEADER_BYTES + dataBytes) {
        throw new DynamoError("transfer-stale", "the peer's shared memory is not what its metadata says");
      }
      const mapped = new MappedMemory(fd, dataBytes, { path: undefined, writable });
      if (mapped.isOf(identity)) return mapped;
      mapped.free();
      throw new DynamoError("transfer-stale", "the peer's shared memory was deregistered or belongs to another agent");
    } finally {
      closeSync(fd);
    }
  }

  /** Owner: from now on peers find it. */
  publish({ incarnation, regionId }: MappedIdentity): void {
    this.#header[AT.regionId] = regionId | 0;
    this.#header[AT.incarnationLow] = Number(BigInt.asIntN(32, incarnation));
    this.#header[AT.incarnationHigh] = Number(BigInt.asIntN(32, incarnation >> 32n));
    Atomics.store(this.#header, AT.live, 1);
  }

  /** Owner: peers that mapped it see that it is over. A peer's own mapping may be read-only, so it never comes here. */
  withdraw(): void {
    assert.ok(this.#path !== undefined, "only its owner withdraws shared memory");
    if (!this.#freed) Atomics.store(this.#header, AT.live, 0);
  }

  /** Registered still, and by whom we think. */
  isOf({ incarnation, regionId }: MappedIdentity): boolean {
    const header = this.#header;
    return (
      !this.#freed &&
      header[AT.magic] === MAGIC &&
      header[AT.version] === VERSION &&
      Atomics.load(header, AT.live) === 1 &&
      header[AT.regionId] === (regionId | 0) &&
      header[AT.incarnationLow] === Number(BigInt.asIntN(32, incarnation)) &&
      header[AT.incarnationHigh] === Number(BigInt.asIntN(32, incarnation >> 32n))
    );
  }

  /** Unmaps, and removes the file that `create` made. Idempotent. Nobody may be reading or writing it. */
  free(): void {
    if (this.#freed) return;
    if (this.#path !== undefined) {
      this.withdraw();
      try {
        unlinkSync(this.#path);
      } catch {
        // Somebody cleared the folder: gone is gone.
      }
    }
    this.#freed = true;
    this.#buffer.transfer(0);
    openLibc().munmap(this.#base, this.#mappedBytes);
  }
}
