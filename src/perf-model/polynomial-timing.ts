import { DECODE_MIN_MS, type DecodeWork, type PrefillWork, type TimingModel } from "./timing.ts";

/**
 * The default model, two fitted quadratics (the coefficients are those of Dynamo's mocker, so that simulated figures can
 * be compared; golden values in perf-model.test.ts):
 *
 *   prefill_ms = 4.209989e-7 t^2 + 1.518344e-2 t + 16.50142       t = new tokens of the pass
 *   decode_ms  = max(1, -25.74 u^2 + 54.01 u + 5.74)              u = used share of the KV cache, at most 1
 */
export function polynomialPrefillMs(newTokens: number): number {
  if (newTokens <= 0) return 0;
  return 4.209989e-7 * newTokens * newTokens + 1.518344e-2 * newTokens + 16.50142;
}

export function polynomialDecodeMs(kvUsage: number): number {
  const usage = Math.min(1, kvUsage);
  return Math.max(DECODE_MIN_MS, -25.74 * usage * usage + 54.01 * usage + 5.74);
}

export const polynomialTiming: TimingModel = {
  prefillMs: ({ inputTokens, prefixTokens }: PrefillWork) => polynomialPrefillMs(inputTokens - prefixTokens),
  decodeMs: ({ sequenceCount, activeKvTokens, totalKvTokens }: DecodeWork) =>
    sequenceCount === 0 ? 0 : polynomialDecodeMs(activeKvTokens / totalKvTokens),
};
