import assert from "node:assert/strict";
import {
  CONTROL,
  MAX_DIRECTORY_BITS,
  RECORD_HI,
  RECORD_LO,
  RECORD_WORDS,
  type FlatKvMemory,
} from "./flat-kv-memory.ts";

/**
 * Which record holds a sequence hash: extendible hashing over segments of open addressing.
 *
 *   directory  [ s0 s0 s1 s2 ]   by the top bits of the mixed hash; several entries may name one segment
 *   segment    [ 1,024 slots ]   linear probing from the low 10 bits; a full segment splits in two by one more bit
 *   slot       6-bit tag | 26-bit record; 0 = empty, all ones = left. The tag spares a record that is not it 63 times of 64.
 *
 * Growth costs one segment (about 20 us) at a time, never a rehash of everything, and the table needs no second copy of
 * itself. Removal leaves a mark where a run goes on behind it (moving entries back would have to look at each one's record,
 * a cache miss apiece); a segment full of marks is rewritten instead of split. Hashes come from outside, so they are mixed with a secret of this index: nobody can aim at one segment.
 */
const SEGMENT_SLOTS = 1_024;
const SLOT_MASK = SEGMENT_SLOTS - 1;
/** 80 % of a segment; with splits at random times the table is 57 % full on average. */
const SEGMENT_LIMIT = 820;
const RECORD_BITS = 26;
const RECORD_MASK = 2 ** RECORD_BITS - 1;
/** A slot whose entry left; `MAX_RECORDS` keeps it apart from every entry. */
const LEFT = 0xffffffff;
/** With fewer entries than this, a segment that is full is full of marks. */
const REWRITE_LIMIT = 600;

/** Mixed hash, as an i32. Bits 0-9 slot, 10-15 tag, from the top the directory. */
function mix(control: Int32Array, lo: number, hi: number): number {
  let hash = Math.imul(lo ^ control[CONTROL.seedA]!, 0x9e3779b1) ^ Math.imul(hi ^ control[CONTROL.seedB]!, 0x85ebca77);
  hash = Math.imul(hash ^ (hash >>> 15), 0xc2b2ae3d);
  return hash ^ (hash >>> 13);
}

/** The record with this sequence hash, or 0. Also for readers: whatever the memory holds, it ends and stays in bounds. */
export function findBlock(memory: FlatKvMemory, lo: number, hi: number): number {
  const { control, records, slots, directory } = memory;
  const hash = mix(control, lo, hi);
  const base = directory[hash >>> control[CONTROL.directoryShift]!]!;
  const tag = (hash >>> 10) & 63;
  for (let i = 0, at = hash & SLOT_MASK; i < SEGMENT_SLOTS; i++, at = (at + 1) & SLOT_MASK) {
    const slot = slots[base + at]!;
    if (slot === 0) return 0;
    if (slot >>> RECORD_BITS !== tag) continue;
    if (slot === LEFT) continue;
    const record = slot & RECORD_MASK;
    if (records[record * RECORD_WORDS + RECORD_LO] === lo && records[record * RECORD_WORDS + RECORD_HI] === hi) {
      return record;
    }
  }
  return 0;
}

/** The writer's side: adds and removes. */
export class BlockTable {
  readonly #memory: FlatKvMemory;
  readonly #maxSegments: number;
  readonly #maxDirectoryBits: number;
  /** By segment: entries; slots that are not empty; bits of hash that all entries share. */
  readonly #counts: number[] = [];
  readonly #taken: number[] = [];
  readonly #bits: number[] = [];
  #directoryBits = 1;
  /** What `warm` read: means nothing, but as it is kept the compiler keeps the loads. */
  warmth = 0;
  /** A segment being written anew: its entries and their hashes. */
  readonly #spreadRecords = new Uint32Array(SEGMENT_SLOTS);
  readonly #spreadHashes = new Int32Array(SEGMENT_SLOTS);

  /** `maxSlots`: the table takes no more than that, whatever the hashes. */
  constructor(memory: FlatKvMemory, maxSlots: number) {
    this.#memory = memory;
    this.#maxSegments = Math.max(2, Math.floor(maxSlots / SEGMENT_SLOTS));
    // Three bits more than equal segments would need: mixed hashes do not ask for more.
    this.#maxDirectoryBits = Math.min(MAX_DIRECTORY_BITS, Math.ceil(Math.log2(this.#maxSegments)) + 3);
    memory.control[CONTROL.directoryShift] = 31;
    memory.directory[0] = this.#addSegment(1);
    memory.directory[1] = this.#addSegment(1);
  }

