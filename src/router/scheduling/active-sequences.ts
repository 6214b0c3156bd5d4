import { ChainTable, grown } from "./chain-table.ts";

/**
 * What is running where: per slot (one data-parallel rank of one worker) its requests, the prompt tokens that are still
 * to be prefilled, and its KV blocks in use. Prompt blocks are counted by sequence hash with a reference count, so what
 * requests share counts once; blocks that cannot be shared are counted as they are.
 *
 * Exact by construction: a booking is freed by `free`, or with its slot, and by nothing else; in particular never by
 * age, however long a request runs. Freeing twice does nothing. Cost: about 0.1 us per block for `add` and `free`
 * together. Owned by the router; `NaiveActiveSequences` is its oracle.
 */
export class Booking {
  readonly slot: number;
  /** Members of the chain table, one per shared prompt block. */
  readonly nodes: Int32Array;
  /** Prompt blocks that nobody shares: reuse is not assumed, or the prompt was not hashed. */
  readonly privateBlocks: number;
  /** Tokens the client expects to get; 0 = unknown. */
  readonly expectedOutputTokens: number;
  /** Prompt tokens charged; 0 from the first token on. */
  prefillTokens: number;
  outputTokens = 0;
  /** What the output counts for now, in units of 1/1024 block. */
  outputUnits = 0;
  live = true;

  constructor(
    slot: number,
    nodes: Int32Array,
    privateBlocks: number,
    prefillTokens: number,
    expectedOutputTokens: number,
  ) {
    this.slot = slot;
    this.nodes = nodes;
    this.privateBlocks = privateBlocks;
    this.prefillTokens = prefillTokens;
    this.expectedOutputTokens = expectedOutputTokens;
  }
}

/** What `add` needs to know of a request. */
export interface BookedRequest {
  /** (lo, hi) pairs; undefined when the blocks are not shared. */
  readonly sequenceHashes: Uint32Array | undefined;
  readonly blockCount: number;
  /** Prompt tokens that are not cached on the worker; 0 when prefill is not tracked. */
  readonly prefillTokens: number;
  /** 0 = unknown. */
  readonly expectedOutputTokens: number;
}

const NO_NODES = new Int32Array(0);
/** Integers, so that sums stay exact however many bookings came and went. */
const UNITS_PER_BLOCK = 1_024;

export class ActiveSequences {
  readonly #table = new ChainTable();
  readonly #blockSizeTokens: number;
  /** By member of the table. */
  #references = new Uint32Array(this.#table.memberCapacity);
  // By slot.
  #requests = new Int32Array(16);
  #blocks = new Int32Array(16);
  #prefillTokens = new Float64Array(16);
  #outputUnits = new Float64Array(16);
  readonly #bookings: (Set<Booking> | undefined)[] = [];
  readonly #freeSlots: number[] = [];

  constructor(blockSizeTokens: number) {
    this.#blockSizeTokens = blockSizeTokens;
  }

  /** Slots are below this. */
  get slotCount(): number {
    return this.#bookings.length;
  }

  get bytes(): number {
    return this.#table.bytes + 4 * this.#references.length;
  }

