import assert from "node:assert/strict";
import { DynamoError } from "../errors/index.ts";
import { randomHexId, type Clock, type Random, type TimerHandle } from "../std/index.ts";
import { SlotTable } from "./slot-table.ts";

/**
 * The blocks a prefill worker has handed over and still keeps, in slots of one registered region:
 *
 *     offered ──claim──► claimed ──release (the read is complete, or given up)──► free
 *        │ cancelled, or the lease is over: free      └── the claim's time is over: free
 *
 * Blocks of a prompt that is still being computed are kept as parts, without a lease: whoever drafts them ends them. Parts
 * can be claimed as they are; those that nobody has claimed become one handoff in the end (`join`).
 *
 * A handoff is claimed once. From then on its slots stay as they are for `claimMs` whatever happens to its owner, so a
 * reader that began before that has read what was offered; one that comes back later finds its time over and throws away
 * what it read. Nothing leaks: each handoff has a timer from its first moment. Owned by the worker's loop.
 */
export interface HandoffStoreOptions {
  /** The region's bytes; slot i is at i x blockBytes. */
  readonly bytes: Uint8Array;
  readonly blockBytes: number;
  readonly clock: Clock;
  readonly random: Random;
  /** How long an offer waits to be claimed. */
  readonly leaseMs: number;
  /** How long a claim lasts. */
  readonly claimMs: number;
  /** Each handoff's end, once: `fetched`, `released` unread, `cancelled` or `expired`. */
  readonly onEnd?: (outcome: HandoffOutcome) => void;
}

export type HandoffOutcome = "fetched" | "released" | "cancelled" | "expired";

export interface HeldBlocks {
  readonly id: string;
  readonly runs: Uint32Array;
  readonly blockCount: number;
}

interface Held extends HeldBlocks {
  /** undefined: a part that nobody has claimed. */
  timer: TimerHandle | undefined;
  isClaimed: boolean;
  readonly onFree: (outcome: HandoffOutcome, wasClaimed: boolean) => void;
}

export class HandoffStore {
  readonly #options: HandoffStoreOptions;
  readonly #slots: SlotTable;
  readonly #held = new Map<string, Held>();

  constructor(options: HandoffStoreOptions) {
    this.#options = options;
    this.#slots = new SlotTable(Math.floor(options.bytes.length / options.blockBytes));
  }

  get blockBytes(): number {
    return this.#options.blockBytes;
  }

  get claimMs(): number {
    return this.#options.claimMs;
  }

  get heldCount(): number {
    return this.#held.size;
  }

  /** Slots in use. */
  get heldBlocks(): number {
    return this.#slots.takenCount;
  }

  get freeBlocks(): number {
    return this.#slots.freeCount;
  }

  /**
   * Copies the leading blocks of `data`, as many as there is room for, and keeps them; `onFree` is called once when they are
   * gone. Throws `transfer-full` when not even one fits.
   */
  offer(data: Uint8Array, onFree: () => void): HeldBlocks {
    return this.#keep(this.#copy(data), onFree);
  }

  full(): DynamoError {
    return new DynamoError("transfer-full", "the memory for handed-off blocks is full", {
      diagnostic: `${this.#held.size} handoffs hold ${this.#slots.takenCount} blocks`,
    });
  }

