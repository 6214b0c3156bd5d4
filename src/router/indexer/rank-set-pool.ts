import { NODE_WORDS, type FlatKvMemory } from "./flat-kv-memory.ts";

/**
 * Interned sets of (tier, rank): all blocks with the same owners share one set, so a block pays one word for its owners
 * however many there are, and a lookup compares one word per block to see that nothing has changed. A set is a sparse bit
 * set, a list of (key, 32 bits) pairs sorted by key, where key = plane << 16 | rank >> 5; so any number of ranks has the
 * same form and a block of one owner costs one pair. Nodes of 8 words:
 *
 *   head          next in bucket | hash | references | continuation | key, bits | key, bits
 *   continuation              -  |   -  |      -     | continuation | key, bits | key, bits
 *
 * Bits of zero end the list. Sets never change, only appear and disappear. A set without references stays until room is
 * needed: the same few sets come and go as blocks travel, and finding one again is cheaper than making it. Transitions
 * (set, member) -> set are remembered in a small direct-mapped cache.
 *
 * Owned by the writer; readers walk the nodes (prefix-matcher.ts).
 */
export const NODE_CONTINUATION = 3;
export const NODE_PAIRS = 4;
const NODE_BUCKET_NEXT = 0;
const NODE_HASH = 1;
const NODE_REFERENCES = 2;

/** The empty set, which is no node. */
export const EMPTY_SET = 0;
/** Instead of a set: no room for it. */
export const NO_ROOM = -1;

/** device, host, disk, external: a storage tier's number is its plane. */
export const PLANES = 4;
export const PLANE_KEY_BITS = 16;
/** What a pair's key can name. */
export const MAX_RANKS = 2 ** (PLANE_KEY_BITS + 5);

/** A (tier, rank) pair as one number. */
export function memberOf(plane: number, rank: number): number {
  return plane * MAX_RANKS + rank;
}

const CACHE_SLOTS = 4_096;
const NOT_CACHED = 0xffffffff;

export class RankSetPool {
  readonly #memory: FlatKvMemory;
  readonly #maxNodes: number;
  #buckets = new Uint32Array(256);
  /** Nodes ever used, node 0 (the empty set) included. */
  #nodeCount = 1;
  #freeHead = 0;
  #freeCount = 0;
  #setCount = 0;
  #unreferencedCount = 0;
  readonly #cacheFrom = new Uint32Array(CACHE_SLOTS);
  readonly #cacheChange = new Uint32Array(CACHE_SLOTS).fill(NOT_CACHED);
  readonly #cacheTo = new Uint32Array(CACHE_SLOTS);
  /** The set being made: pairs of key and bits. */
  #draft = new Uint32Array(64);

  constructor(memory: FlatKvMemory, maxNodes: number) {
    this.#memory = memory;
    this.#maxNodes = maxNodes;
  }

  /** Bytes outside the shared memory. */
  get privateBytes(): number {
    return this.#buckets.byteLength + this.#draft.byteLength + 3 * this.#cacheTo.byteLength;
  }

  get setCount(): number {
    return this.#setCount;
  }

  /** The set with that member: `set` itself when it is in. `NO_ROOM`: nothing has changed. */
  with(set: number, member: number): number {
    return this.#transition(set, member, 1);
  }

  /** The set without that member: `set` itself when it is not in. */
  without(set: number, member: number): number {
    return set === EMPTY_SET ? EMPTY_SET : this.#transition(set, member, 0);
  }

  /** One block changes its set. */
  move(from: number, to: number): void {
    const { sets } = this.#memory;
    if (from !== EMPTY_SET && --sets[from * NODE_WORDS + NODE_REFERENCES]! === 0) this.#unreferencedCount++;
    if (to !== EMPTY_SET && sets[to * NODE_WORDS + NODE_REFERENCES]!++ === 0) this.#unreferencedCount--;
  }

  /** Whether the set has that rank in any tier. */
  hasRank(set: number, rank: number): boolean {
    const { sets } = this.#memory;
    const word = rank >>> 5;
    for (let node = set; node !== 0; node = sets[node * NODE_WORDS + NODE_CONTINUATION]!) {
      for (let at = node * NODE_WORDS + NODE_PAIRS; at < (node + 1) * NODE_WORDS; at += 2) {
        if ((sets[at]! & 0xffff) === word && ((sets[at + 1]! >>> (rank & 31)) & 1) === 1) return true;
      }
    }
    return false;
  }

