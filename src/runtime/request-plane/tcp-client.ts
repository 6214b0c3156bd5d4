import { DynamoError } from "../../errors/index.ts";
import type { GaugeChild } from "../../observability/index.ts";
import type { TimerHandle } from "../../std/index.ts";
import type { ClientStream, ClientStreamHandler, OpenOptions, RequestPlaneClient } from "./base.ts";
import { ClientSession } from "./client-session.ts";
import { openStream, type ClientCore } from "./client-stream.ts";
import { Connection, ConnectionMetrics, type ConnectionOwner } from "./connection.ts";
import { Flusher } from "./flusher.ts";
import { CLIENT_FRAMES, FRAME, decodeError } from "./frame.ts";
import {
  commonVersion,
  decodeHello,
  decodeWelcome,
  encodeHello,
  newNonce,
  proofOf,
  proves,
  refusal,
  type Hello,
} from "./hello.ts";
import { setPatientTimer } from "./patient-timer.ts";
import type { TcpContext } from "./tcp-context.ts";

/**
 * The calling end: one connection per server address, opened with the first stream and again with the first one after a
 * break.
 *
 *     (none) - open -> connecting -- hello through -> ready -- closed: streams end worker-lost -> (none)
 *                          \- failed: its streams end worker-unreachable -> backing off -- time over, open -> connecting
 *
 * Streams that are opened while an attempt is under way share it. While backing off (50 ms, doubling to 2 s) streams end
 * with `worker-unreachable` at once: nothing piles up in front of a dead server. Those that have nobody else to ask only
 * wait for the first back-off: the server may be well again, and they are at most twenty attempts a second.
 */
export const FIRST_BACK_OFF_MS = 50;
const MAX_BACK_OFF_MS = 2_000;
/** A failure is forgotten when nobody asked for its address for this long. */
const FAILURE_MEMORY_MS = 10_000;
/** Addresses come from discovery; above this many failed ones the oldest is forgotten. */
const MAX_FAILURES = 4_096;

interface Failure {
  readonly count: number;
  readonly failedAtMs: number;
  readonly retryAtMs: number;
  readonly error: DynamoError;
}

export class TcpClient implements RequestPlaneClient {
  readonly #context: TcpContext;
  readonly #core: ClientCore;
  readonly #flusher: Flusher;
  readonly #metrics: ConnectionMetrics;
  readonly #peers = new Map<string, TcpClientConnection>();
  /** Connections that closed for new streams or are closing. */
  readonly #all = new Set<TcpClientConnection>();
  readonly #failures = new Map<string, Failure>();
  #closing: Promise<void> | undefined = undefined;

