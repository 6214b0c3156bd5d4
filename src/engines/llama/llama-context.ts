import assert from "node:assert/strict";
import { DynamoError } from "../../errors/index.ts";
import { openLibllama, type Libllama, type LibraryLine, type Pointer } from "./libllama.ts";
import type { TokenBatch, TokenModel } from "./token-model.ts";

/**
 * One model with one context over libllama: a unified KV memory of `cells` cells that belong to numbered sequences, and
 * one batch whose arrays are written in place. Every argument is checked here before a native call, because an assertion
 * inside ggml ends the process; a failed check is a defect of ours and throws.
 *
 * Owned by the engine's thread; every call blocks it. `close` frees all native memory.
 */
export interface LlamaContextOptions {
  readonly modelPath: string;
  /** KV cells for all sequences together. */
  readonly cells: number;
  readonly maxBatchedTokens: number;
  /** Rows of logits that one batch may ask for. */
  readonly maxLogitRows: number;
  /** Sequence ids are 0 to `sequenceIds - 1`. At most 255: the library has 256, and one is for retired cells. */
  readonly sequenceIds: number;
  readonly threads: number;
  /** Logits and KV bytes do not depend on what else is in the batch, nor on how a prompt was cut. */
  readonly batchInvariant: boolean;
}

/** The library computes a batch in pieces of this size; larger ones cost memory and gain nothing on a CPU. */
const MAX_MICRO_BATCH_TOKENS = 512;
/**
 * From 64 tokens on the library's CPU attention works in tiles of 64 x 64 and adds in another order than below. Below, a
 * token's result depends on the tokens before it and on nothing else, as long as their cells lie in order.
 */
const MAX_INVARIANT_TOKENS = 63;
/** Of callers; the library has one more. */
export const MAX_SEQUENCE_IDS = 255;
/** Beyond every position. */
const END_OF_POSITIONS = 2 ** 31 - 1;
const MAX_LOG_LINES = 50;

const DECODE_OK = 0;
/** Copy everything of a sequence, not only parts of it. */
const STATE_WHOLE = 0;

export class LlamaContext implements TokenModel {
  readonly libraryVersion: string;
  readonly vocabularySize: number;
  /** Context length that the model was trained for. */
  readonly trainedContextLength: number;
  readonly batch: TokenBatch;
  /** What the library warned about while it loaded. */
  readonly startLog: readonly LibraryLine[];
  readonly #library: Libllama;
  readonly #options: LlamaContextOptions;
  readonly #model: Pointer;
  readonly #context: Pointer;
  readonly #memory: Pointer;
  readonly #batchMemory: Pointer;
  readonly #batchStruct: Record<string, number | bigint | null>;
  #logitsAt: Pointer = 0n;
  #logits: Float32Array = new Float32Array(0);
  #closed = false;

  /** Throws `library-unavailable`, `model-file-invalid`. Cost: 0.2 s for a 100 MB file in the page cache. */
  constructor(options: LlamaContextOptions) {
    const library = openLibllama();
    const { functions } = library;
    const lines: LibraryLine[] = [];
    this.startLog = lines;
    this.#library = library;
    this.#options = options;
    this.libraryVersion = library.version;
    // The library's log is the only explanation it gives.
    const failure = (reason: "model-file-invalid" | "engine-failed", text: string): DynamoError =>
      new DynamoError(reason, text, { diagnostic: lines.map((line) => line.text).join("; ") });
    const keep = (line: LibraryLine): void => void (lines.length < MAX_LOG_LINES && lines.push(line));

    const model = library.captureLog(keep, () => functions.modelLoad(options.modelPath, library.modelDefaults()));
    if (model === null) throw failure("model-file-invalid", "the model could not be loaded");
    this.#model = model;
    this.vocabularySize = functions.vocabularySize(functions.modelVocabulary(model));
    this.trainedContextLength = functions.modelTrainedContext(model);
    const kind = unsupportedKind(library, model, this.vocabularySize);
    if (kind !== undefined) {
      functions.modelFree(model);
      throw new DynamoError("model-file-invalid", `the model is ${kind}, which this engine does not run`);
    }

    const context = library.captureLog(keep, () => functions.contextCreate(model, contextParams(library, options)));
    if (context === null) {
      functions.modelFree(model);
      throw failure("engine-failed", "the model's context could not be created");
    }
    this.#context = context;
    this.#memory = functions.contextMemory(context);
    const allocation = allocateBatch(library, options.maxBatchedTokens);
    this.batch = allocation.batch;
    this.#batchMemory = allocation.address;
    this.#batchStruct = allocation.struct;
    this.#checkContext();
  }

