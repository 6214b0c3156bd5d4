import { DynamoError } from "../errors/index.ts";
import type { GaugeChild } from "../observability/index.ts";
import type { Clock } from "../std/index.ts";

/**
 * The frontend's gate: at most `limit` requests are served at once, at most `queueLimit` wait in order of arrival, the
 * rest is refused with `too-many-requests` and an estimate of when a place will be free. A place is held until the
 * whole answer ended, not only until its headers went out.
 */
export interface Permit {
  /** Gives the place back, to the longest waiting. Further calls do nothing. */
  release(): void;
}

interface Waiter {
  readonly resolve: (permit: Permit) => void;
}

/** Weight of the newest interval between two releases in the running mean. */
const SMOOTHING = 0.1;

export class AdmissionGate {
  readonly #limit: number;
  readonly #queueLimit: number;
  readonly #clock: Clock;
  readonly #queuedGauge: GaugeChild;
  /** Insertion order is arrival order; leaving is O(1). */
  readonly #waiters = new Set<Waiter>();
  #active = 0;
  #meanIntervalMs = 0;
  #lastReleaseMs = -1;

  constructor(options: { limit: number; queueLimit: number; clock: Clock; queuedGauge: GaugeChild }) {
    this.#limit = options.limit;
    this.#queueLimit = options.queueLimit;
    this.#clock = options.clock;
    this.#queuedGauge = options.queuedGauge;
  }

  get activeCount(): number {
    return this.#active;
  }

  get queuedCount(): number {
    return this.#waiters.size;
  }

  /** A place at once, or undefined when one must wait. */
  tryEnter(): Permit | undefined {
    if (this.#active >= this.#limit) return undefined;
    this.#active++;
    return this.#permit();
  }

  /** Waits for a place. `onLeave` is handed a function that gives up waiting (the client went away). Throws when full. */
  enter(onLeave: (leave: () => void) => void): Promise<Permit> {
    if (this.#waiters.size >= this.#queueLimit) {
      throw new DynamoError("too-many-requests", "the server is at capacity; retry later", {
        diagnostic: `${this.#active} active, ${this.#waiters.size} queued`,
        retryAfterMs: this.#retryAfterMs(),
      });
    }
    const { promise, resolve, reject } = Promise.withResolvers<Permit>();
    const waiter: Waiter = { resolve };
    this.#waiters.add(waiter);
    this.#queuedGauge.set(this.#waiters.size);
    onLeave(() => {
      if (!this.#waiters.delete(waiter)) return;
      this.#queuedGauge.set(this.#waiters.size);
      reject(new DynamoError("client-gone", "the client left while its request waited for a place"));
    });
    return promise;
  }

  #permit(): Permit {
    let held = true;
    return {
      release: () => {
        if (!held) return;
        held = false;
        this.#onRelease();
      },
    };
  }

  #onRelease(): void {
    const nowMs = this.#clock.monotonicMs();
    if (this.#lastReleaseMs >= 0)
      this.#meanIntervalMs += SMOOTHING * (nowMs - this.#lastReleaseMs - this.#meanIntervalMs);
    this.#lastReleaseMs = nowMs;
    const next = this.#waiters.values().next();
    if (next.done === true) {
      this.#active--;
      return;
    }
    this.#waiters.delete(next.value);
    this.#queuedGauge.set(this.#waiters.size);
    next.value.resolve(this.#permit());
  }

  /** The time in which the queue will have moved on by its own length, from the mean time between two releases. */
  #retryAfterMs(): number {
    const estimate = this.#meanIntervalMs * Math.max(1, this.#waiters.size);
    return Math.min(60_000, Math.max(1_000, estimate));
  }
}
