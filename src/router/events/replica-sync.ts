import type { Logger, Metrics } from "../../observability/index.ts";
import {
  ACTIVE_SEQUENCES_CUT_BYTES,
  ACTIVE_SEQUENCES_MAX_EVENTS,
  ACTIVE_SEQUENCES_TOPIC,
  activeSequenceBytes,
  decodeActiveSequences,
  encodeActiveSequences,
  type ActiveSequenceEvent,
  type ActiveSequenceMessage,
} from "../../protocol/index.ts";
import type { EventPlane, EventPublisher, EventSubscription } from "../../runtime/event-plane/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";

/**
 * Several routers, one view of the load: each tells the others what it books, when a prefill is done and what it frees,
 * in batches of at most 256 events or a millisecond. Best effort on the event plane, but it heals: a router that is seen
 * for the first time, or of which something was lost, is asked for a snapshot of what it has on the workers, and its
 * events from then on build on that. A router that leaves takes its bookings along.
 *
 * Own events are told apart by the publisher's id. Growth of outputs is not told, as in Dynamo. Owned by a frontend; one
 * publisher and one subscription for all its models. Cost: under a microsecond per event, nothing when idle.
 */
export interface ReplicaSyncOptions {
  readonly events: EventPlane;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly metrics: Metrics;
  /** 16 hex digits. @default random */
  readonly routerId?: string;
}

/** The part of a router that takes part. */
export interface SyncedRouter {
  onBooking: ((event: ActiveSequenceEvent) => void) | undefined;
  applyRemoteBooking(routerId: string, event: ActiveSequenceEvent): string;
  dropRemoteRouter(routerId: string): void;
}

const BATCH_MS = 1;
/** Requests for a snapshot that come within this time get one; also how often one router is asked. */
const SNAPSHOT_MS = 100;
const ASK_AGAIN_MS = 1_000;
/** A router that does not answer so often has nothing to tell, or is another version. */
const MAX_ASKS = 8;
const MAX_ROUTERS = 256;

/** One own request that is on a worker. */
interface Live {
  readonly add: ActiveSequenceEvent & { readonly type: "add" };
  isPrefilled: boolean;
}

interface SyncedModel {
  readonly name: string;
  readonly router: SyncedRouter;
  /** By request id, oldest first: the samples of one request have the same id. */
  readonly live: Map<string, Live[]>;
  batch: ActiveSequenceEvent[];
  batchBytes: number;
}

type BookingsMessage = Exclude<ActiveSequenceMessage, { readonly type: "please" }>;

interface Peer {
  /** What it told since its last snapshot is whole. */
  isWhole: boolean;
  /** When it was last asked for a snapshot, and how often in vain. */
  askedMs: number;
  askCount: number;
}

export class ReplicaSync {
  readonly #options: ReplicaSyncOptions;
  readonly #models = new Map<string, SyncedModel>();
  readonly #peers = new Map<string, Peer>();
  readonly #count: (direction: "sent" | "received", outcome: string, count?: number) => void;
  #publisher: EventPublisher | undefined;
  #subscription: EventSubscription | undefined;
  #batchTimer: TimerHandle | undefined;
  #snapshotTimer: TimerHandle | undefined;
  #askTimer: TimerHandle | undefined;
  #sampleCount = 0;
  #hasLoggedMalformed = false;
  #closed = false;

  constructor(options: ReplicaSyncOptions) {
    this.#options = options;
    const counter = options.metrics.counter("dynamo_router_replica_sync_events_total");
    this.#count = (direction, outcome, count = 1) => counter.labels(direction, outcome).add(count);
  }

