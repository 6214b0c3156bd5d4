import { randomHexId, systemClock, systemRandom, type Clock, type Random, type TimerHandle } from "../../std/index.ts";
import { silentLogger, type Logger } from "../../observability/index.ts";
import type { EventHandler, EventPlane, EventPublisher, EventSubscription, PublisherOptions } from "./base.ts";
import { EventRing } from "./event-ring.ts";
import {
  DEFAULT_QUEUE_EVENTS,
  DEFAULT_RING_EVENTS,
  REPLAY_BYTES,
  REPLAY_EVENTS,
  RING_BYTES,
  checkPayload,
  checkTopic,
  planeClosed,
  publisherIdOf,
} from "./limits.ts";
import { PublisherSource, type SourceContext, type SourceLink } from "./publisher-source.ts";
import { newStatistics, type EventPlaneStatistics } from "./statistics.ts";

/**
 * The event plane inside one process: the twin of `zmq`, and what a cluster in one process runs on. Events go through a
 * bounded queue per subscription and are handed over in a later turn (`schedule`), so that a publisher never runs a
 * handler. Rings, gaps, replays and restarts are the same code as over the network. All planes of one bus see each other.
 *
 * Cost: one copy of the payload per event, whatever the number of subscriptions; one scheduled turn per batch.
 */
export interface MemoryEventBusOptions {
  /** Events that wait for one subscription's handler; above that the newest are dropped (replay, else gap). @default 100,000 */
  readonly queueEvents?: number;
  /** Loses a message when it returns true: for tests and the simulator. */
  readonly drop?: (
    kind: "event" | "beacon" | "replay",
    topic: string,
    publisherId: string,
    sequence: number,
    /** The plane that would have got it, by its `name`. */
    to: string,
  ) => boolean;
  /** An event for which it returns true comes once more, behind the next one: twice, and out of order. */
  readonly repeat?: (topic: string, publisherId: string, sequence: number, to: string) => boolean;
  /**
   * While it returns true, what this publisher sent waits, and what others sent meanwhile overtakes it: a publisher's own
   * order is all that the plane keeps.
   */
  readonly hold?: (topic: string, publisherId: string, to: string) => boolean;
}

/** A beacon that was lost is sent again after this long, as over the network. */
const BEACON_MS = 1_000;

interface Topic {
  readonly publishers: Map<string, MemoryPublisher>;
  readonly subscriptions: Set<MemorySubscription>;
}

export class MemoryEventBus {
  readonly queueEvents: number;
  readonly drop: NonNullable<MemoryEventBusOptions["drop"]>;
  readonly repeat: NonNullable<MemoryEventBusOptions["repeat"]>;
  readonly hold: MemoryEventBusOptions["hold"];
  readonly #topics = new Map<string, Topic>();

  constructor(options: MemoryEventBusOptions = {}) {
    this.queueEvents = options.queueEvents ?? DEFAULT_QUEUE_EVENTS;
    this.drop = options.drop ?? (() => false);
    this.repeat = options.repeat ?? (() => false);
    this.hold = options.hold;
  }

  /** Number of topics anybody uses: 0 after everything was closed. */
  get topicCount(): number {
    return this.#topics.size;
  }

  topic(name: string): Topic {
    let topic = this.#topics.get(name);
    if (topic === undefined) {
      topic = { publishers: new Map(), subscriptions: new Set() };
      this.#topics.set(name, topic);
    }
    return topic;
  }

  releaseTopic(name: string): void {
    const topic = this.#topics.get(name);
    if (topic !== undefined && topic.publishers.size === 0 && topic.subscriptions.size === 0) this.#topics.delete(name);
  }
}

export interface MemoryEventPlaneOptions {
  readonly bus: MemoryEventBus;
  readonly clock?: Clock;
  /** Runs the delivery of a batch later, never at once. @default setImmediate */
  readonly schedule?: (run: () => void) => void;
  readonly logger?: Logger;
  /** Of the process, for `drop`. @default "" */
  readonly name?: string;
  /** Of ids. @default the system's */
  readonly random?: Random;
}