  /** The same as a part: without a lease until it is claimed or joined. */
  offerPart(data: Uint8Array, onFree: Held["onFree"]): HeldBlocks {
    const runs = this.#copy(data);
    const held = { id: randomHexId(this.#options.random), runs, blockCount: blocksIn(runs) };
    this.#held.set(held.id, { ...held, timer: undefined, isClaimed: false, onFree });
    return held;
  }

  /** Whether it can be claimed. */
  isOffered(id: string): boolean {
    return this.#held.get(id)?.isClaimed === false;
  }

  /**
   * Parts that are offered, one behind the other, and as many leading blocks of `data` behind them as there is room for, as
   * one handoff. There must be a part, or room for a block: else it throws `transfer-full`.
   */
  join(parts: readonly string[], data: Uint8Array, onFree: () => void): HeldBlocks {
    const copied = data.length > 0 && (parts.length === 0 || this.freeBlocks > 0) ? this.#copy(data) : NO_RUNS;
    const runs: Uint32Array[] = [];
    for (const id of parts) {
      const part = this.#held.get(id);
      assert(part?.isClaimed === false && part.timer === undefined, "what is joined is a part that is offered");
      this.#held.delete(id);
      runs.push(part.runs);
    }
    return this.#keep(joined([...runs, copied]), onFree);
  }

  #keep(runs: Uint32Array, onFree: () => void): HeldBlocks {
    const { clock, random, leaseMs } = this.#options;
    const id = randomHexId(random);
    const held = { id, runs, blockCount: blocksIn(runs) };
    const timer = clock.setTimer(leaseMs, () => this.#end(id, "expired"));
    this.#held.set(id, { ...held, timer, isClaimed: false, onFree });
    return held;
  }

  /** Into slots, which it returns. */
  #copy(data: Uint8Array): Uint32Array {
    const { bytes, blockBytes } = this.#options;
    const blockCount = Math.min(data.length / blockBytes, this.#slots.freeCount);
    if (blockCount < 1) throw this.full();
    const runs = this.#slots.take(blockCount);
    let from = 0;
    for (let i = 0; i < runs.length; i += 2) {
      const runBytes = runs[i + 1]! * blockBytes;
      bytes.set(data.subarray(from, from + runBytes), runs[i]! * blockBytes);
      from += runBytes;
    }
    return runs;
  }

  /** The blocks stay for `claimMs` from now on. Throws `handoff-gone` when they are not offered (any more). */
  claim(id: string): void {
    const held = this.#held.get(id);
    if (held === undefined || held.isClaimed) {
      throw new DynamoError(
        "handoff-gone",
        held === undefined
          ? "the handed-off blocks are not kept any more"
          : "the handed-off blocks were claimed before",
      );
    }
    held.isClaimed = true;
    held.timer?.cancel();
    held.timer = this.#options.clock.setTimer(this.#options.claimMs, () => this.#end(id, "expired"));
  }

  /** The reader has what it wanted. Unknown ids are ignored, as below: their time was over. */
  release(id: string): void {
    this.#end(id, this.#held.get(id)?.isClaimed === true ? "fetched" : "released");
  }

  /** The reader does not want them, or could not read them. */
  giveUp(id: string): void {
    this.#end(id, "released");
  }

  /** Whoever asked for them is gone: they go, unless somebody is reading them. */
  cancel(id: string): void {
    if (this.#held.get(id)?.isClaimed === false) this.#end(id, "cancelled");
  }

  close(): void {
    for (const id of this.#held.keys()) this.#end(id, "cancelled");
    assert.equal(this.#slots.takenCount, 0, "no slot is left without its handoff");
  }

  #end(id: string, outcome: HandoffOutcome): void {
    const held = this.#held.get(id);
    if (held === undefined) return;
    this.#held.delete(id);
    held.timer?.cancel();
    this.#slots.free(held.runs);
    this.#options.onEnd?.(outcome);
    held.onFree(outcome, held.isClaimed);
  }
}

const NO_RUNS = new Uint32Array(0);

function blocksIn(runs: Uint32Array): number {
  let count = 0;
  for (let i = 1; i < runs.length; i += 2) count += runs[i]!;
  return count;
}

/** One behind the other; runs that meet become one. */
function joined(rows: readonly Uint32Array[]): Uint32Array {
  const runs: number[] = [];
  for (const row of rows) {
    for (let i = 0; i < row.length; i += 2) {
      const last = runs.length - 2;
      if (last >= 0 && runs[last]! + runs[last + 1]! === row[i]) runs[last + 1]! += row[i + 1]!;
      else runs.push(row[i]!, row[i + 1]!);
    }
  }
  return Uint32Array.from(runs);
}
