import { DynamoError } from "../../errors/index.ts";
import { silentLogger, type Logger } from "../../observability/index.ts";
import { randomHexId, systemClock, systemRandom, type Clock, type Random, type TimerHandle } from "../../std/index.ts";
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
 *
 * A store with a clock of its own is one that holders can lose: they renew their leases (four times per TTL, by their own
 * clocks), an unrenewed one expires, and `isReachable` cuts a holder off.
 * Cost: put and delete O(watchers); list O(entries log entries).
 */
export interface MemoryStoreOptions {
  /** @default none: leases need no renewal */
  readonly clock?: Clock;
}

const RENEWALS_PER_TTL = 4;

export class MemoryStore {
  readonly #clock: Clock | undefined;
  readonly #entries = new Map<string, StoredEntry>();
  readonly #leases = new Map<string, MemoryLease>();
  readonly #expiries = new Map<string, TimerHandle>();
  #isDown = false;
  readonly #feeds = new Set<ChangeFeed>();

  constructor({ clock }: MemoryStoreOptions = {}) {
    this.#clock = clock;
  }

  /** Whether holders must renew. */
  get expires(): boolean {
    return this.#clock !== undefined;
  }

  get leaseCount(): number {
    return this.#leases.size;
  }

  get entries(): ReadonlyMap<string, StoredEntry> {
    return this.#entries;
  }

  /** @internal */
  addLease(lease: MemoryLease): void {
    this.#leases.set(lease.id, lease);
    this.renew(lease);
  }

