import { DynamoError, toDynamoError } from "../../errors/index.ts";
import type { Logger } from "../../observability/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import { keyOf, type BlockIdentity } from "./block-identity.ts";
import { HEADER_BYTES, encodeHeader, entryFault, type EntryFormat } from "./entry.ts";
import type { ObjectStore } from "./object-store.ts";
import { TierHealth } from "./tier-health.ts";
import type { LowerTier, ReadOptions, TierMeters } from "./tier.ts";

/**
 * G4: blocks as objects `<fingerprint>/<sequence hash>`, each with its header, in a store that every worker of the model
 * shares. An object is written once, whoever comes first; nothing is deleted here, the store's own rules do that. What is
 * there is known from a listing at the start and every five minutes, and from what passes by; at most 100,000 blocks,
 * the ones used last.
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

export class ObjectTier implements LowerTier {
  readonly name = "object";
  readonly capacityBytes = Infinity;
  readonly #options: ObjectTierOptions;
  readonly #health: TierHealth;
  readonly #prefix: string;
  /** Least recently used first. */
  readonly #known = new Set<number>();
  readonly #closed = new AbortController();
  #timer: TimerHandle | undefined = undefined;
  #listing: Promise<void> = Promise.resolve();

  constructor(options: ObjectTierOptions) {
    this.#options = options;
    this.#health = new TierHealth({ ...options, tier: "object" });
    const [lo, hi] = options.format.fingerprint;
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

  async write(block: BlockIdentity, data: Uint8Array): Promise<boolean> {
    const { store, format, meters } = this.#options;
    try {
      const pieces = [encodeHeader(format, block, data), asBuffer(data)];
      await this.#limited((limits) => store.put(this.#keyOf(block), pieces, limits));
    } catch (thrown) {
      meters.failed("object", "write-failed");
      this.#failed(thrown);
      return false;
    }
    this.#health.worked();
    this.#note(keyOf(block.lo, block.hi));
    return true;
  }

  async read(block: BlockIdentity, into: Uint8Array, options: ReadOptions): Promise<boolean> {
    const { store, format, meters, clock } = this.#options;
    const header = Buffer.alloc(HEADER_BYTES);
    const key = keyOf(block.lo, block.hi);
    try {
      await store.get(this.#keyOf(block), [header, asBuffer(into)], {
        deadlineMs: options.deadlineMs,
        signal: AbortSignal.any([options.signal, this.#closed.signal]),
      });
    } catch (thrown) {
      if (thrown instanceof DynamoError && thrown.reason === "object-not-found") {
        this.#known.delete(key);
        meters.failed("object", "gone");
      } else if (options.signal.aborted && clock.monotonicMs() < options.deadlineMs) {
        // Whoever asked does not want it any more: the store is not to blame.
      } else {
        meters.failed("object", "read-failed");
        this.#failed(thrown);
      }
      return false;
    }
    const fault = entryFault(format, block, header, into);
    if (fault === undefined) {
      this.#health.worked();
      this.#note(key);
      return true;
    }
    // It stays in the store for somebody to look at; a worker that starts later finds out again.
    this.#known.delete(key);
    meters.failed("object", fault);
    return false;
  }

  takeStored(): BlockIdentity[] {
    return [];
  }

  takeRemoved(): Uint32Array {
    return new Uint32Array(0);
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
          const [, hi, lo] = /\/([0-9a-f]{8})([0-9a-f]{8})$/.exec(key) ?? [];
          if (hi !== undefined) this.#note(keyOf(parseInt(lo!, 16), parseInt(hi, 16)));
        }
        if (keys.length === 0) break;
        after = keys.at(-1)!;
      }
      this.#health.worked();
    } catch (thrown) {
      this.#failed(thrown);
    }
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

  #note(key: number): void {
    this.#known.delete(key);
    this.#known.add(key);
    if (this.#known.size > MAX_KNOWN) this.#known.delete(this.#known.values().next().value!);
  }

  #keyOf({ lo, hi }: BlockIdentity): string {
    return `${this.#prefix}${hex(hi)}${hex(lo)}`;
  }
}

function hex(word: number): string {
  return (word >>> 0).toString(16).padStart(8, "0");
}

function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
