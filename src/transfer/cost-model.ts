import type { CostEstimate } from "./base.ts";

/**
 * What transfers of one pair, back end and operation cost: ms = set-up + descriptors x a + megabytes x b, learnt by recursive
 * least squares with forgetting (Ljung, System Identification, 11.2) from every completed transfer. It starts at the back
 * end's typical figures and believes them like a few dozen measurements. Never negative. Transfers that overlap share the
 * medium and look slower: that is what the next one will see as well.
 */
/** The last few dozen transfers count. A medium that became slower is believed late: errors are relative to what was measured. */
const FORGETTING = 0.95;
/** Variance of the first guess: large, so that a dozen transfers outweigh it. */
const FIRST_VARIANCE = 10;
/** Of the three together. */
const MOST_VARIANCE = 3 * FIRST_VARIANCE;

export interface TypicalCost {
  readonly setupMs: number;
  readonly perDescriptorUs: number;
  readonly gigabytesPerSecond: number;
}

export class CostModel {
  /** ms, ms per descriptor, ms per megabyte. */
  readonly #weights: Float64Array;
  readonly #scale: Float64Array;
  readonly #covariance = Float64Array.of(FIRST_VARIANCE, 0, 0, 0, FIRST_VARIANCE, 0, 0, 0, FIRST_VARIANCE);
  #sampleCount = 0;

  constructor(typical: TypicalCost) {
    this.#weights = Float64Array.of(typical.setupMs, typical.perDescriptorUs / 1_000, 1 / typical.gigabytesPerSecond);
    // Weights are learnt relative to the typical ones, so that set-up, descriptors and bytes are of one size.
    this.#scale = Float64Array.from(this.#weights, (weight) => Math.max(weight, 1e-4));
  }

  observe(descriptorCount: number, byteCount: number, elapsedMs: number): void {
    const x = [this.#scale[0]!, this.#scale[1]! * descriptorCount, (this.#scale[2]! * byteCount) / 1e6];
    // Weigh by size: a transfer of a second must not drown what short ones tell of set-up.
    const norm = Math.max(elapsedMs, 1e-3);
    for (let i = 0; i < 3; i++) x[i]! /= norm;
    const p = this.#covariance;
    // What no transfer tells of must not be forgotten without end.
    const forgetting = p[0]! + p[4]! + p[8]! < MOST_VARIANCE ? FORGETTING : 1;
    const gain = [0, 0, 0];
    let denominator = forgetting;
    for (let i = 0; i < 3; i++) {
      gain[i] = p[3 * i]! * x[0]! + p[3 * i + 1]! * x[1]! + p[3 * i + 2]! * x[2]!;
      denominator += gain[i]! * x[i]!;
    }
    let error = 1;
    for (let i = 0; i < 3; i++) error -= (this.#weights[i]! / this.#scale[i]!) * x[i]!;
    for (let i = 0; i < 3; i++) {
      const k = gain[i]! / denominator;
      this.#weights[i] = Math.max(0, this.#weights[i]! + k * error * this.#scale[i]!);
    }
    for (let i = 0; i < 3; i++) {
      for (let j = i; j < 3; j++) {
        const value = (p[3 * i + j]! - (gain[i]! * gain[j]!) / denominator) / forgetting;
        p[3 * i + j] = value;
        p[3 * j + i] = value;
      }
    }
    this.#sampleCount++;
  }

  estimate(descriptorCount: number, byteCount: number): CostEstimate {
    const [setupMs, perDescriptorMs, perMegabyteMs] = this.#weights as unknown as [number, number, number];
    return {
      totalMs: setupMs + perDescriptorMs * descriptorCount + (perMegabyteMs * byteCount) / 1e6,
      setupMs,
      perDescriptorUs: perDescriptorMs * 1_000,
      gigabytesPerSecond: perMegabyteMs > 0 ? 1 / perMegabyteMs : Number.POSITIVE_INFINITY,
      sampleCount: this.#sampleCount,
    };
  }
}