  /**
   * The store itself is down, for all: no lease expires meanwhile, and each has a whole TTL from its return on, in which its
   * holder can renew it or register again. (That nobody can reach it then is said to each holder: `isReachable`.)
   */
  set isDown(isDown: boolean) {
    if (isDown === this.#isDown) return;
    this.#isDown = isDown;
    for (const lease of this.#leases.values()) {
      this.#expiries.get(lease.id)?.cancel();
      if (!isDown) this.renew(lease);
    }
  }

  /** @internal False when the lease has ended. */
  renew({ id, ttlMs }: MemoryLease): boolean {
    if (!this.#leases.has(id)) return false;
    if (this.#clock === undefined || this.#isDown) return true;
    this.#expiries.get(id)?.cancel();
    this.#expiries.set(
      id,
      this.#clock.setTimer(ttlMs, () => this.removeLease(id, true)),
    );
    return true;
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
    if (!this.#leases.has(leaseId)) throw leaseLost();
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
  delete(key: string, leaseId: string, expired = false): void {
    if (this.#entries.get(key)?.entry.leaseId !== leaseId) return;
    this.#entries.delete(key);
    this.#tell(key, undefined, expired);
  }

  /** @internal */
  removeLease(leaseId: string, expired = false): void {
    if (!this.#leases.delete(leaseId)) return;
    this.#expiries.get(leaseId)?.cancel();
    this.#expiries.delete(leaseId);
    for (const stored of this.#entries.values()) this.delete(stored.entry.key, leaseId, expired);
  }

  /** Ends a lease as an operator would: its keys go, its holder learns of it. False when there is no such lease. */
  revoke(leaseId: string): boolean {
    const lease = this.#leases.get(leaseId);
    lease?.expire();
    return lease !== undefined;
  }

  #tell(key: string, stored: StoredEntry | undefined, expired = false): void {
    for (const feed of this.#feeds) feed.changed(key, stored, expired);
  }
}

class MemoryLease implements Lease {
  readonly id: string;
  readonly ttlMs: number;
  readonly lost: Promise<void>;
  readonly #store: MemoryStore;
  readonly #settleLost: () => void;
  readonly #holder: LeaseHolder;
  #open = true;
  #renewedMs: number;
  #timer: TimerHandle | undefined;

  constructor(id: string, store: MemoryStore, ttlMs: number, holder: LeaseHolder) {
    this.id = id;
    this.#store = store;
    this.ttlMs = ttlMs;
    this.#holder = holder;
    this.#renewedMs = holder.clock.monotonicMs();
    const { promise, resolve } = Promise.withResolvers<void>();
    this.lost = promise;
    this.#settleLost = resolve;
    store.addLease(this);
    if (store.expires) this.#renewLater();
  }

  put(key: string, value: JsonValue): Promise<void> {
    return attempt(() => {
      checkKey(key);
      const encoded = encodeValue(key, value);
      if (!this.#open) throw leaseLost();
      requireReachable(this.#holder);
      this.#store.put(key, encoded, this.id);
    });
  }

  delete(key: string): Promise<void> {
    return attempt(() => {
      checkKey(key);
      requireReachable(this.#holder);
      if (this.#open) this.#store.delete(key, this.id);
    });
  }

  close(): Promise<void> {
    this.#end();
    return Promise.resolve();
  }

  /** `isSilent`: as nobody renewed it, not because it was revoked. */
  expire(isSilent = false): void {
    if (!this.#open) return;
    this.#end(isSilent);
    this.#settleLost();
  }

  #end(isSilent = false): void {
    this.#open = false;
    this.#timer?.cancel();
    // Out of reach, it is left to expire.
    if (this.#holder.isReachable) this.#store.removeLease(this.id, isSilent);
    this.#holder.ended(this);
  }

  #renewLater(): void {
    this.#timer = this.#holder.clock.setTimer(this.ttlMs / RENEWALS_PER_TTL, () => this.#renew());
  }

  #renew(): void {
    const nowMs = this.#holder.clock.monotonicMs();
    if (this.#holder.isReachable) {
      if (!this.#store.renew(this)) return this.expire();
      this.#renewedMs = nowMs;
    } else if (nowMs - this.#renewedMs >= this.ttlMs) return this.expire();
    this.#renewLater();
  }
}

/** What a lease needs of the discovery it was opened through. */
interface LeaseHolder {
  readonly clock: Clock;
  readonly isReachable: boolean;
  ended(lease: MemoryLease): void;
}

function leaseLost(): DynamoError {
  return new DynamoError("lease-lost", "the discovery lease has ended");
}

function requireReachable(holder: Pick<LeaseHolder, "isReachable">): void {
  if (!holder.isReachable) throw new DynamoError("discovery-unavailable", "the discovery store is out of reach");
}

export interface MemoryDiscoveryOptions {
  /** @default a store of its own */
  readonly store?: MemoryStore;
  readonly clock?: Clock;
  readonly logger?: Logger;
  /** Of leases that name none. @default 10000 */
  readonly ttlMs?: number;
  /** Of lease ids. @default the system's */
  readonly random?: Random;
  /** Runs the telling of watchers later, never at once. @default a microtask */
  readonly schedule?: (run: () => void) => void;
}

export class MemoryDiscovery implements Discovery, LeaseHolder {
  readonly clock: Clock;
  readonly #store: MemoryStore;
  readonly #schedule: ((run: () => void) => void) | undefined;
  #isReachable = true;
  readonly #logger: Logger;
  readonly #random: Random;
  readonly #ttlMs: number;
  readonly #leases = new Set<MemoryLease>();
  readonly #feeds = new Set<ChangeFeed>();
  #open = true;

  constructor(options: MemoryDiscoveryOptions = {}) {
    this.#store = options.store ?? new MemoryStore();
    this.clock = options.clock ?? systemClock;
    this.#schedule = options.schedule;
    this.#logger = options.logger ?? silentLogger;
    this.#random = options.random ?? systemRandom;
    this.#ttlMs = options.ttlMs ?? DEFAULT_TTL_MS;
  }

  openLease(options: { readonly ttlMs?: number } = {}): Promise<Lease> {
    return attempt(() => {
      const ttlMs = options.ttlMs ?? this.#ttlMs;
      checkTtl(ttlMs);
      this.#requireOpen();
      const lease = new MemoryLease(randomHexId(this.#random), this.#store, ttlMs, this);
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
        ...(this.#schedule === undefined ? {} : { schedule: this.#schedule }),
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
    if (!this.#open) return { healthy: false, detail: "closed" };
    return this.#isReachable ? { healthy: true } : { healthy: false, detail: "the store is out of reach" };
  }

  get isReachable(): boolean {
    return this.#isReachable;
  }

  /** Cuts this holder off from the store, or connects it again: see `MemoryStore`. */
  set isReachable(isReachable: boolean) {
    if (isReachable === this.#isReachable) return;
    this.#isReachable = isReachable;
    for (const feed of this.#feeds)
      if (isReachable) feed.resume(this.#store.entries);
      else feed.pause();
  }

  /** @internal */
  ended(lease: MemoryLease): void {
    this.#leases.delete(lease);
  }

  async close(): Promise<void> {
    this.#open = false;
    await Promise.all([...this.#leases, ...this.#feeds].map((part) => part.close()));
  }

  /** As if this process was killed: its watchers fall silent, nothing is closed, its keys vanish when their leases expire. */
  abandon(): void {
    this.#open = false;
    for (const feed of this.#feeds) void feed.close();
    if (!this.#store.expires)
      for (const lease of this.#leases) this.clock.setTimer(lease.ttlMs, () => lease.expire(true));
    this.#leases.clear();
  }

  #requireOpen(): void {
    if (!this.#open) throw new DynamoError("discovery-unavailable", "this discovery client is closed");
    requireReachable(this);
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
