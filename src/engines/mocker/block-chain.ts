import { hashBlocks, type HashPair } from "../../tokens/index.ts";

/**
 * The hashes of a sequence that grows: of every full block so far, by the public recipe. Keeps the tokens of the unfinished
 * block only. Hashes are (lo, hi) pairs in arrays that are longer than `blockCount`: only their heads count, and growing
 * replaces them.
 */
export class BlockChain {
  readonly #blockSizeTokens: number;
  readonly #seed: HashPair;
  readonly #tail: Uint32Array;
  #tailLength: number;
  sequenceHashes: Uint32Array;
  localHashes: Uint32Array;
  blockCount: number;

  constructor(tokenIds: Uint32Array, blockSizeTokens: number, seed: HashPair) {
    this.#blockSizeTokens = blockSizeTokens;
    this.#seed = seed;
    const hashes = hashBlocks(tokenIds, blockSizeTokens, seed);
    this.blockCount = hashes.blockCount;
    this.sequenceHashes = hashes.sequenceHashes;
    this.localHashes = hashes.localHashes;
    this.#tail = new Uint32Array(blockSizeTokens);
    const rest = tokenIds.subarray(hashes.blockCount * blockSizeTokens);
    this.#tail.set(rest);
    this.#tailLength = rest.length;
  }

  append(tokenId: number): void {
    this.#tail[this.#tailLength++] = tokenId;
    if (this.#tailLength === this.#blockSizeTokens) this.#closeBlock();
  }

  #closeBlock(): void {
    const at = 2 * this.blockCount;
    const parent: { parent?: HashPair } =
      at === 0 ? {} : { parent: [this.sequenceHashes[at - 2]!, this.sequenceHashes[at - 1]!] };
    const { sequenceHashes, localHashes } = hashBlocks(this.#tail, this.#blockSizeTokens, this.#seed, parent);
    if (at === this.sequenceHashes.length) {
      this.sequenceHashes = grown(this.sequenceHashes);
      this.localHashes = grown(this.localHashes);
    }
    this.sequenceHashes.set(sequenceHashes, at);
    this.localHashes.set(localHashes, at);
    this.blockCount++;
    this.#tailLength = 0;
  }
}

function grown(hashes: Uint32Array): Uint32Array {
  // Output is usually shorter than the prompt: a half more, not twice.
  const larger = new Uint32Array(hashes.length + 2 * Math.max(8, hashes.length >> 2));
  larger.set(hashes);
  return larger;
}