  /** Joins the others. Throws `event-plane-unavailable`. */
  async start(): Promise<void> {
    const { events, routerId } = this.#options;
    this.#publisher = await events.publish(
      ACTIVE_SEQUENCES_TOPIC,
      routerId === undefined ? {} : { publisherId: routerId },
    );
    this.#subscription = await events.subscribe(ACTIVE_SEQUENCES_TOPIC, {
      onEvent: (publisherId, _sequence, payload) => {
        if (publisherId !== this.#publisher!.publisherId) this.#onMessage(publisherId, payload);
      },
      onGap: (publisherId) => {
        if (publisherId !== this.#publisher!.publisherId) this.#doubt(publisherId);
      },
      onPublisherGone: (publisherId) => this.#onGone(publisherId),
    });
    this.#send({ type: "please", routerId: "" });
  }

  /** Routers this one hears of, and if their view is whole; for tests and operators. */
  get peers(): { readonly routerId: string; readonly isWhole: boolean }[] {
    return [...this.#peers].map(([routerId, { isWhole }]) => ({ routerId, isWhole }));
  }

  /** The router of a model takes part from now on. */
  attach(name: string, router: SyncedRouter): void {
    const model: SyncedModel = { name, router, live: new Map(), batch: [], batchBytes: 0 };
    this.#models.set(name, model);
    router.onBooking = (event) => this.#onBooking(model, event);
    // What the others told of this model before went nowhere.
    for (const routerId of this.#peers.keys()) this.#doubt(routerId);
  }

  detach(name: string): void {
    const model = this.#models.get(name);
    if (model === undefined) return;
    this.#models.delete(name);
    model.router.onBooking = undefined;
    for (const routerId of this.#peers.keys()) model.router.dropRemoteRouter(routerId);
  }

  async close(): Promise<void> {
    this.#closed = true;
    this.#batchTimer?.cancel();
    this.#snapshotTimer?.cancel();
    this.#askTimer?.cancel();
    for (const name of this.#models.keys()) this.detach(name);
    await this.#subscription?.close();
    await this.#publisher?.close();
  }

  // ---- Out ----

  #onBooking(model: SyncedModel, event: ActiveSequenceEvent): void {
    const told = noted(model.live, event, () => this.#sampleCount++);
    if (told === undefined) return;
    model.batch.push(told);
    model.batchBytes += activeSequenceBytes(told);
    if (model.batch.length >= ACTIVE_SEQUENCES_MAX_EVENTS || model.batchBytes >= ACTIVE_SEQUENCES_CUT_BYTES)
      this.#flush(model);
    else this.#batchTimer ??= this.#options.clock.setTimer(BATCH_MS, () => this.#flushAll());
  }

  #flushAll(): void {
    this.#batchTimer = undefined;
    for (const model of this.#models.values()) this.#flush(model);
  }

  #flush(model: SyncedModel): void {
    if (model.batch.length === 0) return;
    const events = model.batch;
    model.batch = [];
    model.batchBytes = 0;
    this.#send({ type: "events", model: model.name, events });
  }

  /** All that this router has on the workers; what waits in a batch is part of it. */
  #sendSnapshot(): void {
    this.#snapshotTimer = undefined;
    for (const model of this.#models.values()) {
      model.batch = [];
      model.batchBytes = 0;
      let type: "snapshot" | "events" = "snapshot";
      let events: ActiveSequenceEvent[] = [];
      let bytes = 0;
      for (const lives of model.live.values()) {
        for (const { add, isPrefilled } of lives) {
          events.push(isPrefilled ? { ...add, prefillTokens: 0 } : add);
          bytes += activeSequenceBytes(add);
          if (events.length < ACTIVE_SEQUENCES_MAX_EVENTS && bytes < ACTIVE_SEQUENCES_CUT_BYTES) continue;
          this.#send({ type, model: model.name, events });
          [type, events, bytes] = ["events", [], 0];
        }
      }
      if (type === "snapshot" || events.length > 0) this.#send({ type, model: model.name, events });
    }
  }

  #send(message: ActiveSequenceMessage): void {
    if (this.#closed || this.#publisher === undefined) return;
    const count = message.type === "please" ? 1 : message.events.length;
    try {
      this.#publisher.publish(encodeActiveSequences(message));
      this.#count("sent", "ok", count);
    } catch (thrown) {
      this.#count("sent", "failed", count);
      this.#options.logger.warn({ err: thrown }, "active load could not be told to other routers");
    }
  }

  // ---- In ----

  #onMessage(routerId: string, payload: Uint8Array): void {
    let message: ActiveSequenceMessage;
    try {
      message = decodeActiveSequences(payload);
    } catch (thrown) {
      this.#count("received", "malformed");
      if (this.#hasLoggedMalformed) return;
      this.#hasLoggedMalformed = true;
      this.#options.logger.warn(
        { err: thrown, router: routerId },
        "active load of another router dropped; further ones are only counted",
      );
      return;
    }
    const peer = this.#peer(routerId);
    if (peer === undefined) {
      this.#count("received", "too_many_routers");
      return;
    }
    if (message.type === "please") {
      if (message.routerId === "" || message.routerId === this.#publisher!.publisherId) {
        this.#snapshotTimer ??= this.#options.clock.setTimer(SNAPSHOT_MS, () => this.#sendSnapshot());
      }
    } else this.#apply(routerId, peer, message);
    if (!peer.isWhole) this.#askForSnapshot(routerId, peer);
  }

  #apply(routerId: string, peer: Peer, { type, model: name, events }: BookingsMessage): void {
    if (type === "snapshot") {
      peer.isWhole = true;
      peer.askCount = 0;
    }
    const router = this.#models.get(name)?.router;
    if (router === undefined) {
      this.#count("received", "unknown_model", events.length);
      return;
    }
    if (type === "snapshot") router.dropRemoteRouter(routerId);
    for (const event of events)
      this.#count("received", router.applyRemoteBooking(routerId, event).replaceAll("-", "_"));
  }

  /** Something of this router is missing here. */
  #doubt(routerId: string): void {
    const peer = this.#peer(routerId);
    if (peer === undefined) return;
    peer.isWhole = false;
    peer.askCount = 0;
    this.#askForSnapshot(routerId, peer);
  }

  /** At once if it was not asked lately; again every second while there is no answer. */
  #askForSnapshot(routerId: string, peer: Peer): void {
    const nowMs = this.#options.clock.monotonicMs();
    if (nowMs - peer.askedMs >= ASK_AGAIN_MS && peer.askCount < MAX_ASKS) {
      peer.askedMs = nowMs;
      peer.askCount++;
      this.#send({ type: "please", routerId });
    }
    if (!this.#closed) this.#askTimer ??= this.#options.clock.setTimer(ASK_AGAIN_MS, () => this.#askAgain());
  }

  #askAgain(): void {
    this.#askTimer = undefined;
    for (const [routerId, peer] of this.#peers) {
      if (!peer.isWhole && peer.askCount < MAX_ASKS) this.#askForSnapshot(routerId, peer);
    }
  }

  #onGone(routerId: string): void {
    this.#peers.delete(routerId);
    for (const { router } of this.#models.values()) router.dropRemoteRouter(routerId);
  }

  #peer(routerId: string): Peer | undefined {
    let peer = this.#peers.get(routerId);
    if (peer === undefined) {
      if (this.#peers.size >= MAX_ROUTERS) return undefined;
      this.#peers.set(routerId, (peer = { isWhole: false, askedMs: -Infinity, askCount: 0 }));
    }
    return peer;
  }
}

/**
 * Keeps the list of own live requests, and returns what to tell: the same event, under an id of its own when another
 * sample of the request is on its way too. Which of several samples is meant by an id does not matter: all of them end.
 */
function noted(
  live: Map<string, Live[]>,
  event: ActiveSequenceEvent,
  nextSample: () => number,
): ActiveSequenceEvent | undefined {
  const known = live.get(event.requestId);
  if (event.type === "add") {
    const add = known === undefined ? event : { ...event, requestId: `${event.requestId}#${nextSample()}` };
    if (known === undefined) live.set(event.requestId, [{ add, isPrefilled: false }]);
    else known.push({ add, isPrefilled: false });
    return add;
  }
  if (event.type === "free") {
    const freed = known?.shift();
    if (known?.length === 0) live.delete(event.requestId);
    return freed && { type: "free", requestId: freed.add.requestId };
  }
  const prefilled = known?.find(({ isPrefilled }) => !isPrefilled);
  if (prefilled === undefined) return undefined;
  prefilled.isPrefilled = true;
  return { type: "prefill-completed", requestId: prefilled.add.requestId };
}
