import { DynamoError, toDynamoError } from "../../errors/index.ts";
import type { CounterChild, GaugeChild, Metrics } from "../../observability/index.ts";
import type { Clock } from "../../std/index.ts";
import type { Flusher } from "./flusher.ts";
import { FRAME, FrameDecoder, HANDSHAKE_FRAMES, type FrameLimits, type FrameSink } from "./frame.ts";
import { encodeRefuse } from "./hello.ts";
import type { Heartbeat } from "./heartbeat.ts";
import type { Link } from "./link.ts";
import { Outbox } from "./outbox.ts";
import type { PlaneSocket } from "./tcp-network.ts";

/**
 * One socket that carries frames: cuts what comes in, sends the outbox with one write per flush, answers PING, and ends
 * exactly once. Owned by a server's or a client's end of the connection, which does the handshake and routes frames.
 *
 *     handshake (only HELLO, WELCOME, REFUSE; the outbox waits) -> ready (all else) -> closed
 *
 * At most one write is on the way: while the kernel has not taken it, further frames collect in the outbox and leave with
 * one write when it has. So bytes wait in two places, both counted: `inFlightBytes` and the outbox.
 */
export interface ConnectionOwner {
  /** HELLO, WELCOME and REFUSE before `ready`, everything but PING and PONG after it. May throw. */
  onFrame(type: number, bytes: Buffer, start: number, end: number): void;
  /** After the last frame of a chunk. */
  onChunkEnd(): void;
  /** What came before `ready` breaks the protocol or was not accepted by `onFrame`: `refuse` or `drop`. */
  onStranger(error: DynamoError): void;
  /** Exactly once, never inside a call of the owner's. */
  onClosed(error: DynamoError): void;
}

export type Side = "client" | "server";

/** Counters of one side, resolved once. */
export class ConnectionMetrics {
  readonly sentBytes: CounterChild;
  readonly receivedBytes: CounterChild;
  readonly open: GaugeChild;
  readonly #countError: (kind: string) => void;

  constructor(metrics: Metrics, side: Side) {
    this.sentBytes = metrics.counter("dynamo_transport_tcp_bytes_sent_total").labels(side);
    this.receivedBytes = metrics.counter("dynamo_transport_tcp_bytes_received_total").labels(side);
    this.open = metrics.gauge("dynamo_transport_tcp_pool_active").labels(side);
    const errors = metrics.counter("dynamo_transport_tcp_errors_total");
    this.#countError = (kind) => errors.labels(side, kind).add();
  }

  /** `kind` is one of a fixed few: broken, frozen, malformed, refused, overflow, unreachable. */
  error(kind: "broken" | "frozen" | "malformed" | "refused" | "overflow" | "unreachable"): void {
    this.#countError(kind);
  }
}

export interface ConnectionOptions {
  readonly socket: PlaneSocket;
  readonly owner: ConnectionOwner;
  readonly flusher: Flusher;
  readonly heartbeat: Heartbeat;
  readonly clock: Clock;
  readonly metrics: ConnectionMetrics;
  /** Beyond this many waiting bytes the connection is dropped. */
  readonly maxQueuedBytes: number;
}

const CLOSE_GRACE_MS = 1_000;

export class Connection implements Link, FrameSink {
  readonly outbox = new Outbox();
  dirty = false;
  inFlightBytes = 0;
  /** On the clock's monotonic time; any byte counts. */
  lastReceivedMs: number;
  /** True after the end, whoever made it: nothing is delivered or sent any more. */
  closed = false;
  readonly #socket: PlaneSocket;
  readonly #owner: ConnectionOwner;
  readonly #flusher: Flusher;
  readonly #heartbeat: Heartbeat;
  readonly #clock: Clock;
  readonly #metrics: ConnectionMetrics;
  readonly #maxQueuedBytes: number;
  readonly #decoder = new FrameDecoder(HANDSHAKE_FRAMES);
  readonly #onWritten: () => void;
  #ready = false;
  #slab: Buffer | undefined = undefined;
  #error: DynamoError | undefined = undefined;
  #finishing = false;
  #refused = false;
  #whenClosed: (() => void)[] = [];
  #socketClosed = false;

