import { blockHashSeed, hashBlocks, type HashPair } from "../../tokens/index.ts";

/**
 * One request's tokens and where they are in the KV memory. The scheduler moves it between waiting and running; the
 * engine loop appends what it samples.
 *
 *   tokenIds   [ prompt ............ | generated ...... ]   tokenCount
 *   computed   [ in the KV memory ............. ]           computedCount, at most tokenCount
 *   blocks     [ registered, shared ....... | private ]     blockCount + privateCount blocks cover what is computed
 */
export interface SequenceOptions {
  /** Prompt, and behind it what was generated elsewhere. Taken over: not changed by others from now on. */
  readonly tokenIds: Uint32Array;
  readonly promptCount: number;
  readonly blockSizeTokens: number;
  readonly cacheNamespace: string;
  /** Higher is sooner. */
  readonly priority: number;
  /** Serial number: earlier is sooner among equals. */
  readonly arrival: number;
  /** False: no cached block is used for the prompt (its own blocks are registered all the same). */
  readonly usesCache: boolean;
}

export const NOT_RUNNING = -1;

export class Sequence {
  tokenIds: Uint32Array;
  tokenCount: number;
  readonly promptCount: number;
  readonly priority: number;
  readonly arrival: number;
  readonly usesCache: boolean;
  /** Id in the KV memory while running. */
  cellsId = NOT_RUNNING;
  computedCount = 0;
  /** Tokens that the planned step computes. */
  plannedCount = 0;
  /** Logits rows per planned token, not only for the last one. */
  wantsAllLogits = false;
  blocks = new Int32Array(0);
  blockCount = 0;
  privateCount = 0;
  /** Of the prompt, when it was first admitted. */
  cachedTokenCount = 0;
  wasAdmitted = false;
  readonly #blockSizeTokens: number;
  readonly #seed: HashPair;
  /** (lo, hi) pairs of all blocks that are hashed; grow with the tokens. */
  sequenceHashes: Uint32Array;
  localHashes: Uint32Array;
  hashedBlocks: number;

  constructor(options: SequenceOptions) {
    this.tokenIds = options.tokenIds;
    this.tokenCount = options.tokenIds.length;
    this.promptCount = options.promptCount;
    this.priority = options.priority;
    this.arrival = options.arrival;
    this.usesCache = options.usesCache;
    this.#blockSizeTokens = options.blockSizeTokens;
    this.#seed = blockHashSeed({ cacheNamespace: options.cacheNamespace });
    const hashes = hashBlocks(options.tokenIds, options.blockSizeTokens, this.#seed);
    this.sequenceHashes = hashes.sequenceHashes;
    this.localHashes = hashes.localHashes;
    this.hashedBlocks = hashes.blockCount;
  }

  /** Tokens known but not in the KV memory. 1 while decoding. */
  get remainingCount(): number {
    return this.tokenCount - this.computedCount;
  }

  get generatedCount(): number {
    return this.tokenCount - this.promptCount;
  }

  append(tokenId: number): void {
    if (this.tokenCount === this.tokenIds.length) {
      const grown = new Uint32Array(Math.max(64, this.tokenCount * 2));
      grown.set(this.tokenIds);
      this.tokenIds = grown;
    }
    this.tokenIds[this.tokenCount++] = tokenId;
  }

  /** Sees to it that `blocks` has room for all tokens known so far and one block more. */
  reserveBlockIds(): void {
    const needed = Math.floor(this.tokenCount / this.#blockSizeTokens) + 2;
    if (this.blocks.length >= needed) return;
    const grown = new Int32Array(needed * 2);
    grown.set(this.blocks);
    this.blocks = grown;
  }

  /** Hashes the first `blockCount` blocks, as far as they are not yet; their tokens must be known. */
  hashUpTo(blockCount: number): void {
    const from = this.hashedBlocks;
    if (from >= blockCount) return;
    const size = this.#blockSizeTokens;
    const hashes = hashBlocks(
      this.tokenIds.subarray(from * size, blockCount * size),
      size,
      this.#seed,
      from === 0 ? {} : { parent: [this.sequenceHashes[2 * from - 2]!, this.sequenceHashes[2 * from - 1]!] },
    );
    this.sequenceHashes = withTail(this.sequenceHashes, 2 * from, hashes.sequenceHashes);
    this.localHashes = withTail(this.localHashes, 2 * from, hashes.localHashes);
    this.hashedBlocks = blockCount;
  }
}

/** `head` with `tail` at `at`, in place while there is room. */
function withTail(head: Uint32Array, at: number, tail: Uint32Array): Uint32Array {
  let target = head;
  if (at + tail.length > head.length) {
    target = new Uint32Array(2 * (at + tail.length));
    target.set(head.subarray(0, at));
  }
  target.set(tail, at);
  return target;
}
