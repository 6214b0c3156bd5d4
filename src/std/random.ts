import { randomFillSync } from "node:crypto";

/** A source of randomness as an argument: seeded in tests and in the simulator, the system's elsewhere. */
export interface Random {
  /** Uniform in 0 to 2^32-1. */
  nextU32(): number;
  /** Uniform in [0, 1) with 53 bits. */
  nextFloat(): number;
}

/** xoshiro128** (Blackman and Vigna, 2018), seeded through splitmix32. Not for secrets. */
export class SeededRandom implements Random {
  #a: number;
  #b: number;
  #c: number;
  #d: number;

  constructor(seed: number) {
    let state = seed >>> 0;
    const next = (): number => {
      state = (state + 0x9e3779b9) >>> 0;
      let z = state;
      z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
      z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
      return (z ^ (z >>> 15)) >>> 0;
    };
    this.#a = next();
    this.#b = next();
    this.#c = next();
    this.#d = next();
  }

  nextU32(): number {
    let result = Math.imul(this.#b, 5);
    result = Math.imul((result << 7) | (result >>> 25), 9);
    const t = this.#b << 9;
    this.#c ^= this.#a;
    this.#d ^= this.#b;
    this.#b ^= this.#c;
    this.#a ^= this.#d;
    this.#c ^= t;
    this.#d = (this.#d << 11) | (this.#d >>> 21);
    return result >>> 0;
  }

  nextFloat(): number {
    return ((this.nextU32() >>> 5) * 67_108_864 + (this.nextU32() >>> 6)) / 9_007_199_254_740_992;
  }
}

/** The operating system's generator, read 1,024 numbers at a time: fit for ids that must differ between processes. */
class SystemRandom implements Random {
  readonly #numbers = new Uint32Array(1_024);
  #next = this.#numbers.length;

  nextU32(): number {
    if (this.#next === this.#numbers.length) {
      randomFillSync(this.#numbers);
      this.#next = 0;
    }
    return this.#numbers[this.#next++]!;
  }

  nextFloat(): number {
    return ((this.nextU32() >>> 5) * 67_108_864 + (this.nextU32() >>> 6)) / 9_007_199_254_740_992;
  }
}

export const systemRandom: Random = new SystemRandom();

/** A 64-bit id, never 0. */
export function randomId64(random: Random = systemRandom): bigint {
  const id = (BigInt(random.nextU32()) << 32n) | BigInt(random.nextU32());
  return id === 0n ? 1n : id;
}

/** A 64-bit id as 16 hex digits, never all 0. */
export function randomHexId(random: Random = systemRandom): string {
  return randomId64(random).toString(16).padStart(16, "0");
}