  has(set: number, member: number): boolean {
    const { sets } = this.#memory;
    const key = member >>> 5;
    for (let node = set; node !== 0; node = sets[node * NODE_WORDS + NODE_CONTINUATION]!) {
      for (let at = node * NODE_WORDS + NODE_PAIRS; at < (node + 1) * NODE_WORDS; at += 2) {
        if (sets[at] === key) return ((sets[at + 1]! >>> (member & 31)) & 1) === 1;
      }
    }
    return false;
  }

  /** Calls back with the plane and rank of every member. */
  forEachMember(set: number, visit: (plane: number, rank: number) => void): void {
    const { sets } = this.#memory;
    for (let node = set; node !== 0; node = sets[node * NODE_WORDS + NODE_CONTINUATION]!) {
      for (let at = node * NODE_WORDS + NODE_PAIRS; at < (node + 1) * NODE_WORDS; at += 2) {
        const key = sets[at]!;
        for (let bits = sets[at + 1]! | 0; bits !== 0; bits &= bits - 1) {
          visit(key >>> PLANE_KEY_BITS, ((key & 0xffff) << 5) | (31 - Math.clz32(bits & -bits)));
        }
      }
    }
  }

  /** Drops the sets that no block has any more. Set numbers kept elsewhere lose their meaning unless referenced. */
  sweep(): void {
    const { sets } = this.#memory;
    for (let bucket = 0; bucket < this.#buckets.length; bucket++) {
      let previous = 0;
      for (let set = this.#buckets[bucket]!; set !== 0;) {
        const next = sets[set * NODE_WORDS + NODE_BUCKET_NEXT]!;
        if (sets[set * NODE_WORDS + NODE_REFERENCES] === 0) {
          if (previous === 0) this.#buckets[bucket] = next;
          else sets[previous * NODE_WORDS + NODE_BUCKET_NEXT] = next;
          this.#freeNodes(set);
        } else {
          previous = set;
        }
        set = next;
      }
    }
    this.#unreferencedCount = 0;
    this.#cacheChange.fill(NOT_CACHED);
  }

