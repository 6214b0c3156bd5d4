import assert from "node:assert/strict";
import type { TokenBatch, TokenModel } from "./token-model.ts";

/**
 * A deterministic model over a KV memory that is written down plainly: the twin of libllama in the tests of this folder.
 * Its logits depend on every token that the sequence's cells hold, in order, so a block that is lost, foreign or doubled
 * changes the text. Every call is checked: a token without a free cell, a gap, a copy onto something or from nothing.
 */
export interface FakeModelOptions {
  readonly cells: number;
  readonly maxBatchedTokens: number;
  readonly sequenceIds: number;
  /** @default 64 */
  readonly vocabularySize?: number;
}

interface Cell {
  /** Place in the KV memory. */
  readonly address: number;
  readonly position: number;
  readonly token: number;
  owners: number;
}

/** Bytes of one exported cell: position and token. */
const CELL_BYTES = 8;

export class FakeModel implements TokenModel {
  readonly vocabularySize: number;
  readonly batch: TokenBatch;
  readonly #capacity: number;
  /** Per sequence id: position -> cell. */
  readonly #sequences: Map<number, Cell>[];
  #rows: (Float32Array | undefined)[] = [];
  readonly #isTaken: Uint8Array;
  /** Where the search for a free cell begins, as in libllama: behind the last one, or at one that became free before. */
  #head = 0;
  readonly #retired: Cell[] = [];
  /** Without retired ones. */
  usedCells = 0;
  decodedTokens = 0;
  /** Longest batch seen. */
  largestBatch = 0;
  /** Called in every decode, before it computes. */
  onDecode: () => void = () => {};

  constructor(options: FakeModelOptions) {
    const { cells, maxBatchedTokens, sequenceIds, vocabularySize = 64 } = options;
    this.vocabularySize = vocabularySize;
    this.#capacity = cells;
    this.#isTaken = new Uint8Array(cells);
    this.#sequences = Array.from({ length: sequenceIds }, () => new Map<number, Cell>());
    this.batch = {
      tokenIds: new Int32Array(maxBatchedTokens),
      positions: new Int32Array(maxBatchedTokens),
      sequenceIds: new Int32Array(maxBatchedTokens),
      wantsLogits: new Int8Array(maxBatchedTokens),
    };
  }

  /** What the model would generate greedily after `tokenIds`, without any cache. */
  static continuation(tokenIds: readonly number[], count: number, vocabularySize = 64): number[] {
    const tokens = [...tokenIds];
    for (let i = 0; i < count; i++) tokens.push(argmax(logitsAfter(tokens, vocabularySize)));
    return tokens.slice(tokenIds.length);
  }