  constructor(context: TcpContext) {
    this.#context = context;
    this.#flusher = new Flusher(context.schedule);
    this.#metrics = new ConnectionMetrics(context.metrics, "client");
    const inflight: GaugeChild = context.metrics.gauge("dynamo_request_plane_inflight").labels();
    this.#core = {
      clock: context.clock,
      wheel: context.wheel,
      schedule: context.schedule,
      logger: context.logger,
      maxFrameBytes: context.limits.maxFrameBytes,
      inflight,
    };
  }

  open(address: string, payload: Uint8Array, options: OpenOptions, handler: ClientStreamHandler): ClientStream {
    return openStream(
      this.#core,
      () => this.#sessionOf(address, options.isLastResort === true),
      payload,
      options,
      handler,
    );
  }

  onceLeft(address: string, listener: () => void): (() => void) | undefined {
    const peer = this.#peers.get(address);
    return peer?.isReady === true ? peer.session.onceLeft(listener) : undefined;
  }

  close(): Promise<void> {
    return (this.#closing ??= this.#close());
  }

  async #close(): Promise<void> {
    const error = new DynamoError("cancelled", "the caller shut down");
    await Promise.all([...this.#all].map((connection) => connection.close(error)));
  }

  #sessionOf(address: string, isLastResort: boolean): ClientSession | DynamoError {
    if (this.#closing !== undefined) return new DynamoError("cancelled", "the caller shut down");
    const peer = this.#peers.get(address);
    if (peer !== undefined) return peer.session;
    const failure = this.#failures.get(address);
    if (failure !== undefined) {
      const { failedAtMs, retryAtMs, error } = failure;
      const waitsUntilMs = isLastResort ? failedAtMs + FIRST_BACK_OFF_MS : retryAtMs;
      if (this.#context.clock.monotonicMs() < waitsUntilMs) return error;
    }
    const target = parseAddress(address);
    if (target === undefined) return unreachable(`not an address of this plane: ${JSON.stringify(address)}`);
    return this.#connect(address, target).session;
  }

  #connect(address: string, target: Target): TcpClientConnection {
    const connection = new TcpClientConnection(target, this.#context, {
      flusher: this.#flusher,
      metrics: this.#metrics,
      onReady: () => this.#failures.delete(address),
      onLeaving: () => {
        if (this.#peers.get(address) === connection) this.#peers.delete(address);
      },
      onFailed: (error) => this.#remember(address, error),
      onClosed: () => this.#all.delete(connection),
    });
    this.#peers.set(address, connection);
    this.#all.add(connection);
    return connection;
  }

  #remember(address: string, error: DynamoError): void {
    const nowMs = this.#context.clock.monotonicMs();
    const count = (this.#failures.get(address)?.count ?? 0) + 1;
    const backOffMs = Math.min(MAX_BACK_OFF_MS, FIRST_BACK_OFF_MS * 2 ** Math.min(count - 1, 10));
    // Deleted first, so that the map is in the order of the last failures.
    this.#failures.delete(address);
    this.#failures.set(address, { count, failedAtMs: nowMs, retryAtMs: nowMs + backOffMs, error });
    for (const [oldest, { retryAtMs }] of this.#failures) {
      if (this.#failures.size <= MAX_FAILURES && nowMs < retryAtMs + FAILURE_MEMORY_MS) break;
      this.#failures.delete(oldest);
    }
  }
}

interface Target {
  readonly host: string;
  readonly port: number;
}

interface ClientConnectionDeps {
  readonly flusher: Flusher;
  readonly metrics: ConnectionMetrics;
  readonly onReady: () => void;
  /** No new streams here. */
  readonly onLeaving: () => void;
  /** It never became ready. */
  readonly onFailed: (error: DynamoError) => void;
  readonly onClosed: () => void;
}

class TcpClientConnection implements ConnectionOwner {
  readonly session: ClientSession;
  readonly #target: Target;
  readonly #context: TcpContext;
  readonly #deps: ClientConnectionDeps;
  readonly #connection: Connection;
  readonly #nonce = newNonce();
  readonly #connectTimer: TimerHandle;
  #serverHello: Hello | undefined = undefined;
  /** Why the handshake failed, where it is known better than from the socket. */
  #refusal: DynamoError | undefined = undefined;

  constructor(target: Target, context: TcpContext, deps: ClientConnectionDeps) {
    this.#target = target;
    this.#context = context;
    this.#deps = deps;
    const { limits, connectTimeoutMs } = context;
    this.#connection = new Connection({
      socket: context.network.connect(target),
      owner: this,
      flusher: deps.flusher,
      heartbeat: context.heartbeat,
      clock: context.clock,
      metrics: deps.metrics,
      maxQueuedBytes: limits.queuedBytesPerConnection * 2,
    });
    this.session = new ClientSession({
      link: this.#connection,
      maxStreams: limits.maxStreamsPerConnection,
      queuedBytes: limits.queuedBytesPerConnection,
    });
    this.#connectTimer = setPatientTimer(context.clock, connectTimeoutMs, () => {
      this.#connection.drop(unreachable(`no connection within ${connectTimeoutMs} ms`));
    });
  }

  get isReady(): boolean {
    return this.#connection.ready && !this.#connection.closed;
  }

  close(error: DynamoError): Promise<void> {
    this.#deps.onLeaving();
    this.session.cancelAll(error);
    return this.#connection.finish();
  }

  onFrame(type: number, bytes: Buffer, start: number, end: number): void {
    if (this.#connection.ready) {
      this.session.onFrame(type, bytes, start, end);
      return;
    }
    switch (type) {
      case FRAME.hello:
        this.#onHello(decodeHello(bytes, start, end, "server"));
        return;
      case FRAME.welcome:
        this.#onWelcome(bytes, start, end);
        return;
      default:
        throw decodeError(bytes, start, end);
    }
  }

  onChunkEnd(): void {
    this.session.turnEnd();
  }

  onStranger(error: DynamoError): void {
    this.#refusal = error;
    this.#connection.drop(error);
  }

  onClosed(error: DynamoError): void {
    this.#connectTimer.cancel();
    this.#deps.onLeaving();
    if (this.#connection.ready) {
      const diagnostic = `${this.#name()}: ${error.diagnostic ?? error.message}`;
      this.session.lost(new DynamoError("worker-lost", "the connection to the worker broke", { diagnostic }));
    } else {
      const reported = this.#refusal ?? unreachable(`${this.#name()}: ${error.diagnostic ?? error.message}`);
      if (this.#refusal === undefined) this.#deps.metrics.error("unreachable");
      this.#deps.onFailed(reported);
      this.session.lost(reported);
    }
    this.#deps.onClosed();
  }

  #name(): string {
    return `${this.#target.host}:${this.#target.port}`;
  }

  #onHello(hello: Hello): void {
    if (this.#serverHello !== undefined) throw refusal("the peer said hello twice");
    if (commonVersion(hello) === undefined) {
      throw refusal(`no common protocol version: the peer speaks ${hello.minVersion} to ${hello.maxVersion}`);
    }
    this.#serverHello = hello;
    const { clusterSecret, peerId } = this.#context;
    const proof = proofOf(clusterSecret, { role: "client", serverNonce: hello.nonce, clientNonce: this.#nonce });
    this.#connection.sendHandshake(encodeHello({ role: "client", peerId, nonce: this.#nonce, proof }));
  }

  #onWelcome(bytes: Buffer, start: number, end: number): void {
    const hello = this.#serverHello;
    if (hello === undefined) throw refusal("the peer does not speak the request-plane protocol", "WELCOME first");
    const { version, proof } = decodeWelcome(bytes, start, end);
    if (version !== commonVersion(hello)) throw refusal(`the peer chose protocol version ${version}`);
    const nonces = { serverNonce: hello.nonce, clientNonce: this.#nonce };
    if (!proves(this.#context.clusterSecret, proof, { role: "server", ...nonces })) {
      throw refusal("the cluster secret of the peer is missing or differs");
    }
    this.#connectTimer.cancel();
    this.#connection.becomeReady(CLIENT_FRAMES);
    this.#deps.onReady();
  }
}

function unreachable(diagnostic: string): DynamoError {
  return new DynamoError("worker-unreachable", "no connection to the worker could be made", { diagnostic });
}

/** `tcp://host:port` or `tcp://[v6]:port`. */
function parseAddress(address: string): Target | undefined {
  const match = /^tcp:\/\/(?:\[([0-9a-fA-F:.%]+)\]|([^\s:[\]/]+)):(\d{1,5})$/.exec(address);
  if (match === null) return undefined;
  const port = Number(match[3]);
  const host = match[1] ?? match[2]!;
  return port >= 1 && port <= 65_535 ? { host, port } : undefined;
}
