/**
 * Milliseconds per prompt token of a pool's workers, from engines' own words on single prompts. Prompts that are computed in
 * the same steps each take as long as all of them together: the time since the same worker's last word is what a word
 * accounts for, so that no stretch of time is counted twice. Sums that fade by an eighth with each prompt's share.
 */
const FADE = 7 / 8;
/** Workers whose last word is remembered; one that was forgotten counts in full once. */
const MAX_WORKERS = 1_024;

export class PrefillRate {
  readonly #endedMs = new Map<string, number>();
  #tokens = 0;
  #milliseconds = 0;
  count = 0;

  /** undefined before the first prompt. */
  get msPerToken(): number | undefined {
    return this.#milliseconds > 0 ? this.#milliseconds / this.#tokens : undefined;
  }

  /** A worker computed so many tokens in so long, until now. Returns for how much of it no other prompt has accounted. */
  add(worker: string, tokens: number, milliseconds: number, nowMs: number): number {
    const since = Math.max(nowMs - milliseconds, this.#endedMs.get(worker) ?? -Infinity);
    this.#endedMs.delete(worker);
    this.#endedMs.set(worker, nowMs);
    if (this.#endedMs.size > MAX_WORKERS) this.#endedMs.delete(this.#endedMs.keys().next().value!);
    const own = Math.max(0, nowMs - since);
    this.#tokens = this.#tokens * FADE + tokens;
    this.#milliseconds = this.#milliseconds * FADE + own;
    this.count++;
    return own;
  }
}
