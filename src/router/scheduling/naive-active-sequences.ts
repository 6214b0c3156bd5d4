import type { BookedRequest } from "./active-sequences.ts";

/** The plain version of `ActiveSequences`: nothing is kept but the requests, everything is counted when asked. Oracle of the tests, baseline of the benchmark. */
export interface NaiveBooking {
  readonly slot: number;
  readonly request: BookedRequest;
  isPrefilled: boolean;
  outputTokens: number;
}

export class NaiveActiveSequences {
  readonly #blockSizeTokens: number;
  readonly bookings = new Set<NaiveBooking>();

  constructor(blockSizeTokens: number) {
    this.#blockSizeTokens = blockSizeTokens;
  }

  add(slot: number, request: BookedRequest): NaiveBooking {
    const booking = { slot, request, isPrefilled: false, outputTokens: 0 };
    this.bookings.add(booking);
    return booking;
  }

  removeSlot(slot: number): void {
    for (const booking of this.#of(slot)) this.bookings.delete(booking);
  }

  requests(slot: number): number {
    return this.#of(slot).length;
  }

  prefillTokens(slot: number): number {
    return this.#of(slot).reduce((sum, { isPrefilled, request }) => sum + (isPrefilled ? 0 : request.prefillTokens), 0);
  }

  decodeBlocks(slot: number): number {
    let sum = this.#unique(slot).size;
    for (const { request, outputTokens } of this.#of(slot)) {
      if (request.sequenceHashes === undefined) sum += request.blockCount;
      const { expectedOutputTokens } = request;
      const remaining = expectedOutputTokens === 0 ? 1 : Math.max(0, 1 - outputTokens / expectedOutputTokens);
      sum += Math.round(Math.floor(outputTokens / this.#blockSizeTokens) * remaining * 1_024) / 1_024;
    }
    return sum;
  }

  /** Leading blocks of the chain in use on the slot. */
  shared(slot: number, sequenceHashes: Uint32Array, blockCount: number): number {
    const unique = this.#unique(slot);
    let count = 0;
    while (count < blockCount && unique.has(key(sequenceHashes, count))) count++;
    return count;
  }

  #of(slot: number): NaiveBooking[] {
    return [...this.bookings].filter((booking) => booking.slot === slot);
  }

  #unique(slot: number): Set<string> {
    const unique = new Set<string>();
    for (const { request } of this.#of(slot)) {
      const { sequenceHashes, blockCount } = request;
      for (let i = 0; sequenceHashes !== undefined && i < blockCount; i++) unique.add(key(sequenceHashes, i));
    }
    return unique;
  }
}

function key(hashes: Uint32Array, block: number): string {
  return `${hashes[2 * block]}:${hashes[2 * block + 1]}`;
}
