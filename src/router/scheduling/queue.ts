import { DynamoError } from "../../errors/index.ts";
import {
  IndexedHeap,
  ServiceRate,
  TimerWheel,
  WheelTimer,
  type Clock,
  type Expiring,
  type HeapItem,
} from "../../std/index.ts";

/**
 * Requests that wait in the router while every worker they could go to has its prefill backlog full. Order: strict
 * priority first, then the policy's key, larger first, then arrival:
 *
 *   fcfs   jump - arrival            a jump is a head start in seconds
 *   lcfs   jump + arrival
 *   wspt   (1 + jump) / max(1, prompt tokens - cached tokens)     short work first (Smith 1956)
 *
 * Enter, leave and cancel are O(log n). Every entry ends exactly once: placed, refused by `place`, over its deadline, or
 * cancelled. Owned by the router, which calls `drain` whenever a worker may have room.
 */
export type QueuePolicy = "fcfs" | "lcfs" | "wspt";

export interface QueueItem {
  readonly promptTokens: number;
  readonly strictPriority: number;
  /** Seconds; below 0 counts as 0. */
  readonly priorityJump: number;
  /** On the monotonic clock; undefined = none. */
  readonly deadlineMs: number | undefined;
  /** May go to some workers only: when it cannot be placed, those behind it are looked at all the same. */
  readonly isConstrained: boolean;
}

export interface Waiting<Decision> {
  readonly decision: Promise<Decision>;
  /** Leaves the queue: `decision` is rejected with `error`. Nothing when it was placed already. */
  cancel(error: DynamoError): void;
}

export interface RouteQueueOptions<Item extends QueueItem, Decision> {
  readonly clock: Clock;
  readonly policy: QueuePolicy;
  readonly limit: number;
  /** A request that waited this long gets its key anew before it is placed. 0 = never. */
  readonly refreshAfterMs: number;
  /** undefined = it must go on waiting. What it throws goes to the waiting one. */
  readonly place: (item: Item, waitedMs: number) => Decision | undefined;
  /** Most prompt tokens that any worker has cached, for wspt. */
  readonly cachedTokens: (item: Item) => number;
  /** After each change: how many wait, with how many prompt tokens, of which cached somewhere. */
  readonly onChange?: (entries: number, promptTokens: number, cachedTokens: number) => void;
}

class Entry<Item extends QueueItem, Decision> implements Expiring, Waiting<Decision>, HeapItem {
  readonly queue: RouteQueue<Item, Decision>;
  readonly item: Item;
  readonly order: number;
  readonly arrivalMs: number;
  readonly decision: Promise<Decision>;
  readonly resolve: (decision: Decision) => void;
  readonly reject: (error: unknown) => void;
  readonly timer = new WheelTimer(this);
  key = 0;
  cachedTokens = 0;
  keyedMs: number;
  position = -1;

  constructor(queue: RouteQueue<Item, Decision>, item: Item, order: number, nowMs: number) {
    this.queue = queue;
    this.item = item;
    this.order = order;
    this.arrivalMs = nowMs;
    this.keyedMs = nowMs;
    const { promise, resolve, reject } = Promise.withResolvers<Decision>();
    this.decision = promise;
    this.resolve = resolve;
    this.reject = reject;
  }

  cancel(error: DynamoError): void {
    this.queue.leave(this, error);
  }

  onExpire(): void {
    this.queue.leave(
      this,
      new DynamoError("request-deadline", "the request was still waiting for a worker at its deadline"),
    );
  }
}

/** Constrained entries passed over in one drain: beyond it the drain ends, and the next one goes on. */
const MAX_PASSED_OVER = 32;
/** What one who is refused is told to wait: a connection's round trip is the least that makes sense. */
const RETRY_LIMITS = { minMs: 100, maxMs: 60_000 };

export class RouteQueue<Item extends QueueItem, Decision> {
  readonly #options: RouteQueueOptions<Item, Decision>;
  readonly #heap = new IndexedHeap<Entry<Item, Decision>>(isBefore);
  readonly #rate = new ServiceRate(RETRY_LIMITS);
  readonly #deadlines: TimerWheel;
  #order = 0;
  #promptTokens = 0;
  #cachedTokens = 0;
  #draining = false;

  constructor(options: RouteQueueOptions<Item, Decision>) {
    this.#options = options;
    this.#deadlines = new TimerWheel({ clock: options.clock });
  }

  get length(): number {
    return this.#heap.length;
  }

