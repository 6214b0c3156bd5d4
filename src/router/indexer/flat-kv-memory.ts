import { SharedArena, type SharedMemory } from "./shared-arena.ts";

/**
 * The shared memory of a flat KV index, as its writer and its readers see it: where each array lies and what its words
 * mean. Only the writer stores (readers: one byte per lookup in `touched`); the protocol between both is in
 * write-gate.ts.
 *
 *   records     4 words a block: hash lo, hash hi, rank set, a child to try first. Record 0 means "none".
 *   slots       the hash table's segments: 6 bits of tag, 26 bits of record (block-table.ts)
 *   directory   which segment a hash is in
 *   sets        8-word nodes of interned rank sets (rank-set-pool.ts). Set 0 is the empty set.
 *   touched     1 byte a record: used since the eviction hand last came by
 */
export const RECORD_WORDS = 4;
export const RECORD_LO = 0;
export const RECORD_HI = 1;
export const RECORD_SET = 2;
/** Some child of the record, or 0; in a free record the next free one. */
export const RECORD_CHILD = 3;
/** Of a node of the rank sets. */
export const NODE_WORDS = 8;
/** What 26 bits number, without "none" and the table's mark. */
export const MAX_RECORDS = 2 ** 26 - 2;

/** A directory of 4 MiB. */
export const MAX_DIRECTORY_BITS = 20;

/** Words of the control block. */
export const CONTROL = {
  /** Odd while the writer is inside a section. */
  sequence: 0,
  /** Pages of 64 KiB that the arrays have together. */
  pages: 1,
  /** A reader asks for a pause. */
  wanted: 2,
  /** Counts lookups that ended after they had asked. */
  served: 3,
  rankCount: 4,
  /** 32 minus the bits of hash that the directory takes. */
  directoryShift: 5,
  seedA: 6,
  seedB: 7,
} as const;
const CONTROL_WORDS = 16;
/** Figures for `stats()` of readers, as doubles behind the control words. */
export const FIGURES = { ranks: 0, blocks: 1, memberships: 2, bytes: 3, evictedBlocks: 4 } as const;
const FIGURE_COUNT = 8;

/** What a reader in another thread needs; can be posted to it. */
export interface FlatKvShare {
  readonly control: SharedArrayBuffer;
  readonly records: SharedMemory;
  readonly slots: SharedMemory;
  readonly directory: SharedMemory;
  readonly sets: SharedMemory;
  readonly touched: SharedMemory;
}

/** The writer's bounds; memory is taken as it is needed. */
export interface FlatKvLimits {
  readonly records: number;
  readonly slots: number;
  readonly nodes: number;
}

export class FlatKvMemory {
  readonly control: Int32Array<SharedArrayBuffer>;
  readonly figures: Float64Array<SharedArrayBuffer>;
  records: Uint32Array<SharedArrayBuffer>;
  slots: Uint32Array<SharedArrayBuffer>;
  directory: Uint32Array<SharedArrayBuffer>;
  sets: Uint32Array<SharedArrayBuffer>;
  touched: Uint8Array<SharedArrayBuffer>;
  readonly #arenas: Arenas;
  /** What the views cover. */
  #seenPages: number;

  constructor(from: FlatKvShare | FlatKvLimits) {
    const share = "control" in from ? from : undefined;
    const control = share?.control ?? new SharedArrayBuffer(CONTROL_WORDS * 4 + FIGURE_COUNT * 8);
    this.control = new Int32Array(control, 0, CONTROL_WORDS);
    this.figures = new Float64Array(control, CONTROL_WORDS * 4, FIGURE_COUNT);
    this.#arenas = "control" in from ? arenasOf(from) : arenasFor(from);
    const { records, slots, directory, sets, touched } = this.#arenas;
    this.records = records.words;
    this.slots = slots.words;
    this.directory = directory.words;
    this.sets = sets.words;
    this.touched = new Uint8Array(touched.words.buffer);
    this.#seenPages = this.#pages();
    if (share === undefined) this.control[CONTROL.pages] = this.#seenPages;
  }

  get bytes(): number {
    return this.control.buffer.byteLength + this.#seenPages * 65_536;
  }

  share(): FlatKvShare {
    const { records, slots, directory, sets, touched } = this.#arenas;
    return {
      control: this.control.buffer,
      records: records.memory,
      slots: slots.memory,
      directory: directory.memory,
      sets: sets.memory,
      touched: touched.memory,
    };
  }

  /** Writer: room for records 0 to count-1. */
  ensureRecords(count: number): void {
    const hasGrown = this.#arenas.records.ensureWords(count * RECORD_WORDS);
    if (this.#arenas.touched.ensureWords((count + 3) >>> 2) || hasGrown) this.#grown();
  }

  ensureSlots(wordCount: number): void {
    if (this.#arenas.slots.ensureWords(wordCount)) this.#grown();
  }

  ensureDirectory(wordCount: number): void {
    if (this.#arenas.directory.ensureWords(wordCount)) this.#grown();
  }

  ensureSets(wordCount: number): void {
    if (this.#arenas.sets.ensureWords(wordCount)) this.#grown();
  }

  #grown(): void {
    this.#takeViews();
    Atomics.store(this.control, CONTROL.pages, this.#pages());
  }

  /**
   * Reader, before each read: sees what the writer added. False when this thread does not see all of it yet, which
   * takes the engine some microseconds.
   */
  tryRefresh(): boolean {
    const pages = Atomics.load(this.control, CONTROL.pages);
    if (pages === this.#seenPages) return true;
    for (const arena of Object.values(this.#arenas)) arena.refresh();
    this.#takeViews();
    return this.#seenPages >= pages;
  }

  #pages(): number {
    let bytes = 0;
    for (const arena of Object.values(this.#arenas)) bytes += arena.bytes;
    return bytes / 65_536;
  }

  #takeViews(): void {
    const { records, slots, directory, sets, touched } = this.#arenas;
    this.records = records.words;
    this.slots = slots.words;
    this.directory = directory.words;
    this.sets = sets.words;
    this.touched = new Uint8Array(touched.words.buffer);
    this.#seenPages = this.#pages();
  }
}

type Arenas = Record<"records" | "slots" | "directory" | "sets" | "touched", SharedArena>;

function arenasOf(share: FlatKvShare): Arenas {
  return {
    records: new SharedArena(share.records),
    slots: new SharedArena(share.slots),
    directory: new SharedArena(share.directory),
    sets: new SharedArena(share.sets),
    touched: new SharedArena(share.touched),
  };
}

function arenasFor(limits: FlatKvLimits): Arenas {
  return {
    records: new SharedArena({ maxWords: limits.records * RECORD_WORDS }),
    slots: new SharedArena({ maxWords: limits.slots }),
    directory: new SharedArena({ maxWords: 2 ** MAX_DIRECTORY_BITS }),
    sets: new SharedArena({ maxWords: limits.nodes * NODE_WORDS }),
    touched: new SharedArena({ maxWords: Math.ceil(limits.records / 4) }),
  };
}
