/**
 * How often a hash was seen lately, roughly: a count-min sketch of 4-bit counters that are all halved when ten times the
 * capacity was counted (TinyLFU: Einziger, Friedman, Manes, 2017; sizes as in Dynamo's KVBM). Never under-counts between
 * two halvings, up to 15. Half a byte per counter, four counters per entry of capacity.
 */
const ROWS = 4;
const COUNTER_MAX = 15;
/** Odd constants of the splitmix and golden-ratio family: one row each. */
const ROW_SEEDS = [0x9e3779b1, 0x85ebca77, 0xc2b2ae3d, 0x27d4eb2f] as const;

export class FrequencySketch {
  readonly #nibbles: Uint8Array;
  readonly #mask: number;
  readonly #resetAt: number;
  #increments = 0;

  /** `capacity`: how many distinct hashes are usually there. */
  constructor(capacity: number) {
    let counters = 16;
    while (counters < capacity * 4) counters *= 2;
    this.#nibbles = new Uint8Array(counters / 2);
    this.#mask = counters - 1;
    this.#resetAt = Math.max(1, capacity) * 10;
  }

  /** 0 to 15. */
  count(lo: number, hi: number): number {
    let least = COUNTER_MAX;
    for (let row = 0; row < ROWS; row++) {
      const at = this.#slot(lo, hi, row);
      least = Math.min(least, (this.#nibbles[at >>> 1]! >>> ((at & 1) * 4)) & COUNTER_MAX);
    }
    return least;
  }

  add(lo: number, hi: number): void {
    for (let row = 0; row < ROWS; row++) {
      const at = this.#slot(lo, hi, row);
      const shift = (at & 1) * 4;
      const byte = this.#nibbles[at >>> 1]!;
      if (((byte >>> shift) & COUNTER_MAX) < COUNTER_MAX) this.#nibbles[at >>> 1] = byte + (1 << shift);
    }
    if (++this.#increments >= this.#resetAt) this.#halve();
  }

  #halve(): void {
    const nibbles = this.#nibbles;
    for (let i = 0; i < nibbles.length; i++) nibbles[i] = (nibbles[i]! >>> 1) & 0x77;
    this.#increments >>>= 1;
  }

  #slot(lo: number, hi: number, row: number): number {
    let mixed = Math.imul(lo ^ Math.imul(hi, 0x2545f491), ROW_SEEDS[row]!);
    mixed ^= mixed >>> 15;
    return (Math.imul(mixed, 0x2c1b3c6d) >>> 7) & this.#mask;
  }
}