  /** Throws `too-many-requests` when full. The caller drains afterwards: the new one may be the first. */
  enter(item: Item): Waiting<Decision> {
    const { clock, limit } = this.#options;
    const nowMs = clock.monotonicMs();
    if (this.#heap.length >= limit) {
      throw new DynamoError("too-many-requests", "the server is at capacity: the router's queue is full", {
        diagnostic: `${limit} requests wait for a worker`,
        retryAfterMs: this.#rate.retryAfterMs(nowMs),
      });
    }
    const entry = new Entry(this, item, this.#order++, nowMs);
    this.#setKey(entry);
    if (item.deadlineMs !== undefined) this.#deadlines.add(entry.timer, item.deadlineMs - nowMs);
    this.#heap.push(entry);
    this.#count(entry, 1);
    return entry;
  }

  /** Places what can be placed, in order. */
  drain(): void {
    if (this.#draining || this.#heap.length === 0) return;
    this.#draining = true;
    const passedOver: Entry<Item, Decision>[] = [];
    try {
      while (this.#heap.length > 0 && passedOver.length <= MAX_PASSED_OVER) {
        const entry = this.#heap.first!;
        if (this.#refreshKey(entry)) continue;
        const isPlaced = this.#place(entry);
        if (isPlaced) continue;
        if (!entry.item.isConstrained) break;
        this.#heap.remove(entry);
        passedOver.push(entry);
      }
    } finally {
      for (const entry of passedOver) this.#heap.push(entry);
      this.#draining = false;
    }
  }

  /** For entries. */
  leave(entry: Entry<Item, Decision>, error: DynamoError): void {
    if (entry.position < 0) return;
    this.#remove(entry);
    entry.reject(error);
  }

  /** Everything that waits is refused with `error`. */
  close(error: DynamoError): void {
    while (this.#heap.first !== undefined) this.leave(this.#heap.first, error);
    this.#deadlines.close();
  }

  #place(entry: Entry<Item, Decision>): boolean {
    const { clock, place } = this.#options;
    let decision: Decision | undefined;
    try {
      decision = place(entry.item, clock.monotonicMs() - entry.arrivalMs);
    } catch (thrown) {
      this.#remove(entry);
      entry.reject(thrown);
      return true;
    }
    if (decision === undefined) return false;
    this.#remove(entry);
    entry.resolve(decision);
    return true;
  }

  /** True when the entry moved down: another one is first now. */
  #refreshKey(entry: Entry<Item, Decision>): boolean {
    const { clock, policy, refreshAfterMs } = this.#options;
    if (policy !== "wspt" || refreshAfterMs === 0) return false;
    if (clock.monotonicMs() - entry.keyedMs < refreshAfterMs) return false;
    this.#count(entry, -1);
    this.#setKey(entry);
    this.#count(entry, 1);
    this.#heap.moved(entry);
    return this.#heap.first !== entry;
  }

  #setKey(entry: Entry<Item, Decision>): void {
    const { clock, policy, cachedTokens } = this.#options;
    const { item } = entry;
    const jump = Math.max(0, item.priorityJump);
    entry.keyedMs = clock.monotonicMs();
    entry.cachedTokens = cachedTokens(item);
    if (policy === "wspt") entry.key = (1 + jump) / Math.max(1, item.promptTokens - entry.cachedTokens);
    else entry.key = policy === "fcfs" ? jump - entry.arrivalMs / 1_000 : jump + entry.arrivalMs / 1_000;
  }

  /** Out of the queue for good. */
  #remove(entry: Entry<Item, Decision>): void {
    this.#rate.departed(this.#options.clock.monotonicMs(), this.#heap.length >= this.#options.limit);
    this.#heap.remove(entry);
    this.#deadlines.cancel(entry.timer);
    this.#count(entry, -1);
  }

  #count(entry: Entry<Item, Decision>, sign: 1 | -1): void {
    this.#promptTokens += sign * entry.item.promptTokens;
    this.#cachedTokens += sign * entry.cachedTokens;
    this.#options.onChange?.(this.#heap.length, this.#promptTokens, this.#cachedTokens);
  }
}

interface Ordered {
  readonly item: QueueItem;
  readonly key: number;
  readonly order: number;
}

function isBefore(a: Ordered, b: Ordered): boolean {
  if (a.item.strictPriority !== b.item.strictPriority) return a.item.strictPriority > b.item.strictPriority;
  if (a.key !== b.key) return a.key > b.key;
  return a.order < b.order;
}