  #freeNodes(set: number): void {
    const { sets } = this.#memory;
    this.#setCount--;
    for (let node = set; node !== 0;) {
      const at = node * NODE_WORDS;
      const next = sets[at + NODE_CONTINUATION]!;
      sets.fill(0, at, at + NODE_WORDS);
      sets[at + NODE_CONTINUATION] = this.#freeHead;
      this.#freeHead = node;
      this.#freeCount++;
      node = next;
    }
  }

  #transition(set: number, member: number, isAdded: 0 | 1): number {
    const change = member * 2 + isAdded;
    const slot = (Math.imul(set, 0x9e3779b1) ^ Math.imul(change, 0x85ebca77)) >>> 20;
    if (this.#cacheFrom[slot] === set && this.#cacheChange[slot] === change) return this.#cacheTo[slot]!;
    const to = this.#intern(set, member, isAdded);
    if (to === NO_ROOM) return NO_ROOM;
    this.#cacheFrom[slot] = set;
    this.#cacheChange[slot] = change;
    this.#cacheTo[slot] = to;
    return to;
  }

  /** The slow way: writes the changed set into the draft, then finds it or makes it. */
  #intern(set: number, member: number, isAdded: 0 | 1): number {
    const length = this.#draftOf(set, member, isAdded);
    if (length === 0) return EMPTY_SET;
    let hash = length;
    for (let i = 0; i < length; i++) {
      hash = Math.imul(hash ^ this.#draft[i]!, 0x9e3779b1);
      hash ^= hash >>> 15;
    }
    hash >>>= 0;
    const { sets } = this.#memory;
    for (
      let known = this.#buckets[hash & (this.#buckets.length - 1)]!;
      known !== 0;
      known = sets[known * NODE_WORDS + NODE_BUCKET_NEXT]!
    ) {
      if (sets[known * NODE_WORDS + NODE_HASH] === hash && this.#isDraft(known, length)) return known;
    }
    return this.#make(hash, length);
  }

  /** Returns the draft's length in words. */
  #draftOf(set: number, member: number, isAdded: 0 | 1): number {
    const { sets } = this.#memory;
    const key = member >>> 5;
    const bit = (1 << (member & 31)) >>> 0;
    let length = 0;
    let isDone = isAdded === 0;
    const append = (pairKey: number, bits: number): void => {
      if (bits === 0) return;
      if (length + 2 > this.#draft.length) {
        const larger = new Uint32Array(this.#draft.length * 2);
        larger.set(this.#draft);
        this.#draft = larger;
      }
      this.#draft[length] = pairKey;
      this.#draft[length + 1] = bits;
      length += 2;
    };
    for (let node = set; node !== 0; node = sets[node * NODE_WORDS + NODE_CONTINUATION]!) {
      for (let at = node * NODE_WORDS + NODE_PAIRS; at < (node + 1) * NODE_WORDS; at += 2) {
        const pairKey = sets[at]!;
        const bits = sets[at + 1]!;
        if (bits === 0) break;
        if (!isDone && pairKey > key) {
          append(key, bit);
          isDone = true;
        }
        if (pairKey !== key) append(pairKey, bits);
        else append(pairKey, isAdded === 1 ? (bits | bit) >>> 0 : (bits & ~bit) >>> 0);
        if (pairKey === key) isDone = true;
      }
    }
    if (!isDone) append(key, bit);
    return length;
  }

  #isDraft(set: number, length: number): boolean {
    const { sets } = this.#memory;
    let i = 0;
    for (let node = set; node !== 0; node = sets[node * NODE_WORDS + NODE_CONTINUATION]!) {
      for (let at = node * NODE_WORDS + NODE_PAIRS; at < (node + 1) * NODE_WORDS; at += 2, i += 2) {
        if (sets[at + 1] === 0) return i === length;
        if (i >= length || sets[at] !== this.#draft[i] || sets[at + 1] !== this.#draft[i + 1]) return false;
      }
    }
    return i === length;
  }

  #make(hash: number, length: number): number {
    const nodesNeeded = Math.ceil(length / 4);
    if (!this.#tryReserve(nodesNeeded)) return NO_ROOM;
    const { sets } = this.#memory;
    let head = 0;
    let previous = 0;
    for (let i = 0; i < length; i += 4) {
      const node = this.#takeNode();
      const at = node * NODE_WORDS;
      sets.fill(0, at, at + NODE_WORDS);
      for (let j = 0; j < 4 && i + j < length; j++) sets[at + NODE_PAIRS + j] = this.#draft[i + j]!;
      if (head === 0) head = node;
      else sets[previous * NODE_WORDS + NODE_CONTINUATION] = node;
      previous = node;
    }
    sets[head * NODE_WORDS + NODE_HASH] = hash;
    this.#setCount++;
    this.#unreferencedCount++;
    if (this.#setCount > this.#buckets.length) this.#growBuckets();
    const bucket = hash & (this.#buckets.length - 1);
    sets[head * NODE_WORDS + NODE_BUCKET_NEXT] = this.#buckets[bucket]!;
    this.#buckets[bucket] = head;
    return head;
  }

  /** Room by what is free, by sweeping when that is worth it, or by growing. */
  #tryReserve(nodes: number): boolean {
    if (this.#freeCount >= nodes) return true;
    const isFull = this.#nodeCount + nodes > this.#maxNodes;
    if (isFull || this.#unreferencedCount > 1_024 + this.#setCount / 2) this.sweep();
    if (this.#freeCount >= nodes) return true;
    if (this.#nodeCount + nodes > this.#maxNodes) return false;
    this.#memory.ensureSets((this.#nodeCount + nodes) * NODE_WORDS);
    return true;
  }

  #takeNode(): number {
    const node = this.#freeHead;
    if (node === 0) return this.#nodeCount++;
    this.#freeHead = this.#memory.sets[node * NODE_WORDS + NODE_CONTINUATION]!;
    this.#freeCount--;
    return node;
  }

  #growBuckets(): void {
    const { sets } = this.#memory;
    const old = this.#buckets;
    this.#buckets = new Uint32Array(old.length * 2);
    const mask = this.#buckets.length - 1;
    for (const first of old) {
      for (let set = first; set !== 0;) {
        const next = sets[set * NODE_WORDS + NODE_BUCKET_NEXT]!;
        const bucket = sets[set * NODE_WORDS + NODE_HASH]! & mask;
        sets[set * NODE_WORDS + NODE_BUCKET_NEXT] = this.#buckets[bucket]!;
        this.#buckets[bucket] = set;
        set = next;
      }
    }
  }
}
