import { DynamoError, toDynamoError } from "../../errors/index.ts";
import { silentLogger, type Logger } from "../../observability/index.ts";
import { TimerWheel, systemClock, type Clock } from "../../std/index.ts";
import type {
  ClientStream,
  ClientStreamHandler,
  EndpointHandler,
  OpenOptions,
  RequestPlane,
  RequestPlaneClient,
  RequestPlaneServer,
} from "./base.ts";
import { ClientSession } from "./client-session.ts";
import { openStream, type ClientCore } from "./client-stream.ts";
import { Flusher, onNextTurn, type Schedule } from "./flusher.ts";
import { CLIENT_FRAMES, FrameDecoder, serverFrames, type FrameLimits, type FrameSink } from "./frame.ts";
import { DEFAULT_LIMITS, type RequestPlaneLimits } from "./limits.ts";
import type { Link } from "./link.ts";
import { Outbox } from "./outbox.ts";
import { ServerCore } from "./server-core.ts";
import { ServerSession } from "./server-session.ts";

/**
 * The request plane inside one process: the same sessions, streams and frames as over TCP, carried by two queues instead
 * of a socket. For clusters in one process and for the simulator: no I/O, timers only through the clock, and turns only
 * through the network's `schedule`, so a run repeats exactly under a manual clock and an ordered scheduler.
 *
 *     outbox -- flush --> queue of slabs -- a later turn --> decoder -> session of the other side
 *
 * A slab changes hands without a copy and returns to its outbox once it was read.
 */
export interface MemoryNetworkOptions {
  /** Runs a function on a later turn, in the order of the calls. @default setImmediate */
  readonly schedule?: Schedule;
}

/** The addresses of one process; planes of the same network reach each other. */
export class MemoryNetwork {
  readonly schedule: Schedule;
  readonly #servers = new Map<string, MemoryServer>();
  #nextPort = 1;

  constructor({ schedule = onNextTurn }: MemoryNetworkOptions = {}) {
    this.schedule = schedule;
  }

