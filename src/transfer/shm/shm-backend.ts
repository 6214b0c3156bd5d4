import { lstatSync, mkdirSync, readdirSync, unlinkSync } from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { join } from "node:path";
import { DynamoError } from "../../errors/index.ts";
import { ByteReader, ByteWriter, TruncatedBytes } from "../../std/index.ts";
import {
  avoidable,
  unfit,
  type Obstacle,
  type AgentContext,
  type PairQuestion,
  type Peer,
  type TransferBackend,
} from "../backend.ts";
import type { BackendName } from "../base.ts";
import { CopyQueue } from "../copy-queue.ts";
import { MAX_REGIONS } from "../limits.ts";
import { peerGone, staleRegion } from "../memory-backend.ts";
import type { Region } from "../region.ts";
import { PeerLink } from "../tcp/peer-link.ts";
import { ServingConnection, type Piece, type ServingOwner } from "../tcp/serving-connection.ts";
import { encodeNotify } from "../tcp/wire.ts";
import type { TransferJob } from "../transfer-job.ts";
import { MappedMemory, openLibc } from "./mapped-memory.ts";

/**
 * Transfers between processes of one host and one user through mapped memory: memory that an agent allocated is a file of a
 * tmpfs which the initiator maps too, and a transfer is one copy by the initiator. Messages, and the knowledge that the peer
 * is alive, go over a Unix socket with the tcp back end's protocol.
 *
 * The folder belongs to one user (mode 0700), and that is the trust boundary: a process of the same user could write to the
 * files whatever we check. Within it the initiator checks bounds and access against the peer's metadata, and the header of
 * the mapping before and after each slice. Metadata name no paths: files are found by incarnation and number.
 */
export interface ShmOptions {
  /** A folder on a tmpfs. @default /dev/shm/dynamo-ts-<uid> */
  readonly folder?: string;
}

const CONNECT_TIMEOUT_MS = 3_000;
/** Mappings of peers' memory kept open; more than the regions of all workers of one host. */
const MAX_MAPPINGS = 4_096;

interface PeerPart {
  readonly folderId: string;
  /** Region id to file number. */
  readonly files: ReadonlyMap<number, number>;
}

interface PeerMapping {
  readonly mapped: MappedMemory;
  readonly incarnation: bigint;
  readonly regionId: number;
  /** Jobs that copy to or from it. */
  useCount: number;
}

interface Running {
  readonly link: PeerLink;
  readonly mappings: readonly PeerMapping[];
}

export class ShmBackend implements TransferBackend, ServingOwner {
  readonly name: BackendName = "shm";
  readonly typical = { setupMs: 0.1, perDescriptorUs: 0.5, gigabytesPerSecond: 5 };
  readonly #context: AgentContext;
  readonly #folder: string;
  readonly #folderId: string;
  readonly #server: Server;
  readonly #connections = new Set<ServingConnection>();
  readonly #copies: CopyQueue;
  /** Ours, by the data they hold until they are registered, and by region. */
  readonly #unregistered = new Map<bigint, { readonly mapped: MappedMemory; readonly number: number }>();
  readonly #owned = new Map<number, { readonly mapped: MappedMemory; readonly number: number }>();
  readonly #mappings = new Map<string, PeerMapping>();
  readonly #links = new Map<bigint, PeerLink>();
  readonly #running = new Map<TransferJob, Running>();
  #nextNumber = 1;

  /** Throws `library-unavailable`, `invalid-config`. */
  static async open(context: AgentContext, options: ShmOptions): Promise<ShmBackend> {
    openLibc();
    const folder = options.folder ?? join("/dev/shm", `dynamo-ts-${process.getuid?.() ?? 0}`);
    const backend = new ShmBackend(context, folder);
    await backend.#listen();
    await removeLeftovers(folder);
    return backend;
  }

