/**
 * What the engine loop needs from a model: a KV memory of cells that belong to sequences, a batch to fill, and logits.
 * `LlamaContext` is the real one; `fake-model.ts` the deterministic one of the tests, which also checks every call.
 */

/** Cells of the KV memory: one per position and computed token, in one or more sequences. A cell in none is free. */
export interface KvCells {
  /** Adds the cells of `fromSequence` at positions [start, end) to `toSequence`, which must have none there. */
  copyCells(fromSequence: number, toSequence: number, start: number, end: number): void;
  /** Takes the cells at [start, end) out of the sequence; a cell that is in no other becomes free. */
  removeCells(sequence: number, start: number, end: number): void;
  /** The same for cells that are in no other sequence, but they become free only with the next `reclaimCells`. */
  retireCells(sequence: number, start: number, end: number): void;
  /** New cells go behind the ones before them for as long as nothing is freed in between; this frees what was retired. */
  reclaimCells(): void;
}

/** Parallel arrays, length = tokens of the largest batch, owned by the model and written in place. */
export interface TokenBatch {
  readonly tokenIds: Int32Array;
  /** Position in the sequence; the tokens of a sequence must follow its last one without a gap. */
  readonly positions: Int32Array;
  readonly sequenceIds: Int32Array;
  /** 1 where logits are wanted, else 0. */
  readonly wantsLogits: Int8Array;
}

export interface TokenModel extends KvCells {
  readonly vocabularySize: number;
  readonly batch: TokenBatch;
  /** Computes the first `tokenCount` tokens of the batch. Blocks. Throws `engine-failed`. */
  decode(tokenCount: number): void;
  /** Logits after the token at this index of the last batch; length = vocabulary; valid until the next decode. */
  logits(batchIndex: number): Float32Array;
  clearCells(): void;
  /** Positions [start, end) that the sequence spans. */
  positionsOf(sequence: number): { start: number; end: number };
  /** Size of `exportState`'s result for the sequence as it is. */
  stateBytes(sequence: number): number;
  /** Writes the cells of the sequence; returns the bytes written. */
  exportState(sequence: number, into: Uint8Array): number;
  /** Replaces the cells of the sequence by exported ones; false when the bytes are not acceptable or no cell is free. */
  importState(sequence: number, from: Uint8Array): boolean;
}