  /** Registers a server at `address`, or at a fresh one. Throws `address-in-use`. */
  bind(server: MemoryServer, address?: string): string {
    let bound = address;
    while (bound === undefined || (address === undefined && this.#servers.has(bound))) {
      bound = `memory://${this.#nextPort++}`;
    }
    if (this.#servers.has(bound)) throw new DynamoError("address-in-use", `the address ${bound} is taken`);
    this.#servers.set(bound, server);
    return bound;
  }

  release(address: string): void {
    this.#servers.delete(address);
  }

  find(address: string): MemoryServer | undefined {
    return this.#servers.get(address);
  }

  /** What a killed process looks like to the others: the server is gone, its connections break, no word of goodbye. */
  kill(address: string): void {
    this.#servers.get(address)?.kill();
  }
}

export interface MemoryRequestPlaneOptions {
  readonly network: MemoryNetwork;
  readonly clock?: Clock;
  readonly logger?: Logger;
  /** A fixed address for `listen`, as a fixed port. @default a fresh one */
  readonly address?: string;
  readonly limits?: Partial<RequestPlaneLimits>;
}

interface MemoryContext {
  readonly network: MemoryNetwork;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly address: string | undefined;
  readonly limits: RequestPlaneLimits;
  readonly wheel: TimerWheel;
}

export class MemoryRequestPlane implements RequestPlane {
  readonly client: RequestPlaneClient;
  readonly #context: MemoryContext;
  readonly #servers: MemoryServer[] = [];

  constructor(options: MemoryRequestPlaneOptions) {
    const clock = options.clock ?? systemClock;
    this.#context = {
      network: options.network,
      clock,
      logger: options.logger ?? silentLogger,
      address: options.address,
      limits: { ...DEFAULT_LIMITS, ...options.limits },
      wheel: new TimerWheel({ clock }),
    };
    this.client = new MemoryClient(this.#context);
  }

  listen(): Promise<RequestPlaneServer> {
    // In a promise's body, so that `address-in-use` rejects instead of being thrown.
    return Promise.resolve().then(() => {
      const server = new MemoryServer(this.#context);
      this.#servers.push(server);
      return server;
    });
  }

  async close(): Promise<void> {
    await Promise.all([this.client.close(), ...this.#servers.map((server) => server.close())]);
    this.#context.wheel.close();
  }
}

class MemoryServer implements RequestPlaneServer {
  readonly address: string;
  readonly #context: MemoryContext;
  readonly #core: ServerCore;
  readonly #flusher: Flusher;
  readonly #sessions = new Map<MemoryEnd, ServerSession>();
  #closed = false;

  constructor(context: MemoryContext) {
    this.#context = context;
    this.#core = new ServerCore(context);
    this.#flusher = new Flusher(context.network.schedule);
    this.address = context.network.bind(this, context.address);
  }

  get activeStreamCount(): number {
    return this.#core.activeStreamCount;
  }

  /** The server's end of a new connection, or undefined when it takes no more. */
  accept(): MemoryEnd | undefined {
    const { limits, network } = this.#context;
    if (this.#closed || this.#sessions.size >= limits.maxConnections) return undefined;
    const end = new MemoryEnd({
      schedule: network.schedule,
      logger: this.#context.logger,
      flusher: this.#flusher,
      frames: serverFrames(limits.maxFrameBytes),
      onFrame: (type, bytes, from, to) => session.onFrame(type, bytes, from, to),
      onChunkEnd: () => undefined,
      onClosed: () => {
        this.#sessions.delete(end);
        session.lost(new DynamoError("client-gone", "the caller's connection closed"));
      },
    });
    const session = new ServerSession(this.#core, end);
    this.#sessions.set(end, session);
    if (this.#core.draining) session.goAway();
    return end;
  }

  serve(endpoint: string, handler: EndpointHandler): () => void {
    return this.#core.serve(endpoint, handler);
  }

  flush(): void {
    this.#flusher.flush();
  }

  drain(): Promise<void> {
    if (!this.#core.draining) for (const session of this.#sessions.values()) session.goAway();
    return this.#core.drain();
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#context.network.release(this.address);
    this.#core.endAll(new DynamoError("engine-stopped", "the worker stopped while the request ran"));
    await Promise.all([...this.#sessions.keys()].map((end) => end.finish()));
  }

  kill(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#context.network.release(this.address);
    for (const end of this.#sessions.keys()) end.drop();
  }
}

class MemoryClient implements RequestPlaneClient {
  readonly #context: MemoryContext;
  readonly #core: ClientCore;
  readonly #flusher: Flusher;
  readonly #peers = new Map<string, { end: MemoryEnd; session: ClientSession }>();
  #closing: Promise<void> | undefined = undefined;

  constructor(context: MemoryContext) {
    this.#context = context;
    this.#flusher = new Flusher(context.network.schedule);
    this.#core = {
      clock: context.clock,
      wheel: context.wheel,
      schedule: context.network.schedule,
      logger: context.logger,
      maxFrameBytes: context.limits.maxFrameBytes,
      inflight: { add: () => undefined },
    };
  }

  open(address: string, payload: Uint8Array, options: OpenOptions, handler: ClientStreamHandler): ClientStream {
    return openStream(this.#core, () => this.#sessionOf(address), payload, options, handler);
  }

  onceLeft(address: string, listener: () => void): (() => void) | undefined {
    const peer = this.#peers.get(address);
    return peer === undefined || peer.end.closed ? undefined : peer.session.onceLeft(listener);
  }

  close(): Promise<void> {
    return (this.#closing ??= this.#close());
  }

  async #close(): Promise<void> {
    const error = new DynamoError("cancelled", "the caller shut down");
    const peers = [...this.#peers.values()];
    this.#peers.clear();
    for (const { session } of peers) session.cancelAll(error);
    await Promise.all(peers.map(({ end }) => end.finish()));
  }

  #sessionOf(address: string): ClientSession | DynamoError {
    if (this.#closing !== undefined) return new DynamoError("cancelled", "the caller shut down");
    const known = this.#peers.get(address);
    if (known !== undefined) return known.session;
    const serverEnd = this.#context.network.find(address)?.accept();
    if (serverEnd === undefined) {
      const diagnostic = `nobody listens at ${JSON.stringify(address)}`;
      return new DynamoError("worker-unreachable", "no connection to the worker could be made", { diagnostic });
    }
    return this.#connect(address, serverEnd);
  }

  #connect(address: string, serverEnd: MemoryEnd): ClientSession {
    const { limits, network } = this.#context;
    const end = new MemoryEnd({
      schedule: network.schedule,
      logger: this.#context.logger,
      flusher: this.#flusher,
      frames: CLIENT_FRAMES,
      onFrame: (type, bytes, from, to) => session.onFrame(type, bytes, from, to),
      onChunkEnd: () => session.turnEnd(),
      onClosed: () => {
        if (this.#peers.get(address)?.end === end) this.#peers.delete(address);
        session.lost(new DynamoError("worker-lost", "the connection to the worker broke", { diagnostic: address }));
      },
    });
    const session = new ClientSession({
      link: end,
      maxStreams: limits.maxStreamsPerConnection,
      queuedBytes: limits.queuedBytesPerConnection,
    });
    this.#peers.set(address, { end, session });
    MemoryEnd.join(end, serverEnd);
    return session;
  }
}

interface MemoryEndOptions {
  readonly schedule: Schedule;
  readonly logger: Logger;
  readonly flusher: Flusher;
  readonly frames: FrameLimits;
  readonly onFrame: (type: number, bytes: Buffer, start: number, end: number) => void;
  readonly onChunkEnd: () => void;
  /** Exactly once, never inside a call of the session's. */
  readonly onClosed: () => void;
}

/** One end of a connection: what it flushes lies in the other's queue until that one's turn. */
class MemoryEnd implements Link, FrameSink {
  readonly outbox = new Outbox();
  dirty = false;
  inFlightBytes = 0;
  closed = false;
  readonly #options: MemoryEndOptions;
  readonly #decoder: FrameDecoder;
  readonly #onTurn: () => void;
  #other: MemoryEnd | undefined = undefined;
  #queue: Buffer[] = [];
  #scheduled = false;
  /** The other end has sent its last. */
  #lastCame = false;
  #whenClosed: (() => void)[] = [];

  static join(one: MemoryEnd, other: MemoryEnd): void {
    one.#other = other;
    other.#other = one;
    // What was written before there was another end.
    one.flushOutbox();
    other.flushOutbox();
  }

  constructor(options: MemoryEndOptions) {
    this.#options = options;
    this.#decoder = new FrameDecoder(options.frames);
    this.#onTurn = () => this.#takeQueue();
  }

  requestFlush(): void {
    this.#options.flusher.add(this);
  }

  flushOutbox(): void {
    if (this.#other === undefined || this.outbox.byteLength === 0) return;
    const slab = this.outbox.take();
    if (this.closed) return;
    this.inFlightBytes += slab.length;
    this.#other.#queue.push(slab);
    this.#other.#wake();
  }

  /** Sends what waits, then closes both ends. */
  finish(): Promise<void> {
    if (this.closed) return Promise.resolve();
    this.flushOutbox();
    const other = this.#other!;
    other.#lastCame = true;
    other.#wake();
    return new Promise((resolve) => this.#whenClosed.push(resolve));
  }

  drop(): void {
    this.#close();
    this.#other!.#close();
  }

  onFrame(type: number, bytes: Buffer, start: number, end: number): void {
    this.#options.onFrame(type, bytes, start, end);
  }

  #wake(): void {
    if (this.#scheduled) return;
    this.#scheduled = true;
    this.#options.schedule(this.#onTurn);
  }

  #takeQueue(): void {
    this.#scheduled = false;
    const slabs = this.#queue;
    this.#queue = [];
    try {
      for (const slab of slabs) {
        if (this.closed) break;
        this.#decoder.push(slab, this);
        this.#other!.inFlightBytes -= slab.length;
        this.#other!.outbox.giveBack(slab);
      }
    } catch (thrown) {
      // Both ends are this process: a frame that does not decode is a defect, but ends only this connection.
      const { diagnostic } = toDynamoError(thrown);
      this.#options.logger.error({ diagnostic }, "request plane: a connection in memory broke");
      this.drop();
    }
    this.#options.onChunkEnd();
    if (this.#lastCame) this.drop();
  }

  #close(): void {
    if (this.closed) return;
    this.closed = true;
    this.#queue = [];
    this.#options.schedule(() => {
      this.#options.onClosed();
      const waiting = this.#whenClosed;
      this.#whenClosed = [];
      for (const resolve of waiting) resolve();
    });
  }
}
