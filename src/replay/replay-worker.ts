import type { MockScheduler, PassObserver, Sequence } from "../engines/mocker/index.ts";
import type { KvEvent, LoadSnapshot } from "../protocol/index.ts";
import type { TimerHandle, VirtualClock } from "../std/index.ts";

/** One data-parallel rank of a simulated worker: the mock engine's scheduler on the virtual clock. */
export interface ReplayRankOptions {
  readonly clock: VirtualClock;
  readonly scheduler: MockScheduler;
  readonly observer: PassObserver;
  readonly onKvEvents: (events: readonly KvEvent[]) => void;
}

export class ReplayRank {
  readonly scheduler: MockScheduler;
  /** Time spent in passes. */
  busyMs = 0;
  passes = 0;
  requests = 0;
  /** Prompt tokens that were not in its cache. */
  computedTokens = 0;
  readonly #options: ReplayRankOptions;
  readonly #turn: () => void;
  #pending: TimerHandle | undefined = undefined;

  constructor(options: ReplayRankOptions) {
    this.#options = options;
    this.scheduler = options.scheduler;
    this.#turn = () => this.#runTurn();
  }

  submit(sequence: Sequence): void {
    this.requests++;
    this.scheduler.submit(sequence);
    if (this.scheduler.isPassRunning) return;
    // After everything else of this instant: what arrives together is planned together.
    this.#pending?.cancel();
    this.#pending = this.#options.clock.setTimer(0, this.#turn);
  }

  load(): LoadSnapshot {
    return this.scheduler.load();
  }

  #runTurn(): void {
    const { scheduler } = this;
    const { clock, observer, onKvEvents } = this.#options;
    this.#pending = undefined;
    const nowMs = clock.monotonicMs();
    if (scheduler.isPassRunning) scheduler.endPass(nowMs, observer);
    const durationMs = scheduler.beginPass(nowMs, observer);
    if (scheduler.hasKvEvents) onKvEvents(scheduler.takeKvEvents());
    if (durationMs !== undefined) {
      this.busyMs += durationMs;
      this.passes++;
      this.#pending = clock.setTimer(durationMs, this.#turn);
      return;
    }
    const wakeMs = scheduler.nextWakeMs();
    if (wakeMs !== Infinity) this.#pending = clock.setTimer(wakeMs - nowMs, this.#turn);
  }
}
