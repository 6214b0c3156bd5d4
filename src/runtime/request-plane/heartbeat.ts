import type { Clock, TimerHandle } from "../../std/index.ts";
import { onNextTurn } from "./flusher.ts";

/**
 * Finds peers that are gone without a word: half-open connections, stopped or frozen processes. One timer for all
 * connections of a process, four times a beat. A connection that was silent for a beat gets a PING, one that was silent
 * for `misses` beats is dropped: at most a quarter of a beat later than `beatMs * misses`. Both sides do this on their own,
 * with their own settings.
 *
 * It judges in the turn after the timer, when the sockets have been read: a process that was itself stopped for a while
 * first sees what came meanwhile. Cost: a comparison per connection and quarter beat; a timer only while there is one.
 */
export interface Beating {
  readonly lastReceivedMs: number;
  ping(): void;
  frozen(silentMs: number): void;
}

export interface HeartbeatOptions {
  readonly clock: Clock;
  readonly beatMs: number;
  readonly misses: number;
}

export class Heartbeat {
  readonly #clock: Clock;
  readonly #beatMs: number;
  readonly #misses: number;
  /** The value is when the last PING was sent. */
  readonly #lastPingMs = new Map<Beating, number>();
  #timer: TimerHandle | undefined = undefined;

  constructor({ clock, beatMs, misses }: HeartbeatOptions) {
    this.#clock = clock;
    this.#beatMs = beatMs;
    this.#misses = misses;
  }

  add(connection: Beating): void {
    this.#lastPingMs.set(connection, 0);
    this.#timer ??= this.#nextTimer();
  }

  delete(connection: Beating): void {
    this.#lastPingMs.delete(connection);
    if (this.#lastPingMs.size > 0) return;
    this.#timer?.cancel();
    this.#timer = undefined;
  }

  #nextTimer(): TimerHandle {
    return this.#clock.setTimer(this.#beatMs / 4, () => onNextTurn(() => this.#judge()));
  }

  #judge(): void {
    if (this.#timer === undefined) return;
    const nowMs = this.#clock.monotonicMs();
    for (const [connection, lastPingMs] of this.#lastPingMs) {
      const silentMs = nowMs - connection.lastReceivedMs;
      if (silentMs >= this.#beatMs * this.#misses) connection.frozen(silentMs);
      else if (silentMs >= this.#beatMs && nowMs - lastPingMs >= this.#beatMs) {
        this.#lastPingMs.set(connection, nowMs);
        connection.ping();
      }
    }
    // All may have gone and others come since the timer fired: then theirs is running already.
    this.#timer?.cancel();
    this.#timer = this.#lastPingMs.size > 0 ? this.#nextTimer() : undefined;
  }
}
