import { FrequencySketch } from "../eviction/frequency-sketch.ts";
import { SightFilter, type OffloadFilter } from "./sight-filter.ts";

/** A quarter of a million blocks, 4 million tokens in blocks of 16: half a MB of counters. */
const SKETCH_BLOCKS = 1 << 18;
/** What the counters of the sketch hold. */
export const MAX_MIN_FREQUENCY = 15;

/**
 * Lets a block through from its `minFrequency`-th sight on (Dynamo's policy `presence_lfu`). Counts are those of TinyLFU:
 * rough, never too low until all are halved, which happens by the number of sights and not by time.
 */
export class FrequencyFilter implements OffloadFilter {
  readonly #minFrequency: number;
  readonly #capacity: number;
  #sketch: FrequencySketch;

  /** `minFrequency`: 1 to 15. */
  constructor(minFrequency: number, capacity = SKETCH_BLOCKS) {
    this.#minFrequency = minFrequency;
    this.#capacity = capacity;
    this.#sketch = new FrequencySketch(capacity);
  }

  see(key: number): boolean {
    const [lo, hi] = [key >>> 0, Math.floor(key / 2 ** 32)];
    this.#sketch.add(lo, hi);
    return this.#sketch.count(lo, hi) >= this.#minFrequency;
  }

  clear(): void {
    this.#sketch = new FrequencySketch(this.#capacity);
  }
}

/** By frequency where that is asked for, else by the doubling count of sights. */
export function offloadFilter({
  minFrequency = 0,
  minSights = 1,
}: {
  readonly minFrequency?: number;
  readonly minSights?: number;
}): OffloadFilter {
  return minFrequency > 1 ? new FrequencyFilter(minFrequency) : new SightFilter(minSights);
}
