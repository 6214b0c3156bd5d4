/**
 * Which ranks hold which blocks, for chains: a rank that holds a block holds every block before it in its sequence. That
 * one invariant, kept by the users (active-sequences.ts, approximate-index.ts), makes "how many leading blocks does each
 * rank hold" cheap: walking down a chain the set of ranks only shrinks, so it is looked at only where its size changes.
 *
 *     block      b0 ──► b1 ──► b2 ──► b3          entry: hash, number of ranks, list of its members
 *     ranks     {0,4,7} {0,4,7} {4}   {4}         members: (entry, rank), found by hash too
 *                              ▲ 3 -> 1: ranks of b1 get 2, then rank 4 gets its own depth
 *
 * Flat typed arrays with free lists; no object per block. Cost: `add` and `remove` about 50 ns; a lookup of n blocks is n
 * probes plus the lists at the few places where ranks drop out. Memory: 28 bytes per block and 24 per member, times at
 * most 2 after growth.
 */
const NONE = -1;
const INITIAL = 1_024;

export class ChainTable {
  // Blocks.
  #entryLo = new Uint32Array(INITIAL);
  #entryHi = new Uint32Array(INITIAL);
  /** First member, and the number of members. */
  #entryHead = new Int32Array(INITIAL);
  #entryRanks = new Int32Array(INITIAL);
  /** Next in the bucket, or in the free list. */
  #entryNext = new Int32Array(INITIAL);
  #entryBuckets = new Int32Array(INITIAL).fill(NONE);
  #entryFree = NONE;
  #entriesUsed = 0;
  #entryCount = 0;
  // Members.
  #nodeEntry = new Int32Array(INITIAL);
  #nodeRank = new Int32Array(INITIAL);
  #nodeNext = new Int32Array(INITIAL);
  #nodePrevious = new Int32Array(INITIAL);
  /** Next in the bucket, or in the free list. */
  #nodeChain = new Int32Array(INITIAL);
  #nodeBuckets = new Int32Array(INITIAL).fill(NONE);
  #nodeFree = NONE;
  #nodesUsed = 0;
  #nodeCount = 0;

  /** Distinct blocks. */
  get blockCount(): number {
    return this.#entryCount;
  }

  /** (block, rank) pairs. */
  get memberCount(): number {
    return this.#nodeCount;
  }

  /** Member ids are below this; users that keep arrays per member grow them to it. */
  get memberCapacity(): number {
    return this.#nodeEntry.length;
  }

