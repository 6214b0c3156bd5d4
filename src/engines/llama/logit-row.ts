import {
  WasmFunction,
  doWhile,
  f32,
  f32x4,
  f64,
  i32,
  i32x4,
  instantiateWasm,
  leave,
  v128,
  when,
  type Code,
} from "../../std/index.ts";

/**
 * The row that is being sampled from, with the loops that look at all of it: maximum, sum of the softmax weights, search
 * for what reaches a floor. The row is a copy, because penalties change it and the model's own memory must stay as it is.
 * It lies in the memory of a WebAssembly module, where four logits are handled at a time. `PlainLogitRow` is the twin for
 * platforms without, and the model for its test.
 *
 * NaN and -Infinity mean "cannot come". A weight is exp((logit - maximum) / temperature), so the best token has 1; what
 * lies 30 or more below the best counts as nothing: with 2^20 tokens that is at most 1e-7 of the mass.
 *
 * One row per vocabulary size and thread, borrowed for the length of a synchronous call. Cost for 49,152 logits: copy 15
 * us, maximum 5 us, sum 50 us (plain: 30 us, 180 us). Weights are within 3e-6 of float64's.
 */
export interface LogitRow {
  /** length = vocabulary size. */
  readonly logits: Float32Array;
  /** Sum of the weights of each `BLOCK_TOKENS` tokens, so that a draw has to look into one block only. */
  readonly blockSums: Float64Array;
  /** The largest logit, -Infinity when there is none. */
  maximum(): number;
  /**
   * Where the next group of `GROUP_TOKENS` tokens begins, from `start` on (a multiple of that), that has a logit of at
   * least `floor`; the vocabulary size or more when there is none. For passing over nearly all of a row.
   */
  nextGroup(start: number, floor: number): number;
  /** Sum of all weights; fills `blockSums`. */
  sumWeights(maximum: number, perTemperature: number): number;
}

export const CUTOFF = 30;
export const BLOCK_TOKENS = 256;
export const GROUP_TOKENS = 16;

let current: LogitRow | undefined;

/** The row, holding a copy of `logits` until the next call. */
export function borrowRow(logits: Float32Array): LogitRow {
  if (current?.logits.length !== logits.length) {
    current = trySimdLogitRow(logits.length) ?? new PlainLogitRow(logits.length);
  }
  current.logits.set(logits);
  return current;
}

const STEPS_PER_UNIT = 32;
/** exp(-i / 32). With the cubic below the relative error stays under 3e-9. */
const EXP_TABLE = Float64Array.from({ length: CUTOFF * STEPS_PER_UNIT + 2 }, (_, i) => Math.exp(-i / STEPS_PER_UNIT));

/** exp(x) for -30 <= x <= 0. */
export function expOfNegative(x: number): number {
  const step = (x * -STEPS_PER_UNIT + 0.5) | 0;
  const rest = x + step / STEPS_PER_UNIT;
  return EXP_TABLE[step]! * (1 + rest * (1 + rest * (0.5 + rest * (1 / 6))));
}

export class PlainLogitRow implements LogitRow {
  readonly logits: Float32Array;
  readonly blockSums: Float64Array;

  constructor(vocabularySize: number) {
    this.logits = new Float32Array(vocabularySize);
    this.blockSums = new Float64Array(Math.ceil(vocabularySize / BLOCK_TOKENS));
  }

  maximum(): number {
    const logits = this.logits;
    let max = -Infinity;
    for (let i = 0; i < logits.length; i++) if (logits[i]! > max) max = logits[i]!;
    return max;
  }

  nextGroup(start: number, floor: number): number {
    const logits = this.logits;
    for (let i = start; i < logits.length; i++) if (logits[i]! >= floor) return i - (i % GROUP_TOKENS);
    return logits.length;
  }

  sumWeights(maximum: number, perTemperature: number): number {
    const logits = this.logits;
    const sums = this.blockSums;
    let total = 0;
    for (let start = 0, block = 0; start < logits.length; start += BLOCK_TOKENS, block++) {
      const end = Math.min(start + BLOCK_TOKENS, logits.length);
      let sum = 0;
      for (let i = start; i < end; i++) {
        const x = (logits[i]! - maximum) * perTemperature;
        if (x > -CUTOFF) sum += expOfNegative(x);
      }
      sums[block] = sum;
      total += sum;
    }
    return total;
  }
}

interface RowFunctions {
  maximum(endBytes: number): number;
  /** Offset of the next 64 bytes with a logit of at least `floor`; the end when there are none. */
  nextGroup(startBytes: number, endBytes: number, floor: number): number;
  sumWeights(endBytes: number, maximum: number, perTemperature: number, sumsAt: number): number;
}

const BLOCK_BYTES = 4 * BLOCK_TOKENS;
/** One round of the loops: four vectors. */
const GROUP_BYTES = 4 * GROUP_TOKENS;
const VECTORS = [0, 16, 32, 48];

/** The row is padded with -Infinity to whole blocks; block sums follow it. undefined = no WebAssembly, or no SIMD. */
export function trySimdLogitRow(vocabularySize: number): LogitRow | undefined {
  const blockCount = Math.ceil(vocabularySize / BLOCK_TOKENS);
  const endBytes = blockCount * BLOCK_BYTES;
  const wasm = instantiateWasm<RowFunctions>({
    functions: [emitMaximum(), emitNextGroup(), emitSumWeights()],
    memoryPages: Math.ceil((endBytes + 8 * blockCount) / 65_536),
  });
  if (wasm === undefined) return undefined;
  const { functions, memory } = wasm;
  new Float32Array(memory.buffer, 0, endBytes / 4).fill(-Infinity);
  const logits = new Float32Array(memory.buffer, 0, vocabularySize);
  return {
    logits,
    blockSums: new Float64Array(memory.buffer, endBytes, blockCount),
    maximum: () => functions.maximum(endBytes),
    nextGroup: (start, floor) => functions.nextGroup(4 * start, endBytes, floor) / 4,
    sumWeights: (maximum, perTemperature) => functions.sumWeights(endBytes, maximum, perTemperature, endBytes),
  };
}

