/**
 * Counts by size, for figures with many orders of magnitude: buckets grow by 1 %, so a quantile is right within 0.5 %.
 * From 0.001 to 1e9; smaller values count as the first bucket. Mean and largest are exact.
 */
const SMALLEST = 1e-3;
const GROWTH = Math.log(1.01);
const BUCKETS = Math.ceil(Math.log(1e9 / SMALLEST) / GROWTH) + 1;

export class LogHistogram {
  readonly #counts = new Float64Array(BUCKETS);
  count = 0;
  max = 0;
  #sum = 0;

  observe(value: number): void {
    const bucket = value <= SMALLEST ? 0 : Math.min(BUCKETS - 1, Math.ceil(Math.log(value / SMALLEST) / GROWTH));
    this.#counts[bucket]!++;
    this.count++;
    this.#sum += value;
    if (value > this.max) this.max = value;
  }

  get mean(): number {
    return this.count === 0 ? 0 : this.#sum / this.count;
  }

  /** `share` from 0 to 1; the middle of its bucket. 0 without values. */
  quantile(share: number): number {
    if (this.count === 0) return 0;
    let left = Math.max(1, Math.ceil(share * this.count));
    for (let bucket = 0; bucket < BUCKETS; bucket++) {
      left -= this.#counts[bucket]!;
      if (left <= 0) return Math.min(this.max, bucket === 0 ? SMALLEST : SMALLEST * Math.exp((bucket - 0.5) * GROWTH));
    }
    return this.max;
  }
}
