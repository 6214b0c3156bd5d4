import type { Router, XPublisher } from "zeromq";
import { DynamoError } from "../../errors/index.ts";
import { randomHexId, type TimerHandle } from "../../std/index.ts";
import { EventRing } from "./event-ring.ts";
import { BEACON_DELAYS_MS, REPLAY_BYTES, REPLAY_EVENTS, RING_BYTES, checkPayload } from "./limits.ts";
import type { SourceContext } from "./publisher-source.ts";
import { loadZmq, socketOptions } from "./zmq-context.ts";
import {
  BEACON_PREFIX,
  NO_EPOCH,
  decodeReplayRequest,
  encodeReplayAnswer,
  idFrame,
  u64Frame,
  writeU64,
} from "./zmq-frames.ts";

export interface ZmqPublishersOptions {
  readonly host: string;
  readonly advertisedHost: string;
  readonly queueEvents: number;
  readonly context: SourceContext;
}

/**
 * The publishing side of one process: one XPUB socket that carries all its topics, one ROUTER that answers replays from
 * the rings. XPUB rather than PUB, because it tells when a subscription has arrived: the answer is a beacon, and from
 * there on the subscriber knows what it must have seen. Owned by one `ZmqEventPlane`.
 *
 * Nothing here blocks: a subscriber whose queue is full loses events (a gap on its side), a replay that does not fit is
 * dropped (its deadline on the other side). Cost per event: one copy, three small frames, 3 to 5 us.
 */
export class ZmqPublishers {
  readonly address: string;
  readonly replayAddress: string;
  readonly #events: XPublisher;
  readonly #replay: Router;
  readonly #context: SourceContext;
  readonly #rings = new Map<string, PublisherRing>();
  /** Publishers whose newest sequence is to be repeated, with the number of times it was. */
  readonly #unsettled = new Map<PublisherRing, number>();
  #beaconTimer: TimerHandle | undefined;
  #isClosed = false;
  #hasLoggedMalformed = false;

  private constructor(events: XPublisher, replay: Router, addresses: [string, string], context: SourceContext) {
    this.#events = events;
    this.#replay = replay;
    [this.address, this.replayAddress] = addresses;
    this.#context = context;
    void this.#readSubscriptions();
    void this.#readRequests();
  }

  /** Binds both sockets to free ports of `host`; others are told to connect to `advertisedHost`. */
  static async open({ host, advertisedHost, queueEvents, context }: ZmqPublishersOptions): Promise<ZmqPublishers> {
    const zmq = await loadZmq();
    // What comes in here are subscriptions and replay requests, all of them short.
    const options = { ...socketOptions(zmq, host.includes(":")), maxMessageSize: 1_024 };
    const events = new zmq.library.XPublisher({
      ...options,
      sendTimeout: 0,
      sendHighWaterMark: queueEvents,
      // Each subscription is reported, a repeated one too: that is how a subscriber asks for a beacon.
      verbosity: "allSubs",
    });
    // Mandatory: an answer that cannot be sent is an error here, which is dropped, instead of silence.
    const replay = new zmq.library.Router({ ...options, sendTimeout: 0, mandatory: true, sendHighWaterMark: 1_000 });
    try {
      await events.bind(`tcp://${bracketed(host)}:*`);
      await replay.bind(`tcp://${bracketed(host)}:*`);
    } catch (cause) {
      events.close();
      replay.close();
      throw new DynamoError("event-plane-unavailable", `the event plane could not listen on ${host}`, { cause });
    }
    const addressOf = (socket: XPublisher | Router) =>
      `tcp://${bracketed(advertisedHost)}:${socket.lastEndpoint!.slice(socket.lastEndpoint!.lastIndexOf(":") + 1)}`;
    return new ZmqPublishers(events, replay, [addressOf(events), addressOf(replay)], context);
  }

  /** From here on its replays are answered; the caller announces it. */
  add(topic: string, publisherId: string, ringSize: number): PublisherRing {
    const key = `${topic}/${publisherId}`;
    if (this.#rings.has(key)) {
      throw new DynamoError("event-plane-unavailable", "this process already has a publisher of that topic and id");
    }
    const ring = new PublisherRing(key, topic, publisherId, ringSize);
    this.#rings.set(key, ring);
    return ring;
  }

  remove(ring: PublisherRing): void {
    this.#rings.delete(ring.key);
    this.#unsettled.delete(ring);
  }

