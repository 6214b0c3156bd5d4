import { DynamoError, toDynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import { inChains, keyOf, type BlockIdentity } from "./block-identity.ts";
import { HEADER_BYTES, encodeHeader, entryFault, type EntryFormat } from "./entry.ts";
import { MAX_PACK_BLOCKS, blocksOfPackKey, packKey } from "./pack-key.ts";
import type { ObjectStore } from "./object-store.ts";
import { TierHealth } from "./tier-health.ts";
import type { LowerTier, ReadOptions, TierMeters } from "./tier.ts";

/**
 * G4: packs of up to eight consecutive blocks, one object each, in a store that every worker of the model shares:
 *
 *     <fingerprint>/<pack key> = header, bytes, header, bytes, ...       a read takes the stretch that it needs
 *
 * An object costs milliseconds whatever is in it, a block of a pack tenths of one. The key says which blocks are in
 * the pack (pack-key.ts), so that a listing tells all about them. An object is written once, whoever comes first; nothing is
 * deleted here, the store's own rules do that. What is there is known from a listing at the start and every five minutes,
 * and from what passes by; at most 100,000 blocks, the ones used last.
 */
export interface ObjectTierOptions {
  readonly store: ObjectStore;
  readonly format: EntryFormat;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly meters: TierMeters;
}

const MAX_KNOWN = 100_000;
const LIST_EVERY_MS = 300_000;
const CALL_TIMEOUT_MS = 10_000;
/** A listing is made of pages, each with the time of a call. */
const MAX_PAGES = 200;

/** Beyond this the bytes cost more than the request, and half an object more than it should. */
const MAX_PACK_BYTES = 8 * 1024 * 1024;

/** Where a block is. */
interface Place {
  readonly block: BlockIdentity;
  /** Of the object; the same text for all blocks of a pack. */
  readonly key: string;
  readonly index: number;
}

export class ObjectTier implements LowerTier {
  readonly name = "object";
  readonly capacityBytes = Infinity;
  readonly maxRunBlocks: number;
  onChange: (() => void) | undefined = undefined;
  readonly #options: ObjectTierOptions;
  readonly #health: TierHealth;
  readonly #prefix: string;
  /** Least recently used first. */
  readonly #known = new Map<number, Place>();
  /** What routers have not been told yet: true = it came. */
  readonly #untold = new Map<number, { readonly block: BlockIdentity; readonly isHere: boolean }>();
  readonly #closed = new AbortController();
  #timer: TimerHandle | undefined = undefined;
  #listing: Promise<void> = Promise.resolve();

  constructor(options: ObjectTierOptions) {
    this.#options = options;
    this.#health = new TierHealth({ ...options, tier: "object" });
    const { fingerprint, blockBytes } = options.format;
    this.maxRunBlocks = Math.max(1, Math.min(MAX_PACK_BLOCKS, Math.floor(MAX_PACK_BYTES / blockBytes)));
    const [lo, hi] = fingerprint;
    this.#prefix = `${hex(hi)}${hex(lo)}/`;
  }

  get usedBytes(): number {
    return this.#known.size * this.#options.format.blockBytes;
  }

  /** The listing goes on in the background: a slow store does not hold up a start. */
  open(): Promise<void> {
    this.#listing = this.#list();
    return Promise.resolve();
  }

  /** Resolves when the listing that runs is through. */
  listed(): Promise<void> {
    return this.#listing;
  }

  has(lo: number, hi: number): boolean {
    return this.#known.has(keyOf(lo, hi)) && this.#health.mayTry();
  }

  isWritable(): boolean {
    return this.#health.mayTry();
  }

  /** Neighbours in one object, or a block by itself. */
  runLength(blocks: readonly BlockIdentity[]): number {
    const [first, ...rest] = blocks.map(({ lo, hi }) => this.#known.get(keyOf(lo, hi)));
    const end = rest.findIndex((place, i) => place?.key !== first?.key || place?.index !== first!.index + i + 1);
    return first === undefined || rest.length === 0 ? 1 : end < 0 ? blocks.length : end + 1;
  }

  async write(run: readonly BlockIdentity[], data: readonly Uint8Array[]): Promise<boolean> {
    const { store, format, meters } = this.#options;
    const key = `${this.#prefix}${packKey(run)}`;
    try {
      const pieces = run.flatMap((block, i) => [encodeHeader(format, block, data[i]!), asBuffer(data[i]!)]);
      await this.#limited((limits) => store.put(key, pieces, limits));
    } catch (thrown) {
      meters.failed("object", "write-failed", run.length);
      this.#failed(thrown);
      return false;
    }
    this.#health.worked();
    run.forEach((block, index) => this.#note({ block, key, index }));
    return true;
  }

  async read(
    run: readonly BlockIdentity[],
    into: readonly Uint8Array[],
    options: ReadOptions,
  ): Promise<readonly boolean[]> {
    const { store, format, meters, clock } = this.#options;
    const { key, index } = this.#placeOf(run[0]!);
    const stride = HEADER_BYTES + format.blockBytes;
    const headers = run.map(() => Buffer.alloc(HEADER_BYTES));
    try {
      const pieces = into.flatMap((piece, i) => [headers[i]!, asBuffer(piece)]);
      await store.get(key, index * stride, pieces, {
        deadlineMs: options.deadlineMs,
        signal: AbortSignal.any([options.signal, this.#closed.signal]),
      });
    } catch (thrown) {
      if (thrown instanceof DynamoError && thrown.reason === "object-not-found") {
        for (const block of run) this.#forget(block);
        meters.failed("object", "gone", run.length);
      } else if (options.signal.aborted && clock.monotonicMs() < options.deadlineMs) {
        // Whoever asked does not want it any more: the store is not to blame.
      } else {
        meters.failed("object", "read-failed", run.length);
        this.#failed(thrown);
      }
      return run.map(() => false);
    }
    return run.map((block, i) => this.#isWhole(block, headers[i]!, into[i]!));
  }

  /** Of a block that is not known any more: where it would be by itself. */
  #placeOf(block: BlockIdentity): Place {
    const known = this.#known.get(keyOf(block.lo, block.hi));
    return known ?? { block, key: `${this.#prefix}${packKey([block])}`, index: 0 };
  }

  #isWhole(block: BlockIdentity, header: Buffer, data: Uint8Array): boolean {
    const { format, meters } = this.#options;
    const fault = entryFault(format, block, header, data);
    if (fault === undefined) {
      this.#health.worked();
      this.#touch(block);
      return true;
    }
    // It stays in the store for somebody to look at; a worker that starts later finds out again.
    this.#forget(block);
    meters.failed("object", fault);
    return false;
  }

  takeStored(): BlockIdentity[] {
    const came = [...this.#untold.values()].filter(({ isHere }) => isHere).map(({ block }) => block);
    for (const { lo, hi } of came) this.#untold.delete(keyOf(lo, hi));
    // Whether a router knows a parent that is not in the store is for the router to say.
    return inChains(came, () => true);
  }

  takeRemoved(): Uint32Array {
    const gone = [...this.#untold.values()].filter(({ isHere }) => !isHere).map(({ block }) => block);
    for (const { lo, hi } of gone) this.#untold.delete(keyOf(lo, hi));
    return Uint32Array.from(gone.flatMap(({ lo, hi }) => [lo, hi]));
  }

  /** The store is everybody's. */
  clear(): Promise<number> {
    return Promise.resolve(0);
  }

  async close(): Promise<void> {
    this.#timer?.cancel();
    this.#closed.abort();
    await this.#listing;
    await this.#options.store.close();
  }

  async #list(): Promise<void> {
    const { store, clock } = this.#options;
    try {
      let after = "";
      for (let page = 0; page < MAX_PAGES; page++) {
        const keys = await this.#limited((limits) => store.list(this.#prefix, after, limits));
        for (const key of keys) {
          const blocks = blocksOfPackKey(key.slice(this.#prefix.length));
          blocks?.forEach((block, index) => this.#note({ block, key, index }));
        }
        if (keys.length === 0) break;
        after = keys.at(-1)!;
      }
      this.#health.worked();
    } catch (thrown) {
      this.#failed(thrown);
    }
    this.onChange?.();
    if (!this.#closed.signal.aborted) {
      this.#timer = clock.setTimer(LIST_EVERY_MS, () => {
        this.#listing = this.#list();
      });
    }
  }

  #failed(thrown: unknown): void {
    if (this.#closed.signal.aborted) return;
    const { diagnostic, publicMessage } = toDynamoError(thrown);
    this.#health.failed(diagnostic ?? publicMessage);
  }

  async #limited<T>(call: (limits: ReadOptions) => Promise<T>): Promise<T> {
    const { clock } = this.#options;
    const late = new AbortController();
    const timer = clock.setTimer(CALL_TIMEOUT_MS, () => late.abort());
    try {
      return await call({
        deadlineMs: clock.monotonicMs() + CALL_TIMEOUT_MS,
        signal: AbortSignal.any([this.#closed.signal, late.signal]),
      });
    } finally {
      timer.cancel();
    }
  }

  /** A block that is in several objects is read from the one heard of last. */
  #note(place: Place): void {
    const key = keyOf(place.block.lo, place.block.hi);
    if (!this.#known.delete(key)) this.#change(place.block, true);
    this.#known.set(key, place);
    if (this.#known.size > MAX_KNOWN) this.#forget(this.#known.values().next().value!.block);
  }

  #touch({ lo, hi }: BlockIdentity): void {
    const place = this.#known.get(keyOf(lo, hi));
    if (place !== undefined) this.#note(place);
  }

  #forget(block: BlockIdentity): void {
    if (this.#known.delete(keyOf(block.lo, block.hi))) this.#change(block, false);
  }

  #change(block: BlockIdentity, isHere: boolean): void {
    const key = keyOf(block.lo, block.hi);
    const before = this.#untold.get(key);
    if (before !== undefined && before.isHere !== isHere) this.#untold.delete(key);
    else this.#untold.set(key, { block, isHere });
  }
}

function hex(word: number): string {
  return (word >>> 0).toString(16).padStart(8, "0");
}

function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
