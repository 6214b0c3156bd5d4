/**
 * Items of one stream that wait for credit: first in, first out, in one buffer that grows by doubling. Exists only while
 * something waits. `byteLength` counts what an item takes here, so empty items are not free.
 *
 *     [ taken | u32 length, bytes | u32 length, bytes | free ]
 *               ^ head                                 ^ tail
 */
const LENGTH_BYTES = 4;
const FIRST_BYTES = 4 * 1024;

export class ParkedItems {
  #bytes: Buffer = Buffer.alloc(0);
  #head = 0;
  #tail = 0;

  get byteLength(): number {
    return this.#tail - this.#head;
  }

  static costOf(itemBytes: number): number {
    return LENGTH_BYTES + itemBytes;
  }

  push(item: Uint8Array): void {
    const cost = LENGTH_BYTES + item.length;
    if (this.#tail + cost > this.#bytes.length) this.#makeRoom(cost);
    this.#bytes.writeUInt32LE(item.length, this.#tail);
    this.#bytes.set(item, this.#tail + LENGTH_BYTES);
    this.#tail += cost;
  }

  /** The oldest item, valid until the next `push`. Must not be empty. */
  shift(): Buffer {
    const at = this.#head + LENGTH_BYTES;
    const end = at + this.#bytes.readUInt32LE(this.#head);
    this.#head = end;
    return this.#bytes.subarray(at, end);
  }

  #makeRoom(cost: number): void {
    const held = this.byteLength;
    // Moving to the front is enough when at least half is free, and then costs less than what was pushed since.
    const target =
      held + cost <= this.#bytes.length / 2
        ? this.#bytes
        : Buffer.allocUnsafeSlow(Math.max(FIRST_BYTES, held + cost, this.#bytes.length * 2));
    this.#bytes.copy(target, 0, this.#head, this.#tail);
    this.#bytes = target;
    this.#head = 0;
    this.#tail = held;
  }
}
