import type { Clock, TimerHandle } from "../../std/index.ts";

/**
 * Finds peers that are gone without a word: half-open connections, stopped or frozen processes. One timer for all
 * connections of a process, four times a beat. Each beat without a byte from the peer is a miss and sends a PING; at the
 * last of `misses` the connection is dropped: a quarter of a beat later than `beatMs * misses` at most. Both sides do this
 * on their own, with their own settings.
 *
 * A process that was itself stopped for a while must not blame its peers: it judges in the turn after the timer, when the
 * sockets have been read, and however long the pause was, it counts as one miss, which the peer may answer.
 * Cost: a comparison per connection and quarter beat; a timer only while there is a connection.
 */
export interface Beating {
  readonly lastReceivedMs: number;
  ping(): void;
  frozen(silentMs: number): void;
}

interface Pulse {
  /** The `lastReceivedMs` of the last look. */
  seenMs: number;
  /** Up to here the peer's silence is accounted for. */
  markMs: number;
  missCount: number;
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
  readonly #pulses = new Map<Beating, Pulse>();
  #timer: TimerHandle | undefined = undefined;

  constructor({ clock, beatMs, misses }: HeartbeatOptions) {
    this.#clock = clock;
    this.#beatMs = beatMs;
    this.#misses = misses;
  }

  add(connection: Beating): void {
    this.#pulses.set(connection, { seenMs: -1, markMs: this.#clock.monotonicMs(), missCount: 0 });
    this.#timer ??= this.#nextTimer();
  }

  delete(connection: Beating): void {
    this.#pulses.delete(connection);
    if (this.#pulses.size > 0) return;
    this.#timer?.cancel();
    this.#timer = undefined;
  }

  #nextTimer(): TimerHandle {
    return this.#clock.setTimer(this.#beatMs / 4, () => this.#clock.nextTurn(() => this.#judge()));
  }

  #judge(): void {
    if (this.#timer === undefined) return;
    const nowMs = this.#clock.monotonicMs();
    for (const [connection, pulse] of this.#pulses) this.#judgeOne(connection, pulse, nowMs);
    // All may have gone and others come since the timer fired: then theirs is running already.
    this.#timer?.cancel();
    this.#timer = this.#pulses.size > 0 ? this.#nextTimer() : undefined;
  }

  #judgeOne(connection: Beating, pulse: Pulse, nowMs: number): void {
    const { lastReceivedMs } = connection;
    if (lastReceivedMs !== pulse.seenMs) {
      pulse.seenMs = lastReceivedMs;
      pulse.markMs = lastReceivedMs;
      pulse.missCount = 0;
    }
    const overdueMs = nowMs - pulse.markMs - this.#beatMs;
    if (overdueMs < 0) return;
    // The mark moves by whole beats, so that late timers do not add up; after a pause it moves to now.
    pulse.markMs = overdueMs < this.#beatMs ? pulse.markMs + this.#beatMs : nowMs;
    if (++pulse.missCount >= this.#misses) connection.frozen(nowMs - lastReceivedMs);
    else connection.ping();
  }
}
