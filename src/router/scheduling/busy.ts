/**
 * When a rank has enough to do. A busy rank gets nothing new; a worker is busy when all its ranks are, and a request is
 * refused (`worker-full`, 529) only when every worker is. Each threshold that is set counts, any of them suffices.
 * Settable while running (`POST /busy_threshold`).
 */
export interface BusyThresholds {
  /** Share of the rank's KV blocks in use, 0 to 1. */
  readonly activeDecodeBlocks?: number;
  /** Prompt tokens waiting to be prefilled. */
  readonly activePrefillTokens?: number;
  /** The same in batches of the engine (`max_num_batched_tokens`). */
  readonly activePrefillTokensFrac?: number;
}

export interface RankLoad {
  readonly decodeBlocks: number;
  readonly totalBlocks: number;
  readonly prefillTokens: number;
  readonly maxBatchedTokens: number;
}

export function hasThresholds(thresholds: BusyThresholds): boolean {
  return (
    thresholds.activeDecodeBlocks !== undefined ||
    thresholds.activePrefillTokens !== undefined ||
    thresholds.activePrefillTokensFrac !== undefined
  );
}

/** A threshold that needs a capacity which is not known (0) does not count. */
export function isBusy(thresholds: BusyThresholds, load: RankLoad): boolean {
  const { activeDecodeBlocks, activePrefillTokens, activePrefillTokensFrac } = thresholds;
  const { decodeBlocks, totalBlocks, prefillTokens, maxBatchedTokens } = load;
  if (activeDecodeBlocks !== undefined && totalBlocks > 0 && decodeBlocks > activeDecodeBlocks * totalBlocks)
    return true;
  if (activePrefillTokens !== undefined && prefillTokens > activePrefillTokens) return true;
  return (
    activePrefillTokensFrac !== undefined &&
    maxBatchedTokens > 0 &&
    prefillTokens > activePrefillTokensFrac * maxBatchedTokens
  );
}
