/**
 * Durations in buckets of 1 % width, from 1 us to about three hours: percentiles of millions of samples in constant
 * memory, no allocation per sample. A percentile is the upper edge of its bucket, so at most 1 % too high; count, mean
 * and maximum are exact. 0 has a bucket of its own (tokens that came in one packet).
 */
const GROWTH = 1.01;
const SMALLEST_MS = 0.001;
const BUCKET_COUNT = 2_350;
const SCALE = 1 / Math.log(GROWTH);

export interface Percentiles {
  readonly count: number;
  readonly mean: number;
  readonly p50: number;
  readonly p90: number;
  readonly p95: number;
  readonly p99: number;
  readonly max: number;
}

export class LatencyHistogram {
  readonly #counts = new Float64Array(BUCKET_COUNT);
  #count = 0;
  #sum = 0;
  #max = 0;

  get count(): number {
    return this.#count;
  }

  /** `durationMs` of 0 or more. */
  add(durationMs: number): void {
    const bucket = durationMs < SMALLEST_MS ? 0 : 1 + Math.floor(Math.log(durationMs / SMALLEST_MS) * SCALE);
    const index = bucket < BUCKET_COUNT ? bucket : BUCKET_COUNT - 1;
    this.#counts[index] = this.#counts[index]! + 1;
    this.#count++;
    this.#sum += durationMs;
    if (durationMs > this.#max) this.#max = durationMs;
  }

  /** The value below which `fraction` (0 to 1) of the samples lie; 0 when there are none. */
  percentile(fraction: number): number {
    const rank = Math.ceil(fraction * this.#count);
    let seen = 0;
    for (let i = 0; i < BUCKET_COUNT; i++) {
      seen += this.#counts[i]!;
      if (seen >= rank && seen > 0) return i === 0 ? 0 : Math.min(this.#max, SMALLEST_MS * GROWTH ** i);
    }
    return 0;
  }

  percentiles(): Percentiles {
    return {
      count: this.#count,
      mean: this.#count === 0 ? 0 : this.#sum / this.#count,
      p50: this.percentile(0.5),
      p90: this.percentile(0.9),
      p95: this.percentile(0.95),
      p99: this.percentile(0.99),
      max: this.#max,
    };
  }
}