  decode(tokenCount: number): void {
    this.onDecode();
    const { tokenIds, positions, sequenceIds, wantsLogits } = this.batch;
    assert(tokenCount > 0 && tokenCount <= tokenIds.length, "a batch has 1 to maxBatchedTokens tokens");
    this.largestBatch = Math.max(this.largestBatch, tokenCount);
    this.decodedTokens += tokenCount;
    this.#rows = [];
    for (let i = 0; i < tokenCount; i++) {
      const sequence = this.#cellsOf(sequenceIds[i]!);
      const position = positions[i]!;
      assert.equal(position, sequence.size, "a token follows the last one of its sequence");
      sequence.set(position, this.#place(position, tokenIds[i]!));
      if (wantsLogits[i] === 1) this.#rows[i] = logitsAfter(this.tokensOf(sequenceIds[i]!), this.vocabularySize);
    }
  }

  logits(batchIndex: number): Float32Array {
    const row = this.#rows[batchIndex];
    assert(row !== undefined, "this token asked for logits");
    return row;
  }

  /** The tokens that a sequence sees, by position from `start` on; throws on a gap. */
  tokensOf(sequenceId: number, start = 0, end = start + this.#cellsOf(sequenceId).size): number[] {
    const sequence = this.#cellsOf(sequenceId);
    return Array.from({ length: end - start }, (_, i) => {
      const cell = sequence.get(start + i);
      assert(cell !== undefined, `sequence ${sequenceId} has a cell at position ${start + i}`);
      return cell.token;
    });
  }

  copyCells(from: number, to: number, start: number, end: number): void {
    assert(from !== to, "a copy goes to another sequence");
    for (let position = start; position < end; position++) {
      const cell = this.#cellsOf(from).get(position);
      assert(cell !== undefined, "a copied cell exists");
      assert(!this.#cellsOf(to).has(position), "a copy goes where the sequence has nothing");
      cell.owners++;
      this.#cellsOf(to).set(position, cell);
    }
  }

  removeCells(sequence: number, start: number, end: number): void {
    const cells = this.#cellsOf(sequence);
    for (let position = start; position < end; position++) {
      const cell = cells.get(position);
      if (cell === undefined) continue;
      cells.delete(position);
      if (--cell.owners === 0) this.#free(cell);
    }
  }

  retireCells(sequence: number, start: number, end: number): void {
    const cells = this.#cellsOf(sequence);
    for (let position = start; position < end; position++) {
      const cell = cells.get(position);
      if (cell === undefined) continue;
      assert.equal(cell.owners, 1, "a retired cell is in no other sequence");
      cells.delete(position);
      this.usedCells--;
      this.#retired.push(cell);
    }
  }

  reclaimCells(): void {
    this.usedCells += this.#retired.length;
    for (const cell of this.#retired.splice(0)) this.#free(cell);
  }

  clearCells(): void {
    for (const sequence of this.#sequences) sequence.clear();
    this.#retired.length = 0;
    this.#isTaken.fill(0);
    this.#head = 0;
    this.usedCells = 0;
  }

  /** Whether the sequence's cells lie in the order of its positions. */
  isOrdered(sequence: number): boolean {
    const cells = [...this.#cellsOf(sequence).values()].toSorted((a, b) => a.position - b.position);
    return cells.every((cell, i) => i === 0 || cells[i - 1]!.address < cell.address);
  }

  #place(position: number, token: number): Cell {
    assert(this.usedCells + this.#retired.length < this.#capacity, "there is a free cell for every token");
    let address = this.#head;
    while (this.#isTaken[address % this.#capacity] === 1) address++;
    address %= this.#capacity;
    this.#isTaken[address] = 1;
    this.#head = address + 1;
    this.usedCells++;
    return { address, position, token, owners: 1 };
  }

  #free(cell: Cell): void {
    this.#isTaken[cell.address] = 0;
    this.#head = Math.min(this.#head, cell.address);
    this.usedCells--;
  }

  positionsOf(sequence: number): { start: number; end: number } {
    const positions = [...this.#cellsOf(sequence).keys()];
    return positions.length === 0
      ? { start: 0, end: 0 }
      : { start: Math.min(...positions), end: Math.max(...positions) + 1 };
  }

  stateBytes(sequence: number): number {
    return this.#cellsOf(sequence).size * CELL_BYTES;
  }

  exportState(sequence: number, into: Uint8Array): number {
    const view = new DataView(into.buffer, into.byteOffset, into.byteLength);
    let at = 0;
    for (const { position, token } of this.#cellsOf(sequence).values()) {
      view.setUint32(at, position);
      view.setUint32(at + 4, token);
      at += CELL_BYTES;
    }
    return at;
  }

  importState(sequence: number, from: Uint8Array): boolean {
    const view = new DataView(from.buffer, from.byteOffset, from.byteLength);
    const count = from.length / CELL_BYTES;
    assert.equal(this.#cellsOf(sequence).size, 0);
    for (let i = 0; i < count; i++) {
      const position = view.getUint32(i * CELL_BYTES);
      const token = view.getUint32(i * CELL_BYTES + 4);
      if (token >= this.vocabularySize) return false;
      this.#cellsOf(sequence).set(position, this.#place(position, token));
    }
    return true;
  }

  #cellsOf(sequence: number): Map<number, Cell> {
    const cells = this.#sequences[sequence];
    assert(cells !== undefined, "sequence ids are in range");
    return cells;
  }
}

/** A row in which every token of the history counts, with its place. */
function logitsAfter(tokens: readonly number[], vocabularySize: number): Float32Array {
  let state = 0x9e3779b9;
  for (const token of tokens) {
    state = Math.imul(state ^ token, 0x85ebca6b);
    state ^= state >>> 13;
  }
  const row = new Float32Array(vocabularySize);
  for (let i = 0; i < vocabularySize; i++) {
    const mixed = Math.imul(state ^ Math.imul(i + 1, 0xc2b2ae35), 0x27d4eb2f);
    row[i] = ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 29;
  }
  return row;
}

function argmax(row: Float32Array): number {
  let best = 0;
  for (let i = 1; i < row.length; i++) if (row[i]! > row[best]!) best = i;
  return best;
}
