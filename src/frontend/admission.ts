import { DynamoError } from "../errors/index.ts";
import type { GaugeChild } from "../observability/index.ts";
import { ServiceRate, type Clock } from "../std/index.ts";
import { FairQueue, type FairItem } from "./fair-queue.ts";

/**
 * The frontend's gate. A request takes places: of its model, as many as it asks for answers, and one of the frontend. It
 * holds them until its whole answer ended, not only until the headers went out. Whoever finds none free waits, in fair
 * shares per tenant (fair-queue.ts); at most `queueLimit` wait, over all models. Above that the last of the tenant that
 * has most waiting is refused with `too-many-requests`, which may be the one that came: a tenant that floods the gate
 * fills the queue only for itself. Who would wait for longer than it can is refused at once, as waiting in vain helps
 * nobody: the pace of the model's places tells.
 *
 * A model's limit is asked each time, as it follows its workers: `drain` lets in what a new limit has room for. No timers
 * and no promises: a waiting entry is called. Entering at once is O(1) and allocates nothing.
 */
export interface GateEntry extends FairItem {
  /** How long it can wait from now on; Infinity = as long as it takes. */
  readonly patienceMs: number;
  /** A place came free and is this entry's now. */
  onAdmitted(): void;
  /** It was sent away for somebody of another tenant. */
  onRefused(error: DynamoError): void;
}

/** What a request holds until its answer ended. */
export interface Permit {
  /** Gives it back. Further calls do nothing. */
  release(): void;
}

/** A tenth of a second is a round trip; nobody should have to wait for more than a minute without asking again. */
const RETRY_LIMITS = { minMs: 100, maxMs: 60_000 };

/** The places of one model. */
export class ModelPlaces {
  readonly queue = new FairQueue<GateEntry>();
  /** At which they come free. */
  readonly rate = new ServiceRate(RETRY_LIMITS);
  /** Places taken. */
  active = 0;
  readonly #limit: () => number;

  constructor(limit: () => number) {
    this.#limit = limit;
  }

  get limit(): number {
    return this.#limit();
  }

  /** Until the next one of that tenant would have its turn; 0 while the pace is not known. */
  expectedWaitMs(tenant: string): number {
    const { length, tenantCount } = this.queue;
    const before = Math.min(length, this.queue.lengthOf(tenant) * tenantCount + tenantCount);
    return before * this.rate.meanIntervalMs;
  }

  /** Whether `cost` more places are free. What asks for more than there are gets them when it is alone. */
  hasRoom(cost: number): boolean {
    return this.active === 0 || this.active + cost <= this.#limit();
  }
}

export interface AdmissionGateOptions {
  /** Requests served at once, over all models. */
  readonly limit: number;
  readonly queueLimit: number;
  readonly clock: Clock;
  readonly queuedGauge: GaugeChild;
}

export class AdmissionGate {
  readonly #limit: number;
  readonly #queueLimit: number;
  readonly #clock: Clock;
  readonly #queuedGauge: GaugeChild;
  /** Models somebody waits for, in the order of their turns. */
  readonly #waiting = new Set<ModelPlaces>();
  #active = 0;
  #queued = 0;

  constructor(options: AdmissionGateOptions) {
    this.#limit = options.limit;
    this.#queueLimit = options.queueLimit;
    this.#clock = options.clock;
    this.#queuedGauge = options.queuedGauge;
  }

  get activeCount(): number {
    return this.#active;
  }

  get queuedCount(): number {
    return this.#queued;
  }

  /** Places at once, or false when one must wait. */
  tryEnter(places: ModelPlaces, cost: number): boolean {
    if (this.#active >= this.#limit || places.queue.length > 0 || !places.hasRoom(cost)) return false;
    this.#take(places, cost);
    return true;
  }

  /**
   * Waits for its places. Throws `too-many-requests` when it would wait for longer than it can, and when the queue is full
   * and no other tenant has more waiting.
   */
  enter(places: ModelPlaces, entry: GateEntry): void {
    const nowMs = this.#clock.monotonicMs();
    if (places.expectedWaitMs(entry.tenant) > entry.patienceMs) throw this.#refusal(places, nowMs);
    if (this.#queued >= this.#queueLimit) this.#makeRoom(places, entry, nowMs);
    places.queue.push(entry, nowMs);
    this.#waiting.add(places);
    this.#countQueued(1);
  }

  /** Gives up waiting. */
  leave(places: ModelPlaces, entry: GateEntry): void {
    if (entry.position < 0) return;
    places.queue.remove(entry);
    this.#left(places);
    // It may have been the one the others waited behind.
    this.drain();
  }

  /** Gives the places back. */
  release(places: ModelPlaces, cost: number): void {
    const isFull = this.#isFull(places);
    this.#active--;
    places.active -= cost;
    places.rate.departed(this.#clock.monotonicMs(), isFull);
    if (this.#queued > 0) this.drain();
  }

  /** Lets in whoever there is room for; models take turns as well. */
  drain(): void {
    for (const places of this.#waiting) {
      if (this.#active >= this.#limit) return;
      const entry = places.queue.peek()!;
      if (!places.hasRoom(entry.cost)) continue;
      places.queue.shift();
      this.#left(places);
      this.#take(places, entry.cost);
      // Behind the others: a set's loop comes to what was added while it ran.
      if (places.queue.length > 0) {
        this.#waiting.delete(places);
        this.#waiting.add(places);
      }
      entry.onAdmitted();
    }
  }

  #take(places: ModelPlaces, cost: number): void {
    this.#active++;
    places.active += cost;
  }

  /** Every place is taken: from one departure to the next is the pace of service. */
  #isFull(places: ModelPlaces): boolean {
    return this.#queued > 0 || this.#active >= this.#limit || !places.hasRoom(1);
  }

  /** One of the model's queue is out of it. */
  #left(places: ModelPlaces): void {
    if (places.queue.length === 0) this.#waiting.delete(places);
    this.#countQueued(-1);
  }

  #countQueued(change: 1 | -1): void {
    this.#queued += change;
    this.#queuedGauge.set(this.#queued);
  }

  #refusal(places: ModelPlaces, nowMs: number): DynamoError {
    return new DynamoError("too-many-requests", "the server is at capacity; retry later", {
      diagnostic: `${this.#active} active, ${this.#queued} queued`,
      retryAfterMs: places.rate.retryAfterMs(nowMs),
    });
  }

  /** Sends the last of the tenant with most waiting away, or throws when that is who came. */
  #makeRoom(own: ModelPlaces, entry: GateEntry, nowMs: number): void {
    const error = this.#refusal(own, nowMs);
    let from: ModelPlaces | undefined;
    let last: GateEntry | undefined;
    let most = own.queue.lengthOf(entry.tenant) + 1;
    for (const places of this.#waiting) {
      const candidate = places.queue.lastOfLongest()!;
      const length = places.queue.lengthOf(candidate.tenant);
      if (length <= most) continue;
      [from, last, most] = [places, candidate, length];
    }
    if (from === undefined || last === undefined) throw error;
    from.queue.remove(last);
    this.#left(from);
    last.onRefused(error);
  }
}
