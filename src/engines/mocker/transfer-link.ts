/**
 * A link that transfers share fairly: with n of them under way each gets a n-th of the bandwidth (processor sharing), so a
 * transfer that is alone for half of its bytes and one of two for the rest takes one and a half times as long.
 *
 * Time comes from the caller. Served bytes per transfer since the start only grow, at bandwidth / n; a transfer is over
 * when that figure has grown by its size. Cost: O(n) per completion, n being the transfers under way.
 */
interface Transfer<T> {
  readonly item: T;
  /** Served bytes at which it is over. */
  readonly endBytes: number;
}

export class TransferLink<T> {
  readonly #bytesPerMs: number;
  #servedBytes = 0;
  #nowMs = 0;
  #transfers: Transfer<T>[] = [];

  constructor(bandwidthBytesPerSecond: number) {
    this.#bytesPerMs = bandwidthBytesPerSecond / 1_000;
  }

  get count(): number {
    return this.#transfers.length;
  }

  /** The caller has advanced the link to `nowMs`. */
  add(item: T, bytes: number, nowMs: number): void {
    this.#passTime(nowMs);
    this.#transfers.push({ item, endBytes: this.#servedBytes + bytes });
  }

  /** Forgets a transfer; what it got is lost. Unknown ones are ignored. */
  remove(item: T, nowMs: number): void {
    this.#passTime(nowMs);
    this.#transfers = this.#transfers.filter((transfer) => transfer.item !== item);
  }

  /** When the next transfer is over if none joins; Infinity without any. */
  nextEndMs(): number {
    const next = this.#next();
    if (next === undefined) return Infinity;
    return this.#nowMs + ((next.endBytes - this.#servedBytes) * this.#transfers.length) / this.#bytesPerMs;
  }

  /** Calls `onEnd` for what is over by `nowMs`, in order. It must not add transfers. */
  advance(nowMs: number, onEnd: (item: T) => void): void {
    for (;;) {
      const endMs = this.nextEndMs();
      if (endMs > nowMs) break;
      const ended = this.#next()!;
      this.#servedBytes = ended.endBytes;
      this.#nowMs = endMs;
      this.#transfers = this.#transfers.filter((transfer) => transfer !== ended);
      onEnd(ended.item);
    }
    this.#passTime(nowMs);
  }

  #passTime(nowMs: number): void {
    if (this.#transfers.length > 0) {
      this.#servedBytes += ((nowMs - this.#nowMs) * this.#bytesPerMs) / this.#transfers.length;
    }
    this.#nowMs = nowMs;
  }

  /** The one that ends first; the earlier one of equals. */
  #next(): Transfer<T> | undefined {
    let first: Transfer<T> | undefined;
    for (const transfer of this.#transfers)
      if (first === undefined || transfer.endBytes < first.endBytes) first = transfer;
    return first;
  }
}
