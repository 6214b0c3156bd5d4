/** A moving average that follows: each sample counts for an eighth, the first ones for their share. */
const WEIGHT = 1 / 8;

export class Speed {
  #value: number | undefined = undefined;
  count = 0;

  /** undefined before the first sample. */
  get value(): number | undefined {
    return this.#value;
  }

  add(sample: number): void {
    this.count++;
    const weight = Math.max(WEIGHT, 1 / this.count);
    this.#value = this.#value === undefined ? sample : this.#value + weight * (sample - this.#value);
  }
}
