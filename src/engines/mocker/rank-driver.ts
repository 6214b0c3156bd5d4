import type { KvEvent } from "../../protocol/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import type { MockScheduler, PassObserver } from "./mock-scheduler.ts";

/**
 * Runs one scheduler on a clock. Passes follow each other on an ideal timeline: the next one begins when the last one
 * should have ended, not when a late timer said so. Rates are then right though a timer is good for a millisecond, and a
 * process that was held up catches up, at most `MAX_LAG_MS` of it.
 */
export interface RankDriverHooks {
  /** Before a turn: whatever it emits is collected from now on. */
  onTurn(): void;
  /** After a turn. `kvEvents` may be empty. */
  onTurnEnd(kvEvents: readonly KvEvent[]): void;
}

const MAX_LAG_MS = 50;
/** Waits below this are not worth a timer, whose resolution is 1 ms. */
const TIMER_MIN_MS = 0.5;

export class RankDriver {
  readonly scheduler: MockScheduler;
  readonly #clock: Clock;
  readonly #observer: PassObserver;
  readonly #hooks: RankDriverHooks;
  #pending: TimerHandle | undefined = undefined;
  /** When the running pass ends, or the last one ended. */
  #timelineMs = 0;
  #isStopped = false;

  constructor(scheduler: MockScheduler, clock: Clock, observer: PassObserver, hooks: RankDriverHooks) {
    this.scheduler = scheduler;
    this.#clock = clock;
    this.#observer = observer;
    this.#hooks = hooks;
  }

  /** Something changed: an idle rank looks at it on the next loop turn, a busy one after its pass. */
  kick(): void {
    if (this.scheduler.isPassRunning) return;
    this.#pending?.cancel();
    this.#wait(0);
  }

  stop(): void {
    this.#isStopped = true;
    this.#pending?.cancel();
  }

  #turn(): void {
    this.#pending = undefined;
    const nowMs = this.#clock.monotonicMs();
    this.#hooks.onTurn();
    let startMs = nowMs;
    if (this.scheduler.isPassRunning) {
      startMs = Math.max(this.#timelineMs, nowMs - MAX_LAG_MS);
      this.scheduler.endPass(nowMs, this.#observer);
    }
    const durationMs = this.scheduler.beginPass(nowMs, this.#observer);
    // The hooks may stop us.
    this.#hooks.onTurnEnd(this.scheduler.takeKvEvents());
    if (durationMs !== undefined) {
      this.#timelineMs = startMs + durationMs;
      this.#wait(this.#timelineMs - nowMs);
    } else {
      const wakeMs = this.scheduler.nextWakeMs();
      if (wakeMs !== Infinity) this.#wait(wakeMs - nowMs);
    }
  }

  #wait(delayMs: number): void {
    if (this.#isStopped) return;
    const run = (): void => this.#turn();
    if (delayMs >= TIMER_MIN_MS) {
      this.#pending = this.#clock.setTimer(delayMs, run);
    } else {
      let isCancelled = false;
      this.#pending = { cancel: () => void (isCancelled = true) };
      this.#clock.nextTurn(() => {
        if (!isCancelled) run();
      });
    }
  }
}
