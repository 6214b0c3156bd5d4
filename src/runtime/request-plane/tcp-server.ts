import { networkInterfaces } from "node:os";
import { DynamoError } from "../../errors/index.ts";
import type { EndpointHandler, RequestPlaneServer } from "./base.ts";
import { Connection, ConnectionMetrics, type ConnectionOwner } from "./connection.ts";
import { Flusher } from "./flusher.ts";
import { FRAME, serverFrames } from "./frame.ts";
import { commonVersion, decodeHello, encodeHello, encodeWelcome, newNonce, proofOf, proves, refusal } from "./hello.ts";
import { ServerCore } from "./server-core.ts";
import { ServerSession } from "./server-session.ts";
import { setPatientTimer } from "./patient-timer.ts";
import type { TcpContext } from "./tcp-context.ts";
import type { PlaneListener, PlaneSocket } from "./tcp-network.ts";

/**
 * The listening end of the TCP request plane. Takes connections up to the limit, gives each a hello and, when that is
 * through, a session. Peers that are refused are counted, and logged once per cause.
 */
export class TcpServer implements RequestPlaneServer {
  readonly #context: TcpContext;
  readonly #core: ServerCore;
  readonly #flusher: Flusher;
  readonly #metrics: ConnectionMetrics;
  readonly #server: PlaneListener;
  readonly #connections = new Set<TcpServerConnection>();
  readonly #logged = new Set<string>();
  #address = "";
  #closing: Promise<void> | undefined = undefined;

  /** Throws `address-in-use`. */
  static async listen(context: TcpContext): Promise<TcpServer> {
    const server = new TcpServer(context);
    await server.#listen();
    return server;
  }

  private constructor(context: TcpContext) {
    this.#context = context;
    this.#core = new ServerCore(context);
    this.#flusher = new Flusher(context.schedule);
    this.#metrics = new ConnectionMetrics(context.metrics, "server");
    this.#server = context.network.createServer((socket) => this.#onSocket(socket));
    this.#server.maxConnections = context.limits.maxConnections;
    this.#server.on("drop", () => this.onRefused("too many connections", "unknown"));
  }

  get address(): string {
    return this.#address;
  }

  get activeStreamCount(): number {
    return this.#core.activeStreamCount;
  }

  serve(endpoint: string, handler: EndpointHandler): () => void {
    return this.#core.serve(endpoint, handler);
  }

  flush(): void {
    this.#flusher.flush();
  }

  drain(): Promise<void> {
    if (!this.#core.draining) for (const connection of this.#connections) connection.goAway();
    return this.#core.drain();
  }

  close(): Promise<void> {
    return (this.#closing ??= this.#close());
  }

  async #close(): Promise<void> {
    this.#core.endAll(new DynamoError("engine-stopped", "the worker stopped while the request ran"));
    const stopped = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    await Promise.all([...this.#connections].map((connection) => connection.finish()));
    await stopped;
  }

  async #listen(): Promise<void> {
    const { host, port, advertiseHost, advertisePort } = this.#context;
    await new Promise<void>((resolve, reject) => {
      const onError = (error: NodeJS.ErrnoException): void => reject(listenError(error, host, port));
      this.#server.once("error", onError);
      this.#server.listen(port, host, () => {
        this.#server.off("error", onError);
        // Out of file descriptors on accept: those that are connected go on.
        this.#server.on("error", (error) => this.onRefused(error.message, "unknown"));
        resolve();
      });
    });
    const bound = this.#server.address();
    if (bound === null || typeof bound === "string") throw new DynamoError("internal", "internal error");
    this.#address = formatAddress(advertiseHost ?? reachableHost(bound.address), advertisePort ?? bound.port);
  }

  #onSocket(socket: PlaneSocket): void {
    const connection = new TcpServerConnection(socket, this.#context, {
      core: this.#core,
      flusher: this.#flusher,
      metrics: this.#metrics,
      onRefused: (cause, peer) => this.onRefused(cause, peer),
      onClosed: () => this.#connections.delete(connection),
    });
    this.#connections.add(connection);
  }

  /** The peers' texts go into the log only, and only the first of a cause. */
  onRefused(cause: string, peer: string): void {
    if (this.#logged.has(cause) || this.#logged.size >= 64) return;
    this.#logged.add(cause);
    this.#context.logger.warn({ cause, peer }, "request plane: refused a connection; further ones are only counted");
  }
}

interface ServerConnectionDeps {
  readonly core: ServerCore;
  readonly flusher: Flusher;
  readonly metrics: ConnectionMetrics;
  readonly onRefused: (cause: string, peer: string) => void;
  readonly onClosed: () => void;
}

