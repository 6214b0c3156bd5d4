import assert from "node:assert/strict";

/**
 * Measured points as functions: linear between neighbours and, outside, along the line through the two outermost points.
 * Made once, then a binary search per question and no allocation. The constructors assert what `profile.ts` checked.
 */
export class LinearCurve {
  readonly #xs: Float64Array;
  readonly #ys: Float64Array;

  /** At least one point; `xs` strictly ascending. One point is a constant. */
  constructor(xs: ArrayLike<number>, ys: ArrayLike<number>) {
    assert(xs.length === ys.length, "each point has an x and a y");
    assertAscending(xs);
    this.#xs = Float64Array.from(xs);
    this.#ys = Float64Array.from(ys);
  }

  at(x: number): number {
    if (this.#xs.length === 1) return this.#ys[0]!;
    const left = segmentOf(this.#xs, x);
    const share = shareIn(this.#xs, left, x);
    return this.#ys[left]! + share * (this.#ys[left + 1]! - this.#ys[left]!);
  }
}

/** z over a full grid: bilinear inside a cell, the outermost cells go on outside. */
export class BilinearSurface {
  readonly #xs: Float64Array;
  readonly #ys: Float64Array;
  /** Row major: z of (xs[i], ys[j]) at i * ys.length + j. */
  readonly #zs: Float64Array;

  constructor(xs: ArrayLike<number>, ys: ArrayLike<number>, zs: ArrayLike<number>) {
    assertAscending(xs);
    assertAscending(ys);
    assert(zs.length === xs.length * ys.length, "the grid has a value at each crossing");
    this.#xs = Float64Array.from(xs);
    this.#ys = Float64Array.from(ys);
    this.#zs = Float64Array.from(zs);
  }

  at(x: number, y: number): number {
    const row = segmentOf(this.#xs, x);
    const column = segmentOf(this.#ys, y);
    const rowShare = shareIn(this.#xs, row, x);
    const columnShare = shareIn(this.#ys, column, y);
    const low = this.#alongRow(row, column, columnShare);
    return low + rowShare * (this.#alongRow(Math.min(row + 1, this.#xs.length - 1), column, columnShare) - low);
  }

  #alongRow(row: number, column: number, share: number): number {
    const at = row * this.#ys.length + column;
    const low = this.#zs[at]!;
    return this.#ys.length === 1 ? low : low + share * (this.#zs[at + 1]! - low);
  }
}

/** Index of the left end of the segment that answers for x; the outermost ones answer for everything beyond. */
function segmentOf(xs: Float64Array, x: number): number {
  let low = 0;
  let high = xs.length - 2;
  while (low < high) {
    const middle = (low + high + 1) >>> 1;
    if (xs[middle]! <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}

function shareIn(xs: Float64Array, left: number, x: number): number {
  return xs.length === 1 ? 0 : (x - xs[left]!) / (xs[left + 1]! - xs[left]!);
}

function assertAscending(xs: ArrayLike<number>): void {
  assert(xs.length > 0, "there is at least one point");
  for (let i = 1; i < xs.length; i++) assert(xs[i]! > xs[i - 1]!, "the points ascend");
}
