import type { Clock } from "../std/index.ts";

/**
 * Long work in steps, a bounded share of each turn of the event loop for all of it together: the streams of other
 * requests wait for one share, however many long prompts came at once. First come, first served, so that each is done
 * soon; but who has had `SHARES_IN_A_ROW` goes to the end of the line, so that a huge one holds up nobody for long. One
 * job ends per turn at most, because what comes after it (routing, sending) is work too.
 *
 * Bounded by its callers: one job per request that is being served.
 */
export type Steps = Iterator<void, void>;

interface Job {
  readonly steps: Steps;
  readonly signal: AbortSignal | undefined;
  readonly resolve: () => void;
  readonly reject: (reason: unknown) => void;
  shares: number;
}

/** Per turn; a step is well under a millisecond. */
const SHARE_MS = 2;
const SHARES_IN_A_ROW = 4;
const NO_STEPS: Steps = { next: () => ({ done: true, value: undefined }) };

export class TurnShare {
  readonly #clock: Clock;
  #queue: Job[] = [];
  /** Used in this turn. */
  #spentMs = 0;
  #isTurnDue = false;

  constructor(clock: Clock) {
    this.#clock = clock;
  }

  /** Runs `steps` to their end: at once as far as this turn's share goes. True when that was enough. */
  tryFinish(steps: Steps): boolean {
    if (this.#queue.length > 0) return false;
    this.#dueTurn();
    return this.#work(steps);
  }

  /** Waits for a turn; one caller has it at a time. For work that cannot be cut into steps. */
  wait(): Promise<void> {
    return this.finish(NO_STEPS, undefined);
  }

  /** Rejects with what the steps throw, or with the signal's reason. */
  finish(steps: Steps, signal: AbortSignal | undefined): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#queue.push({ steps, signal, resolve, reject, shares: 0 });
      this.#dueTurn();
    });
  }

  #dueTurn(): void {
    if (this.#isTurnDue) return;
    this.#isTurnDue = true;
    this.#clock.nextTurn(() => this.#onTurn());
  }

  #onTurn(): void {
    this.#isTurnDue = false;
    this.#spentMs = 0;
    const job = this.#queue[0];
    if (job === undefined) return;
    const isOver = this.#advance(job);
    if (isOver || ++job.shares % SHARES_IN_A_ROW === 0) {
      this.#queue.shift();
      if (!isOver) this.#queue.push(job);
    }
    if (this.#queue.length > 0) this.#dueTurn();
  }

  #advance({ steps, signal, resolve, reject }: Job): boolean {
    try {
      signal?.throwIfAborted();
      if (!this.#work(steps)) return false;
      resolve();
    } catch (thrown) {
      reject(thrown);
    }
    return true;
  }

  /** True when the steps ended, false when the share did. */
  #work(steps: Steps): boolean {
    const startMs = this.#clock.monotonicMs();
    const endMs = startMs + SHARE_MS - this.#spentMs;
    let nowMs = startMs;
    try {
      while (nowMs < endMs) {
        if (steps.next().done === true) return true;
        nowMs = this.#clock.monotonicMs();
      }
      return false;
    } finally {
      this.#spentMs += this.#clock.monotonicMs() - startMs;
    }
  }
}
