/**
 * Time as an argument. Every role gets a `Clock`, so that the same code runs on the system's clock and under the
 * simulator's virtual time. `monotonicMs` never goes back and is the only clock for durations and deadlines; `wallMs`
 * is for what people and other machines read.
 */
export interface TimerHandle {
  cancel(): void;
}

export interface Clock {
  /** Milliseconds, fractional, from an arbitrary start; never goes back. */
  monotonicMs(): number;
  /** Unix time in milliseconds; may jump. */
  wallMs(): number;
  /** Calls `run` once after `delayMs` (0 to 2^31-1). A pending timer does not keep the process alive. */
  setTimer(delayMs: number, run: () => void): TimerHandle;
  /** Calls `run` once on a later turn of the loop, in the order of the calls; the process stays alive for it. */
  nextTurn(run: () => void): void;
}

class SystemTimer implements TimerHandle {
  readonly #timer: NodeJS.Timeout;
  constructor(delayMs: number, run: () => void) {
    this.#timer = setTimeout(run, delayMs);
    this.#timer.unref();
  }
  cancel(): void {
    clearTimeout(this.#timer);
  }
}

export const systemClock: Clock = {
  monotonicMs: () => performance.now(),
  wallMs: () => Date.now(),
  setTimer: (delayMs, run) => new SystemTimer(delayMs, run),
  nextTurn: (run) => {
    setImmediate(run);
  },
};

interface ManualTimer {
  dueMs: number;
  order: number;
  run: () => void;
  cancelled: boolean;
}

/**
 * Virtual time: nothing moves until `advance` is called; timers due run in order of time, then of creation. Turns are the
 * loop's own: they pass without `advance`.
 */
export class ManualClock implements Clock {
  #nowMs = 0;
  #order = 0;
  #timers: ManualTimer[] = [];
  /** Added to the monotonic time to give `wallMs`; change it to make the wall clock jump. */
  wallOffsetMs: number;

  constructor(wallOffsetMs = 1_700_000_000_000) {
    this.wallOffsetMs = wallOffsetMs;
  }

  monotonicMs(): number {
    return this.#nowMs;
  }

  wallMs(): number {
    return this.#nowMs + this.wallOffsetMs;
  }

  setTimer(delayMs: number, run: () => void): TimerHandle {
    const timer: ManualTimer = {
      dueMs: this.#nowMs + Math.max(0, delayMs),
      order: this.#order++,
      run,
      cancelled: false,
    };
    this.#timers.push(timer);
    return {
      cancel: () => {
        timer.cancelled = true;
      },
    };
  }

  nextTurn(run: () => void): void {
    setImmediate(run);
  }

  /** Number of timers that would still fire. */
  get pendingTimerCount(): number {
    return this.#timers.filter((timer) => !timer.cancelled).length;
  }

  /** Moves time forward by `deltaMs`, firing what falls due on the way, each at its own instant. */
  advance(deltaMs: number): void {
    const untilMs = this.#nowMs + deltaMs;
    for (;;) {
      this.#timers = this.#timers.filter((timer) => !timer.cancelled);
      let next: ManualTimer | undefined;
      for (const timer of this.#timers) {
        if (timer.dueMs > untilMs) continue;
        if (
          next === undefined ||
          timer.dueMs < next.dueMs ||
          (timer.dueMs === next.dueMs && timer.order < next.order)
        ) {
          next = timer;
        }
      }
      if (next === undefined) break;
      this.#nowMs = Math.max(this.#nowMs, next.dueMs);
      next.cancelled = true;
      next.run();
    }
    this.#nowMs = untilMs;
  }
}
