import { DynamoError } from "../../errors/index.ts";
import { silentLogger, type Logger } from "../../observability/index.ts";
import { randomHexId, systemClock, systemRandom, type Clock, type Random } from "../../std/index.ts";
import type { Discovery, DiscoveryChange, DiscoveryEntry, DiscoveryHealth, JsonValue, Lease, Watch } from "./base.ts";
import { ChangeFeed } from "./change-feed.ts";
import {
  checkKey,
  checkPrefix,
  checkTtl,
  DEFAULT_TTL_MS,
  encodeValue,
  entriesUnder,
  MAX_ENTRIES,
  type StoredEntry,
} from "./store-key.ts";

/**
 * Discovery inside one process: the twin that tests, the simulator and single-process clusters use. One `MemoryStore` is
 * shared by one `MemoryDiscovery` per role. Everything happens at once; watchers are told in a microtask. A lease needs
 * no renewal, because its holder cannot die alone; `abandon` plays a killed holder, under virtual time too.
 * Cost: put and delete O(watchers); list O(entries log entries).
 */
export class MemoryStore {
  readonly #entries = new Map<string, StoredEntry>();
  readonly #leases = new Map<string, MemoryLease>();
  readonly #feeds = new Set<ChangeFeed>();

  get entries(): ReadonlyMap<string, StoredEntry> {
    return this.#entries;
  }

  /** @internal */
  addLease(lease: MemoryLease): void {
    this.#leases.set(lease.id, lease);
  }

  /** @internal */
  addFeed(feed: ChangeFeed): void {
    this.#feeds.add(feed);
    feed.start(this.#entries);
  }

  /** @internal */
  removeFeed(feed: ChangeFeed): void {
    this.#feeds.delete(feed);
  }

  /** @internal */
  put(key: string, encoded: string, leaseId: string): void {
    const before = this.#entries.get(key);
    if (before === undefined && this.#entries.size >= MAX_ENTRIES) {
      throw new DynamoError("discovery-unavailable", `the discovery store is full: ${MAX_ENTRIES} entries`);
    }
    // Parsed anew, as every other back end does: nobody shares objects with the writer.
    const stored = { entry: { key, value: JSON.parse(encoded) as JsonValue, leaseId }, encoded };
    this.#entries.set(key, stored);
    this.#tell(key, stored);
  }

  /** @internal Removes the key if this lease holds it. */
  delete(key: string, leaseId: string): void {
    if (this.#entries.get(key)?.entry.leaseId !== leaseId) return;
    this.#entries.delete(key);
    this.#tell(key, undefined);
  }

  /** @internal */
  removeLease(leaseId: string): void {
    if (!this.#leases.delete(leaseId)) return;
    for (const stored of this.#entries.values()) this.delete(stored.entry.key, leaseId);
  }

  /** Ends a lease as an operator would: its keys go, its holder learns of it. False when there is no such lease. */
  revoke(leaseId: string): boolean {
    const lease = this.#leases.get(leaseId);
    lease?.expire();
    return lease !== undefined;
  }

  #tell(key: string, stored: StoredEntry | undefined): void {
    for (const feed of this.#feeds) feed.changed(key, stored);
  }
}

class MemoryLease implements Lease {
  readonly id: string;
  readonly ttlMs: number;
  readonly lost: Promise<void>;
  readonly #store: MemoryStore;
  readonly #settleLost: () => void;
  readonly #onEnd: (lease: MemoryLease) => void;
  #open = true;

  constructor(id: string, store: MemoryStore, ttlMs: number, onEnd: (lease: MemoryLease) => void) {
    this.id = id;
    this.#store = store;
    this.ttlMs = ttlMs;
    this.#onEnd = onEnd;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.lost = promise;
    this.#settleLost = resolve;
    store.addLease(this);
  }

  put(key: string, value: JsonValue): Promise<void> {
    return attempt(() => {
      checkKey(key);
      const encoded = encodeValue(key, value);
      if (!this.#open) throw new DynamoError("lease-lost", "the discovery lease has ended");
      this.#store.put(key, encoded, this.id);
    });
  }

  delete(key: string): Promise<void> {
    return attempt(() => {
      checkKey(key);
      if (this.#open) this.#store.delete(key, this.id);
    });
  }

  close(): Promise<void> {
    this.#end();
    return Promise.resolve();
  }

  expire(): void {
    if (!this.#open) return;
    this.#end();
    this.#settleLost();
  }

  #end(): void {
    this.#open = false;
    this.#store.removeLease(this.id);
    this.#onEnd(this);
  }
}

export interface MemoryDiscoveryOptions {
  /** @default a store of its own */
  readonly store?: MemoryStore;
  readonly clock?: Clock;
  readonly logger?: Logger;
  /** Of lease ids. @default the system's */
  readonly random?: Random;
}

export class MemoryDiscovery implements Discovery {
  readonly #store: MemoryStore;
  readonly #clock: Clock;
  readonly #logger: Logger;
  readonly #random: Random;
  readonly #leases = new Set<MemoryLease>();
  readonly #feeds = new Set<ChangeFeed>();
  #open = true;

  constructor(options: MemoryDiscoveryOptions = {}) {
    this.#store = options.store ?? new MemoryStore();
    this.#clock = options.clock ?? systemClock;
    this.#logger = options.logger ?? silentLogger;
    this.#random = options.random ?? systemRandom;
  }

  openLease(options: { readonly ttlMs?: number } = {}): Promise<Lease> {
    return attempt(() => {
      const ttlMs = options.ttlMs ?? DEFAULT_TTL_MS;
      checkTtl(ttlMs);
      this.#requireOpen();
      const lease = new MemoryLease(randomHexId(this.#random), this.#store, ttlMs, (ended) =>
        this.#leases.delete(ended),
      );
      this.#leases.add(lease);
      return lease;
    });
  }

  list(prefix: string): Promise<DiscoveryEntry[]> {
    return attempt(() => {
      checkPrefix(prefix);
      this.#requireOpen();
      return entriesUnder(prefix, this.#store.entries).map((stored) => stored.entry);
    });
  }

  watch(prefix: string, listener: (change: DiscoveryChange) => void): Promise<Watch> {
    return attempt(() => {
      checkPrefix(prefix);
      this.#requireOpen();
      const feed = new ChangeFeed({
        prefix,
        listener,
        logger: this.#logger,
        onClose: (closed) => {
          this.#feeds.delete(closed);
          this.#store.removeFeed(closed);
        },
      });
      this.#feeds.add(feed);
      this.#store.addFeed(feed);
      return feed;
    });
  }

  health(): DiscoveryHealth {
    return this.#open ? { healthy: true } : { healthy: false, detail: "closed" };
  }

  async close(): Promise<void> {
    this.#open = false;
    await Promise.all([...this.#leases, ...this.#feeds].map((part) => part.close()));
  }

  /** As if this process was killed: its watchers fall silent, nothing is closed, its keys vanish when their leases expire. */
  abandon(): void {
    this.#open = false;
    for (const feed of this.#feeds) void feed.close();
    for (const lease of this.#leases) this.#clock.setTimer(lease.ttlMs, () => lease.expire());
    this.#leases.clear();
  }

  #requireOpen(): void {
    if (!this.#open) throw new DynamoError("discovery-unavailable", "this discovery client is closed");
  }
}

/** Runs at once; a throw becomes a rejection, as callers of a promise expect. */
function attempt<T>(run: () => T): Promise<T> {
  try {
    return Promise.resolve(run());
  } catch (error) {
    return Promise.reject(error as Error);
  }
}
