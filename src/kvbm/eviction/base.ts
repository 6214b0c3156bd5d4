/**
 * The order in which a pool's inactive blocks go. The pool tells the policy of every change; the policy holds the
 * inactive blocks and names the next victim. Blocks are ids of the pool's arrays, which policies may read.
 */
export interface EvictionPolicy {
  /** Inactive blocks. */
  readonly size: number;
  /** The block became matchable; it is referenced. */
  registered(block: number): void;
  /** The block was asked for once more. Called after `remove` when it was inactive. */
  touched(block: number): void;
  /** The block became inactive. */
  insert(block: number): void;
  /** The block is inactive and no longer to be: somebody took it, or it is dropped. */
  remove(block: number): void;
  /** Takes the next victim out; `size` must be above 0. */
  takeVictim(): number;
  /** The block is not matchable any more; it is not inactive. */
  forgotten(block: number): void;
}

/** What a policy may see of its pool. */
export interface PoolView {
  readonly blockCount: number;
  /** (lo, hi) per block. */
  readonly hashes: Uint32Array;
  /** (lo, hi) of the parent per block; both 0 = none. */
  readonly parents: Uint32Array;
  /** The registered block with this hash, or -1. */
  find(lo: number, hi: number): number;
}
