import type { OverlapScores } from "./base.ts";
import { findBlock } from "./block-table.ts";
import {
  CONTROL,
  NODE_WORDS,
  RECORD_CHILD,
  RECORD_HI,
  RECORD_LO,
  RECORD_SET,
  RECORD_WORDS,
  type FlatKvMemory,
} from "./flat-kv-memory.ts";
import { EMPTY_SET, NODE_CONTINUATION, NODE_PAIRS, PLANE_KEY_BITS } from "./rank-set-pool.ts";

/**
 * The lookup: walks a chain from its first block and tells per rank how far it is covered. From one block to the next it
 * tries the record's child (chains stored at once lie side by side in memory), and asks the hash table only where the
 * prompt takes another branch. While the rank set stays the same nothing else happens; where it changes, four sets of
 * active ranks (matching on the device, in host memory, on disk, in the shared store) are narrowed, 32 ranks at a time, and
 * only ranks that drop out cost something each. So: a few ns per block, plus about one per rank that holds the first block.
 *
 * Reads shared memory without any lock. Under a concurrent write it returns something, always ends and never throws; the
 * caller throws the result away (write-gate.ts). Owns its scratch: one matcher per thread.
 */
export class PrefixMatcher {
  readonly #memory: FlatKvMemory;
  /** By word of 32 ranks: who still matches, in which tier. */
  #device = new Uint32Array(8);
  #host = new Uint32Array(8);
  #disk = new Uint32Array(8);
  #shared = new Uint32Array(8);
  /** The set under the walk, one array per tier. */
  #inDevice = new Uint32Array(8);
  #inHost = new Uint32Array(8);
  #inDisk = new Uint32Array(8);
  #inStore = new Uint32Array(8);
  /** The walk has met a block in a store; before that `#shared` and `#inStore` mean nothing. */
  #hasStore = false;
  /** Words that the first block's set touches: nobody else can match. */
  #firstWord = 0;
  #endWord = 0;

  constructor(memory: FlatKvMemory) {
    this.#memory = memory;
  }

