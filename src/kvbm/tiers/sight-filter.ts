/** Says which blocks are worth a place one tier down. A sight is a block that was computed or asked for. */
export interface OffloadFilter {
  /** Notes one sight of a block (`keyOf`); true when it may pass. */
  see(key: number, nowMs: number): boolean;
  clear(): void;
}

/**
 * Lets a block through once it was seen often enough: against wearing out disks with blocks that nobody asks for again.
 * The rule of Dynamo's KVBM: the first sight counts 1, each further one doubles, a block passes at `minSights`, and every
 * 600 s all counts go down by one. At most a million blocks are remembered; above that all go down sooner.
 */
const DECAY_MS = 600_000;
const MAX_ENTRIES = 1_000_000;
const MAX_COUNT = 1 << 20;

export class SightFilter implements OffloadFilter {
  readonly minSights: number;
  readonly #maxEntries: number;
  readonly #counts = new Map<number, number>();
  #decayAtMs: number | undefined = undefined;

  /** `minSights` up to 1 lets everything through and remembers nothing. */
  constructor(minSights: number, maxEntries = MAX_ENTRIES) {
    this.minSights = minSights;
    this.#maxEntries = maxEntries;
  }

  get size(): number {
    return this.#counts.size;
  }

  /** Notes one sight of a block; true when it may pass. */
  see(key: number, nowMs: number): boolean {
    if (this.minSights <= 1) return true;
    this.#decayAtMs ??= nowMs + DECAY_MS;
    for (; nowMs >= this.#decayAtMs; this.#decayAtMs += DECAY_MS) {
      if (this.#counts.size === 0) this.#decayAtMs = nowMs;
      else this.#decay();
    }
    const count = Math.min(MAX_COUNT, (this.#counts.get(key) ?? 0.5) * 2);
    this.#counts.set(key, count);
    while (this.#counts.size > this.#maxEntries) this.#decay();
    return count >= this.minSights;
  }

  clear(): void {
    this.#counts.clear();
  }

  #decay(): void {
    for (const [key, count] of this.#counts) {
      if (count <= 1) this.#counts.delete(key);
      else this.#counts.set(key, count - 1);
    }
  }
}