  get bytes(): number {
    const perEntry = 5 * 4;
    const perNode = 5 * 4;
    return (
      this.#entryLo.length * perEntry +
      this.#nodeEntry.length * perNode +
      4 * (this.#entryBuckets.length + this.#nodeBuckets.length)
    );
  }

  /** The member's id, its own until `remove`. `isNew` tells whether this call made it. */
  add(lo: number, hi: number, rank: number): number {
    let entry = this.#find(lo, hi);
    if (entry === NONE) entry = this.#addEntry(lo, hi);
    else {
      const known = this.#findNode(entry, rank);
      if (known !== NONE) {
        this.isNew = false;
        return known;
      }
    }
    this.isNew = true;
    return this.#addNode(entry, rank);
  }

  /** About the last `add`. */
  isNew = false;

  remove(node: number): void {
    const entry = this.#nodeEntry[node]!;
    const next = this.#nodeNext[node]!;
    const previous = this.#nodePrevious[node]!;
    if (previous === NONE) this.#entryHead[entry] = next;
    else this.#nodeNext[previous] = next;
    if (next !== NONE) this.#nodePrevious[next] = previous;
    this.#unchainNode(node);
    this.#nodeRank[node] = NONE;
    this.#nodeChain[node] = this.#nodeFree;
    this.#nodeFree = node;
    this.#nodeCount--;
    const ranks = this.#entryRanks[entry]! - 1;
    this.#entryRanks[entry] = ranks;
    if (ranks === 0) this.#removeEntry(entry);
  }

  /** Calls `visit` for every member of a rank, which may remove it. Looks at all members: for ranks that leave. */
  forEachOfRank(rank: number, visit: (node: number) => void): void {
    for (let node = 0; node < this.#nodesUsed; node++) if (this.#nodeRank[node] === rank) visit(node);
  }

  /**
   * Writes `into[rank]` = leading blocks held, for ranks that hold at least the first; the others keep their value, so
   * the caller zeroes. `hashes`: (lo, hi) pairs, length >= 2 x blockCount.
   */
  leadingInto(hashes: Uint32Array, blockCount: number, into: Uint32Array): void {
    let before = NONE;
    let ranksBefore = 0;
    for (let block = 0; block < blockCount; block++) {
      const entry = this.#find(hashes[2 * block]!, hashes[2 * block + 1]!);
      const ranks = entry === NONE ? 0 : this.#entryRanks[entry]!;
      if (block > 0 && ranks !== ranksBefore) this.#mark(before, block, into);
      if (entry === NONE) return;
      before = entry;
      ranksBefore = ranks;
    }
    if (before !== NONE) this.#mark(before, blockCount, into);
  }

  #mark(entry: number, depth: number, into: Uint32Array): void {
    for (let node = this.#entryHead[entry]!; node !== NONE; node = this.#nodeNext[node]!) {
      into[this.#nodeRank[node]!] = depth;
    }
  }

  #find(lo: number, hi: number): number {
    let entry = this.#entryBuckets[lo & (this.#entryBuckets.length - 1)]!;
    while (entry !== NONE && (this.#entryLo[entry] !== lo || this.#entryHi[entry] !== hi)) {
      entry = this.#entryNext[entry]!;
    }
    return entry;
  }

  #findNode(entry: number, rank: number): number {
    let node = this.#nodeBuckets[this.#nodeBucket(entry, rank)]!;
    while (node !== NONE && (this.#nodeEntry[node] !== entry || this.#nodeRank[node] !== rank)) {
      node = this.#nodeChain[node]!;
    }
    return node;
  }

  #nodeBucket(entry: number, rank: number): number {
    let mixed = Math.imul(entry, 0x9e3779b1) ^ Math.imul(rank, 0x85ebca6b);
    mixed ^= mixed >>> 15;
    return mixed & (this.#nodeBuckets.length - 1);
  }

  #addEntry(lo: number, hi: number): number {
    let entry = this.#entryFree;
    if (entry !== NONE) this.#entryFree = this.#entryNext[entry]!;
    else {
      if (this.#entriesUsed === this.#entryLo.length) this.#growEntries();
      entry = this.#entriesUsed++;
    }
    const bucket = lo & (this.#entryBuckets.length - 1);
    this.#entryLo[entry] = lo;
    this.#entryHi[entry] = hi;
    this.#entryHead[entry] = NONE;
    this.#entryRanks[entry] = 0;
    this.#entryNext[entry] = this.#entryBuckets[bucket]!;
    this.#entryBuckets[bucket] = entry;
    this.#entryCount++;
    return entry;
  }

  #removeEntry(entry: number): void {
    const bucket = this.#entryLo[entry]! & (this.#entryBuckets.length - 1);
    const after = this.#entryNext[entry]!;
    if (this.#entryBuckets[bucket] === entry) this.#entryBuckets[bucket] = after;
    else {
      let at = this.#entryBuckets[bucket]!;
      while (this.#entryNext[at] !== entry) at = this.#entryNext[at]!;
      this.#entryNext[at] = after;
    }
    this.#entryNext[entry] = this.#entryFree;
    this.#entryFree = entry;
    this.#entryCount--;
  }

  #addNode(entry: number, rank: number): number {
    let node = this.#nodeFree;
    if (node !== NONE) this.#nodeFree = this.#nodeChain[node]!;
    else {
      if (this.#nodesUsed === this.#nodeEntry.length) this.#growNodes();
      node = this.#nodesUsed++;
    }
    const head = this.#entryHead[entry]!;
    this.#nodeEntry[node] = entry;
    this.#nodeRank[node] = rank;
    this.#nodeNext[node] = head;
    this.#nodePrevious[node] = NONE;
    if (head !== NONE) this.#nodePrevious[head] = node;
    this.#entryHead[entry] = node;
    this.#entryRanks[entry]!++;
    const bucket = this.#nodeBucket(entry, rank);
    this.#nodeChain[node] = this.#nodeBuckets[bucket]!;
    this.#nodeBuckets[bucket] = node;
    this.#nodeCount++;
    return node;
  }

  #unchainNode(node: number): void {
    const bucket = this.#nodeBucket(this.#nodeEntry[node]!, this.#nodeRank[node]!);
    const after = this.#nodeChain[node]!;
    if (this.#nodeBuckets[bucket] === node) {
      this.#nodeBuckets[bucket] = after;
      return;
    }
    let at = this.#nodeBuckets[bucket]!;
    while (this.#nodeChain[at] !== node) at = this.#nodeChain[at]!;
    this.#nodeChain[at] = after;
  }

  /** Only called when every entry is in use, so each has its place in a bucket of the new size. */
  #growEntries(): void {
    const size = this.#entryLo.length * 2;
    this.#entryLo = grown(this.#entryLo, size);
    this.#entryHi = grown(this.#entryHi, size);
    this.#entryHead = grown(this.#entryHead, size);
    this.#entryRanks = grown(this.#entryRanks, size);
    this.#entryNext = grown(this.#entryNext, size);
    this.#entryBuckets = new Int32Array(size).fill(NONE);
    for (let entry = 0; entry < this.#entriesUsed; entry++) {
      const bucket = this.#entryLo[entry]! & (size - 1);
      this.#entryNext[entry] = this.#entryBuckets[bucket]!;
      this.#entryBuckets[bucket] = entry;
    }
  }

  #growNodes(): void {
    const size = this.#nodeEntry.length * 2;
    this.#nodeEntry = grown(this.#nodeEntry, size);
    this.#nodeRank = grown(this.#nodeRank, size);
    this.#nodeNext = grown(this.#nodeNext, size);
    this.#nodePrevious = grown(this.#nodePrevious, size);
    this.#nodeChain = grown(this.#nodeChain, size);
    this.#nodeBuckets = new Int32Array(size).fill(NONE);
    for (let node = 0; node < this.#nodesUsed; node++) {
      const bucket = this.#nodeBucket(this.#nodeEntry[node]!, this.#nodeRank[node]!);
      this.#nodeChain[node] = this.#nodeBuckets[bucket]!;
      this.#nodeBuckets[bucket] = node;
    }
  }
}

/** The array with its content and room for `size` elements. */
export function grown<A extends Int32Array | Uint32Array | Float64Array>(array: A, size: number): A {
  const larger = new (array.constructor as new (length: number) => A)(size);
  larger.set(array);
  return larger;
}
