import type { Dealer, Subscriber } from "zeromq";
import { toDynamoError, type DynamoError } from "../../errors/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import { loadZmq, type Zmq } from "./zmq-context.ts";

/**
 * The sockets towards a stock engine's KV event publisher (vLLM's `--kv-events-config`, SGLang's too): a SUB socket for
 * its PUB, and for each replay a DEALER to its ROUTER. Frames go through as they are; what they mean, and which are
 * missing, is the business of who reads them (engine-events/vllm-event-source.ts).
 *
 * The engine binds when its endpoint has a `*`, and connects out otherwise: then this side binds. The library reconnects
 * by itself; `onConnected` tells of every connection, as what was published in between is gone.
 */
export interface EngineLinkOptions {
  /** Of the engine's PUB socket: `tcp://host:port`, `ipc://path`. */
  readonly endpoint: string;
  /** @default connect */
  readonly direction?: "connect" | "bind";
  /** Of its ROUTER socket. @default none: a gap cannot be filled */
  readonly replayEndpoint?: string;
  /** First bytes of the topic. @default all topics */
  readonly topic?: string;
  readonly clock: Clock;
}

export interface EngineLinkHandler {
  onConnected(): void;
  onFrames(frames: readonly Buffer[]): void;
  /** The socket broke; nothing comes any more. */
  onFailed(error: DynamoError): void;
}

export interface ReplayHandler {
  /** One reply, without the empty frame in front. Returns true when it was the last one. */
  onFrames(frames: readonly Buffer[]): boolean;
  /** After the last one, or with what went wrong: exactly once unless cancelled. */
  onEnd(error: DynamoError | undefined): void;
}

export interface EngineLink {
  readonly canReplay: boolean;
  /** Asks for everything from that sequence number on. Returns what cancels it. */
  replay(from: number, handler: ReplayHandler): () => void;
  close(): void;
}

/** A batch of 65,536 blocks with their tokens is about 8 MB. */
const MAX_MESSAGE_BYTES = 64 * 1024 * 1024;
/** Messages that wait in the library; above that the engine's side drops, which is a gap here. */
const QUEUE_MESSAGES = 100_000;
/** The engine looks for replay requests every 100 ms, between its own batches. */
const REPLAY_IDLE_MS = 5_000;
/** 10,000 batches, its default, take a second or two. */
const REPLAY_TOTAL_MS = 60_000;

/** Throws `library-unavailable`, and `event-plane-unavailable` when the library refuses an address. */
export async function openEngineLink(options: EngineLinkOptions, handler: EngineLinkHandler): Promise<EngineLink> {
  const zmq = await loadZmq();
  try {
    const link = new ZmqEngineLink(zmq, options, handler);
    await link.open();
    return link;
  } catch (thrown) {
    throw toDynamoError(thrown, "event-plane-unavailable");
  }
}

function socketOptions(zmq: Zmq, endpoint: string) {
  return {
    context: zmq.context,
    ipv6: endpoint.includes("["),
    linger: 0,
    maxMessageSize: MAX_MESSAGE_BYTES,
    reconnectInterval: 100,
    reconnectMaxInterval: 2_000,
    /** An engine whose machine vanished without a word is noticed. */
    heartbeatInterval: 5_000,
    heartbeatTimeout: 15_000,
  };
}

class ZmqEngineLink implements EngineLink {
  readonly #zmq: Zmq;
  readonly #options: EngineLinkOptions;
  readonly #handler: EngineLinkHandler;
  readonly #subscriber: Subscriber;
  readonly #replays = new Set<Replay>();
  #isClosed = false;

