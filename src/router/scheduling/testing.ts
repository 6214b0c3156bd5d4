import fc from "fast-check";
import { blockHashSeed, hashBlocks } from "../../tokens/index.ts";

/** For tests of what is kept per chain of blocks: prompts as paths in a small tree, so that they share prefixes often. */
export const BLOCK_SIZE = 4;

/** A prompt of one block per step; equal steps from the start on are equal blocks. */
export function chainOf(path: readonly number[]): { readonly hashes: Uint32Array; readonly blockCount: number } {
  const tokens = Uint32Array.from(path.flatMap((step) => Array.from({ length: BLOCK_SIZE }, () => step)));
  const { sequenceHashes, blockCount } = hashBlocks(tokens, BLOCK_SIZE, blockHashSeed());
  return { hashes: sequenceHashes, blockCount };
}

export const aPath = fc.array(fc.nat(2), { maxLength: 7 });
