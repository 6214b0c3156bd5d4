/**
 * How fast a full server frees its places, and so when somebody who was refused may come back. The mean time between two
 * departures is measured only while the server is full: an idle hour says nothing about its pace.
 *
 * Promises are spaced: whoever is refused is told a moment of its own, one mean interval behind the one before, so that
 * those who wait exactly that long come one by one as places come free, not all at once for the first. Owned by whoever
 * gives out the places; O(1), allocates nothing.
 */
export interface ServiceRateOptions {
  /** Nobody is asked to wait less or more than this. */
  readonly minMs: number;
  readonly maxMs: number;
}

/** What one departure weighs beside the next: the pace is that of about the last fifty, bursts and pauses together. */
const DECAY = 0.98;
/** What the first ones are told, before any place came free: the pace is not known yet. */
const UNMEASURED_MS = 1_000;

export class ServiceRate {
  readonly #minMs: number;
  readonly #maxMs: number;
  /** Departures and the time they took, both decayed. */
  #departures = 0;
  #elapsedMs = 0;
  /** Of the last departure while full, or when it became full; -1 = it is not full. */
  #lastMs = -1;
  #promisedMs = -Infinity;

  constructor({ minMs, maxMs }: ServiceRateOptions) {
    this.#minMs = minMs;
    this.#maxMs = maxMs;
  }

  /** Between two departures while full; 0 until it was measured. */
  get meanIntervalMs(): number {
    return this.#departures === 0 ? 0 : this.#elapsedMs / this.#departures;
  }

  /** A place came free; `isFull`: until now there was none. */
  departed(nowMs: number, isFull: boolean): void {
    if (!isFull) {
      this.#lastMs = -1;
      return;
    }
    if (this.#lastMs >= 0) {
      this.#elapsedMs = this.#elapsedMs * DECAY + nowMs - this.#lastMs;
      this.#departures = this.#departures * DECAY + 1;
    }
    this.#lastMs = nowMs;
  }

  /** When the next one who is refused, because all is full, may come back; from now. Each call gives away a moment. */
  retryAfterMs(nowMs: number): number {
    if (this.#lastMs < 0) this.#lastMs = nowMs;
    const meanMs = this.meanIntervalMs;
    if (meanMs === 0) return Math.min(this.#maxMs, Math.max(this.#minMs, UNMEASURED_MS));
    // Places that stopped coming free make the last pace a thing of the past.
    const intervalMs = Math.max(meanMs, nowMs - this.#lastMs);
    const promisedMs = Math.max(this.#promisedMs, nowMs) + intervalMs;
    // What was cut off at the longest wait was not promised: the line must not grow without end.
    this.#promisedMs = Math.min(promisedMs, nowMs + this.#maxMs);
    return Math.min(this.#maxMs, Math.max(this.#minMs, promisedMs - nowMs));
  }
}
