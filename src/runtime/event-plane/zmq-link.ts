import type { Dealer, Subscriber } from "zeromq";
import type { PublisherRecord } from "./base.ts";
import type { PublisherSource, SourceContext } from "./publisher-source.ts";
import { socketOptions, type Zmq } from "./zmq-context.ts";
import {
  BEACON_PREFIX,
  NO_EPOCH,
  decodeBeacon,
  decodeReplayAnswer,
  encodeReplayRequest,
  isBeacon,
  readSequence,
} from "./zmq-frames.ts";

/**
 * The subscribing side towards one remote process: a SUB socket for the events of all its publishers that anybody here
 * wants, and a DEALER, opened with the first replay. Frames go to the sources of their topic and publisher; what has no
 * source is dropped in silence (a topic is a prefix for the library, and a record may come later than the events).
 *
 * Asking for a beacon is subscribing once more: it travels the same connection as the subscription itself, so that the
 * beacon that comes back stands, in order, among the live events. The library reconnects and subscribes again by itself;
 * that too brings a beacon, and with it the replay of what was missed.
 *
 * Full: 100,000 events wait in the library, above that the sender's side drops, which is a gap here.
 */
export class ZmqLink {
  readonly #zmq: Zmq;
  readonly #replayAddress: string;
  readonly #context: SourceContext;
  readonly #onStateChange: () => void;
  readonly #subscriber: Subscriber;
  #dealer: Dealer | undefined;
  /** By topic, then by publisher id. Sources of several subscriptions may want the same publisher. */
  readonly #routes = new Map<string, Map<string, Set<PublisherSource>>>();
  readonly #asks = new Map<number, { source: PublisherSource; askNumber: number }>();
  readonly #askOf = new Map<PublisherSource, number>();
  #nextAsk = 1;
  /** The route of the event before: most events come in runs of one topic and publisher. */
  #lastTopic: Buffer = EMPTY;
  #lastId: Buffer = EMPTY;
  #lastSources: Set<PublisherSource> | undefined;
  /** On the monotonic clock; undefined unless the publishers' process was found unreachable. */
  #downSinceMs: number | undefined;
  #isClosed = false;
  #hasLoggedMalformed = false;