  constructor(options: ConnectionOptions) {
    this.#socket = options.socket;
    this.#owner = options.owner;
    this.#flusher = options.flusher;
    this.#heartbeat = options.heartbeat;
    this.#clock = options.clock;
    this.#metrics = options.metrics;
    this.#maxQueuedBytes = options.maxQueuedBytes;
    this.lastReceivedMs = options.clock.monotonicMs();
    this.#onWritten = () => this.#written();
    const socket = options.socket;
    socket.setNoDelay(true);
    socket.on("data", (chunk: Buffer) => this.#onData(chunk));
    socket.on("error", (error: Error) => this.#onSocketError(error));
    socket.on("end", () => this.#fail(lost("the peer closed the connection")));
    socket.on("close", () => this.#onSocketClosed());
  }

  get ready(): boolean {
    return this.#ready;
  }

  /** Sends a handshake frame, ahead of everything in the outbox. */
  sendHandshake(frame: Buffer): void {
    if (this.closed) return;
    this.#metrics.sentBytes.add(frame.length);
    this.#socket.write(frame);
  }

  /** The handshake is through: frames of `limits` from now on, and the outbox may leave. */
  becomeReady(limits: FrameLimits): void {
    this.#ready = true;
    this.#decoder.limits = limits;
    this.#metrics.open.add(1);
    this.#heartbeat.add(this);
    if (this.outbox.byteLength > 0 && !this.dirty) this.requestFlush();
  }

  requestFlush(): void {
    this.#flusher.add(this);
  }

  flushOutbox(): void {
    const { outbox } = this;
    if (this.closed) {
      outbox.take();
      return;
    }
    if (!this.#ready || outbox.byteLength === 0) return;
    if (this.#slab !== undefined) {
      if (this.inFlightBytes + outbox.byteLength > this.#maxQueuedBytes) {
        this.#metrics.error("overflow");
        this.drop(lost(`${this.inFlightBytes + outbox.byteLength} bytes wait for the peer`));
      }
      return;
    }
    const slab = outbox.take();
    this.#slab = slab;
    this.inFlightBytes = slab.length;
    this.#metrics.sentBytes.add(slab.length);
    this.#socket.write(slab, this.#onWritten);
    // The kernel took all of it at once: the usual case. The callback comes later and finds nothing to do.
    if (this.#socket.writableLength === 0) this.#release();
  }

  /** Sends `PING`; any answer counts as life. */
  ping(): void {
    this.outbox.control(FRAME.ping);
    if (!this.dirty) this.requestFlush();
  }

  /** The peer has been silent too long. */
  frozen(silentMs: number): void {
    this.#metrics.error("frozen");
    this.drop(lost(`nothing came from the peer for ${Math.round(silentMs)} ms`));
  }

  drop(error: DynamoError): void {
    this.#fail(error);
  }

  /** Says why to a peer that did not get through the handshake, reads nothing more from it, and closes. */
  refuse(error: DynamoError): void {
    this.#refused = true;
    this.sendHandshake(encodeRefuse(error));
    void this.finish();
  }

  /** Sends what waits, then closes; by force after a second. Resolves when the socket is closed. */
  finish(): Promise<void> {
    if (this.#socketClosed) return Promise.resolve();
    const closed = new Promise<void>((resolve) => this.#whenClosed.push(resolve));
    if (this.closed || this.#finishing) return closed;
    this.#finishing = true;
    const timer = this.#clock.setTimer(CLOSE_GRACE_MS, () => this.#fail(lost("the peer did not let go")));
    this.#whenClosed.push(() => timer.cancel());
    this.#endWhenSent();
    return closed;
  }

  // ---- FrameSink ----

  onFrame(type: number, bytes: Buffer, start: number, end: number): void {
    if (type === FRAME.ping) {
      this.outbox.control(FRAME.pong);
      if (!this.dirty) this.requestFlush();
    } else if (type !== FRAME.pong) {
      this.#owner.onFrame(type, bytes, start, end);
    }
  }

  // ---- parts ----

  #onData(chunk: Buffer): void {
    if (this.closed || this.#refused) return;
    this.lastReceivedMs = this.#clock.monotonicMs();
    this.#metrics.receivedBytes.add(chunk.length);
    try {
      this.#decoder.push(chunk, this);
    } catch (thrown) {
      this.#onBadFrame(toDynamoError(thrown));
    }
    this.#owner.onChunkEnd();
  }

  #onSocketError(error: Error): void {
    if (!this.closed && this.#ready) this.#metrics.error("broken");
    this.#fail(lost(error.message, error));
  }

  #onBadFrame(error: DynamoError): void {
    if (this.#ready) {
      this.#metrics.error("malformed");
      this.drop(error);
    } else {
      this.#metrics.error("refused");
      this.#owner.onStranger(error);
    }
  }

  #written(): void {
    if (this.#slab === undefined || this.#socket.writableLength > 0) return;
    this.#release();
    if (!this.closed) this.flushOutbox();
    if (this.#finishing) this.#endWhenSent();
  }

  #release(): void {
    const slab = this.#slab!;
    this.#slab = undefined;
    this.inFlightBytes = 0;
    this.outbox.giveBack(slab);
  }

  #endWhenSent(): void {
    this.flushOutbox();
    if (this.#slab === undefined && !this.closed) this.#socket.end();
  }

  #fail(error: DynamoError): void {
    if (this.closed) return;
    this.closed = true;
    this.#error = error;
    if (this.#ready) {
      this.#heartbeat.delete(this);
      this.#metrics.open.add(-1);
    }
    this.#socket.destroy();
  }

  #onSocketClosed(): void {
    this.#fail(lost("the connection closed"));
    this.#socketClosed = true;
    this.outbox.take();
    const waiting = this.#whenClosed;
    this.#whenClosed = [];
    for (const resolve of waiting) resolve();
    this.#owner.onClosed(this.#error!);
  }
}

export function lost(diagnostic: string, cause?: unknown): DynamoError {
  return new DynamoError("worker-lost", "the connection to the worker broke", { diagnostic, cause });
}
