/**
 * Predicted time of engine work: the contract that the mock engine, replay and planning share. Models are pure: the same
 * question gives the same answer, at any time, on any machine. One pass of an engine is `prefillMs + decodeMs`.
 */
export interface PrefillWork {
  /** Sequences with prompt tokens in the pass. */
  readonly sequenceCount: number;
  /** Sum over them of the tokens that are in the KV cache after the pass. */
  readonly inputTokens: number;
  /** Sum over them of the tokens that were there before it, reused or computed earlier. */
  readonly prefixTokens: number;
}

export interface DecodeWork {
  /** Sequences that get one token each. */
  readonly sequenceCount: number;
  /** Tokens of KV cache that running sequences hold. */
  readonly activeKvTokens: number;
  /** Tokens the KV cache can hold. */
  readonly totalKvTokens: number;
  /** Sum of the lengths of the decoding sequences. */
  readonly contextTokens: number;
}

export interface TimingModel {
  /** 0 for no new tokens; never negative. */
  prefillMs(work: PrefillWork): number;
  /** 0 for no sequences. */
  decodeMs(work: DecodeWork): number;
}

/** A decode step takes at least this long on any hardware that the models describe. */
export const DECODE_MIN_MS = 1;

/** Time to move `bytes` over a link of its own; 0 when the bandwidth is 0, which means "do not simulate". */
export function transferMs(bytes: number, bandwidthBytesPerSecond: number): number {
  return bandwidthBytesPerSecond === 0 ? 0 : (bytes / bandwidthBytesPerSecond) * 1_000;
}
