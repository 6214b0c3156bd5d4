import { toDynamoError } from "../../errors/index.ts";
import { silentLogger, type Logger } from "../../observability/index.ts";
import { systemClock, type Clock, type TimerHandle } from "../../std/index.ts";
import type {
  EventHandler,
  EventPlane,
  EventPlaneHealth,
  EventPublisher,
  EventSubscription,
  PublisherDirectory,
  PublisherOptions,
  PublisherRecord,
} from "./base.ts";
import {
  DEFAULT_QUEUE_EVENTS,
  DEFAULT_RING_EVENTS,
  checkTopic,
  isPublisherRecord,
  planeClosed,
  publisherIdOf,
} from "./limits.ts";
import { PublisherSource, type SourceContext } from "./publisher-source.ts";
import { newStatistics, type EventPlaneStatistics } from "./statistics.ts";
import { loadZmq, type Zmq } from "./zmq-context.ts";
import { ZmqLink } from "./zmq-link.ts";
import { ZmqPublishers, type PublisherRing } from "./zmq-publishers.ts";

/**
 * The event plane between processes, over ZeroMQ without a broker: publishers bind and are announced in a directory,
 * subscribers connect to each. Frames and the life of a subscription are told in README.md, the sockets are in
 * `zmq-publishers.ts` and `zmq-link.ts`; this file joins them with the directory.
 */
export interface ZmqEventPlaneOptions {
  readonly directory: PublisherDirectory;
  /** Interface to listen on. @default 127.0.0.1 */
  readonly host?: string;
  /** What others connect to; needed when `host` is a wildcard. @default host */
  readonly advertisedHost?: string;
  /** Events that wait for one subscriber here, and again there; above that the newest are dropped. @default 100,000 */
  readonly queueEvents?: number;
  readonly clock?: Clock;
  readonly logger?: Logger;
}

export class ZmqEventPlane implements EventPlane {
  readonly statistics: EventPlaneStatistics = newStatistics();
  readonly #directory: PublisherDirectory;
  readonly #host: string;
  readonly #advertisedHost: string;
  readonly #queueEvents: number;
  readonly #context: SourceContext;
  #publishers: Promise<ZmqPublishers> | undefined;
  readonly #links = new Map<string, ZmqLink>();
  readonly #open = new Set<ZmqPublisher | ZmqSubscription>();
  #downTimer: TimerHandle | undefined;
  #isDegraded = false;
  #isClosed = false;

