/**
 * The prefix cache in the plainest words: the model that `block-cache.test.ts` compares with. Blocks are named by their
 * tokens from the start of the sequence, there are no cells, ids or holders, and every count is counted anew.
 */
interface NaiveBlock {
  users: number;
}

export class NaiveBlockCache {
  readonly #totalBlocks: number;
  readonly #blocks = new Map<string, NaiveBlock>();
  /** Names of blocks without users, the next to be evicted first. */
  #unused: string[] = [];
  privateBlocks = 0;
  evictions: string[] = [];

  constructor(totalBlocks: number) {
    this.#totalBlocks = totalBlocks;
  }

  get freeBlocks(): number {
    return this.#totalBlocks - this.#blocks.size - this.privateBlocks;
  }

  get unusedBlocks(): number {
    return this.#unused.length;
  }

  get names(): string[] {
    return [...this.#blocks.keys()].toSorted();
  }

  findPrefix(names: readonly string[]): number {
    const missing = names.findIndex((name) => !this.#blocks.has(name));
    return missing < 0 ? names.length : missing;
  }

  acquire(names: readonly string[]): void {
    for (const name of names) {
      this.#blocks.get(name)!.users++;
      this.#unused = this.#unused.filter((other) => other !== name);
    }
  }

  reserve(count: number): boolean {
    if (this.freeBlocks + this.unusedBlocks < count) return false;
    while (this.freeBlocks < count) this.#evict();
    this.privateBlocks += count;
    return true;
  }

  register(names: readonly string[]): void {
    for (const name of names) {
      this.privateBlocks--;
      if (!this.#blocks.has(name)) this.#blocks.set(name, { users: 0 });
      this.acquire([name]);
    }
  }

  release(names: readonly string[], privateCount: number): void {
    this.privateBlocks -= privateCount;
    for (const name of names.toReversed()) if (--this.#blocks.get(name)!.users === 0) this.#unused.push(name);
  }

  clear(): number {
    const count = this.unusedBlocks;
    while (this.unusedBlocks > 0) this.#evict();
    return count;
  }

  #evict(): void {
    const name = this.#unused.shift()!;
    this.#blocks.delete(name);
    this.evictions.push(name);
  }
}
