import { FrequencySketch, type EvictionName } from "./eviction/index.ts";

/**
 * The block pool in the plainest way: one object per block, searches instead of indexes. The oracle of the tests and the
 * baseline of the benchmark. Hashes are strings here; `lo:hi`.
 */
interface NaiveBlock {
  state: "reset" | "partial" | "complete" | "registered";
  hash: string;
  parent: string;
  references: number;
  /** When it became inactive. */
  inactiveSince: number;
  /** Frequency class at that moment. */
  frequency: number;
  generation: number;
}

export class NaiveBlockPool {
  readonly blocks: NaiveBlock[];
  readonly evicted: string[] = [];
  readonly #eviction: EvictionName;
  /** The same sketch: what it counts is not what this twin checks. */
  readonly #sketch: FrequencySketch;
  readonly #reset: number[];
  #clock = 0;

  constructor(blockCount: number, eviction: EvictionName) {
    this.#eviction = eviction;
    this.#sketch = new FrequencySketch(blockCount);
    this.blocks = Array.from({ length: blockCount }, () => ({
      state: "reset",
      hash: "",
      parent: "",
      references: 0,
      inactiveSince: 0,
      frequency: 0,
      generation: 0,
    }));
    this.#reset = Array.from({ length: blockCount }, (_, i) => blockCount - 1 - i);
  }

  get inactive(): NaiveBlock[] {
    return this.blocks.filter(({ state, references }) => state === "registered" && references === 0);
  }

  count(state: NaiveBlock["state"]): number {
    return this.blocks.filter((block) => block.state === state).length;
  }

  find(hash: string): number {
    return this.blocks.findIndex((block) => block.state === "registered" && block.hash === hash);
  }

  allocate(count: number): number[] | undefined {
    if (this.#reset.length + this.inactive.length < count) return undefined;
    return Array.from({ length: count }, () => {
      if (this.#reset.length === 0) this.#evict();
      const block = this.#reset.pop()!;
      this.blocks[block]!.state = "partial";
      return block;
    });
  }

  stage(block: number, hash: string, parent: string): void {
    Object.assign(this.blocks[block]!, { state: "complete", hash, parent });
  }

  register(block: number): number {
    const known = this.find(this.blocks[block]!.hash);
    if (known >= 0) {
      this.#resetBlock(block);
      this.retain(known);
      return known;
    }
    Object.assign(this.blocks[block]!, { state: "registered", references: 1 });
    this.#touch(block);
    return block;
  }

  free(block: number): void {
    this.#resetBlock(block);
  }

  matchPrefix(hashes: readonly string[]): number[] {
    const found: number[] = [];
    for (const hash of hashes) {
      const block = this.find(hash);
      if (block < 0) break;
      this.retain(block);
      found.push(block);
    }
    return found;
  }

  scanMatches(hashes: readonly string[]): number[] {
    return hashes.map((hash) => {
      const block = this.find(hash);
      if (block >= 0) this.retain(block);
      return block;
    });
  }

  retain(block: number): void {
    this.blocks[block]!.references++;
    this.#touch(block);
  }

  release(block: number): void {
    const entry = this.blocks[block]!;
    if (--entry.references > 0) return;
    entry.inactiveSince = ++this.#clock;
    const [lo, hi] = pairOf(entry.hash);
    const count = this.#sketch.count(lo, hi);
    entry.frequency = [2, 6, 15].filter((threshold) => count >= threshold).length;
  }

  drop(block: number): boolean {
    if (this.blocks[block]!.references > 0) return false;
    this.evicted.push(this.blocks[block]!.hash);
    this.#resetBlock(block);
    return true;
  }

  clear(): number {
    let count = 0;
    for (; this.inactive.length > 0; count++) this.#evict();
    return count;
  }

  #touch(block: number): void {
    const [lo, hi] = pairOf(this.blocks[block]!.hash);
    this.#sketch.add(lo, hi);
  }

  #evict(): void {
    const inactive = this.inactive.toSorted((a, b) => a.inactiveSince - b.inactiveSince);
    let victim = inactive[0]!;
    if (this.#eviction === "frequency") victim = inactive.toSorted((a, b) => a.frequency - b.frequency)[0]!;
    if (this.#eviction === "lineage") victim = inactive.find((block) => this.#isLeaf(block)) ?? victim;
    this.evicted.push(victim.hash);
    this.#resetBlock(this.blocks.indexOf(victim));
  }

  #isLeaf({ hash }: NaiveBlock): boolean {
    return !this.blocks.some((block) => block.state === "registered" && block.parent === hash);
  }

  #resetBlock(block: number): void {
    const entry = this.blocks[block]!;
    Object.assign(entry, { state: "reset", hash: "", parent: "", references: 0, generation: entry.generation + 1 });
    this.#reset.push(block);
  }
}

export function pairOf(hash: string): [lo: number, hi: number] {
  const [lo, hi] = hash.split(":").map(Number);
  return [lo!, hi!];
}