  constructor(zmq: Zmq, options: EngineLinkOptions, handler: EngineLinkHandler) {
    this.#zmq = zmq;
    this.#options = options;
    this.#handler = handler;
    const { endpoint } = options;
    this.#subscriber = new zmq.library.Subscriber({
      ...socketOptions(zmq, endpoint),
      receiveHighWaterMark: QUEUE_MESSAGES,
    });
    this.#subscriber.events.on("handshake", () => {
      if (!this.#isClosed) handler.onConnected();
    });
  }

  async open(): Promise<void> {
    const { endpoint, direction, topic = "" } = this.#options;
    try {
      this.#subscriber.subscribe(topic);
      if (direction === "bind") await this.#subscriber.bind(endpoint);
      else this.#subscriber.connect(endpoint);
    } catch (thrown) {
      this.close();
      throw thrown;
    }
    void this.#read();
  }

  get canReplay(): boolean {
    return this.#options.replayEndpoint !== undefined;
  }

  replay(from: number, handler: ReplayHandler): () => void {
    const { replayEndpoint: endpoint, clock } = this.#options;
    const dealer = new this.#zmq.library.Dealer({
      ...socketOptions(this.#zmq, endpoint!),
      sendTimeout: REPLAY_IDLE_MS,
    });
    const replay = new Replay(dealer, clock, handler, () => this.#replays.delete(replay));
    this.#replays.add(replay);
    replay.start(endpoint!, from);
    return () => replay.cancel();
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    for (const replay of this.#replays) replay.cancel();
    this.#subscriber.close();
  }

  async #read(): Promise<void> {
    for (;;) {
      let frames: Buffer[];
      try {
        frames = await this.#subscriber.receive();
      } catch (thrown) {
        if (!this.#isClosed) this.#handler.onFailed(toDynamoError(thrown, "event-plane-unavailable"));
        return;
      }
      if (this.#isClosed) return;
      this.#handler.onFrames(frames);
    }
  }
}

/** One replay on a socket of its own, so that a late answer to an earlier one cannot be taken for this one's. */
class Replay {
  readonly #dealer: Dealer;
  readonly #clock: Clock;
  readonly #handler: ReplayHandler;
  readonly #onClosed: () => void;
  readonly #total: TimerHandle;
  #idle: TimerHandle;
  #isOver = false;

  constructor(dealer: Dealer, clock: Clock, handler: ReplayHandler, onClosed: () => void) {
    this.#dealer = dealer;
    this.#clock = clock;
    this.#handler = handler;
    this.#onClosed = onClosed;
    this.#total = clock.setTimer(REPLAY_TOTAL_MS, () => this.#late(REPLAY_TOTAL_MS));
    this.#idle = clock.setTimer(REPLAY_IDLE_MS, () => this.#late(REPLAY_IDLE_MS));
  }

  start(endpoint: string, from: number): void {
    const wanted = Buffer.alloc(8);
    wanted.writeBigUInt64BE(BigInt(from));
    try {
      this.#dealer.connect(endpoint);
    } catch (thrown) {
      // Not in the caller's turn: it has not got its handle yet.
      queueMicrotask(() => this.#end(thrown));
      return;
    }
    this.#dealer.send([Buffer.alloc(0), wanted]).catch((thrown: unknown) => this.#end(thrown));
    void this.#read();
  }

  cancel(): void {
    this.#close();
  }

  async #read(): Promise<void> {
    while (!this.#isOver) {
      let frames: Buffer[];
      try {
        frames = await this.#dealer.receive();
      } catch (thrown) {
        this.#end(thrown);
        return;
      }
      if (this.#isOver) return;
      this.#idle.cancel();
      this.#idle = this.#clock.setTimer(REPLAY_IDLE_MS, () => this.#late(REPLAY_IDLE_MS));
      const isLast = this.#handler.onFrames(frames[0]?.length === 0 ? frames.slice(1) : frames);
      if (isLast && this.#close()) this.#handler.onEnd(undefined);
    }
  }

  #late(timeoutMs: number): void {
    this.#end(new Error(`the engine's replay took longer than ${timeoutMs} ms`));
  }

  #end(thrown: unknown): void {
    if (this.#close()) this.#handler.onEnd(toDynamoError(thrown, "event-plane-unavailable"));
  }

  /** False when it was over already. */
  #close(): boolean {
    if (this.#isOver) return false;
    this.#isOver = true;
    this.#total.cancel();
    this.#idle.cancel();
    this.#dealer.close();
    this.#onClosed();
    return true;
  }
}