  /** Throws when the library refuses the address. */
  constructor(
    zmq: Zmq,
    record: PublisherRecord,
    queueEvents: number,
    context: SourceContext,
    onStateChange: () => void = () => undefined,
  ) {
    this.#onStateChange = onStateChange;
    this.#zmq = zmq;
    this.#replayAddress = record.replayAddress;
    this.#context = context;
    this.#subscriber = new zmq.library.Subscriber({
      ...socketOptions(zmq, record.address.includes("[")),
      receiveHighWaterMark: queueEvents,
    });
    try {
      this.#subscriber.connect(record.address);
    } catch (thrown) {
      this.#subscriber.close();
      throw thrown;
    }
    void this.#readState();
    void this.#readEvents();
  }

  /** Since when its events cannot come, by the monotonic clock. */
  get downSinceMs(): number | undefined {
    return this.#downSinceMs;
  }

  get isEmpty(): boolean {
    return this.#routes.size === 0;
  }

  add(source: PublisherSource): void {
    const { topic, publisherId } = source;
    let publishers = this.#routes.get(topic);
    if (publishers === undefined) {
      publishers = new Map();
      this.#routes.set(topic, publishers);
      // Events before beacons: when the second has arrived, so has the first.
      this.#subscriber.subscribe(topic);
      this.#subscriber.subscribe(BEACON_PREFIX + topic);
    } else {
      this.requestBeacon(topic);
    }
    const sources = publishers.get(publisherId);
    if (sources === undefined) publishers.set(publisherId, new Set([source]));
    else sources.add(source);
    this.#lastSources = undefined;
  }

  remove(source: PublisherSource): void {
    const { topic, publisherId } = source;
    const publishers = this.#routes.get(topic);
    const sources = publishers?.get(publisherId);
    if (publishers === undefined || sources === undefined || !sources.delete(source)) return;
    this.#forgetAsk(source);
    if (sources.size === 0) publishers.delete(publisherId);
    if (publishers.size === 0) {
      this.#routes.delete(topic);
      this.#subscriber.unsubscribe(topic, BEACON_PREFIX + topic);
    }
    this.#lastSources = undefined;
  }

  /** Subscribed twice, unsubscribed once: the other side sees one more subscription, the filter here stays as it was. */
  requestBeacon(topic: string): void {
    if (this.#isClosed) return;
    this.#subscriber.subscribe(BEACON_PREFIX + topic);
    this.#subscriber.unsubscribe(BEACON_PREFIX + topic);
  }

  ask(source: PublisherSource, askNumber: number, from: number, to: number): void {
    if (this.#isClosed) return;
    this.#forgetAsk(source);
    const number = this.#nextAsk++;
    this.#asks.set(number, { source, askNumber });
    this.#askOf.set(source, number);
    const { topic, publisherId } = source;
    // Not sent (the queue is full): the deadline of the ask tells.
    this.#openDealer()
      .send(encodeReplayRequest({ topic, publisherId, from, to, askNumber: number }))
      .catch(() => undefined);
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#subscriber.close();
    this.#dealer?.close();
    this.#asks.clear();
    this.#askOf.clear();
    this.#routes.clear();
  }

  #forgetAsk(source: PublisherSource): void {
    const number = this.#askOf.get(source);
    if (number === undefined) return;
    this.#askOf.delete(source);
    this.#asks.delete(number);
  }

  #openDealer(): Dealer {
    if (this.#dealer !== undefined) return this.#dealer;
    const options = socketOptions(this.#zmq, this.#replayAddress.includes("["));
    const dealer = new this.#zmq.library.Dealer({ ...options, sendTimeout: 0 });
    this.#dealer = dealer;
    dealer.connect(this.#replayAddress);
    void this.#readAnswers(dealer);
    return dealer;
  }

  /** The library connects again by itself, at random parts of its back-off; here it is only told. */
  async #readState(): Promise<void> {
    for (;;) {
      let type: string;
      try {
        type = (await this.#subscriber.events.receive()).type;
      } catch {
        return; // The socket is closed.
      }
      if (type === "handshake") this.#setDown(undefined);
      else if (type === "disconnect" || type === "connect:retry") {
        this.#setDown(this.#downSinceMs ?? this.#context.clock.monotonicMs());
      }
      if (type === "end") return;
    }
  }

  #setDown(sinceMs: number | undefined): void {
    if (this.#isClosed || sinceMs === this.#downSinceMs) return;
    this.#downSinceMs = sinceMs;
    this.#onStateChange();
  }

  async #readEvents(): Promise<void> {
    for (;;) {
      let frames: Buffer[];
      try {
        frames = await this.#subscriber.receive();
      } catch (thrown) {
        return this.#readEnded(thrown);
      }
      if (isBeacon(frames)) this.#onBeacon(frames);
      else this.#onEvent(frames);
    }
  }

  #onEvent(frames: readonly Buffer[]): void {
    if (frames.length !== 4 || frames[1]!.length !== 8) return this.#malformed();
    const sequence = readSequence(frames[2]!);
    if (sequence < 1) return this.#malformed();
    const sources = this.#find(frames[0]!, frames[1]!);
    if (sources === undefined) return;
    for (const source of sources) source.live(sequence, frames[3]!);
  }

  #find(topic: Buffer, id: Buffer): Set<PublisherSource> | undefined {
    if (this.#lastSources !== undefined && id.equals(this.#lastId) && topic.equals(this.#lastTopic)) {
      return this.#lastSources;
    }
    this.#lastTopic = topic;
    this.#lastId = id;
    this.#lastSources = this.#routes.get(topic.toString("latin1"))?.get(id.toString("hex"));
    return this.#lastSources;
  }

  #onBeacon(frames: readonly Buffer[]): void {
    const beacon = decodeBeacon(frames);
    if (beacon === undefined) return this.#malformed();
    const sources = this.#routes.get(beacon.topic)?.get(beacon.publisherId);
    if (sources === undefined) return;
    for (const source of sources) source.beacon(beacon.epoch, beacon.newest);
  }

  async #readAnswers(dealer: Dealer): Promise<void> {
    for (;;) {
      let frames: Buffer[];
      try {
        frames = await dealer.receive();
      } catch (thrown) {
        return this.#readEnded(thrown);
      }
      const answer = decodeReplayAnswer(frames);
      if (answer === undefined) {
        this.#malformed();
        continue;
      }
      const ask = this.#asks.get(answer.askNumber);
      if (ask === undefined) continue;
      this.#forgetAsk(ask.source);
      if (answer.epoch === NO_EPOCH) ask.source.replayFailed(ask.askNumber);
      else ask.source.replayed(ask.askNumber, answer.epoch, answer.first, answer.newest, answer.payloads);
    }
  }

  #readEnded(thrown: unknown): void {
    if (this.#isClosed) return;
    this.#context.logger.error({ err: thrown }, "event plane: a subscribing socket failed; its events stop");
  }

  #malformed(): void {
    this.#context.statistics.malformed++;
    if (this.#hasLoggedMalformed) return;
    this.#hasLoggedMalformed = true;
    this.#context.logger.warn("event plane: malformed frames dropped; further ones of this peer are only counted");
  }
}

const EMPTY: Buffer = Buffer.alloc(0);
