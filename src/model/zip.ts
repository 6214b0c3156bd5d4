import { createReadStream } from "node:fs";
import { open, type FileHandle } from "node:fs/promises";
import { pipeline } from "node:stream/promises";
import { Transform, type Writable } from "node:stream";
import { createInflateRaw } from "node:zlib";

/**
 * Takes one member out of a zip file on disk, streaming. Reads the end record and the central directory (APPNOTE 4.3),
 * with limits; what local headers claim is used for nothing but finding where the data starts. Stored and deflated
 * members, CRC-32 checked; no ZIP64 (a file it would be needed for is over our limits), no encryption, no split archives.
 */
export const ZIP_LIMITS = {
  /** Wheels have tens of members. */
  members: 65_535,
  directoryBytes: 16 * 1024 * 1024,
  /** 22 bytes of end record, then a comment of at most 65,535. */
  endBytes: 22 + 65_535,
} as const;

export interface ZipMember {
  readonly name: string;
  readonly compressedBytes: number;
  readonly bytes: number;
  readonly crc32: number;
  /** 0 stored, 8 deflated. */
  readonly method: 0 | 8;
  readonly headerOffset: number;
}

/** Any way in which a zip file is not one we read; the text says which. */
export class ZipError extends Error {
  override readonly name = "ZipError";
}

/** Finds a member by its exact name. Throws `ZipError`, also when there is none. */
export async function findZipMember(path: string, name: string): Promise<ZipMember> {
  const file = await open(path, "r");
  try {
    const { size } = await file.stat();
    const directory = await readDirectory(file, size);
    const members = parseDirectory(directory.bytes, directory.count);
    const member = members.find((candidate) => candidate.name === name);
    if (member === undefined) throw new ZipError(`no member ${JSON.stringify(name)}`);
    return member;
  } finally {
    await file.close();
  }
}

/** Writes the member's bytes to `target` and ends it. Throws `ZipError` when they do not match the directory. */
export async function extractZipMember(
  path: string,
  member: ZipMember,
  target: Writable,
  signal: AbortSignal,
): Promise<void> {
  const start = await dataOffset(path, member);
  const { crc32 } = await import("node:zlib");
  let bytes = 0;
  let crc = 0;
  const check = new Transform({
    transform(chunk: Buffer, _encoding, done) {
      bytes += chunk.length;
      // Stops a deflate bomb at the size the directory promised.
      if (bytes > member.bytes)
        return done(new ZipError(`member is longer than the ${member.bytes} bytes it declares`));
      crc = crc32(chunk, crc);
      done(null, chunk);
    },
  });
  const end = start + member.compressedBytes - 1;
  const source = member.compressedBytes === 0 ? [] : createReadStream(path, { start, end, highWaterMark: 256 * 1024 });
  try {
    if (member.method === 8)
      await pipeline(source, createInflateRaw({ chunkSize: 256 * 1024 }), check, target, { signal });
    else await pipeline(source, check, target, { signal });
  } catch (error) {
    if (String((error as { code?: unknown }).code).startsWith("Z_")) {
      throw new ZipError(`deflated data is damaged: ${(error as Error).message}`, { cause: error });
    }
    throw error;
  }
  if (bytes !== member.bytes) throw new ZipError(`member has ${bytes} bytes, declared were ${member.bytes}`);
  if (crc !== member.crc32) throw new ZipError("member's CRC-32 does not match");
}

const END_SIGNATURE = 0x0605_4b50;
const DIRECTORY_SIGNATURE = 0x0201_4b50;
const LOCAL_SIGNATURE = 0x0403_4b50;

async function readDirectory(file: FileHandle, size: number): Promise<{ bytes: Buffer; count: number }> {
  const tailBytes = Math.min(size, ZIP_LIMITS.endBytes);
  const tail = await readAt(file, size - tailBytes, tailBytes);
  for (let at = tail.length - 22; at >= 0; at--) {
    if (tail.readUInt32LE(at) !== END_SIGNATURE) continue;
    // The comment must fill exactly the rest, or this is data that looks like a signature.
    if (at + 22 + tail.readUInt16LE(at + 20) !== tail.length) continue;
    const disk = tail.readUInt16LE(at + 4);
    const count = tail.readUInt16LE(at + 10);
    const byteLength = tail.readUInt32LE(at + 12);
    const offset = tail.readUInt32LE(at + 16);
    if (disk !== 0 || tail.readUInt16LE(at + 8) !== count) throw new ZipError("split archives are not read");
    if (offset === 0xffff_ffff || count === 0xffff) throw new ZipError("ZIP64 archives are not read");
    if (byteLength > ZIP_LIMITS.directoryBytes) {
      throw new ZipError(`directory of ${byteLength} bytes is over the limit of ${ZIP_LIMITS.directoryBytes}`);
    }
    if (offset + byteLength > size - tailBytes + at) throw new ZipError("directory lies outside the file");
    return { bytes: await readAt(file, offset, byteLength), count };
  }
  throw new ZipError("not a zip file, or cut short: no end record");
}

/** Exported for tests: parses `count` central directory entries. */
export function parseDirectory(bytes: Buffer, count: number): ZipMember[] {
  const members: ZipMember[] = [];
  let at = 0;
  for (let i = 0; i < count; i++) {
    if (at + 46 > bytes.length || bytes.readUInt32LE(at) !== DIRECTORY_SIGNATURE) {
      throw new ZipError(`directory entry ${i} of ${count} is damaged or missing`);
    }
    const flags = bytes.readUInt16LE(at + 8);
    const method = bytes.readUInt16LE(at + 10);
    const nameLength = bytes.readUInt16LE(at + 28);
    const next = at + 46 + nameLength + bytes.readUInt16LE(at + 30) + bytes.readUInt16LE(at + 32);
    if (next > bytes.length) throw new ZipError(`directory entry ${i} reaches past the directory`);
    const name = bytes.toString("utf8", at + 46, at + 46 + nameLength);
    // A member we could not read is only an error for who wants it.
    if ((flags & 1) === 0 && (method === 0 || method === 8)) {
      members.push({
        name,
        method,
        crc32: bytes.readUInt32LE(at + 16),
        compressedBytes: bytes.readUInt32LE(at + 20),
        bytes: bytes.readUInt32LE(at + 24),
        headerOffset: bytes.readUInt32LE(at + 42),
      });
    }
    at = next;
  }
  return members;
}

async function dataOffset(path: string, member: ZipMember): Promise<number> {
  const file = await open(path, "r");
  try {
    const { size } = await file.stat();
    if (member.headerOffset + 30 > size) throw new ZipError("member lies outside the file");
    const header = await readAt(file, member.headerOffset, 30);
    if (header.readUInt32LE(0) !== LOCAL_SIGNATURE) throw new ZipError("member has no local header");
    const start = member.headerOffset + 30 + header.readUInt16LE(26) + header.readUInt16LE(28);
    if (start + member.compressedBytes > size) throw new ZipError("member lies outside the file");
    return start;
  } finally {
    await file.close();
  }
}

async function readAt(file: FileHandle, offset: number, byteLength: number): Promise<Buffer> {
  const bytes = Buffer.alloc(byteLength);
  let filled = 0;
  while (filled < byteLength) {
    const { bytesRead } = await file.read(bytes, filled, byteLength - filled, offset + filled);
    if (bytesRead === 0) throw new ZipError("the file ends early");
    filled += bytesRead;
  }
  return bytes;
}