  publish(ring: PublisherRing, payload: Uint8Array): number {
    checkPayload(payload);
    // A copy, as the ring keeps it and the library sends larger frames from where they are; and in memory of its own:
    // `Buffer.from` would take a piece of a pool, and the ring would hold 64 KiB for each event of a hundred bytes.
    const copy = Buffer.allocUnsafeSlow(payload.length);
    copy.set(payload);
    const sequence = ring.events.push(copy);
    if (this.#isClosed || this.#rings.get(ring.key) !== ring) return sequence;
    this.#context.statistics.published++;
    this.#send(ring.topicFrame, ring.idFrame, sequence, copy);
    this.#unsettled.set(ring, 0);
    if (this.#beaconTimer === undefined) this.#armBeacons();
    return sequence;
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#beaconTimer?.cancel();
    this.#unsettled.clear();
    this.#rings.clear();
    this.#events.close();
    this.#replay.close();
  }

  /** With a send timeout of 0 the library sends or fails within the call, so that small frames may be reused after it. */
  #send(topic: Buffer, id: Buffer, sequence: number, last: Buffer): void {
    this.#events.send([topic, id, writeU64(sequenceScratch, sequence), last]).catch(ignore);
  }

  #sendBeacon(ring: PublisherRing): void {
    this.#send(ring.beaconFrame, ring.idFrame, ring.events.newest, ring.epochFrame);
  }

  /** One timer for all publishers: a beacon each some time after its last event, more than once, then silence. */
  #armBeacons(): void {
    this.#beaconTimer = this.#context.clock.setTimer(BEACON_DELAYS_MS[0], () => {
      this.#beaconTimer = undefined;
      for (const [ring, ticks] of this.#unsettled) {
        const elapsedMs = (ticks + 1) * BEACON_DELAYS_MS[0];
        if (BEACON_DELAYS_MS.some((delayMs) => delayMs === elapsedMs)) this.#sendBeacon(ring);
        if (elapsedMs >= BEACON_DELAYS_MS.at(-1)!) this.#unsettled.delete(ring);
        else this.#unsettled.set(ring, ticks + 1);
      }
      if (this.#unsettled.size > 0) this.#armBeacons();
    });
  }

  /** A subscription to a topic's beacons has arrived, so the one to its events before it has too: say where we are. */
  async #readSubscriptions(): Promise<void> {
    for (;;) {
      let frame: Buffer;
      try {
        [frame] = (await this.#events.receive()) as [Buffer];
      } catch (thrown) {
        return this.#readEnded(thrown);
      }
      if (frame.length < 3 || frame.length > 130 || frame[0] !== 1 || frame[1] !== 0) continue;
      const topic = frame.toString("latin1", 2);
      for (const ring of this.#rings.values()) if (ring.topic === topic) this.#sendBeacon(ring);
    }
  }

  async #readRequests(): Promise<void> {
    for (;;) {
      let frames: Buffer[];
      try {
        frames = await this.#replay.receive();
      } catch (thrown) {
        return this.#readEnded(thrown);
      }
      const peer = frames.shift()!;
      const request = decodeReplayRequest(frames);
      if (request === undefined) {
        this.#malformed();
        continue;
      }
      const { askNumber, from, to } = request;
      const ring = this.#rings.get(`${request.topic}/${request.publisherId}`);
      const page = ring?.events.page(from, to, REPLAY_EVENTS, REPLAY_BYTES) ?? { first: from, payloads: [] };
      const answer = { askNumber, epoch: ring?.epoch ?? NO_EPOCH, newest: ring?.events.newest ?? 0, ...page };
      this.#replay.send([peer, ...encodeReplayAnswer(answer)]).catch(ignore);
    }
  }

  #readEnded(thrown: unknown): void {
    if (this.#isClosed) return;
    this.#context.logger.error(
      { err: thrown },
      "event plane: a publishing socket failed; replays are not answered any more",
    );
  }

  #malformed(): void {
    this.#context.statistics.malformed++;
    if (this.#hasLoggedMalformed) return;
    this.#hasLoggedMalformed = true;
    this.#context.logger.warn("event plane: malformed replay request dropped; further ones are only counted");
  }
}

/** One publisher: its events kept for replay and its frames made once. */
export class PublisherRing {
  readonly key: string;
  readonly topic: string;
  readonly publisherId: string;
  /** New for every publisher object: tells a restarted publisher from the one before it. */
  readonly epoch: string;
  readonly events: EventRing;
  readonly topicFrame: Buffer;
  readonly beaconFrame: Buffer;
  readonly idFrame: Buffer;
  readonly epochFrame: Buffer;

  constructor(key: string, topic: string, publisherId: string, ringSize: number) {
    this.key = key;
    this.topic = topic;
    this.publisherId = publisherId;
    this.epoch = randomHexId();
    this.events = new EventRing(ringSize, RING_BYTES);
    this.topicFrame = Buffer.from(topic, "latin1");
    this.beaconFrame = Buffer.from(BEACON_PREFIX + topic, "latin1");
    this.idFrame = idFrame(publisherId);
    this.epochFrame = idFrame(this.epoch);
  }
}

const sequenceScratch = u64Frame(0);

/** A failed send is a lost event or answer; the other side notices by sequence or deadline. */
function ignore(): void {}

function bracketed(host: string): string {
  return host.includes(":") ? `[${host}]` : host;
}
