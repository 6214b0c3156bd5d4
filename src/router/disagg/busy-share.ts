/**
 * The share of its time something was busy lately: each busy stretch counts less the longer it is ago, by a factor of e in
 * 10 s. Two numbers and one exponential per call.
 */
const MEMORY_MS = 10_000;

export class BusyShare {
  #value = 0;
  #atMs = 0;

  /** It was busy for so long, until now. */
  add(busyMs: number, nowMs: number): void {
    this.#value = this.at(nowMs) + busyMs / MEMORY_MS;
    this.#atMs = nowMs;
  }

  /** Of several workers together it may be more than 1. */
  at(nowMs: number): number {
    return this.#value * Math.exp((this.#atMs - nowMs) / MEMORY_MS);
  }
}
