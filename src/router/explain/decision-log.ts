import type { RestoredBlocks } from "../../protocol/index.ts";
import type { LeftOut } from "../eligibility.ts";
import type { RouteStage } from "../route-request.ts";
import type { WorkerCandidate } from "../policies/index.ts";
import { CandidateColumns, type CostWeights, type PromptShape } from "../scheduling/cost.ts";

/**
 * The last decisions, for people. A decision leaves references and copied numbers only; texts are made when somebody
 * asks (render.ts). Bounded twice: 4,096 records, and 16 MiB of numbers:
 *
 *     records   ring of 4,096                arena   Float32Array, used round and round; a record's 9 columns of
 *               [r0][r1]...[rn]                      `count` numbers lie at `begin`, and are gone once overwritten
 *
 * The arena starts small and doubles while live records would be overwritten: with four workers it stays under 1 MiB.
 * Cost per decision: about 0.2 us plus 4 ns per candidate.
 */
export class DecisionRecord {
  readonly requestId: string;
  readonly atMs: number;
  readonly policy: string;
  readonly prompt: PromptShape;
  readonly weights: CostWeights;
  readonly candidates: readonly WorkerCandidate[];
  readonly leftOut: LeftOut;
  /** Constants: why this decision knew less than it should. */
  readonly degradations: readonly string[];
  readonly queuedMs: number;
  /** Of the prompt's tokens: what an earlier worker had answered. */
  readonly resumedTokens: number;
  readonly stage: RouteStage;
  reason = "";
  /** Into `candidates`. */
  chosen = -1;
  overlapBlocks = 0;
  /** Where its columns are, in numbers written since the start; -1 = not kept. */
  begin = -1;
  // What became of it.
  firstTokenMs = -1;
  cachedTokens = -1;
  restored: RestoredBlocks | undefined = undefined;
  outputTokens = 0;
  durationMs = -1;
  outcome = "";

  constructor(details: {
    readonly requestId: string;
    readonly atMs: number;
    readonly policy: string;
    readonly prompt: PromptShape;
    readonly weights: CostWeights;
    readonly candidates: readonly WorkerCandidate[];
    readonly leftOut: LeftOut;
    readonly degradations: readonly string[];
    readonly queuedMs: number;
    readonly resumedTokens: number;
    readonly stage: RouteStage;
  }) {
    this.requestId = details.requestId;
    this.atMs = details.atMs;
    this.policy = details.policy;
    this.prompt = details.prompt;
    this.weights = details.weights;
    this.candidates = details.candidates;
    this.leftOut = details.leftOut;
    this.degradations = details.degradations;
    this.queuedMs = details.queuedMs;
    this.resumedTokens = details.resumedTokens;
    this.stage = details.stage;
  }
}

const COLUMN_NAMES = [
  "device",
  "host",
  "disk",
  "shared",
  "prefillTokens",
  "decodeBlocks",
  "activeRequests",
  "multiplier",
  "cost",
] as const;
const INITIAL_ARENA = 16 * 1024;

export class DecisionLog {
  readonly #limit: number;
  readonly #maxArena: number;
  readonly #records: DecisionRecord[] = [];
  /** Where the next record goes once the ring is full: the oldest one. */
  #next = 0;
  #arena: Float32Array;
  /** Numbers written since the start. */
  #written = 0;

  constructor({
    records = 4_096,
    arenaBytes = 16 * 1024 * 1024,
  }: { readonly records?: number; readonly arenaBytes?: number } = {}) {
    this.#limit = records;
    this.#maxArena = arenaBytes >> 2;
    this.#arena = new Float32Array(Math.min(INITIAL_ARENA, this.#maxArena));
  }

  get length(): number {
    return this.#records.length;
  }

  /** Of the numbers; the records themselves are about 250 bytes each. */
  get arenaBytes(): number {
    return this.#arena.byteLength;
  }

  /** Keeps the record with a copy of its columns, in place of the oldest. */
  add(record: DecisionRecord, columns: CandidateColumns): void {
    if (this.#records.length < this.#limit) this.#records.push(record);
    else {
      this.#records[this.#next] = record;
      this.#next = (this.#next + 1) % this.#limit;
    }
    const { count } = columns;
    const size = count * COLUMN_NAMES.length;
    if (size > this.#maxArena) return;
    while (this.#arena.length < this.#maxArena && this.#wouldOverwrite(size)) this.#grow();
    if (size > this.#arena.length) return;
    let at = this.#place(size);
    record.begin = this.#written - size;
    const arena = this.#arena;
    for (const name of COLUMN_NAMES) {
      const column = columns[name];
      for (let i = 0; i < count; i++) arena[at++] = column[i]!;
    }
  }

  /** The decisions for a request and its further samples (`id-1`, ...), oldest first. Looks at all records. */
  find(requestId: string): DecisionRecord[] {
    const found = this.#records.filter(
      (record) => record.requestId === requestId || isSampleOf(record.requestId, requestId),
    );
    return found.toSorted((a, b) => a.atMs - b.atMs);
  }

  /** The record's columns as they were; undefined when they had to make room. */
  columnsOf(record: DecisionRecord): CandidateColumns | undefined {
    const count = record.candidates.length;
    if (record.begin < 0 || this.#isOverwritten(record)) return undefined;
    const columns = new CandidateColumns();
    columns.resize(count);
    let at = record.begin % this.#arena.length;
    for (const name of COLUMN_NAMES) {
      for (let i = 0; i < count; i++) columns[name][i] = this.#arena[at++]!;
    }
    return columns;
  }

  /** Reserves `size` numbers in one piece: at the end of the arena a piece that does not fit is left unused. */
  #place(size: number): number {
    const { length } = this.#arena;
    const at = this.#written % length;
    if (at + size > length) this.#written += length - at;
    this.#written += size;
    return (this.#written - size) % length;
  }

  #isOverwritten(record: DecisionRecord): boolean {
    return this.#written - record.begin > this.#arena.length;
  }

  /** Whether placing `size` more would take the place of the oldest record that has its columns. */
  #wouldOverwrite(size: number): boolean {
    const { length } = this.#arena;
    if (size > length) return true;
    const at = this.#written % length;
    const end = this.#written + size + (at + size > length ? length - at : 0);
    for (let i = 0; i < this.#records.length; i++) {
      const record = this.#records[(this.#next + i) % this.#records.length]!;
      if (record.begin >= 0) return end - record.begin > length;
    }
    return false;
  }

  /** Twice the size, with the live records moved to its start. */
  #grow(): void {
    const old = this.#arena;
    const arena = new Float32Array(Math.min(old.length * 2, this.#maxArena));
    let at = 0;
    for (let i = 0; i < this.#records.length; i++) {
      const record = this.#records[(this.#next + i) % this.#records.length]!;
      if (record.begin < 0) continue;
      if (this.#isOverwritten(record)) {
        record.begin = -1;
        continue;
      }
      const size = record.candidates.length * COLUMN_NAMES.length;
      const begin = record.begin % old.length;
      arena.set(old.subarray(begin, begin + size), at);
      record.begin = at;
      at += size;
    }
    this.#arena = arena;
    this.#written = at;
  }
}

function isSampleOf(candidate: string, requestId: string): boolean {
  return (
    candidate.length > requestId.length &&
    candidate.startsWith(requestId) &&
    /^-p?\d+(-\d+)?$/.test(candidate.slice(requestId.length))
  );
}
