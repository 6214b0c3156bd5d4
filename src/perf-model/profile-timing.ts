import { BilinearSurface, LinearCurve } from "./interpolation.ts";
import type { Profile } from "./profile.ts";
import { DECODE_MIN_MS, type DecodeWork, type PrefillWork, type TimingModel } from "./timing.ts";

/**
 * Times read off measured points. Prefill: the curve at the mean of new tokens per sequence, times the sequences; a pass
 * of one chunk is the usual case. Decode: the surface at (KV tokens in use, mean context), at least 1 ms.
 */
export function profileTiming(profile: Profile): TimingModel {
  const { prefill, decode } = profile;
  const prefillCurve = new LinearCurve(prefill.inputTokens, prefill.ttftMs);
  const decodeSurface = new BilinearSurface(decode.activeKvTokens, decode.contextTokens, decode.itlMs);
  return {
    prefillMs({ sequenceCount, inputTokens, prefixTokens }: PrefillWork): number {
      const newTokens = inputTokens - prefixTokens;
      if (newTokens <= 0) return 0;
      return Math.max(0, sequenceCount * prefillCurve.at(newTokens / sequenceCount));
    },
    decodeMs({ sequenceCount, activeKvTokens, contextTokens }: DecodeWork): number {
      if (sequenceCount === 0) return 0;
      return Math.max(DECODE_MIN_MS, decodeSurface.at(activeKvTokens, contextTokens / sequenceCount));
    },
  };
}
