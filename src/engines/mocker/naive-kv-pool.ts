/**
 * The block accounting of `KvPool` written down without any index or counter: the oracle of its property tests. A block is
 * the text of its whole prefix. Everything is found by looking through everything.
 */
interface NaiveBlock {
  readonly key: string;
  readonly parent: string | undefined;
  lastUse: number;
}

export interface NaiveTable {
  registered: string[];
  privateCount: number;
}

export class NaiveKvPool {
  readonly #totalBlocks: number;
  readonly #blockSizeTokens: number;
  #cached: NaiveBlock[] = [];
  readonly tables = new Set<NaiveTable>();
  #time = 0;

  constructor(totalBlocks: number, blockSizeTokens: number) {
    this.#totalBlocks = totalBlocks;
    this.#blockSizeTokens = blockSizeTokens;
  }

  get cachedKeys(): string[] {
    return this.#cached.map(({ key }) => key).sort();
  }

  get idleCount(): number {
    return this.#cached.filter(({ key }) => !this.#isUsed(key)).length;
  }

  get activeCount(): number {
    return this.#takenCount() - this.idleCount;
  }

  get availableCount(): number {
    return this.#totalBlocks - this.activeCount;
  }

  keysOf(tokens: readonly number[]): string[] {
    const keys: string[] = [];
    for (let end = this.#blockSizeTokens; end <= tokens.length; end += this.#blockSizeTokens) {
      keys.push(tokens.slice(0, end).join(" "));
    }
    return keys;
  }

  countCached(tokens: readonly number[]): number {
    const keys = this.keysOf(tokens);
    const miss = keys.findIndex((key) => !this.#cached.some((block) => block.key === key));
    return miss < 0 ? keys.length : miss;
  }

  open(): NaiveTable {
    const table: NaiveTable = { registered: [], privateCount: 0 };
    this.tables.add(table);
    return table;
  }

  useCached(table: NaiveTable, tokens: readonly number[], count: number): void {
    table.registered = this.keysOf(tokens).slice(0, count);
  }

  tryGrow(table: NaiveTable, tokens: readonly number[]): boolean {
    const blockCount = Math.ceil(tokens.length / this.#blockSizeTokens);
    if (blockCount - table.registered.length - table.privateCount > this.availableCount) return false;
    const keys = this.keysOf(tokens);
    for (let i = table.registered.length; i < keys.length; i++) {
      const key = keys[i]!;
      if (table.privateCount > 0) table.privateCount--;
      if (!this.#cached.some((block) => block.key === key)) {
        this.#makeRoom();
        this.#cached.push({ key, parent: keys[i - 1], lastUse: 0 });
      }
      table.registered.push(key);
    }
    while (table.registered.length + table.privateCount < blockCount) {
      this.#makeRoom();
      table.privateCount++;
    }
    return true;
  }

  release(table: NaiveTable): void {
    this.tables.delete(table);
    for (const key of table.registered.toReversed()) {
      if (!this.#isUsed(key)) this.#cached.find((block) => block.key === key)!.lastUse = ++this.#time;
    }
  }

  clear(): number {
    const count = this.idleCount;
    this.#cached = this.#cached.filter(({ key }) => this.#isUsed(key));
    return count;
  }

  #isUsed(key: string): boolean {
    return [...this.tables].some(({ registered }) => registered.includes(key));
  }

  #takenCount(): number {
    return this.#cached.length + [...this.tables].reduce((sum, { privateCount }) => sum + privateCount, 0);
  }

  #makeRoom(): void {
    if (this.#takenCount() < this.#totalBlocks) return;
    const leaves = this.#cached.filter(
      ({ key }) => !this.#isUsed(key) && !this.#cached.some(({ parent }) => parent === key),
    );
    const oldest = leaves.toSorted((a, b) => a.lastUse - b.lastUse)[0]!;
    this.#cached = this.#cached.filter((block) => block !== oldest);
  }
}