  constructor(options: ZmqEventPlaneOptions) {
    this.#directory = options.directory;
    this.#host = options.host ?? "127.0.0.1";
    this.#advertisedHost = options.advertisedHost ?? this.#host;
    this.#queueEvents = options.queueEvents ?? DEFAULT_QUEUE_EVENTS;
    this.#context = {
      clock: options.clock ?? systemClock,
      logger: options.logger ?? silentLogger,
      statistics: this.statistics,
    };
  }

  async publish(topic: string, options: PublisherOptions = {}): Promise<EventPublisher> {
    checkTopic(topic);
    const publisherId = publisherIdOf(options.publisherId);
    const publishers = await this.#openPublishers();
    if (this.#isClosed) throw planeClosed();
    const ring = publishers.add(topic, publisherId, options.ringSize ?? DEFAULT_RING_EVENTS);
    const { address, replayAddress } = publishers;
    let announced: { withdraw(): Promise<void> };
    try {
      announced = await this.#directory.announce(topic, { publisherId, address, replayAddress });
    } catch (thrown) {
      publishers.remove(ring);
      throw toDynamoError(thrown, "event-plane-unavailable");
    }
    const publisher = new ZmqPublisher(publishers, ring, announced, () => this.#open.delete(publisher));
    this.#open.add(publisher);
    if (this.#isClosed) {
      await publisher.close();
      throw planeClosed();
    }
    return publisher;
  }

  async subscribe(
    topic: string,
    handler: EventHandler,
    options: { readonly replay?: boolean } = {},
  ): Promise<EventSubscription> {
    checkTopic(topic);
    const zmq = await loadZmq();
    if (this.#isClosed) throw planeClosed();
    const subscription = new ZmqSubscription(
      topic,
      handler,
      options.replay === true ? "earliest" : "latest",
      this.#context,
      (record) => this.#acquireLink(zmq, record),
      (record) => this.#releaseLink(record),
      () => this.#open.delete(subscription),
    );
    this.#open.add(subscription);
    try {
      await subscription.start(this.#directory);
    } catch (thrown) {
      await subscription.close();
      throw toDynamoError(thrown, "event-plane-unavailable");
    }
    if (this.#isClosed) {
      await subscription.close();
      throw planeClosed();
    }
    return subscription;
  }

  /** Of the processes that the directory names; one that is not reached for a moment is no news. */
  health(): EventPlaneHealth {
    const downCount = this.#downCount();
    if (downCount === 0) return { healthy: true };
    return { healthy: false, detail: `${downCount} of ${this.#links.size} publishing processes unreachable` };
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    this.#downTimer?.cancel();
    const results = await Promise.allSettled([...this.#open].map((opened) => opened.close()));
    for (const link of this.#links.values()) link.close();
    this.#links.clear();
    const publishers = await this.#publishers?.catch(() => undefined);
    publishers?.close();
    for (const result of results) if (result.status === "rejected") throw toDynamoError(result.reason);
  }

  #openPublishers(): Promise<ZmqPublishers> {
    if (this.#isClosed) return Promise.reject(planeClosed());
    this.#publishers ??= ZmqPublishers.open({
      host: this.#host,
      advertisedHost: this.#advertisedHost,
      queueEvents: this.#queueEvents,
      context: this.#context,
    }).catch((thrown: unknown) => {
      this.#publishers = undefined;
      throw thrown;
    });
    return this.#publishers;
  }

  #acquireLink(zmq: Zmq, record: PublisherRecord): ZmqLink {
    const key = linkKey(record);
    let link = this.#links.get(key);
    if (link === undefined) {
      link = new ZmqLink(zmq, record, this.#queueEvents, this.#context, () => this.#onLinkChange());
      this.#links.set(key, link);
    }
    return link;
  }

  #releaseLink(record: PublisherRecord): void {
    const key = linkKey(record);
    const link = this.#links.get(key);
    if (link === undefined || !link.isEmpty) return;
    this.#links.delete(key);
    link.close();
    this.#onLinkChange();
  }

  #downCount(): number {
    const untilMs = this.#context.clock.monotonicMs() - UNREACHABLE_AFTER_MS;
    let count = 0;
    for (const { downSinceMs } of this.#links.values()) {
      if (downSinceMs !== undefined && downSinceMs <= untilMs) count++;
    }
    return count;
  }

  /** Says once that publishers are unreachable, and once that all are heard again. */
  #onLinkChange(): void {
    if (this.#isClosed) return;
    const { logger, clock } = this.#context;
    const { healthy, detail } = this.health();
    if (healthy === this.#isDegraded) {
      this.#isDegraded = !healthy;
      if (healthy) logger.info("event plane: all publishing processes are reached again");
      else logger.warn({ detail }, "event plane: going on with the last known load and blocks");
    }
    let isDown = false;
    for (const link of this.#links.values()) isDown ||= link.downSinceMs !== undefined;
    if (!isDown) {
      this.#downTimer?.cancel();
      this.#downTimer = undefined;
      return;
    }
    this.#downTimer ??= clock.setTimer(UNREACHABLE_AFTER_MS, () => {
      this.#downTimer = undefined;
      this.#onLinkChange();
    });
  }
}

/** A publisher that leaves takes its record with it, and a lost connection is back in a tenth of a second; longer is a fault. */
const UNREACHABLE_AFTER_MS = 2_000;

function linkKey(record: PublisherRecord): string {
  return `${record.address} ${record.replayAddress}`;
}

class ZmqPublisher implements EventPublisher {
  readonly publisherId: string;
  readonly #publishers: ZmqPublishers;
  readonly #ring: PublisherRing;
  readonly #announced: { withdraw(): Promise<void> };
  readonly #onClose: () => void;
  #closing: Promise<void> | undefined;

  constructor(
    publishers: ZmqPublishers,
    ring: PublisherRing,
    announced: { withdraw(): Promise<void> },
    onClose: () => void,
  ) {
    this.publisherId = ring.publisherId;
    this.#publishers = publishers;
    this.#ring = ring;
    this.#announced = announced;
    this.#onClose = onClose;
  }

  publish(payload: Uint8Array): number {
    return this.#publishers.publish(this.#ring, payload);
  }

  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    try {
      await this.#announced.withdraw();
    } finally {
      this.#publishers.remove(this.#ring);
      this.#onClose();
    }
  }
}

