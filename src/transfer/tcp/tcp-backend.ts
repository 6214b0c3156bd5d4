import { randomBytes } from "node:crypto";
import { createServer, type Server, type Socket } from "node:net";
import { isIPv6 } from "node:net";
import { DynamoError } from "../../errors/index.ts";
import { ByteReader, ByteWriter, TruncatedBytes, type TimerHandle } from "../../std/index.ts";
import {
  unfit,
  type Obstacle,
  type AgentContext,
  type PairQuestion,
  type Peer,
  type TransferBackend,
} from "../backend.ts";
import type { BackendName } from "../base.ts";
import type { DescriptorList } from "../descriptor-list.ts";
import type { Region } from "../region.ts";
import type { TransferJob } from "../transfer-job.ts";
import { PeerLink, Pull } from "./peer-link.ts";
import { ServingConnection, type Piece, type ServingOwner } from "./serving-connection.ts";
import { encodeNotify, encodePull, malformed, type PullRequest } from "./wire.ts";

/**
 * Transfers over TCP: scatter/gather between the registered memories of two processes, without a copy in either beyond the
 * kernel's. A read asks the peer for chunks; a write asks the peer to read from us, so bytes always flow towards the side
 * that dialled. Each agent listens on loopback unless told otherwise; the cluster secret decides who gets in.
 *
 * The same wire protocol runs over a Unix socket for `shm`, which needs it for messages only.
 */
export interface TcpOptions {
  /** @default 127.0.0.1 */
  readonly host?: string;
  /** @default 0: any free one */
  readonly port?: number;
  /** What peers connect to, when it is not `host`. */
  readonly advertiseHost?: string;
  /** Connections for data to one peer. @default 2 */
  readonly connectionCount?: number;
  /** Bytes asked for and not yet here, per connection. @default 4194304 */
  readonly windowBytes?: number;
  /** @default 3000 */
  readonly connectTimeoutMs?: number;
}

const DEFAULTS = {
  host: "127.0.0.1",
  port: 0,
  connectionCount: 2,
  windowBytes: 4 * 1024 * 1024,
  connectTimeoutMs: 3_000,
};
/** Connections peers may have to us: three per peer. */
const MAX_CONNECTIONS = 4_096;
/** Writes of one connection's peer that we fetch at a time. */
const MAX_PULLS = 4_096;
const MAX_HOST_BYTES = 256;
/** Longer ones fire at once. */
const MAX_TIMER_MS = 0x7fff_ffff;

/** A running write of ours: what the peer may fetch. */
interface Grant {
  readonly peerIncarnation: bigint;
  readonly source: DescriptorList;
  /** Where each descriptor starts in the whole. */
  readonly starts: Float64Array;
  readonly byteCount: number;
}

interface Active {
  readonly link: PeerLink;
  /** A read of ours. */
  readonly pull?: Pull;
  /** A write of ours. */
  readonly grant?: bigint;
  requestId?: number;
}

/** A write of a peer's that we fetch. */
interface Fetching {
  readonly connection: ServingConnection;
  readonly link: PeerLink;
  readonly pull: Pull;
  readonly timer: TimerHandle;
  readonly release: () => void;
}

export class TcpBackend implements TransferBackend, ServingOwner {
  readonly name: BackendName = "tcp";
  readonly typical = { setupMs: 0.4, perDescriptorUs: 4, gigabytesPerSecond: 1.2 };
  readonly #context: AgentContext;
  readonly #options: Required<Omit<TcpOptions, "advertiseHost">>;
  readonly #advertiseHost: string;
  readonly #server: Server;
  readonly #connections = new Set<ServingConnection>();
  readonly #links = new Map<string, PeerLink>();
  readonly #active = new Map<TransferJob, Active>();
  readonly #grants = new Map<bigint, Grant>();
  readonly #fetching = new Map<ServingConnection, Map<number, Fetching>>();
  #port = 0;
  #closed = false;

  /** Listens. Throws `address-in-use`, `invalid-config`. */
  static async open(context: AgentContext, options: TcpOptions): Promise<TcpBackend> {
    const backend = new TcpBackend(context, options);
    await backend.#listen();
    return backend;
  }

