/**
 * Whether taking blocks from the tiers is sooner than computing them, from what both took lately: exponentially weighted
 * means, a quarter for the newest. Until prefill was measured everything is taken. Source numbers as in `TierMatch`.
 */
const NEWEST_SHARE = 0.25;
/** Milliseconds per block before anything was measured: engine's cache, host, disk, object store. */
const TYPICAL_MS = [0, 0.1, 0.5, 3];
/** A prefill of fewer tokens says more about the step than about tokens. */
const MIN_PREFILL_TOKENS = 64;

export class TierCosts {
  /** Index = source + 1. */
  readonly #blockMs = [...TYPICAL_MS];
  #prefillMsPerToken: number | undefined = undefined;

  tookToPrefill(tokens: number, elapsedMs: number): void {
    if (tokens < MIN_PREFILL_TOKENS) return;
    const perToken = elapsedMs / tokens;
    const known = this.#prefillMsPerToken ?? perToken;
    this.#prefillMsPerToken = known + NEWEST_SHARE * (perToken - known);
  }

  tookToImport(blocks: number, elapsedMs: number): void {
    this.#note(1, blocks, elapsedMs);
  }

  /** `source` 1 = first lower tier. */
  tookToRead(source: number, blocks: number, elapsedMs: number): void {
    this.#note(source + 1, blocks, elapsedMs);
  }

  /** How many leading blocks to take so that most time is saved, and how long computing them would take. */
  worthTaking(sources: readonly number[], blockSizeTokens: number): { count: number; recomputeMs: number } {
    const perToken = this.#prefillMsPerToken;
    if (perToken === undefined) return { count: sources.length, recomputeMs: Infinity };
    const recomputeBlockMs = perToken * blockSizeTokens;
    let saved = 0;
    let best = 0;
    let count = 0;
    sources.forEach((source, i) => {
      // Everything below the host is read and then imported.
      const importMs = source < 0 ? 0 : this.#blockMs[1]!;
      saved += recomputeBlockMs - importMs - (source > 0 ? this.#blockMs[source + 1]! : 0);
      if (saved <= best) return;
      best = saved;
      count = i + 1;
    });
    for (const source of new Set(sources.slice(count))) this.#forgive(source + 1);
    return { count, recomputeMs: recomputeBlockMs * count };
  }

  /** What was slow once and is left out since must be tried again some time. */
  #forgive(index: number): void {
    const typical = TYPICAL_MS[index] ?? TYPICAL_MS.at(-1)!;
    this.#blockMs[index] = typical + 0.9 * (this.#blockMs[index]! - typical);
  }

  #note(index: number, blocks: number, elapsedMs: number): void {
    if (blocks === 0) return;
    const known = this.#blockMs[index] ?? TYPICAL_MS.at(-1)!;
    this.#blockMs[index] = known + NEWEST_SHARE * (elapsedMs / blocks - known);
  }
}
