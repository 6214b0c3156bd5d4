import type { Clock, TimerHandle } from "./clock.ts";

/**
 * Virtual time for millions of timers: a binary heap by due time, then by creation. ManualClock looks through all timers
 * each time, which suits tests with a few. A turn is a timer that is due now. `runNext` moves time to the next timer and runs it.
 */
class Timer implements TimerHandle {
  readonly dueMs: number;
  readonly order: number;
  run: (() => void) | undefined;

  constructor(dueMs: number, order: number, run: () => void) {
    this.dueMs = dueMs;
    this.order = order;
    this.run = run;
  }

  /** It stays in the heap until its time and does nothing then. */
  cancel(): void {
    this.run = undefined;
  }
}

/** Where wall time starts: any fixed moment. */
const EPOCH_MS = 1_700_000_000_000;

export class VirtualClock implements Clock {
  #nowMs = 0;
  #order = 0;
  readonly #heap: Timer[] = [];

  monotonicMs(): number {
    return this.#nowMs;
  }

  wallMs(): number {
    return EPOCH_MS + this.#nowMs;
  }

  setTimer(delayMs: number, run: () => void): TimerHandle {
    const timer = new Timer(this.#nowMs + Math.max(0, delayMs), this.#order++, run);
    const heap = this.#heap;
    let at = heap.length;
    heap.push(timer);
    while (at > 0) {
      const above = (at - 1) >> 1;
      if (!isBefore(timer, heap[above]!)) break;
      heap[at] = heap[above]!;
      at = above;
    }
    heap[at] = timer;
    return timer;
  }

  nextTurn(run: () => void): void {
    this.setTimer(0, run);
  }

  /** When the next timer is due; undefined when there is none. */
  nextDueMs(): number | undefined {
    while (this.#heap.length > 0 && this.#heap[0]!.run === undefined) this.#takeFirst();
    return this.#heap[0]?.dueMs;
  }

  /** Moves time forward to a moment before the next timer. */
  moveTo(nowMs: number): void {
    this.#nowMs = Math.max(this.#nowMs, nowMs);
  }

  /** False when there is no timer. */
  runNext(): boolean {
    for (;;) {
      const timer = this.#takeFirst();
      if (timer === undefined) return false;
      const { run } = timer;
      if (run === undefined) continue;
      this.#nowMs = Math.max(this.#nowMs, timer.dueMs);
      timer.run = undefined;
      run();
      return true;
    }
  }

  #takeFirst(): Timer | undefined {
    const heap = this.#heap;
    const first = heap[0];
    const last = heap.pop();
    if (heap.length === 0 || last === undefined) return first;
    let at = 0;
    for (;;) {
      let below = 2 * at + 1;
      if (below >= heap.length) break;
      if (below + 1 < heap.length && isBefore(heap[below + 1]!, heap[below]!)) below++;
      if (isBefore(last, heap[below]!)) break;
      heap[at] = heap[below]!;
      at = below;
    }
    heap[at] = last;
    return first;
  }
}

function isBefore(a: Timer, b: Timer): boolean {
  return a.dueMs < b.dueMs || (a.dueMs === b.dueMs && a.order < b.order);
}