  /** Adds a record whose hash is not in the table yet. False: the table is full. */
  tryAdd(record: number): boolean {
    const memory = this.#memory;
    for (;;) {
      const hash = this.#hashOf(record);
      const base = memory.directory[hash >>> (32 - this.#directoryBits)]!;
      const segment = base / SEGMENT_SLOTS;
      if (this.#taken[segment]! < SEGMENT_LIMIT) {
        put(memory.slots, base, hash, record);
        this.#counts[segment]!++;
        this.#taken[segment]!++;
        return true;
      }
      if (this.#counts[segment]! < REWRITE_LIMIT) this.#spread(segment, base, base, 0);
      else if (!this.#trySplit(segment, hash)) {
        // A table at its bound still makes use of what was left.
        if (this.#counts[segment]! === this.#taken[segment]) return false;
        this.#spread(segment, base, base, 0);
      }
    }
  }

  /**
   * Loads where blocks `from` to `to` - 1 of a chain would stand, so that looking up and adding each one afterwards does not
   * wait for memory: in a loop of its own the processor waits for many cache lines at a time.
   */
  warm(hashes: Uint32Array, from: number, to: number): void {
    const { control, slots, directory } = this.#memory;
    const shift = 32 - this.#directoryBits;
    let sum = 0;
    for (let block = from; block < to; block++) {
      const hash = mix(control, hashes[2 * block]!, hashes[2 * block + 1]!);
      sum = (sum + slots[directory[hash >>> shift]! + (hash & SLOT_MASK)]!) | 0;
    }
    this.warmth = sum;
  }

  /** Removes a record that is in the table, while its hash still stands in it. */
  remove(record: number): void {
    const { slots, directory } = this.#memory;
    const hash = this.#hashOf(record);
    const base = directory[hash >>> (32 - this.#directoryBits)]!;
    const segment = base / SEGMENT_SLOTS;
    let at = hash & SLOT_MASK;
    while ((slots[base + at]! & RECORD_MASK) !== record) {
      assert(slots[base + at] !== 0, "a record that is removed is in the table");
      at = (at + 1) & SLOT_MASK;
    }
    this.#counts[segment]!--;
    if (slots[base + ((at + 1) & SLOT_MASK)] !== 0) {
      slots[base + at] = LEFT;
      return;
    }
    // The end of a run: it and the marks before it are empty again.
    do {
      slots[base + at] = 0;
      this.#taken[segment]!--;
      at = (at - 1) & SLOT_MASK;
    } while (slots[base + at] === LEFT);
  }

  #trySplit(segment: number, hash: number): boolean {
    const bits = this.#bits[segment]!;
    if (this.#counts.length >= this.#maxSegments) return false;
    if (bits === this.#directoryBits && !this.#tryDoubleDirectory()) return false;
    const base = segment * SEGMENT_SLOTS;
    const newBase = this.#addSegment(bits + 1);
    const { directory } = this.#memory;
    this.#bits[segment] = bits + 1;
    // The directory entries of the segment are one run; its upper half goes to the new segment.
    const runLength = 2 ** (this.#directoryBits - bits);
    const first = (hash >>> (32 - bits)) * runLength;
    directory.fill(newBase, first + runLength / 2, first + runLength);
    this.#spread(segment, base, newBase, bits);
    return true;
  }

  /** Writes a segment anew, without marks; entries with the bit after the first `bits` set go to `upperBase`. */
  #spread(segment: number, base: number, upperBase: number, bits: number): void {
    const { control, records, slots } = this.#memory;
    const [entries, hashes] = [this.#spreadRecords, this.#spreadHashes];
    let count = 0;
    for (let at = base; at < base + SEGMENT_SLOTS; at++) {
      const slot = slots[at]!;
      if (slot !== 0 && slot !== LEFT) entries[count++] = slot & RECORD_MASK;
    }
    // In a loop of its own: every record is a cache miss, and this way the processor waits for many at a time.
    for (let i = 0; i < count; i++) {
      const at = entries[i]! * RECORD_WORDS;
      hashes[i] = mix(control, records[at + RECORD_LO]!, records[at + RECORD_HI]!);
    }
    slots.fill(0, base, base + SEGMENT_SLOTS);
    let moved = 0;
    for (let i = 0; i < count; i++) {
      const hash = hashes[i]!;
      const isUpper = upperBase !== base && ((hash >>> (31 - bits)) & 1) === 1;
      if (isUpper) moved++;
      put(slots, isUpper ? upperBase : base, hash, entries[i]!);
    }
    this.#counts[segment] = count - moved;
    this.#taken[segment] = count - moved;
    if (upperBase === base) return;
    this.#counts[upperBase / SEGMENT_SLOTS] = moved;
    this.#taken[upperBase / SEGMENT_SLOTS] = moved;
  }

  #tryDoubleDirectory(): boolean {
    if (this.#directoryBits === this.#maxDirectoryBits) return false;
    const size = 2 ** this.#directoryBits;
    this.#memory.ensureDirectory(2 * size);
    const { directory, control } = this.#memory;
    for (let i = size - 1; i >= 0; i--) {
      directory[2 * i] = directory[i]!;
      directory[2 * i + 1] = directory[i]!;
    }
    this.#directoryBits++;
    control[CONTROL.directoryShift] = 32 - this.#directoryBits;
    return true;
  }

  /** Returns where it starts. */
  #addSegment(bits: number): number {
    const segment = this.#counts.length;
    this.#memory.ensureSlots((segment + 1) * SEGMENT_SLOTS);
    this.#counts.push(0);
    this.#taken.push(0);
    this.#bits.push(bits);
    return segment * SEGMENT_SLOTS;
  }

  #hashOf(record: number): number {
    const { control, records } = this.#memory;
    const at = record * RECORD_WORDS;
    return mix(control, records[at + RECORD_LO]!, records[at + RECORD_HI]!);
  }
}

function put(slots: Uint32Array, base: number, hash: number, record: number): void {
  let at = hash & SLOT_MASK;
  while (slots[base + at] !== 0) at = (at + 1) & SLOT_MASK;
  slots[base + at] = (((hash >>> 10) & 63) << RECORD_BITS) | record;
}