class ZmqSubscription implements EventSubscription {
  readonly #topic: string;
  readonly #handler: EventHandler;
  /** For publishers that are there when the subscription begins; later ones are followed from their first event. */
  #start: "earliest" | "latest";
  readonly #context: SourceContext;
  readonly #acquireLink: (record: PublisherRecord) => ZmqLink;
  readonly #releaseLink: (record: PublisherRecord) => void;
  readonly #onClose: () => void;
  readonly #sources = new Map<string, { record: PublisherRecord; link: ZmqLink; source: PublisherSource }>();
  #watch: { close(): Promise<void> } | undefined;
  #closing: Promise<void> | undefined;

  constructor(
    topic: string,
    handler: EventHandler,
    start: "earliest" | "latest",
    context: SourceContext,
    acquireLink: (record: PublisherRecord) => ZmqLink,
    releaseLink: (record: PublisherRecord) => void,
    onClose: () => void,
  ) {
    this.#topic = topic;
    this.#handler = handler;
    this.#start = start;
    this.#context = context;
    this.#acquireLink = acquireLink;
    this.#releaseLink = releaseLink;
    this.#onClose = onClose;
  }

  async start(directory: PublisherDirectory): Promise<void> {
    const watch = await directory.watch(this.#topic, (change) => {
      if (this.#closing !== undefined) return;
      if (change.type === "put") this.#put(change.record);
      else this.#drop(change.publisherId);
    });
    this.#start = "earliest";
    this.#watch = watch;
    // Closed while the watch was being opened.
    if (this.#closing !== undefined) await watch.close();
  }

  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    for (const { record, link, source } of this.#sources.values()) {
      source.close();
      link.remove(source);
      this.#releaseLink(record);
    }
    this.#sources.clear();
    this.#onClose();
    await this.#watch?.close();
  }

  #put(record: PublisherRecord): void {
    const known = this.#sources.get(record.publisherId);
    if (known !== undefined) {
      if (linkKey(known.record) === linkKey(record)) return;
      this.#drop(record.publisherId);
    }
    const link = this.#tryLink(record);
    if (link === undefined) return;
    const source = new PublisherSource({
      topic: this.#topic,
      publisherId: record.publisherId,
      start: this.#start,
      handler: this.#handler,
      context: this.#context,
      link: {
        ask: (asking, askNumber, from, to) => link.ask(asking, askNumber, from, to),
        doubt: () => link.requestBeacon(this.#topic),
      },
    });
    this.#sources.set(record.publisherId, { record, link, source });
    link.add(source);
  }

  /** Records come from other processes: a bad one is counted, logged and left out. */
  #tryLink(record: PublisherRecord): ZmqLink | undefined {
    let err: unknown;
    try {
      if (isPublisherRecord(record)) return this.#acquireLink(record);
    } catch (thrown) {
      // The library does not take the address: the same as a record that we do not take.
      err = thrown;
    }
    this.#context.statistics.malformed++;
    this.#context.logger.warn(
      { err, topic: this.#topic, publisher_id: record.publisherId, address: record.address },
      "event plane: publisher record ignored, its id or address is not valid",
    );
    return undefined;
  }

  #drop(publisherId: string): void {
    const known = this.#sources.get(publisherId);
    if (known === undefined) return;
    this.#sources.delete(publisherId);
    known.source.gone();
    known.link.remove(known.source);
    this.#releaseLink(known.record);
  }
}
