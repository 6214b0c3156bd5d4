import type { KvIndexReader, KvIndexStats, OverlapScores } from "./base.ts";
import { CONTROL, FIGURES, FlatKvMemory, type FlatKvShare } from "./flat-kv-memory.ts";
import { PrefixMatcher } from "./prefix-matcher.ts";
import { MAX_READ_ATTEMPTS, ReadGate } from "./write-gate.ts";

/**
 * Lookups in another thread than the writer's, over the same memory. Each answer is one state of the index; a lookup that
 * falls into a write is made again (write-gate.ts). Sees growth by itself. One per thread and index; no lock, no message,
 * nothing to close.
 */
export class FlatKvIndexReader implements KvIndexReader {
  readonly #memory: FlatKvMemory;
  readonly #matcher: PrefixMatcher;
  readonly #gate: ReadGate;
  /** Lookups made again because of a write. */
  retries = 0;
  /** Lookups answered with "nobody holds anything", because a thousand tries fell into writes: say so in a metric. */
  starvedLookups = 0;

  constructor(share: FlatKvShare) {
    this.#memory = new FlatKvMemory(share);
    this.#matcher = new PrefixMatcher(this.#memory);
    this.#gate = new ReadGate(this.#memory.control);
  }

  get rankCount(): number {
    return this.#memory.control[CONTROL.rankCount]!;
  }

  findMatches(sequenceHashes: Uint32Array, blockCount: number, into: OverlapScores): void {
    for (let tries = 0; tries < MAX_READ_ATTEMPTS; tries++) {
      const sequence = this.#gate.enter(tries);
      if (sequence === -1 || !this.#memory.tryRefresh()) continue;
      const record = this.#matcher.match(sequenceHashes, blockCount, into);
      if (!this.#gate.leave(sequence, tries)) continue;
      this.#memory.touched[record] = 1;
      this.retries += tries;
      return;
    }
    this.starvedLookups++;
    into.reset(this.rankCount);
  }

  /** Each figure is true; together they may be of neighbouring moments. */
  stats(): KvIndexStats {
    const { figures } = this.#memory;
    return {
      ranks: figures[FIGURES.ranks]!,
      blocks: figures[FIGURES.blocks]!,
      memberships: figures[FIGURES.memberships]!,
      bytes: figures[FIGURES.bytes]!,
      evictedBlocks: figures[FIGURES.evictedBlocks]!,
    };
  }
}