  /** See `KvIndexReader.findMatches`. Returns the last record on the way, or 0. */
  match(hashes: Uint32Array, blockCount: number, into: OverlapScores): number {
    const memory = this.#memory;
    const { records } = memory;
    const rankCount = memory.control[CONTROL.rankCount]!;
    into.reset(rankCount);
    this.#fitScratch((rankCount + 31) >>> 5);
    const count = Math.min(blockCount, hashes.length >>> 1);
    let record = 0;
    let set = EMPTY_SET;
    let block = 0;
    for (; block < count; block++) {
      const lo = hashes[2 * block]!;
      const hi = hashes[2 * block + 1]!;
      let next = record === 0 ? 0 : records[record * RECORD_WORDS + RECORD_CHILD]!;
      let at = next * RECORD_WORDS;
      if (next === 0 || records[at + RECORD_LO] !== lo || records[at + RECORD_HI] !== hi) {
        next = findBlock(memory, lo, hi);
        if (next === 0) break;
        at = next * RECORD_WORDS;
      }
      const nextSet = records[at + RECORD_SET]!;
      if (nextSet !== set || block === 0) {
        if (nextSet === EMPTY_SET) break;
        this.#load(nextSet, block === 0);
        if (block === 0) this.#start();
        else if (!this.#narrow(block, into)) return next;
        set = nextSet;
      }
      record = next;
    }
    if (block > 0) this.#finish(block, into);
    return record;
  }

  #fitScratch(wordCount: number): void {
    if (wordCount <= this.#device.length) return;
    const size = Math.max(wordCount, 2 * this.#device.length);
    this.#device = new Uint32Array(size);
    this.#host = new Uint32Array(size);
    this.#disk = new Uint32Array(size);
    this.#shared = new Uint32Array(size);
    this.#inDevice = new Uint32Array(size);
    this.#inHost = new Uint32Array(size);
    this.#inDisk = new Uint32Array(size);
    this.#inStore = new Uint32Array(size);
  }

  /** Spreads a set into one bit set per tier, over the words that still matter. */
  #load(set: number, isFirst: boolean): void {
    const { sets } = this.#memory;
    const [inDevice, inHost, inDisk] = [this.#inDevice, this.#inHost, this.#inDisk];
    const size = inDevice.length;
    const firstWord = isFirst ? 0 : this.#firstWord;
    const endWord = isFirst ? size : this.#endWord;
    inDevice.fill(0, firstWord, endWord);
    inHost.fill(0, firstWord, endWord);
    inDisk.fill(0, firstWord, endWord);
    if (isFirst) this.#hasStore = false;
    else if (this.#hasStore) this.#inStore.fill(0, firstWord, endWord);
    let lowest = size;
    let highest = -1;
    // The number of nodes is bounded by the words of all planes: half-written links must not lead round in circles.
    let nodesLeft = 4 * size;
    for (let node = set; node !== 0 && nodesLeft-- > 0; node = sets[node * NODE_WORDS + NODE_CONTINUATION]!) {
      const end = (node + 1) * NODE_WORDS;
      for (let at = node * NODE_WORDS + NODE_PAIRS; at < end; at += 2) {
        const key = sets[at]!;
        const bits = sets[at + 1]!;
        if (bits === 0) break;
        const word = key & 0xffff;
        const plane = key >>> PLANE_KEY_BITS;
        if (plane === 0) inDevice[word] = bits;
        else if (plane === 1) inHost[word] = bits;
        else if (plane === 2) inDisk[word] = bits;
        else this.#inStoreToo(word, bits);
        if (word < lowest) lowest = word;
        if (word > highest) highest = word;
      }
    }
    if (!isFirst) return;
    this.#firstWord = lowest;
    this.#endWord = Math.min(highest + 1, size);
  }

  /** Most indexes have no block in a store: its sets are kept from the first one on that a walk meets. */
  #inStoreToo(word: number, bits: number): void {
    if (!this.#hasStore) {
      this.#hasStore = true;
      this.#shared.fill(0);
      this.#inStore.fill(0);
    }
    this.#inStore[word] = bits;
  }

  #start(): void {
    const [device, host, disk] = [this.#device, this.#host, this.#disk];
    const [inDevice, inHost, inDisk] = [this.#inDevice, this.#inHost, this.#inDisk];
    for (let word = this.#firstWord; word < this.#endWord; word++) {
      const d = inDevice[word]!;
      const h = inHost[word]!;
      const k = inDisk[word]!;
      device[word] = d;
      host[word] = h & ~d;
      disk[word] = k & ~h & ~d;
      if (this.#hasStore) this.#shared[word] = this.#inStore[word]! & ~k & ~h & ~d;
    }
  }

  /** The block's set differs from the one before: who drops out of a tier goes on in the next one, or is done. */
  #narrow(block: number, into: OverlapScores): boolean {
    const [device, host, disk] = [this.#device, this.#host, this.#disk];
    const [inDevice, inHost, inDisk] = [this.#inDevice, this.#inHost, this.#inDisk];
    const hasStore = this.#hasStore;
    let active = 0;
    for (let word = this.#firstWord; word < this.#endWord; word++) {
      const h = inHost[word]!;
      const k = inDisk[word]!;
      const offDevice = device[word]! & ~inDevice[word]!;
      const offHost = host[word]! & ~h;
      const offDisk = disk[word]! & ~k;
      if ((offDevice | offHost | offDisk) !== 0) {
        endDevice(offDevice, word, block, into);
        endHost(offHost, word, block, into);
        endDisk(offDisk, word, block, into);
        device[word] = device[word]! & ~offDevice;
        host[word] = (host[word]! & ~offHost) | (offDevice & h);
        disk[word] = (disk[word]! & ~offDisk) | (((offDevice & ~h) | offHost) & k);
      }
      if (hasStore) active |= this.#narrowShared(word, block, (((offDevice & ~h) | offHost) & ~k) | offDisk, into);
      active |= device[word]! | host[word]! | disk[word]!;
    }
    return active !== 0;
  }

  /** `came`: ranks that have just dropped out of every nearer tier. A match in the store takes what is on disk too. */
  #narrowShared(word: number, block: number, came: number, into: OverlapScores): number {
    const shared = this.#shared;
    const here = this.#inStore[word]! | this.#inDisk[word]!;
    const off = shared[word]! & ~here;
    endShared(off, word, block, into);
    shared[word] = (shared[word]! & ~off) | (came & here);
    return shared[word]!;
  }

  #finish(block: number, into: OverlapScores): void {
    for (let word = this.#firstWord; word < this.#endWord; word++) {
      endDevice(this.#device[word]!, word, block, into);
      endHost(this.#host[word]!, word, block, into);
      endDisk(this.#disk[word]!, word, block, into);
      if (this.#hasStore) endShared(this.#shared[word]!, word, block, into);
    }
  }
}

function endDevice(ranks: number, word: number, block: number, into: OverlapScores): void {
  const { device } = into;
  for (let bits = ranks | 0; bits !== 0; bits &= bits - 1)
    device[(word << 5) | (31 - Math.clz32(bits & -bits))] = block;
}

function endHost(ranks: number, word: number, block: number, into: OverlapScores): void {
  const { device, host } = into;
  for (let bits = ranks | 0; bits !== 0; bits &= bits - 1) {
    const rank = (word << 5) | (31 - Math.clz32(bits & -bits));
    host[rank] = block - device[rank]!;
  }
}

function endDisk(ranks: number, word: number, block: number, into: OverlapScores): void {
  const { device, host, disk } = into;
  for (let bits = ranks | 0; bits !== 0; bits &= bits - 1) {
    const rank = (word << 5) | (31 - Math.clz32(bits & -bits));
    disk[rank] = block - device[rank]! - host[rank]!;
  }
}

function endShared(ranks: number, word: number, block: number, into: OverlapScores): void {
  const { device, host, disk, shared } = into;
  for (let bits = ranks | 0; bits !== 0; bits &= bits - 1) {
    const rank = (word << 5) | (31 - Math.clz32(bits & -bits));
    shared[rank] = block - device[rank]! - host[rank]! - disk[rank]!;
  }
}
