import assert from "node:assert/strict";

/**
 * Shared memory that grows in place: one shared WebAssembly memory used as an array of u32. Chosen over the alternatives
 * because its views are as fast as plain typed arrays (those of a growable SharedArrayBuffer are 40 times slower), nothing
 * is copied when it grows, and other threads see the new size through the memory object they already hold, without a
 * message. Address space is reserved, memory is not: untouched pages cost nothing.
 *
 * The owner calls `ensureWords`; another thread makes an arena over the same memory and calls `refresh` when it is told
 * that there is more. Cost: a growth takes up to half a millisecond with threads attached, so it adds a sixteenth each time.
 */
export interface SharedMemory {
  readonly buffer: SharedArrayBuffer;
  grow(pages: number): number;
}

interface WebAssemblyMemories {
  readonly Memory: new (options: { initial: number; maximum: number; shared: true }) => SharedMemory;
}

const PAGE_BYTES = 65_536;
/** 4 GiB, what 32-bit WebAssembly addresses. */
const MAX_PAGES = 65_536;

export class SharedArena {
  readonly memory: SharedMemory;
  /** All of the memory. Replaced when it grows: do not keep it across a call that may grow it. */
  words: Uint32Array<SharedArrayBuffer>;

  readonly #maxPages: number;

  /** A new memory of one page that will hold up to `maxWords`, or another thread's. */
  constructor(from: { readonly maxWords: number } | SharedMemory) {
    if ("maxWords" in from) {
      const { WebAssembly } = globalThis as unknown as { readonly WebAssembly: WebAssemblyMemories };
      this.#maxPages = Math.max(1, Math.ceil((from.maxWords * 4) / PAGE_BYTES));
      assert(this.#maxPages <= MAX_PAGES, "an arena stays under 4 GiB");
      this.memory = new WebAssembly.Memory({ initial: 1, maximum: this.#maxPages, shared: true });
    } else {
      this.#maxPages = 0;
      this.memory = from;
    }
    this.words = new Uint32Array(this.memory.buffer);
  }

  get bytes(): number {
    return this.words.byteLength;
  }

  /** Makes room for `wordCount` words; new ones are zero. Returns whether `words` was replaced. */
  ensureWords(wordCount: number): boolean {
    if (wordCount <= this.words.length) return false;
    const havePages = this.words.byteLength / PAGE_BYTES;
    const needPages = Math.ceil((wordCount * 4) / PAGE_BYTES);
    assert(needPages <= this.#maxPages, "the owner stays within the bound it gave");
    const pages = Math.min(this.#maxPages, Math.max(needPages, havePages + (havePages >>> 4)));
    this.memory.grow(pages - havePages);
    this.words = new Uint32Array(this.memory.buffer);
    return true;
  }

  /** Sees what the owner added. */
  refresh(): void {
    const { buffer } = this.memory;
    if (buffer.byteLength !== this.words.byteLength) this.words = new Uint32Array(buffer);
  }
}
