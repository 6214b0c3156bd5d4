/**
 * How long a crashed process waits before it is started again: 0.2 s, doubled each time up to 10 s, and from the beginning
 * after it ran well for half a minute. Pure; the caller has the clock.
 */
export class RestartBackOff {
  static readonly firstMs = 200;
  static readonly maxMs = 10_000;
  static readonly healthyMs = 30_000;
  #nextMs = RestartBackOff.firstMs;

  /** The pause after a run of `ranMs`. */
  next(ranMs: number): number {
    if (ranMs >= RestartBackOff.healthyMs) this.#nextMs = RestartBackOff.firstMs;
    const pauseMs = this.#nextMs;
    this.#nextMs = Math.min(RestartBackOff.maxMs, pauseMs * 2);
    return pauseMs;
  }
}
