import { createHash } from "node:crypto";

/**
 * vLLM's own block hashes (`--prefix-caching-hash-algo`), made from tokens: `H((parent's digest, token ids, extra keys))`,
 * told in events as the low 64 bits of the digest, big-endian. Blocks are indexed by our hashes, never by these; they are
 * for checking that both sides mean the same blocks, and for naming a block before the engine has.
 *
 *     sha256_cbor   SHA-256 of canonical CBOR
 *     sha256        SHA-256 of Python's pickle, protocol 5 (vLLM's default)
 *
 * The digest before the first block is that of the process's PYTHONHASHSEED, as text; servers that this project starts have
 * "0". Extra keys are texts here: a cache salt (of the first block) or the name of a LoRA adapter.
 */
export type VllmHashAlgorithm = "sha256" | "sha256_cbor";

/** The digest in front of the first block. `seed` is PYTHONHASHSEED. */
export function vllmNoneHash(algorithm: VllmHashAlgorithm, seed: string): Buffer {
  return sha256(algorithm === "sha256_cbor" ? cborText(seed) : pickled([pickleText(seed)]));
}

export function vllmBlockDigest(
  algorithm: VllmHashAlgorithm,
  parent: Uint8Array,
  tokenIds: ArrayLike<number>,
  extraKeys?: readonly string[],
): Buffer {
  if (algorithm === "sha256_cbor") {
    const keys = extraKeys === undefined ? [Buffer.of(0xf6)] : [cborHead(4, extraKeys.length), ...extraKeys.map(cborText)];
    return sha256(Buffer.concat([cborHead(4, 3), cborHead(2, parent.length), parent, cborInts(tokenIds), ...keys]));
  }
  // Each thing that could be named again takes a slot of the pickle's memory (0x94), whether it is or not.
  const keys = extraKeys === undefined ? [NONE] : [pickleTuple(extraKeys.map(pickleText))];
  return sha256(pickled([pickleBytes(parent), pickleTuple(Array.from(tokenIds, pickleInt)), ...keys, Buffer.of(0x87, 0x94)]));
} // prettier-ignore

/** As events tell it. */
export function vllmEventHash(digest: Uint8Array): bigint {
  return Buffer.from(digest.buffer, digest.byteOffset, digest.length).readBigUInt64BE(digest.length - 8);
}

/** The hashes of all whole blocks of a sequence, as events tell them. */
export function vllmEventHashes(
  tokenIds: Uint32Array,
  blockSizeTokens: number,
  { algorithm, seed, salt }: { readonly algorithm: VllmHashAlgorithm; readonly seed: string; readonly salt?: string },
): bigint[] {
  const hashes: bigint[] = [];
  let parent = vllmNoneHash(algorithm, seed);
  for (let at = 0; at + blockSizeTokens <= tokenIds.length; at += blockSizeTokens) {
    const extra = at === 0 && salt !== undefined ? [salt] : undefined;
    parent = vllmBlockDigest(algorithm, parent, tokenIds.subarray(at, at + blockSizeTokens), extra);
    hashes.push(vllmEventHash(parent));
  }
  return hashes;
}

function sha256(bytes: Uint8Array): Buffer {
  return createHash("sha256").update(bytes).digest();
}

// ---- Canonical CBOR: the shortest form of each number ----

function cborHead(major: number, value: number): Buffer {
  const tag = major << 5;
  if (value < 24) return Buffer.of(tag | value);
  if (value < 0x100) return Buffer.of(tag | 24, value);
  if (value < 0x10000) return Buffer.of(tag | 25, value >> 8, value & 0xff);
  const bytes = Buffer.alloc(5);
  bytes[0] = tag | 26;
  bytes.writeUInt32BE(value, 1);
  return bytes;
}

function cborText(text: string): Buffer {
  const bytes = Buffer.from(text, "utf8");
  return Buffer.concat([cborHead(3, bytes.length), bytes]);
}

function cborInts(values: ArrayLike<number>): Buffer {
  return Buffer.concat([cborHead(4, values.length), ...Array.from(values, (value) => cborHead(0, value))]);
}

// ---- Pickle, protocol 5: a frame with its length, opcodes, a stop ----

const NONE = Buffer.of(0x4e);
const MEMO = Buffer.of(0x94);

function pickled(parts: readonly Buffer[]): Buffer {
  const body = Buffer.concat([...parts, Buffer.of(0x2e)]);
  // A frame is written from four bytes on.
  if (body.length < 4) return Buffer.concat([Buffer.of(0x80, 5), body]);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(body.length));
  return Buffer.concat([Buffer.of(0x80, 5, 0x95), length, body]);
}

function pickleText(text: string): Buffer {
  const bytes = Buffer.from(text, "utf8");
  if (bytes.length > 0xff) {
    const length = Buffer.alloc(4);
    length.writeUInt32LE(bytes.length);
    return Buffer.concat([Buffer.of(0x58), length, bytes, MEMO]);
  }
  return Buffer.concat([Buffer.of(0x8c, bytes.length), bytes, MEMO]);
}

function pickleBytes(bytes: Uint8Array): Buffer {
  return Buffer.concat([Buffer.of(0x43, bytes.length), bytes, MEMO]);
}

function pickleInt(value: number): Buffer {
  if (value < 0x100) return Buffer.of(0x4b, value);
  if (value < 0x10000) return Buffer.of(0x4d, value & 0xff, value >> 8);
  const bytes = Buffer.alloc(5);
  bytes[0] = 0x4a;
  bytes.writeInt32LE(value, 1);
  return bytes;
}

/** Up to three elements have an opcode of their own. */
function pickleTuple(parts: readonly Buffer[]): Buffer {
  if (parts.length >= 1 && parts.length <= 3) {
    return Buffer.concat([...parts, Buffer.of(0x84 + parts.length), MEMO]);
  }
  return Buffer.concat([Buffer.of(0x28), ...parts, Buffer.of(0x74), MEMO]);
}