function emitMaximum(): WasmFunction {
  const target = new WasmFunction("maximum", ["i32"], "f32");
  const endBytes = target.parameter(0);
  const at = target.local("i32");
  // Four, because each comparison waits for the one before.
  const maxima = VECTORS.map(() => target.local("v128"));
  const best = maxima[0]!;
  const lanes = [0, 1, 2, 3].map((index) => f32x4.lane(best.get, index));
  target.body(
    ...maxima.map((each) => each.set(f32x4.splat(f32.const(-Infinity)))),
    doWhile(
      [
        ...maxima.flatMap((each, i) => each.set(f32x4.pseudoMax(each.get, v128.load(at.get, VECTORS[i])))),
        ...at.set(i32.add(at.get, i32.const(GROUP_BYTES))),
      ],
      i32.lessUnsigned(at.get, endBytes.get),
    ),
    ...maxima.slice(1).map((each) => best.set(f32x4.pseudoMax(best.get, each.get))),
    lanes.reduce((left, right) => f32.max(left, right)),
  );
  return target;
}

function emitNextGroup(): WasmFunction {
  const target = new WasmFunction("nextGroup", ["i32", "i32", "f32"], "i32");
  const [at, endBytes] = [target.parameter(0), target.parameter(1)];
  const floor = target.local("v128");
  const isHere = VECTORS.map((offset) => f32x4.atLeast(v128.load(at.get, offset), floor.get));
  const notAtEnd = i32.lessUnsigned(at.get, endBytes.get);
  target.body(
    floor.set(f32x4.splat(target.parameter(2).get)),
    when(
      notAtEnd,
      doWhile(
        [
          ...when(v128.isAnyTrue(isHere.reduce((left, right) => v128.or(left, right))), leave(at.get)),
          ...at.set(i32.add(at.get, i32.const(GROUP_BYTES))),
        ],
        notAtEnd,
      ),
    ),
    at.get,
  );
  return target;
}

/** 2^x on [-0.5, 0.5] by its series: the seventh term is under 2e-7. */
const POWER_OF_TWO_SERIES = [0, 1, 2, 3, 4, 5, 6].map((n) => {
  let factorial = 1;
  for (let i = 2; i <= n; i++) factorial *= i;
  return Math.LN2 ** n / factorial;
});
const FLOAT_EXPONENT_BIAS = 127;
const FLOAT_MANTISSA_BITS = 23;

function emitSumWeights(): WasmFunction {
  const target = new WasmFunction("sumWeights", ["i32", "f32", "f32", "i32"], "f64");
  const [endBytes, maximum, perTemperature] = [target.parameter(0), target.parameter(1), target.parameter(2)];
  const sumsAt = target.parameter(3);
  const at = target.local("i32");
  const blockEnd = target.local("i32");
  const total = target.local("f64");
  const blockSum = target.local("f64");
  const sum = target.local("v128");
  const x = target.local("v128");
  const power = target.local("v128");
  const whole = target.local("v128");
  const splat = (value: number): Code => f32x4.splat(f32.const(value));

  // exp(x) = 2^power = 2^whole * 2^(power - whole); 2^whole is made by writing its exponent.
  const weights = (offset: number): Code => [
    ...x.set(
      f32x4.mul(f32x4.sub(v128.load(at.get, offset), f32x4.splat(maximum.get)), f32x4.splat(perTemperature.get)),
    ),
    ...power.set(f32x4.mul(x.get, splat(Math.LOG2E))),
    ...whole.set(f32x4.nearest(power.get)),
    ...power.set(f32x4.sub(power.get, whole.get)),
    ...v128.and(
      f32x4.mul(
        POWER_OF_TWO_SERIES.map(splat).reduceRight((series, coefficient) =>
          f32x4.add(coefficient, f32x4.mul(power.get, series)),
        ),
        i32x4.shiftLeft(
          i32x4.add(i32x4.fromF32x4(whole.get), i32x4.splat(i32.const(FLOAT_EXPONENT_BIAS))),
          i32.const(FLOAT_MANTISSA_BITS),
        ),
      ),
      f32x4.greater(x.get, splat(-CUTOFF)),
    ),
  ];
  const lanes = [0, 1, 2, 3].map((index) => f64.fromF32(f32x4.lane(sum.get, index)));
  target.body(
    doWhile(
      [
        ...blockEnd.set(i32.add(at.get, i32.const(BLOCK_BYTES))),
        ...sum.set(splat(0)),
        ...doWhile(
          [
            ...VECTORS.flatMap((offset) => sum.set(f32x4.add(sum.get, weights(offset)))),
            ...at.set(i32.add(at.get, i32.const(GROUP_BYTES))),
          ],
          i32.lessUnsigned(at.get, blockEnd.get),
        ),
        ...blockSum.set(lanes.reduce((left, right) => f64.add(left, right))),
        ...f64.store(sumsAt.get, blockSum.get),
        ...sumsAt.set(i32.add(sumsAt.get, i32.const(8))),
        ...total.set(f64.add(total.get, blockSum.get)),
      ],
      i32.lessUnsigned(at.get, endBytes.get),
    ),
    total.get,
  );
  return target;
}