  private constructor(context: AgentContext, options: TcpOptions) {
    this.#context = context;
    const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
    this.#options = { ...DEFAULTS, ...(given as TcpOptions) };
    for (const [name, least, most] of [
      ["port", 0, 65_535],
      ["connectionCount", 1, 64],
      ["windowBytes", 65_536, 32 * 1024 * 1024],
      ["connectTimeoutMs", 1, 600_000],
    ] as const) {
      const value = this.#options[name];
      if (!(Number.isInteger(value) && value >= least && value <= most)) {
        throw new DynamoError("invalid-config", `transfer tcp ${name}: expected ${least} to ${most}, got ${value}`);
      }
    }
    this.#advertiseHost = options.advertiseHost ?? this.#options.host;
    this.#server = createServer({ noDelay: true, keepAlive: true }, (socket) => this.#accept(socket));
    this.#server.maxConnections = MAX_CONNECTIONS;
  }

  #listen(): Promise<void> {
    const { host, port } = this.#options;
    return new Promise((resolve, reject) => {
      this.#server.once("error", (cause: NodeJS.ErrnoException) => {
        const reason = cause.code === "EADDRINUSE" ? "address-in-use" : "invalid-config";
        reject(
          new DynamoError(reason, `transfers cannot listen on ${host}:${port}`, { diagnostic: cause.message, cause }),
        );
      });
      this.#server.listen(port, host, () => {
        this.#server.removeAllListeners("error");
        this.#server.on("error", (error) =>
          this.#context.logger.warn({ why: error.message }, "transfers: accepting failed"),
        );
        this.#port = (this.#server.address() as { port: number }).port;
        resolve();
      });
    });
  }

  /** What it listens on. */
  get address(): { readonly host: string; readonly port: number } {
    return { host: this.#options.host, port: this.#port };
  }

  publish(): Uint8Array {
    const part = new ByteWriter(64);
    part.text(this.#advertiseHost);
    part.u16(this.#port);
    return part.copy();
  }

  register(): Promise<void> {
    return Promise.resolve();
  }

  deregister(): Promise<void> {
    return Promise.resolve();
  }

  obstacle({ peer, localKind, remoteKind }: PairQuestion): Obstacle | undefined {
    if (peer.isSelf) return unfit("the peer is this agent");
    if (localKind !== "host" || remoteKind !== "host") return unfit("moves host memory only");
    return undefined;
  }

  // ---- our transfers ----

  post(job: TransferJob): void {
    let link: PeerLink;
    try {
      link = this.#linkTo(job.peer);
    } catch (thrown) {
      setImmediate(() => job.end(thrown as DynamoError));
      return;
    }
    if (job.operation === "read") this.#postRead(job, link);
    else this.#postWrite(job, link);
  }

  #postRead(job: TransferJob, link: PeerLink): void {
    const pull = new Pull({
      destination: job.pairs.local,
      source: { kind: "read", list: job.pairs.remote },
      byteCount: job.byteCount,
      bytesOf: bytesOf(job.localRegions),
      onEnd: (error) => {
        if (error !== undefined || job.message === undefined) this.#end(job, error);
        else
          link.request(
            (id) => encodeNotify(id, job.message!),
            (failed) => this.#end(job, failed),
          );
      },
    });
    this.#active.set(job, { link, pull });
    link.pull(pull);
  }

  #postWrite(job: TransferJob, link: PeerLink): void {
    const grant = randomBytes(8).readBigUInt64LE();
    this.#grants.set(grant, grantOf(job));
    const active: Active = { link, grant };
    this.#active.set(job, active);
    const timeoutMs = job.deadlineMs - this.#context.clock.monotonicMs();
    active.requestId = link.request(
      (id) => encodePull({ id, grant, timeoutMs, message: job.message, destination: job.pairs.remote }),
      (error) => this.#end(job, error),
    );
  }

  #end(job: TransferJob, error?: DynamoError): void {
    const active = this.#active.get(job);
    if (active?.grant !== undefined) this.#grants.delete(active.grant);
    this.#active.delete(job);
    job.end(error);
  }

  stop(job: TransferJob): void {
    const active = this.#active.get(job);
    if (active === undefined) return;
    if (active.pull !== undefined) {
      active.link.abort(active.pull);
      this.#end(job);
      return;
    }
    // From here on the peer gets no more bytes. It writes to its own memory for us: it is over when the peer says so, or its
    // connection is gone.
    if (active.grant !== undefined) this.#grants.delete(active.grant);
    if (active.requestId !== undefined) active.link.cancelRequest(active.requestId);
  }

  notify(peer: Peer, message: Uint8Array, _timeoutMs: number, done: (error?: DynamoError) => void): void {
    try {
      this.#linkTo(peer).request((id) => encodeNotify(id, message), done);
    } catch (thrown) {
      setImmediate(() => done(thrown as DynamoError));
    }
  }

  #linkTo(peer: Peer): PeerLink {
    const part = peer.metadata.backends.get("tcp");
    if (part === undefined) throw new DynamoError("transfer-no-path", `${peer.name} has no tcp back end`);
    return this.#link(peer.metadata.incarnation, decodeAddress(part));
  }

  /** One link per peer incarnation and address: metadata that claims another address gets another link. */
  #link(peerIncarnation: bigint, address: { readonly host: string; readonly port: number }): PeerLink {
    const key = `${peerIncarnation} ${address.host} ${address.port}`;
    let link = this.#links.get(key);
    if (link === undefined) {
      link = new PeerLink({
        context: this.#context,
        address,
        peerIncarnation,
        ownPort: this.#port,
        laneCount: this.#options.connectionCount,
        windowBytes: this.#options.windowBytes,
        connectTimeoutMs: this.#options.connectTimeoutMs,
        onClosed: (closed) => {
          if (this.#links.get(key) === closed) this.#links.delete(key);
        },
      });
      this.#links.set(key, link);
    }
    return link;
  }

  // ---- what peers ask of us ----

  #accept(socket: Socket): void {
    if (this.#closed) {
      socket.destroy();
      return;
    }
    this.#connections.add(new ServingConnection(socket, this.#context, this, this.#options.connectTimeoutMs));
  }

  resolveGrant(grant: bigint, peerIncarnation: bigint, start: number, byteCount: number): Piece[] {
    const granted = this.#grants.get(grant);
    if (granted?.peerIncarnation !== peerIncarnation) {
      throw new DynamoError("transfer-out-of-bounds", "the bytes that were asked for are not granted, or no longer");
    }
    if (!(Number.isSafeInteger(start) && start >= 0 && byteCount > 0 && start + byteCount <= granted.byteCount)) {
      throw malformed(`[${start}, ${start + byteCount}) of a write of ${granted.byteCount} bytes`);
    }
    const { source, starts } = granted;
    const pieces: Piece[] = [];
    let i = indexAt(starts, start);
    let inside = start - starts[i]!;
    for (let left = byteCount; left > 0; i++) {
      const length = Math.min(left, source.lengths[i]! - inside);
      const region = this.#context.regions.find(source.regionIds[i]!);
      if (region === undefined) throw new DynamoError("transfer-stale", "the source memory was deregistered");
      pieces.push({ region, offset: source.offsets[i]! + inside, byteCount: length });
      left -= length;
      inside = 0;
    }
    return pieces;
  }

  onPull(connection: ServingConnection, request: PullRequest): void {
    let running = this.#fetching.get(connection);
    if (running === undefined) this.#fetching.set(connection, (running = new Map()));
    if (running.has(request.id)) throw malformed(`write ${request.id} is running already`);
    if (running.size >= MAX_PULLS) throw new DynamoError("transfer-full", `more than ${MAX_PULLS} writes of one peer`);
    if (connection.peerPort === 0)
      throw new DynamoError("transfer-no-path", "the writing agent does not listen, so nothing can be fetched from it");
    const { destination } = request;
    const regions = new Map<number, Region>();
    let byteCount = 0;
    for (let i = 0; i < destination.count; i++) {
      const id = destination.regionIds[i]!;
      const region = this.#context.regions.check(id, destination.offsets[i]!, destination.lengths[i]!, "write");
      if (region.kind !== "host")
        throw new DynamoError("transfer-no-path", `${region.kind} memory cannot be written over tcp`);
      regions.set(id, region);
      byteCount += destination.lengths[i]!;
    }
    const address = { host: dialBack(connection.remoteAddress), port: connection.peerPort };
    const link = this.#link(connection.peerIncarnation, address);
    const pinned = [...regions.values()];
    for (const region of pinned) region.pin();
    const pull = new Pull({
      destination,
      source: { kind: "fetch", grant: request.grant },
      byteCount,
      bytesOf: bytesOf(pinned),
      onEnd: (error) => this.#fetched(connection, request, error),
    });
    const timer = this.#context.clock.setTimer(Math.min(request.timeoutMs, MAX_TIMER_MS), () => {
      this.#stopFetching(
        connection,
        request.id,
        new DynamoError("request-deadline", "the write did not finish in time"),
      );
    });
    const release = (): void => {
      for (const region of pinned) region.unpin();
    };
    running.set(request.id, { connection, link, pull, timer, release });
    link.pull(pull);
  }

  #fetched(connection: ServingConnection, request: PullRequest, error: DynamoError | undefined): void {
    if (!this.#endFetching(connection, request.id)) return;
    let outcome = error;
    if (outcome === undefined && request.message !== undefined) {
      try {
        this.#context.deliver(connection.peerName, request.message);
      } catch (thrown) {
        outcome = thrown as DynamoError;
      }
    }
    connection.answer(request.id, outcome);
  }

  #endFetching(connection: ServingConnection, id: number): boolean {
    const running = this.#fetching.get(connection);
    const fetching = running?.get(id);
    if (fetching === undefined) return false;
    running!.delete(id);
    fetching.timer.cancel();
    fetching.release();
    return true;
  }

  #stopFetching(connection: ServingConnection, id: number, error: DynamoError): void {
    const fetching = this.#fetching.get(connection)?.get(id);
    if (fetching === undefined) return;
    fetching.link.abort(fetching.pull);
    this.#endFetching(connection, id);
    connection.answer(id, error);
  }

  onCancel(connection: ServingConnection, id: number): void {
    this.#stopFetching(connection, id, new DynamoError("cancelled", "the write was cancelled by its agent"));
  }

  onServingClosed(connection: ServingConnection): void {
    this.#connections.delete(connection);
    const lost = new DynamoError("transfer-peer-lost", "the writing agent is gone");
    for (const id of this.#fetching.get(connection)?.keys() ?? []) this.#stopFetching(connection, id, lost);
    this.#fetching.delete(connection);
  }

  // ---- end ----

  forget(peer: Peer): void {
    const lost = new DynamoError("transfer-peer-lost", `the agent ${peer.name} was removed`);
    for (const link of this.#links.values()) {
      if (link.peerIncarnation === peer.metadata.incarnation) link.close(lost);
    }
  }

  async close(): Promise<void> {
    this.#closed = true;
    const gone = new DynamoError("draining", "the transfer agent was closed");
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    for (const connection of this.#connections) connection.close();
    for (const link of this.#links.values()) link.close(gone);
    await closed;
  }
}

function grantOf(job: TransferJob): Grant {
  const source = job.pairs.local;
  const starts = new Float64Array(source.count);
  let sum = 0;
  for (let i = 0; i < source.count; i++) {
    starts[i] = sum;
    sum += source.lengths[i]!;
  }
  return { peerIncarnation: job.peer.metadata.incarnation, source, starts, byteCount: sum };
}

/** The last index whose start is at most `value`. */
function indexAt(starts: Float64Array, value: number): number {
  let low = 0;
  let high = starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >>> 1;
    if (starts[middle]! <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}

function bytesOf(regions: readonly { readonly id: number; readonly bytes: Buffer }[]): (regionId: number) => Buffer {
  const [only] = regions;
  if (regions.length === 1 && only !== undefined) return () => only.bytes;
  const bytes = new Map(regions.map((region) => [region.id, region.bytes]));
  return (regionId) => bytes.get(regionId)!;
}

function decodeAddress(part: Buffer): { host: string; port: number } {
  try {
    const body = new ByteReader(part);
    return { host: body.text(MAX_HOST_BYTES), port: body.u16() };
  } catch (thrown) {
    if (thrown instanceof TruncatedBytes) throw malformed(`tcp address: ${thrown.message}`);
    throw thrown;
  }
}

/** An IPv4 peer seen through a dual-stack socket is dialled by its IPv4 address. */
function dialBack(remoteAddress: string): string {
  return isIPv6(remoteAddress) && remoteAddress.startsWith("::ffff:") ? remoteAddress.slice(7) : remoteAddress;
}
