import assert from "node:assert/strict";
import { addHashPairs, compareHashPairs } from "./hash-pair.ts";
import { tryHashBlocksInWasm } from "./xxh3-wasm.ts";
import { xxh3_64, xxh3_64Into, xxh3_64OfPairInto, type HashPair } from "./xxh3.ts";

/**
 * Block identity: the one place where hashes of token blocks are computed. The recipe is the public one that Dynamo's
 * routers and publishers use, so that ours and theirs agree bit for bit:
 *
 *   seed        1337, plus XXH3(lora name, 0), plus XXH3(cache namespace, 1), each only when not empty
 *   local[i]    XXH3(tokens of block i as u32 little-endian ++ multimodal hashes, ascending, u64 little-endian; seed)
 *   sequence[0] local[0]
 *   sequence[i] XXH3(le64(sequence[i - 1]) ++ le64(local[i]), 1337)
 *
 * Only complete blocks have a hash. Golden values: test/fixtures/golden-block-hashes.json, pinned by block-hash.test.ts.
 * Cost: 10,000 tokens in blocks of 16 take 15 to 25 us (WebAssembly); benchmarks/hashing.ts measures it. Host order is
 * taken to be little-endian, as on every platform Node 24 is built for but s390x.
 */
const BASE_SEED: HashPair = [1337, 0];
const ROOT_OF_LORA: HashPair = [0, 0];
const ROOT_OF_NAMESPACE: HashPair = [1, 0];
const utf8 = new TextEncoder();

/** Seed of the local hashes: who may share blocks with whom. Empty and absent names are the same. */
export function blockHashSeed(identity: { loraName?: string; cacheNamespace?: string } = {}): HashPair {
  let seed = BASE_SEED;
  if (identity.loraName) seed = addHashPairs(seed, xxh3_64(utf8.encode(identity.loraName), ROOT_OF_LORA));
  if (identity.cacheNamespace) {
    seed = addHashPairs(seed, xxh3_64(utf8.encode(identity.cacheNamespace), ROOT_OF_NAMESPACE));
  }
  return seed;
}

/** Hashes as (lo, hi) pairs: block i is at 2i and 2i + 1. length = 2 x blockCount. Owned by the caller. */
export interface BlockHashes {
  readonly blockCount: number;
  readonly localHashes: Uint32Array;
  readonly sequenceHashes: Uint32Array;
}

export interface HashBlocksOptions {
  /** Sequence hash of the block before the first token, to go on with a chain. @default the chain starts here */
  readonly parent?: HashPair;
  /** Windows of one token more than a block, as Eagle and MTP engines hash; stride stays the block. @default false */
  readonly eagle?: boolean;
  /** Hashes of the multimodal objects in each block, by block index, in any order. @default none */
  readonly multimodalHashes?: readonly (readonly HashPair[] | undefined)[];
}

/**
 * Local and sequence hashes of all complete blocks of `tokenIds` (length = tokens, read only).
 * @example hashBlocks(tokenIds, 16, blockHashSeed()).sequenceHashes
 */
export function hashBlocks(
  tokenIds: Uint32Array,
  blockSizeTokens: number,
  seed: HashPair,
  options: HashBlocksOptions = {},
): BlockHashes {
  assert(Number.isInteger(blockSizeTokens) && blockSizeTokens > 0, "a block has at least one token");
  const windowTokens = blockSizeTokens + (options.eagle === true ? 1 : 0);
  const blockCount = Math.max(0, Math.floor((tokenIds.length - windowTokens) / blockSizeTokens) + 1);
  const hashes: BlockHashes = {
    blockCount,
    localHashes: new Uint32Array(2 * blockCount),
    sequenceHashes: new Uint32Array(2 * blockCount),
  };
  const shape = { blockSizeTokens, windowTokens, seed, parent: options.parent };
  if (options.multimodalHashes !== undefined || !tryHashBlocksInWasm(tokenIds, shape, hashes)) {
    hashBlocksInTypeScript(tokenIds, shape, hashes, options.multimodalHashes);
  }
  return hashes;
}

/** How `hashBlocks` cuts a sequence; what its two implementations share. */
export interface BlockShape {
  readonly blockSizeTokens: number;
  /** Tokens that enter one local hash: the block size, or one more. */
  readonly windowTokens: number;
  readonly seed: HashPair;
  readonly parent: HashPair | undefined;
}

/** The plain version: oracle of the WebAssembly one, and the way for multimodal blocks. */
export function hashBlocksInTypeScript(
  tokenIds: Uint32Array,
  shape: BlockShape,
  out: BlockHashes,
  multimodalHashes: HashBlocksOptions["multimodalHashes"] = [],
): void {
  const { localHashes, sequenceHashes } = out;
  const [seedLo, seedHi] = shape.seed;
  let parent = shape.parent;
  for (let block = 0; block < out.blockCount; block++) {
    const byteOffset = tokenIds.byteOffset + 4 * block * shape.blockSizeTokens;
    const tokenBytes = new Uint8Array(tokenIds.buffer, byteOffset, 4 * shape.windowTokens);
    const bytes = withMultimodalHashes(tokenBytes, multimodalHashes[block] ?? []);
    const at = 2 * block;
    xxh3_64Into(bytes, bytes.length, seedLo, seedHi, localHashes, at);
    const localLo = localHashes[at]!;
    const localHi = localHashes[at + 1]!;
    if (parent === undefined) {
      sequenceHashes[at] = localLo;
      sequenceHashes[at + 1] = localHi;
    } else {
      nextSequenceHash(parent[0], parent[1], localLo, localHi, sequenceHashes, at);
    }
    parent = [sequenceHashes[at]!, sequenceHashes[at + 1]!];
  }
}

/** One step of the chain: writes the child's sequence hash to `out[index]`, `out[index + 1]`. */
export function nextSequenceHash(
  parentLo: number,
  parentHi: number,
  localLo: number,
  localHi: number,
  out: Uint32Array,
  index: number,
): void {
  xxh3_64OfPairInto(parentLo, parentHi, localLo, localHi, BASE_SEED[0], BASE_SEED[1], out, index);
}

function withMultimodalHashes(tokenBytes: Uint8Array, hashes: readonly HashPair[]): Uint8Array {
  if (hashes.length === 0) return tokenBytes;
  const bytes = new Uint8Array(tokenBytes.length + 8 * hashes.length);
  bytes.set(tokenBytes);
  const view = new DataView(bytes.buffer, tokenBytes.length);
  hashes.toSorted(compareHashPairs).forEach(([lo, hi], i) => {
    view.setUint32(8 * i, lo, true);
    view.setUint32(8 * i + 4, hi, true);
  });
  return bytes;
}
