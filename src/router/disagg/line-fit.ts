/**
 * A straight line through noisy samples, least squares with weights that fade by 2 % per sample, so that it follows a
 * cluster that changes. It starts as an assumed line worth two samples, which the measured ones outweigh soon. Neither
 * intercept nor slope is ever negative: what is fitted is a cost.
 */
const FADE = 0.98;

export class LineFit {
  readonly #assumedIntercept: number;
  readonly #assumedSlope: number;
  #weight = 0;
  #x = 0;
  #y = 0;
  #xx = 0;
  #xy = 0;
  count = 0;
  intercept: number;
  slope: number;

  constructor(assumedIntercept: number, assumedSlope: number) {
    this.#assumedIntercept = assumedIntercept;
    this.#assumedSlope = assumedSlope;
    this.intercept = assumedIntercept;
    this.slope = assumedSlope;
  }

  at(x: number): number {
    return this.intercept + this.slope * x;
  }

  add(x: number, y: number): void {
    if (this.count === 0) {
      // As if the assumption had been seen twice where the first sample is.
      const assumed = this.#assumedIntercept + this.#assumedSlope * x;
      this.#note(0, this.#assumedIntercept);
      this.#note(x, assumed);
    }
    this.count++;
    this.#weight *= FADE;
    this.#x *= FADE;
    this.#y *= FADE;
    this.#xx *= FADE;
    this.#xy *= FADE;
    this.#note(x, y);
    this.#solve();
  }

  #note(x: number, y: number): void {
    this.#weight++;
    this.#x += x;
    this.#y += y;
    this.#xx += x * x;
    this.#xy += x * y;
  }

  #solve(): void {
    const meanX = this.#x / this.#weight;
    const meanY = this.#y / this.#weight;
    const variance = this.#xx / this.#weight - meanX * meanX;
    const covariance = this.#xy / this.#weight - meanX * meanY;
    const slope = variance > 1e-9 ? Math.max(0, covariance / variance) : this.#assumedSlope;
    const intercept = meanY - slope * meanX;
    // Through the origin when the line would cut the axis below it.
    this.intercept = Math.max(0, intercept);
    this.slope = intercept < 0 && this.#xx > 0 ? this.#xy / this.#xx : slope;
  }
}