  /** The lowest free slot, empty. */
  addSlot(): number {
    let slot = this.#bookings.length;
    if (this.#freeSlots.length > 0) slot = Math.min(...this.#freeSlots);
    if (slot < this.#bookings.length) this.#freeSlots.splice(this.#freeSlots.indexOf(slot), 1);
    this.#bookings[slot] = new Set();
    if (slot >= this.#requests.length) {
      const size = this.#requests.length * 2;
      this.#requests = grown(this.#requests, size);
      this.#blocks = grown(this.#blocks, size);
      this.#prefillTokens = grown(this.#prefillTokens, size);
      this.#outputUnits = grown(this.#outputUnits, size);
    }
    return slot;
  }

  /** Frees everything on the slot; its number may be given out again. */
  removeSlot(slot: number): void {
    for (const booking of this.#bookings[slot] ?? []) this.free(booking);
    this.#bookings[slot] = undefined;
    this.#freeSlots.push(slot);
  }

  requests(slot: number): number {
    return this.#requests[slot]!;
  }

  prefillTokens(slot: number): number {
    return this.#prefillTokens[slot]!;
  }

  /** Unique prompt blocks, private ones, and output as far as it is tracked. */
  decodeBlocks(slot: number): number {
    return this.#blocks[slot]! + this.#outputUnits[slot]! / UNITS_PER_BLOCK;
  }

  add(slot: number, request: BookedRequest): Booking {
    const { sequenceHashes, blockCount, prefillTokens, expectedOutputTokens } = request;
    const shared = sequenceHashes !== undefined && blockCount > 0;
    const booking = new Booking(
      slot,
      shared ? this.#hold(slot, sequenceHashes, blockCount) : NO_NODES,
      shared ? 0 : blockCount,
      prefillTokens,
      expectedOutputTokens,
    );
    this.#requests[slot]!++;
    this.#blocks[slot]! += booking.privateBlocks;
    this.#prefillTokens[slot]! += prefillTokens;
    this.#bookings[slot]!.add(booking);
    return booking;
  }

  /** The first token came: nothing of the prompt is left to compute. */
  prefillDone(booking: Booking): void {
    if (!booking.live || booking.prefillTokens === 0) return;
    this.#prefillTokens[booking.slot]! -= booking.prefillTokens;
    booking.prefillTokens = 0;
  }

  /**
   * Counts generated tokens: one block per full block of them. With an expected length all output counts for the part
   * that is still to come: a request near its end is about to free its blocks.
   */
  addOutput(booking: Booking, tokens: number): void {
    if (!booking.live) return;
    booking.outputTokens += tokens;
    const blocks = Math.floor(booking.outputTokens / this.#blockSizeTokens);
    const expected = booking.expectedOutputTokens;
    const remaining = expected === 0 ? 1 : Math.max(0, 1 - booking.outputTokens / expected);
    const units = Math.round(blocks * remaining * UNITS_PER_BLOCK);
    this.#outputUnits[booking.slot]! += units - booking.outputUnits;
    booking.outputUnits = units;
  }

  free(booking: Booking): void {
    if (!booking.live) return;
    booking.live = false;
    const { slot, nodes } = booking;
    this.#requests[slot]!--;
    this.#blocks[slot]! -= booking.privateBlocks;
    this.#prefillTokens[slot]! -= booking.prefillTokens;
    this.#outputUnits[slot]! -= booking.outputUnits;
    this.#bookings[slot]!.delete(booking);
    // Deepest first: at no moment does a rank hold a block without the one before it.
    for (let i = nodes.length - 1; i >= 0; i--) {
      const node = nodes[i]!;
      const references = this.#references[node]! - 1;
      this.#references[node] = references;
      if (references > 0) continue;
      this.#table.remove(node);
      this.#blocks[slot]!--;
    }
  }

  /**
   * How many leading blocks of a prompt are already in use on each slot: what the request would not add. Writes
   * `into[slot]` for slots with at least one; the caller zeroes.
   */
  sharedInto(sequenceHashes: Uint32Array, blockCount: number, into: Uint32Array): void {
    if (this.#table.memberCount > 0) this.#table.leadingInto(sequenceHashes, blockCount, into);
  }

  #hold(slot: number, hashes: Uint32Array, blockCount: number): Int32Array {
    const nodes = new Int32Array(blockCount);
    for (let block = 0; block < blockCount; block++) {
      const node = this.#table.add(hashes[2 * block]!, hashes[2 * block + 1]!, slot);
      nodes[block] = node;
      if (node >= this.#references.length) this.#references = grown(this.#references, this.#table.memberCapacity);
      if (this.#table.isNew) {
        this.#references[node] = 1;
        this.#blocks[slot]!++;
      } else this.#references[node]!++;
    }
    return nodes;
  }
}