class TcpServerConnection implements ConnectionOwner {
  readonly #context: TcpContext;
  readonly #deps: ServerConnectionDeps;
  readonly #connection: Connection;
  readonly #session: ServerSession;
  readonly #nonce = newNonce();
  readonly #peer: string;
  readonly #helloTimer: { cancel(): void };

  constructor(socket: PlaneSocket, context: TcpContext, deps: ServerConnectionDeps) {
    this.#context = context;
    this.#deps = deps;
    this.#peer = `${socket.remoteAddress ?? "?"}:${socket.remotePort ?? 0}`;
    this.#connection = new Connection({
      socket,
      owner: this,
      flusher: deps.flusher,
      heartbeat: context.heartbeat,
      clock: context.clock,
      metrics: deps.metrics,
      maxQueuedBytes: context.limits.queuedBytesPerConnection * 2,
    });
    this.#session = new ServerSession(deps.core, this.#connection);
    this.#helloTimer = setPatientTimer(context.clock, context.connectTimeoutMs, () => {
      deps.metrics.error("refused");
      // Its process stood still, or the way to here: it is no stranger for that, and may try again or go elsewhere.
      this.onStranger(new DynamoError("connect-timeout", "no hello came in time"));
    });
    this.#connection.sendHandshake(
      encodeHello({ role: "server", peerId: context.peerId, nonce: this.#nonce, proof: Buffer.alloc(0) }),
    );
  }

  goAway(): void {
    if (this.#connection.ready) this.#session.goAway();
  }

  finish(): Promise<void> {
    return this.#connection.finish();
  }

  onFrame(type: number, bytes: Buffer, start: number, end: number): void {
    if (this.#connection.ready) this.#session.onFrame(type, bytes, start, end);
    else this.#onHello(type, bytes, start, end);
  }

  onChunkEnd(): void {
    // A server acts frame by frame; what it writes leaves with the next flush.
  }

  onStranger(error: DynamoError): void {
    this.#helloTimer.cancel();
    this.#deps.onRefused(error.publicMessage, this.#peer);
    this.#connection.refuse(error);
  }

  onClosed(error: DynamoError): void {
    this.#helloTimer.cancel();
    this.#deps.onClosed();
    const { diagnostic } = error;
    this.#session.lost(
      new DynamoError("client-gone", "the caller's connection closed", diagnostic === undefined ? {} : { diagnostic }),
    );
  }

  #onHello(type: number, bytes: Buffer, start: number, end: number): void {
    const { clusterSecret, limits } = this.#context;
    if (type !== FRAME.hello) throw refusal("the peer does not speak the request-plane protocol", `frame type ${type}`);
    const hello = decodeHello(bytes, start, end, "client");
    const version = commonVersion(hello);
    if (version === undefined) {
      throw refusal(`no common protocol version: the peer speaks ${hello.minVersion} to ${hello.maxVersion}`);
    }
    const nonces = { serverNonce: this.#nonce, clientNonce: hello.nonce };
    if (!proves(clusterSecret, hello.proof, { role: "client", ...nonces })) {
      throw refusal("the cluster secret is missing or differs");
    }
    this.#helloTimer.cancel();
    const proof = proofOf(clusterSecret, { role: "server", ...nonces });
    this.#connection.sendHandshake(encodeWelcome({ version, proof }));
    this.#connection.becomeReady(serverFrames(limits.maxFrameBytes));
    if (this.#deps.core.draining) this.#session.goAway();
  }
}

function listenError(error: NodeJS.ErrnoException, host: string, port: number): DynamoError {
  const diagnostic = error.message;
  if (error.code === "EADDRINUSE") {
    return new DynamoError("address-in-use", `the address ${host}:${port} is taken`, { diagnostic, cause: error });
  }
  return new DynamoError("invalid-config", `cannot listen on ${host}:${port}: ${error.code ?? error.message}`, {
    diagnostic,
    cause: error,
  });
}

function formatAddress(host: string, port: number): string {
  return host.includes(":") ? `tcp://[${host}]:${port}` : `tcp://${host}:${port}`;
}

/** A wildcard address is nothing to connect to: the first address of this machine that others can reach, else loopback. */
function reachableHost(bound: string): string {
  if (bound !== "0.0.0.0" && bound !== "::") return bound;
  for (const addresses of Object.values(networkInterfaces())) {
    for (const { internal, family, address } of addresses ?? []) {
      if (!internal && family === "IPv4") return address;
    }
  }
  return "127.0.0.1";
}