  /** The second half of the layout check: what we wrote into the params is what the library read. */
  #checkContext(): void {
    const { functions } = this.#library;
    const { cells, maxBatchedTokens, sequenceIds, threads } = this.#options;
    const context = this.#context;
    const actual = [
      functions.contextCells(context) >= cells,
      functions.contextBatch(context) >= maxBatchedTokens,
      functions.contextSequences(context) === sequenceIds + 1,
      functions.contextThreads(context) === threads,
    ];
    if (actual.every(Boolean)) return;
    this.close();
    throw new DynamoError("library-unavailable", "the inference library has an unexpected layout", {
      diagnostic: `cells, batch, sequences, threads as asked for: ${actual.join(", ")}`,
    });
  }

  decode(tokenCount: number): void {
    const { batch } = this;
    const { maxBatchedTokens, sequenceIds } = this.#options;
    assert(tokenCount > 0 && tokenCount <= maxBatchedTokens, "a batch has 1 to maxBatchedTokens tokens");
    let rows = 0;
    for (let i = 0; i < tokenCount; i++) {
      assert(batch.tokenIds[i]! >= 0 && batch.tokenIds[i]! < this.vocabularySize, "token ids are in the vocabulary");
      assert(batch.sequenceIds[i]! >= 0 && batch.sequenceIds[i]! < sequenceIds, "sequence ids are in range");
      assert(batch.positions[i]! >= 0, "positions are not negative");
      rows += batch.wantsLogits[i]!;
    }
    assert(rows <= this.#options.maxLogitRows, "a batch asks for at most maxLogitRows rows");
    const { functions } = this.#library;
    this.#batchStruct["n_tokens"] = tokenCount;
    const code = functions.decode(this.#context, this.#batchStruct);
    if (code !== DECODE_OK) {
      throw new DynamoError("engine-failed", "the model failed to compute a step", {
        diagnostic: `llama_decode returned ${code} for ${tokenCount} tokens`,
      });
    }
    if (rows > 0) this.#viewLogits(rows);
  }

  /** The library keeps the rows in one buffer that moves only when it grows: one view serves many steps. */
  #viewLogits(rows: number): void {
    const address = this.#library.functions.logits(this.#context);
    assert(address !== null, "logits were asked for and must be there");
    const length = rows * this.vocabularySize;
    if (address === this.#logitsAt && length <= this.#logits.length) return;
    this.#logits = new Float32Array(this.#library.view(address, length * 4));
    this.#logitsAt = address;
  }

  logits(batchIndex: number): Float32Array {
    const address = this.#library.functions.logitsOfToken(this.#context, batchIndex);
    assert(address !== null, "this token asked for logits");
    const start = Number(address - this.#logitsAt) / 4;
    assert(start >= 0 && start + this.vocabularySize <= this.#logits.length, "the row lies inside the logits");
    return this.#logits.subarray(start, start + this.vocabularySize);
  }

  copyCells(fromSequence: number, toSequence: number, start: number, end: number): void {
    this.#checkRange(fromSequence, start, end);
    this.#checkRange(toSequence, start, end);
    this.#library.functions.sequenceCopy(this.#memory, fromSequence, toSequence, start, end);
  }

  removeCells(sequence: number, start: number, end: number): void {
    this.#checkRange(sequence, start, end);
    const removed = this.#library.functions.sequenceRemove(this.#memory, sequence, start, end);
    assert(removed, "this kind of memory can remove any range");
  }

  /** Cells keep no free place: they go to a sequence of their own. */
  retireCells(sequence: number, start: number, end: number): void {
    this.#checkRange(sequence, start, end);
    const { functions } = this.#library;
    functions.sequenceCopy(this.#memory, sequence, this.#options.sequenceIds, start, end);
    functions.sequenceRemove(this.#memory, sequence, start, end);
  }

  reclaimCells(): void {
    this.#library.functions.sequenceRemove(this.#memory, this.#options.sequenceIds, 0, END_OF_POSITIONS);
  }

  #checkRange(sequence: number, start: number, end: number): void {
    assert(sequence >= 0 && sequence < this.#options.sequenceIds, "sequence ids are in range");
    assert(start >= 0 && end > start, "a range has a start and an end after it");
  }

  clearCells(): void {
    this.#library.functions.memoryClear(this.#memory, false);
  }

  positionsOf(sequence: number): { start: number; end: number } {
    const { functions } = this.#library;
    const first = functions.sequenceFirst(this.#memory, sequence);
    return { start: Math.max(first, 0), end: functions.sequenceLast(this.#memory, sequence) + 1 };
  }

  stateBytes(sequence: number): number {
    return this.#library.functions.stateBytes(this.#context, sequence, STATE_WHOLE);
  }

  exportState(sequence: number, into: Uint8Array): number {
    return this.#library.functions.stateGet(this.#context, into, into.byteLength, sequence, STATE_WHOLE);
  }

  importState(sequence: number, from: Uint8Array): boolean {
    return this.#library.functions.stateSet(this.#context, from, from.byteLength, sequence, STATE_WHOLE) > 0;
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    const { functions } = this.#library;
    functions.contextFree(this.#context);
    functions.modelFree(this.#model);
    this.#library.free(this.#batchMemory);
    this.#logits = new Float32Array(0);
  }
}

function unsupportedKind(library: Libllama, model: Pointer, vocabularySize: number): string | undefined {
  const { functions } = library;
  if (functions.modelHasEncoder(model)) return "an encoder";
  // Their memory cannot be cut at a block's border.
  if (functions.modelIsRecurrent(model) || functions.modelIsHybrid(model)) return "recurrent";
  return vocabularySize > 0 ? undefined : "without a vocabulary";
}

function contextParams(library: Libllama, options: LlamaContextOptions): Record<string, unknown> {
  return {
    ...library.contextDefaults(),
    n_ctx: options.cells,
    n_batch: options.maxBatchedTokens,
    n_ubatch: Math.min(
      options.maxBatchedTokens,
      options.batchInvariant ? MAX_INVARIANT_TOKENS : MAX_MICRO_BATCH_TOKENS,
    ),
    n_seq_max: options.sequenceIds + 1,
    // The library reserves a row per sequence and asserts that it may.
    n_outputs_max: Math.max(options.maxLogitRows, options.sequenceIds + 1),
    n_threads: options.threads,
    n_threads_batch: options.threads,
    // All sequences in one pool of cells: a cell can belong to several, which is how prefixes are shared.
    kv_unified: true,
  };
}

/** Native memory for the arrays of a batch, one sequence per token, with views to write them in place. */
function allocateBatch(
  library: Libllama,
  capacity: number,
): { batch: TokenBatch; address: Pointer; struct: Record<string, number | bigint | null> } {
  // In this order every array is aligned: 8-byte pointers, then 4-byte numbers, then bytes.
  const { address, view } = library.allocate(capacity * (8 + 4 * 4 + 1));
  const pointers = new BigUint64Array(view, 0, capacity);
  const at = (array: number): number => capacity * (8 + 4 * array);
  const sequencesAt = address + BigInt(at(3));
  for (let i = 0; i < capacity; i++) pointers[i] = sequencesAt + BigInt(4 * i);
  new Int32Array(view, at(2), capacity).fill(1);
  return {
    address,
    batch: {
      tokenIds: new Int32Array(view, at(0), capacity),
      positions: new Int32Array(view, at(1), capacity),
      sequenceIds: new Int32Array(view, at(3), capacity),
      wantsLogits: new Int8Array(view, at(4), capacity),
    },
    struct: {
      n_tokens: 0,
      token: address + BigInt(at(0)),
      embd: null,
      pos: address + BigInt(at(1)),
      n_seq_id: address + BigInt(at(2)),
      seq_id: address,
      logits: address + BigInt(at(4)),
    },
  };
}
