import type { Clock, TimerHandle } from "../../std/index.ts";
import { TransferLink } from "./transfer-link.ts";

/** A shared link on a clock: `move` resolves when so many bytes have come over it, later the more others move. */
export class TimedLink {
  readonly #link: TransferLink<() => void>;
  readonly #clock: Clock;
  #timer: TimerHandle | undefined = undefined;
  #isStopped = false;

  constructor(bandwidthBytesPerSecond: number, clock: Clock) {
    this.#link = new TransferLink(bandwidthBytesPerSecond);
    this.#clock = clock;
  }

  move(byteCount: number): Promise<void> {
    if (this.#isStopped || byteCount <= 0) return Promise.resolve();
    return new Promise((resolve) => {
      const nowMs = this.#clock.monotonicMs();
      this.#link.advance(nowMs, (end) => end());
      this.#link.add(resolve, byteCount, nowMs);
      this.#arm();
    });
  }

  /** What is on its way arrives at once. */
  stop(): void {
    this.#isStopped = true;
    this.#timer?.cancel();
    this.#link.advance(Number.MAX_SAFE_INTEGER, (end) => end());
  }

  #arm(): void {
    this.#timer?.cancel();
    const endMs = this.#link.nextEndMs();
    if (endMs === Infinity) return;
    this.#timer = this.#clock.setTimer(Math.max(0, endMs - this.#clock.monotonicMs()), () => {
      this.#link.advance(this.#clock.monotonicMs(), (end) => end());
      this.#arm();
    });
  }
}