export class MemoryEventPlane implements EventPlane {
  readonly statistics: EventPlaneStatistics = newStatistics();
  readonly #bus: MemoryEventBus;
  readonly #context: SourceContext;
  readonly #schedule: (run: () => void) => void;
  readonly #random: Random;
  readonly #name: string;
  readonly #open = new Set<MemoryPublisher | MemorySubscription>();
  #isClosed = false;

  constructor(options: MemoryEventPlaneOptions) {
    this.#bus = options.bus;
    this.#schedule = options.schedule ?? setImmediate;
    this.#random = options.random ?? systemRandom;
    this.#name = options.name ?? "";
    this.#context = {
      clock: options.clock ?? systemClock,
      logger: options.logger ?? silentLogger,
      statistics: this.statistics,
    };
  }

  async publish(topic: string, options: PublisherOptions = {}): Promise<EventPublisher> {
    checkTopic(topic);
    if (this.#isClosed) throw planeClosed();
    const publisher = new MemoryPublisher(
      this.#bus,
      topic,
      publisherIdOf(options.publisherId, this.#random),
      randomHexId(this.#random),
      options.ringSize ?? DEFAULT_RING_EVENTS,
      this.statistics,
      () => this.#open.delete(publisher),
    );
    this.#open.add(publisher);
    return publisher;
  }

  async subscribe(
    topic: string,
    handler: EventHandler,
    options: { readonly replay?: boolean } = {},
  ): Promise<EventSubscription> {
    checkTopic(topic);
    if (this.#isClosed) throw planeClosed();
    const subscription = new MemorySubscription(
      this.#bus,
      topic,
      handler,
      this.#context,
      this.#schedule,
      this.#name,
      options.replay ?? false,
      () => this.#open.delete(subscription),
    );
    this.#open.add(subscription);
    return subscription;
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    await Promise.all([...this.#open].map((opened) => opened.close()));
  }

  /** As if this process was killed: it hears and says nothing more. Others learn of it with `close`, as its lease ends. */
  abandon(): void {
    this.#isClosed = true;
    for (const opened of this.#open) {
      if (opened instanceof MemoryPublisher) opened.isSilent = true;
      else void opened.close();
    }
  }
}

class MemoryPublisher implements EventPublisher {
  readonly publisherId: string;
  readonly epoch: string;
  readonly ring: EventRing;
  readonly #bus: MemoryEventBus;
  readonly #topicName: string;
  readonly #topic: Topic;
  readonly #statistics: EventPlaneStatistics;
  readonly #onClose: () => void;
  /** Its process is gone without a word: it answers nothing. */
  isSilent = false;
  #isClosed = false;

  constructor(
    bus: MemoryEventBus,
    topicName: string,
    publisherId: string,
    epoch: string,
    ringSize: number,
    statistics: EventPlaneStatistics,
    onClose: () => void,
  ) {
    this.publisherId = publisherId;
    this.epoch = epoch;
    this.ring = new EventRing(ringSize, RING_BYTES);
    this.#bus = bus;
    this.#topicName = topicName;
    this.#topic = bus.topic(topicName);
    this.#statistics = statistics;
    this.#onClose = onClose;
    // An older publisher of the same id is replaced, as a newer record replaces an older one in discovery.
    this.#topic.publishers.set(publisherId, this);
    for (const subscription of this.#topic.subscriptions) subscription.publisherCame(this);
  }

  publish(payload: Uint8Array): number {
    checkPayload(payload);
    const copy = new Uint8Array(payload);
    const sequence = this.ring.push(copy);
    if (this.#isClosed || this.#topic.publishers.get(this.publisherId) !== this) return sequence;
    this.#statistics.published++;
    for (const subscription of this.#topic.subscriptions) {
      if (this.#bus.drop("event", this.#topicName, this.publisherId, sequence, subscription.name))
        subscription.missed(this);
      else {
        subscription.enqueue(this, sequence, copy);
        subscription.enqueueRepeated();
        if (this.#bus.repeat(this.#topicName, this.publisherId, sequence, subscription.name))
          subscription.repeated = { publisher: this, sequence, payload: copy };
      }
    }
    return sequence;
  }

  close(): Promise<void> {
    if (this.#isClosed) return Promise.resolve();
    this.#isClosed = true;
    if (this.#topic.publishers.get(this.publisherId) === this) {
      this.#topic.publishers.delete(this.publisherId);
      for (const subscription of this.#topic.subscriptions) subscription.publisherLeft(this);
      this.#bus.releaseTopic(this.#topicName);
    }
    this.#onClose();
    return Promise.resolve();
  }
}

/** What waits for a subscription: an event, or (sequence 0) something to do in its order among the events. */
interface Waiting {
  readonly publisher: MemoryPublisher;
  readonly sequence: number;
  readonly payload: Uint8Array;
  readonly run: (() => void) | undefined;
}

const NO_BYTES = new Uint8Array(0);

class MemorySubscription implements EventSubscription, SourceLink {
  readonly name: string;
  readonly #bus: MemoryEventBus;
  readonly #topicName: string;
  readonly #topic: Topic;
  readonly #handler: EventHandler;
  readonly #context: SourceContext;
  readonly #schedule: (run: () => void) => void;
  readonly #onClose: () => void;
  readonly #sources = new Map<MemoryPublisher, PublisherSource>();
  readonly #publisherOf = new Map<PublisherSource, MemoryPublisher>();
  #queue: Waiting[] = [];
  /** Comes once more behind the next event. */
  repeated: Pick<Waiting, "publisher" | "sequence" | "payload"> | undefined = undefined;
  #queuedEvents = 0;
  /** Publishers that lost an event to the full queue: their beacon follows when there is room again. */
  readonly #missed = new Set<MemoryPublisher>();
  #beaconTimer: TimerHandle | undefined;
  #isScheduled = false;
  #isClosed = false;

  constructor(
    bus: MemoryEventBus,
    topicName: string,
    handler: EventHandler,
    context: SourceContext,
    schedule: (run: () => void) => void,
    name: string,
    replay: boolean,
    onClose: () => void,
  ) {
    this.#bus = bus;
    this.#topicName = topicName;
    this.#topic = bus.topic(topicName);
    this.#handler = handler;
    this.#context = context;
    this.#schedule = schedule;
    this.name = name;
    this.#onClose = onClose;
    this.#topic.subscriptions.add(this);
    for (const publisher of this.#topic.publishers.values()) this.#join(publisher, replay ? "earliest" : "latest");
  }

  enqueueRepeated(): void {
    const again = this.repeated;
    this.repeated = undefined;
    if (again !== undefined && this.#sources.has(again.publisher))
      this.enqueue(again.publisher, again.sequence, again.payload);
  }

  enqueue(publisher: MemoryPublisher, sequence: number, payload: Uint8Array): void {
    if (this.#queuedEvents >= this.#bus.queueEvents) {
      this.#context.statistics.overflows++;
      this.missed(publisher);
      return;
    }
    this.#queuedEvents++;
    this.#push({ publisher, sequence, payload, run: undefined });
  }

  /** An event was lost on the way: without a beacon nobody would know if it was the last one. */
  missed(publisher: MemoryPublisher): void {
    this.#missed.add(publisher);
    this.#wake();
  }

  publisherCame(publisher: MemoryPublisher): void {
    for (const known of this.#sources.keys()) {
      if (known.publisherId === publisher.publisherId) this.publisherLeft(known);
    }
    this.#join(publisher, "earliest");
  }

  publisherLeft(publisher: MemoryPublisher): void {
    this.#do(publisher, () => {
      const source = this.#sources.get(publisher);
      if (source === undefined) return;
      // What the beacon finds missing is asked for in vain: `gone` reports it lost.
      source.beacon(publisher.epoch, publisher.ring.newest);
      source.gone();
      this.#sources.delete(publisher);
      this.#publisherOf.delete(source);
      this.#missed.delete(publisher);
    });
  }

  close(): Promise<void> {
    if (this.#isClosed) return Promise.resolve();
    this.#isClosed = true;
    this.#beaconTimer?.cancel();
    for (const source of this.#sources.values()) source.close();
    this.#sources.clear();
    this.#publisherOf.clear();
    this.#queue = [];
    this.#topic.subscriptions.delete(this);
    this.#bus.releaseTopic(this.#topicName);
    this.#onClose();
    return Promise.resolve();
  }

  // SourceLink.

  ask(source: PublisherSource, askNumber: number, from: number, to: number): void {
    const publisher = this.#publisherOf.get(source)!;
    if (publisher.isSilent || this.#bus.drop("replay", this.#topicName, source.publisherId, from, this.name)) return;
    this.#do(publisher, () => {
      const { first, payloads } = publisher.ring.page(from, to, REPLAY_EVENTS, REPLAY_BYTES);
      source.replayed(askNumber, publisher.epoch, first, publisher.ring.newest, payloads);
    });
  }

  doubt(source: PublisherSource): void {
    const publisher = this.#publisherOf.get(source)!;
    if (!this.#beacon(publisher)) this.missed(publisher);
  }

  #join(publisher: MemoryPublisher, start: "earliest" | "latest"): void {
    const source = new PublisherSource({
      topic: this.#topicName,
      publisherId: publisher.publisherId,
      start,
      handler: this.#handler,
      context: this.#context,
      link: this,
    });
    this.#sources.set(publisher, source);
    this.#publisherOf.set(source, publisher);
    if (!this.#beacon(publisher)) this.missed(publisher);
  }

  /** False when it was lost. */
  #beacon(publisher: MemoryPublisher): boolean {
    const newest = publisher.ring.newest;
    if (publisher.isSilent) return true;
    if (this.#bus.drop("beacon", this.#topicName, publisher.publisherId, newest, this.name)) return false;
    this.#do(publisher, () => this.#sources.get(publisher)?.beacon(publisher.epoch, newest));
    return true;
  }

  #do(publisher: MemoryPublisher, run: () => void): void {
    this.#push({ publisher, sequence: 0, payload: NO_BYTES, run });
  }

  #push(waiting: Waiting): void {
    if (this.#isClosed) return;
    this.#queue.push(waiting);
    this.#wake();
  }

  #wake(): void {
    if (this.#isClosed || this.#isScheduled) return;
    this.#isScheduled = true;
    this.#schedule(() => this.#drain());
  }

  #drain(): void {
    this.#isScheduled = false;
    const queue = this.#withoutHeld();
    for (const { publisher, sequence, payload, run } of queue) {
      if (this.#isClosed) return;
      if (run !== undefined) run();
      else this.#sources.get(publisher)?.live(sequence, payload);
    }
    for (const publisher of this.#missed) if (this.#beacon(publisher)) this.#missed.delete(publisher);
    if (this.#queue.length > 0) this.#wake();
    if (this.#missed.size > 0) this.#beaconTimer ??= this.#context.clock.setTimer(BEACON_MS, () => this.#beaconAgain());
  }

  /** What is to be handed over now, in order; what is held back stays in the queue. */
  #withoutHeld(): Waiting[] {
    const queue = this.#queue;
    this.#queue = [];
    this.#queuedEvents = 0;
    const { hold } = this.#bus;
    if (hold === undefined) return queue;
    const held = new Map<MemoryPublisher, boolean>();
    return queue.filter((waiting) => {
      const { publisher, run } = waiting;
      let isHeld = held.get(publisher);
      if (isHeld === undefined) held.set(publisher, (isHeld = hold(this.#topicName, publisher.publisherId, this.name)));
      if (!isHeld) return true;
      this.#queue.push(waiting);
      if (run === undefined) this.#queuedEvents++;
      return false;
    });
  }

  #beaconAgain(): void {
    this.#beaconTimer = undefined;
    this.#wake();
  }
}
