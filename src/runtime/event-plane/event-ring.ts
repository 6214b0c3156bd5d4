import assert from "node:assert/strict";

/**
 * The last events of one publisher, for replay: a ring over sequence numbers, bounded by count and by bytes. Full means
 * that the oldest event goes; the newest always stays. Owned by the publisher; `push` is O(1), `page` O(answer).
 *
 * ```
 *  slot = sequence % size     oldest ............ newest      (consecutive, oldest = newest - count + 1)
 * ```
 */
export class EventRing {
  readonly #slots: (Uint8Array | undefined)[];
  readonly #maxBytes: number;
  #newest = 0;
  #count = 0;
  #bytes = 0;

  constructor(size: number, maxBytes: number) {
    assert(Number.isInteger(size) && size >= 1, `expected a ring size from 1 up, got ${size}`);
    this.#slots = [];
    this.#slots.length = Math.min(size, 2 ** 24);
    this.#maxBytes = maxBytes;
  }

  /** Sequence of the newest event, 0 before the first. */
  get newest(): number {
    return this.#newest;
  }

  get count(): number {
    return this.#count;
  }

  /** Sequence of the oldest event kept; `newest + 1` when none is. */
  get oldest(): number {
    return this.#newest - this.#count + 1;
  }

  /** Keeps `payload` (not a copy: the caller gives it away, and it is no piece of larger memory) under the next sequence number, which it returns. */
  push(payload: Uint8Array): number {
    const slots = this.#slots;
    if (this.#count === slots.length) this.#dropOldest();
    const sequence = ++this.#newest;
    slots[sequence % slots.length] = payload;
    this.#count++;
    this.#bytes += payload.length;
    while (this.#bytes > this.#maxBytes && this.#count > 1) this.#dropOldest();
    return sequence;
  }

  #dropOldest(): void {
    const slot = this.oldest % this.#slots.length;
    this.#bytes -= this.#slots[slot]!.length;
    this.#slots[slot] = undefined;
    this.#count--;
  }

  /**
   * The events from `from` to `to` that are still kept, up to the limits but at least one if there is any. `first` is
   * the sequence of the first one; what was asked before it is gone.
   */
  page(from: number, to: number, maxEvents: number, maxBytes: number): { first: number; payloads: Uint8Array[] } {
    const first = Math.max(from, this.oldest);
    const last = Math.min(to, this.#newest, first + maxEvents - 1);
    const payloads: Uint8Array[] = [];
    let bytes = 0;
    for (let sequence = first; sequence <= last; sequence++) {
      const payload = this.#slots[sequence % this.#slots.length]!;
      bytes += payload.length;
      if (bytes > maxBytes && payloads.length > 0) break;
      payloads.push(payload);
    }
    return { first, payloads };
  }
}