  private constructor(context: AgentContext, folder: string) {
    this.#context = context;
    this.#copies = new CopyQueue(context.clock);
    this.#folder = folder;
    this.#folderId = ownFolder(folder);
    this.#server = createServer((socket: Socket) => {
      this.#connections.add(new ServingConnection(socket, context, this, CONNECT_TIMEOUT_MS));
    });
  }

  #listen(): Promise<void> {
    const path = socketPath(this.#folder, this.#context.incarnation);
    return new Promise((resolve, reject) => {
      this.#server.once("error", (cause) => {
        reject(
          new DynamoError("invalid-config", `transfers cannot listen in ${this.#folder}`, {
            diagnostic: cause.message,
            cause,
          }),
        );
      });
      this.#server.listen(path, resolve);
    });
  }

  // ---- memory ----

  /** Found by peers once it is registered. Throws `transfer-full`. */
  allocate(byteLength: number): MappedMemory {
    const number = this.#nextNumber++;
    const mapped = MappedMemory.create(filePath(this.#folder, this.#context.incarnation, number), byteLength);
    this.#unregistered.set(mapped.address, { mapped, number });
    return mapped;
  }

  /** Memory that could not be registered. */
  discard(mapped: MappedMemory): void {
    this.#unregistered.delete(mapped.address);
    mapped.free();
  }

  register(region: Region): Promise<void> {
    if (region.address === undefined) return Promise.resolve();
    const owned = this.#unregistered.get(region.address);
    if (owned === undefined) return Promise.resolve();
    this.#unregistered.delete(region.address);
    this.#owned.set(region.id, owned);
    owned.mapped.publish({ incarnation: this.#context.incarnation, regionId: region.id });
    return Promise.resolve();
  }

  deregister(region: Region): Promise<void> {
    this.#owned.get(region.id)?.mapped.withdraw();
    this.#owned.delete(region.id);
    return Promise.resolve();
  }

  publish(): Uint8Array {
    const part = new ByteWriter(256);
    part.text(this.#folderId);
    part.u16(this.#owned.size);
    for (const [regionId, { number }] of this.#owned) {
      part.u32(regionId);
      part.u32(number);
    }
    return part.copy();
  }

  obstacle({ peer, localKind, remoteKind, remoteRegionIds }: PairQuestion): Obstacle | undefined {
    if (peer.isSelf) return unfit("the peer is this agent");
    if (localKind !== "host" || remoteKind !== "host") return unfit("moves host memory only");
    let part: PeerPart;
    try {
      part = decodePart(peer);
    } catch (thrown) {
      return unfit((thrown as Error).message);
    }
    if (part.folderId !== this.#folderId) return unfit("the peer is on another host or uses another folder");
    for (const id of remoteRegionIds) {
      if (!part.files.has(id)) return avoidable("the peer's memory is not mapped: it was not allocated by its agent");
    }
    return undefined;
  }

  // ---- our transfers ----

  post(job: TransferJob): void {
    const mappings: PeerMapping[] = [];
    try {
      checkAccess(job);
      for (const id of new Set(job.pairs.remote.regionIds)) mappings.push(this.#mapping(job.peer, id));
    } catch (thrown) {
      setImmediate(() => job.end(thrown as DynamoError));
      return;
    }
    const link = this.#link(job.peer.metadata.incarnation);
    for (const mapping of mappings) mapping.useCount++;
    this.#running.set(job, { link, mappings });
    const { local, remote } = job.pairs;
    const isRead = job.operation === "read";
    const localBytes = (id: number): Buffer | undefined => this.#context.regions.find(id)?.bytes;
    const remoteBytes = (id: number): Buffer | undefined => {
      const mapping = mappings.find(({ regionId }) => regionId === id)!;
      return mapping.mapped.isOf(mapping) ? mapping.mapped.bytes : undefined;
    };
    this.#copies.add({
      job,
      from: isRead ? remote : local,
      to: isRead ? local : remote,
      source: isRead ? remoteBytes : localBytes,
      destination: isRead ? localBytes : remoteBytes,
      onCopied: (isStale) => this.#copied(job, link, isStale || mappings.some((m) => !m.mapped.isOf(m))),
    });
    // A peer that is gone is found by its socket, which ends everything that runs towards it.
    link.whenReady(() => undefined);
  }

  #copied(job: TransferJob, link: PeerLink, isStale: boolean): void {
    if (isStale) this.#end(job, staleRegion());
    else if (job.message === undefined) link.whenReady(() => this.#end(job));
    else
      link.request(
        (id) => encodeNotify(id, job.message!),
        (error) => this.#end(job, error),
      );
  }

  #end(job: TransferJob, error?: DynamoError): void {
    const running = this.#running.get(job);
    if (running === undefined) return;
    this.#running.delete(job);
    this.#copies.remove(job);
    for (const mapping of running.mappings) {
      mapping.useCount--;
      if (mapping.useCount === 0 && !mapping.mapped.isOf(mapping)) this.#unmap(mapping);
    }
    job.end(error);
  }

  stop(job: TransferJob): void {
    this.#copies.remove(job);
    setImmediate(() => this.#end(job));
  }

  notify(peer: Peer, message: Uint8Array, _timeoutMs: number, done: (error?: DynamoError) => void): void {
    this.#link(peer.metadata.incarnation).request((id) => encodeNotify(id, message), done);
  }

  #mapping(peer: Peer, regionId: number): PeerMapping {
    const { incarnation, regions } = peer.metadata;
    const number = decodePart(peer).files.get(regionId)!;
    const key = `${incarnation}-${number}`;
    const known = this.#mappings.get(key);
    if (known?.mapped.isOf({ incarnation, regionId })) return known;
    if (known !== undefined && known.useCount === 0) this.#unmap(known);
    if (this.#mappings.size >= MAX_MAPPINGS)
      throw new DynamoError("transfer-full", `more than ${MAX_MAPPINGS} mappings of peers' memory`);
    const region = regions.get(regionId)!;
    const writable = region.remoteAccess !== "read";
    const path = filePath(this.#folder, incarnation, number);
    const mapped = MappedMemory.open(path, region.byteLength, { incarnation, regionId }, writable);
    const mapping = { mapped, incarnation, regionId, useCount: 0 };
    this.#mappings.set(key, mapping);
    return mapping;
  }

  #unmap(mapping: PeerMapping): void {
    for (const [key, known] of this.#mappings) if (known === mapping) this.#mappings.delete(key);
    mapping.mapped.free();
  }

  #link(incarnation: bigint): PeerLink {
    let link = this.#links.get(incarnation);
    if (link === undefined) {
      link = new PeerLink({
        context: this.#context,
        address: { path: socketPath(this.#folder, incarnation) },
        peerIncarnation: incarnation,
        ownPort: 0,
        laneCount: 1,
        windowBytes: 1,
        connectTimeoutMs: CONNECT_TIMEOUT_MS,
        onClosed: (closed) => this.#onLinkClosed(closed),
      });
      this.#links.set(incarnation, link);
    }
    return link;
  }

  #onLinkClosed(link: PeerLink): void {
    if (this.#links.get(link.peerIncarnation) === link) this.#links.delete(link.peerIncarnation);
    for (const [job, running] of this.#running) if (running.link === link) this.#end(job, peerGone(job.peer));
    this.#release(link.peerIncarnation);
  }

  #release(incarnation: bigint): void {
    for (const mapping of this.#mappings.values()) {
      if (mapping.incarnation === incarnation && mapping.useCount === 0) this.#unmap(mapping);
    }
  }

  // ---- what peers ask of us: messages only ----

  resolveGrant(): Piece[] {
    throw new DynamoError("transfer-no-path", "bytes do not travel over this socket");
  }

  onPull(): void {
    throw new DynamoError("transfer-no-path", "bytes do not travel over this socket");
  }

  onCancel(): void {}

  onServingClosed(connection: ServingConnection): void {
    this.#connections.delete(connection);
  }

  // ---- end ----

  forget(peer: Peer): void {
    const { incarnation } = peer.metadata;
    this.#links.get(incarnation)?.close(peerGone(peer));
    this.#release(incarnation);
  }

  async close(): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    for (const connection of this.#connections) connection.close();
    const gone = new DynamoError("draining", "the transfer agent was closed");
    for (const link of this.#links.values()) link.close(gone);
    for (const mapping of this.#mappings.values()) this.#unmap(mapping);
    await closed;
  }
}

/** One-sided: the owner is not asked, so the initiator keeps to what the metadata allow. */
function checkAccess(job: TransferJob): void {
  const { regionIds } = job.pairs.remote;
  let known = -1;
  for (let i = 0; i < regionIds.length; i++) {
    if (regionIds[i] === known) continue;
    known = regionIds[i]!;
    const { remoteAccess } = job.peer.metadata.regions.get(known)!;
    if (remoteAccess === "read-write" || remoteAccess === job.operation) continue;
    throw new DynamoError("transfer-out-of-bounds", `the memory is not registered for remote ${job.operation}`);
  }
}

const parts = new WeakMap<Peer, PeerPart>();

function decodePart(peer: Peer): PeerPart {
  let part = parts.get(peer);
  if (part !== undefined) return part;
  const bytes = peer.metadata.backends.get("shm");
  if (bytes === undefined) throw new DynamoError("transfer-no-path", `${peer.name} has no shared memory`);
  try {
    const body = new ByteReader(bytes);
    const folderId = body.text(128);
    const count = body.u16();
    if (count > MAX_REGIONS) throw new TruncatedBytes(`${count} regions`);
    const files = new Map<number, number>();
    for (let i = 0; i < count; i++) files.set(body.u32(), body.u32());
    part = { folderId, files };
  } catch (thrown) {
    if (!(thrown instanceof TruncatedBytes)) throw thrown;
    throw new DynamoError("malformed-frame", "the peer's metadata on shared memory are malformed", {
      diagnostic: thrown.message,
    });
  }
  parts.set(peer, part);
  return part;
}

/** Makes the folder or checks that it is this user's alone; returns what tells it from every other folder. */
function ownFolder(folder: string): string {
  try {
    mkdirSync(folder, { mode: 0o700, recursive: true });
    const stat = lstatSync(folder);
    if (!stat.isDirectory() || stat.uid !== process.getuid?.() || (stat.mode & 0o077) !== 0) {
      throw new Error("it must be a folder of this user with mode 0700");
    }
    return `${stat.dev}:${stat.ino}`;
  } catch (cause) {
    throw new DynamoError("invalid-config", `no shared memory in ${folder}: ${(cause as Error).message}`, { cause });
  }
}

const hex = (incarnation: bigint): string => incarnation.toString(16).padStart(16, "0");
const socketPath = (folder: string, incarnation: bigint): string => join(folder, `${hex(incarnation)}.sock`);
const filePath = (folder: string, incarnation: bigint, number: number): string =>
  join(folder, `${hex(incarnation)}-${number}.mem`);

/** Files of agents that were killed: nobody answers at their socket, which is made before and removed after them. */
async function removeLeftovers(folder: string): Promise<void> {
  const names = readdirSync(folder).filter((name) => /^[0-9a-f]{16}(?:\.sock|-\d+\.mem)$/.test(name));
  for (const prefix of new Set(names.map((name) => name.slice(0, 16)))) {
    if (await answers(join(folder, `${prefix}.sock`))) continue;
    for (const file of names.filter((name) => name.startsWith(prefix))) {
      try {
        unlinkSync(join(folder, file));
      } catch {
        // Another agent that starts now was faster.
      }
    }
  }
}

function answers(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect({ path });
    socket.once("connect", () => {
      socket.destroy();
      resolve(true);
    });
    socket.once("error", (error: NodeJS.ErrnoException) =>
      resolve(error.code !== "ECONNREFUSED" && error.code !== "ENOENT"),
    );
  });
}
