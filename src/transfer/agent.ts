import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { hostname } from "node:os";
import { DynamoError } from "../errors/index.ts";
import { silentLogger, type Logger, type Metrics } from "../observability/index.ts";
import { TimerWheel, randomId64, systemClock, type Clock, type TimerHandle } from "../std/index.ts";
import type {
  BackendChoice,
  BackendName,
  CostEstimate,
  Memory,
  Notification,
  Operation,
  PairTelemetry,
  RegisterOptions,
  SlowPathPolicy,
  Transfer,
  TransferOptions,
} from "./base.ts";
import type { AgentContext, Peer, TransferBackend } from "./backend.ts";
import { chooseBackend } from "./choose-backend.ts";
import { checkList, gatherPairs, type DescriptorList } from "./descriptor-list.ts";
import { FileBackend } from "./file-backend.ts";
import {
  DEFAULT_TIMEOUT_MS,
  MAX_ACTIVE_TRANSFERS,
  MAX_MESSAGE_BYTES,
  MAX_NAME_BYTES,
  MAX_PEERS,
  MAX_QUEUED_NOTIFICATIONS,
  STOP_GRACE_MS,
} from "./limits.ts";
import { MemoryBackend, MemoryNetwork } from "./memory-backend.ts";
import { decodeMetadata, encodeMetadata } from "./metadata.ts";
import type { NixlOptions } from "./nixl/nixl-backend.ts";
import { PairStatistics } from "./pair-statistics.ts";
import { PreparedTable } from "./prepared-table.ts";
import { RegionTable, type Region } from "./region.ts";
import type { S3Options } from "./s3/s3-backend.ts";
import type { MappedMemory } from "./shm/mapped-memory.ts";
import type { ShmBackend, ShmOptions } from "./shm/shm-backend.ts";
import { TcpBackend, type TcpOptions } from "./tcp/tcp-backend.ts";
import { TransferJob, type JobOwner } from "./transfer-job.ts";

/**
 * One process's end of the transfer plane (NIXL's agent): see `base.ts` for the contract. One event loop owns it. It checks
 * every argument, picks the back end of each table, keeps deadlines and limits, counts, and learns what transfers cost.
 */
export interface TransferAgentOptions {
  /** Unique in the cluster: `namespace.component.instance`. At most 128 bytes. */
  readonly name: string;
  readonly clock?: Clock;
  readonly metrics?: Metrics;
  readonly logger?: Logger;
  /** With it, peers that do not know it get nothing over `tcp` and `shm`. */
  readonly clusterSecret?: string | undefined;
  /** Warnings come once per pair. `refuse` also refuses to start without shared memory. @default "warn" */
  readonly slowPath?: SlowPathPolicy;
  /** A transfer of a megabyte or more below this rate is told in the log and counted, once per pair. @default 0 */
  readonly slowGigabytesPerSecond?: number;
  /** Agents of this process that should reach each other share one. @default one of its own */
  readonly memory?: MemoryNetwork;
  /** @default loopback, any port */
  readonly tcp?: false | TcpOptions;
  /** Left out without an error where the machine has no mapped memory, unless options are given. */
  readonly shm?: false | ShmOptions;
  readonly s3?: S3Options;
  /** Throws `library-unavailable` when NIXL is not installed. */
  readonly nixl?: NixlOptions;
}

export class TransferAgent implements JobOwner {
  readonly name: string;
  readonly incarnation: bigint;
  readonly #hostId = hostIdentity();
  readonly #clock: Clock;
  readonly #wheel: TimerWheel;
  readonly #logger: Logger;
  readonly #metrics: Metrics | undefined;
  readonly #slowPath: SlowPathPolicy;
  readonly #slowGigabytesPerSecond: number;
  readonly #regions = new RegionTable();
  readonly #mappings = new Map<Region, MappedMemory>();
  readonly #backends = new Map<BackendName, TransferBackend>();
  readonly #unavailable = new Set<BackendName>();
  /** Peers and back ends that were warned about. */
  readonly #toldSlowPaths = new Set<string>();
  readonly #peers = new Map<string, Peer>();
  readonly #active = new Set<TransferJob>();
  readonly #stopping = new Map<TransferJob, TimerHandle>();
  readonly #statistics: PairStatistics;
  readonly #context: AgentContext;
  #shm: ShmBackend | undefined = undefined;
  #notifications: Notification[] = [];
  #listener: ((notification: Notification) => void) | undefined = undefined;
  #closed = false;

  /** Opens the back ends. Throws `address-in-use`, `library-unavailable`, `invalid-config`. */
  static async start(options: TransferAgentOptions): Promise<TransferAgent> {
    const agent = new TransferAgent(options);
    try {
      await agent.#open(options);
    } catch (thrown) {
      await agent.close();
      throw thrown;
    }
    return agent;
  }

  private constructor(options: TransferAgentOptions) {
    if (options.name === "" || Buffer.byteLength(options.name) > MAX_NAME_BYTES) {
      throw new DynamoError(
        "invalid-config",
        `name: expected 1 to ${MAX_NAME_BYTES} bytes, got ${options.name.length}`,
      );
    }
    this.name = options.name;
    this.incarnation = randomId64();
    this.#clock = options.clock ?? systemClock;
    this.#wheel = new TimerWheel({ clock: this.#clock });
    this.#logger = options.logger ?? silentLogger;
    this.#metrics = options.metrics;
    this.#slowPath = options.slowPath ?? "warn";
    this.#slowGigabytesPerSecond = options.slowGigabytesPerSecond ?? 0;
    this.#statistics = new PairStatistics(options.metrics);
    this.#context = {
      name: this.name,
      incarnation: this.incarnation,
      regions: this.#regions,
      clock: this.#clock,
      logger: this.#logger,
      clusterSecret: options.clusterSecret,
      deliver: (from, message) => this.#deliver(from, message),
    };
  }

  async #open(options: TransferAgentOptions): Promise<void> {
    const add = (backend: TransferBackend): void => void this.#backends.set(backend.name, backend);
    add(new MemoryBackend(this.#context, options.memory ?? new MemoryNetwork()));
    add(new FileBackend(this.#context));
    if (options.shm !== false) await this.#openShm(options.shm);
    if (options.tcp !== false) add(await TcpBackend.open(this.#context, options.tcp ?? {}));
    if (options.s3 !== undefined) {
      const { S3Backend } = await import("./s3/s3-backend.ts");
      add(new S3Backend(this.#context, options.s3));
    }
    if (options.nixl !== undefined) {
      const { NixlBackend } = await import("./nixl/nixl-backend.ts");
      add(await NixlBackend.open(this.#context, options.nixl));
    }
  }

  async #openShm(options: ShmOptions | undefined): Promise<void> {
    try {
      const { ShmBackend } = await import("./shm/shm-backend.ts");
      this.#shm = await ShmBackend.open(this.#context, options ?? {});
      this.#backends.set("shm", this.#shm);
    } catch (thrown) {
      if (options !== undefined || this.#slowPath === "refuse") throw thrown;
      this.#unavailable.add("shm");
      const level = this.#slowPath === "warn" ? "warn" : "info";
      this.#logger[level](
        { why: (thrown as Error).message },
        "transfers: no shared memory between processes here, they take a slower path",
      );
    }
  }

  // ---- memory ----

  /**
   * Host memory of this agent, zeroed and page-aligned, registered: mapped so that processes of this host reach it without
   * a socket where `shm` is there. It goes with `deregister`: its `bytes` have length 0 from then on.
   */
  async allocate(byteLength: number, options: RegisterOptions = {}): Promise<Region> {
    const shm = this.#shm;
    if (shm === undefined)
      return this.register({ kind: "host", bytes: new Uint8Array(new SharedArrayBuffer(byteLength)) }, options);
    const mapped = shm.allocate(byteLength);
    const memory: Memory = { kind: "host", bytes: mapped.bytes };
    try {
      return await this.#register(memory, { ...options, address: mapped.address }, mapped);
    } catch (thrown) {
      shm.discard(mapped);
      throw thrown;
    }
  }

  /** Registers memory of the caller's, who keeps it allocated until `deregister` has resolved. */
  register(memory: Memory, options: RegisterOptions = {}): Promise<Region> {
    return this.#register(memory, options, undefined);
  }

  async #register(
    memory: Memory,
    options: RegisterOptions & { readonly address?: bigint },
    mapped: MappedMemory | undefined,
  ): Promise<Region> {
    this.#assertOpen();
    const region = this.#regions.add(memory, options);
    if (mapped !== undefined) this.#mappings.set(region, mapped);
    const done: TransferBackend[] = [];
    try {
      for (const backend of this.#backends.values()) {
        await backend.register(region);
        done.push(backend);
      }
    } catch (thrown) {
      this.#regions.remove(region);
      this.#mappings.delete(region);
      for (const backend of done) await backend.deregister(region);
      throw thrown;
    }
    this.#metrics?.gauge("dynamo_transfer_registered_bytes").labels(region.kind).add(region.byteLength);
    return region;
  }

  /** Refuses new uses at once, resolves when none is left and the memory is the caller's again (or unmapped). */
  async deregister(region: Region): Promise<void> {
    if (this.#regions.find(region.id) !== region) {
      throw new DynamoError("transfer-out-of-bounds", "the region is not registered");
    }
    this.#regions.remove(region);
    this.#metrics?.gauge("dynamo_transfer_registered_bytes").labels(region.kind).add(-region.byteLength);
    await region.unpinned();
    for (const backend of this.#backends.values()) await backend.deregister(region);
    this.#mappings.get(region)?.free();
    this.#mappings.delete(region);
  }

  // ---- peers ----

  /** What peers need to reach this agent's memory as it is registered now. */
  metadata(): Buffer {
    const parts = new Map<BackendName, Uint8Array>();
    for (const backend of this.#backends.values()) {
      const part = backend.publish();
      if (part !== undefined) parts.set(backend.name, part);
    }
    return encodeMetadata(
      { name: this.name, incarnation: this.incarnation, hostId: this.#hostId },
      parts,
      this.#regions.all(),
    );
  }

  /** Loads a peer's metadata, in place of what was known of that name. Throws `malformed-frame`, `protocol-version`. */
  addPeer(metadata: Uint8Array): Peer {
    this.#assertOpen();
    const decoded = decodeMetadata(metadata);
    const known = this.#peers.get(decoded.name);
    if (known === undefined && this.#peers.size >= MAX_PEERS) {
      throw new DynamoError("transfer-full", `more than ${MAX_PEERS} peers`);
    }
    if (known !== undefined && known.metadata.incarnation !== decoded.incarnation) this.#drop(known);
    const peer: Peer = { name: decoded.name, isSelf: decoded.incarnation === this.incarnation, metadata: decoded };
    this.#peers.set(peer.name, peer);
    return peer;
  }

  /** Fails its transfers with `transfer-peer-lost` and closes what was open to it. */
  removePeer(peer: Peer): void {
    if (this.#peers.get(peer.name)?.metadata.incarnation !== peer.metadata.incarnation) return;
    this.#drop(peer);
    this.#statistics.forget(peer.name);
    for (const key of this.#toldSlowPaths) if (key.endsWith(` ${peer.name}`)) this.#toldSlowPaths.delete(key);
  }

  #drop(peer: Peer): void {
    this.#peers.delete(peer.name);
    const lost = new DynamoError("transfer-peer-lost", `the agent ${peer.name} was removed`);
    for (const job of this.#active) if (job.peer.metadata.incarnation === peer.metadata.incarnation) job.stop(lost);
    for (const backend of this.#backends.values()) backend.forget(peer);
  }

  /** This agent as its own peer: for transfers between its memory, files and objects. */
  get self(): Peer {
    const metadata = {
      name: this.name,
      incarnation: this.incarnation,
      hostId: this.#hostId,
      backends: new Map(),
      regions: new Map(),
    };
    return { name: this.name, isSelf: true, metadata };
  }

  // ---- transfers ----

  /**
   * Checks both lists once and chooses the back end. Descriptors of `remote` name the peer's regions (our own when the peer
   * is `self`). Throws `transfer-out-of-bounds`, `transfer-no-path`.
   */
  prepare(
    peer: Peer,
    lists: { readonly local: DescriptorList; readonly remote: DescriptorList },
    options: { readonly backend?: BackendName } = {},
  ): PreparedTable {
    this.#assertOpen();
    const own = (id: number): number => this.#regions.find(id)?.byteLength ?? -1;
    const theirs = (id: number): number => peer.metadata.regions.get(id)?.byteLength ?? -1;
    checkList(lists.local, own, "local");
    checkList(lists.remote, peer.isSelf ? own : theirs, "remote");
    const localRegions = distinct(lists.local.regionIds).map((id) => this.#regions.find(id)!);
    const remoteRegionIds = distinct(lists.remote.regionIds);
    const remoteKinds = remoteRegionIds.map((id) =>
      peer.isSelf ? this.#regions.find(id)!.kind : peer.metadata.regions.get(id)!.kind,
    );
    if (new Set(remoteKinds).size > 1 || new Set(localRegions.map((region) => region.kind)).size > 1) {
      throw new DynamoError("transfer-out-of-bounds", "a list names memory of more than one kind");
    }
    const question = {
      peer,
      localKind: localRegions[0]!.kind,
      remoteKind: remoteKinds[0]!,
      localRegions,
      remoteRegionIds,
      alignment: Math.min(alignmentOf(lists.local), alignmentOf(lists.remote)),
    };
    const chosen = chooseBackend({
      backends: this.#backends,
      question,
      isSameHost: peer.metadata.hostId === this.#hostId,
      wanted: options.backend,
      unavailable: this.#unavailable,
    });
    if (chosen.isSlowPath && options.backend === undefined) this.#onSlowPath(peer, chosen);
    this.#statistics.onChoice(peer.name, chosen);
    return new PreparedTable({ peer, ...lists, localRegions, remoteRegionIds, chosen });
  }

  #onSlowPath(peer: Peer, { backend, reason }: BackendChoice): void {
    if (this.#slowPath === "refuse") {
      throw new DynamoError(
        "transfer-no-path",
        `only the slower back end ${backend} moves this memory, and slow paths are refused`,
        {
          diagnostic: reason,
        },
      );
    }
    this.#metrics?.counter("dynamo_transfer_slow_paths_total").labels(backend).add();
    const key = `${backend} ${peer.name}`;
    if (this.#slowPath !== "warn" || this.#toldSlowPaths.has(key)) return;
    this.#toldSlowPaths.add(key);
    this.#logger.warn({ peer: peer.name, backend, reason }, "transfers take a slow path");
  }

  /** Reads from the peer: block `remoteIndices[i]` of the table comes to `localIndices[i]`. See `transfer`. */
  read(
    table: PreparedTable,
    localIndices: Uint32Array,
    remoteIndices: Uint32Array,
    options: TransferOptions = {},
  ): Transfer {
    return this.transfer("read", table, localIndices, remoteIndices, options);
  }

  /** Writes to the peer: block `localIndices[i]` of the table goes to `remoteIndices[i]`. See `transfer`. */
  write(
    table: PreparedTable,
    localIndices: Uint32Array,
    remoteIndices: Uint32Array,
    options: TransferOptions = {},
  ): Transfer {
    return this.transfer("write", table, localIndices, remoteIndices, options);
  }

  /**
   * Posts one batch. Throws for what the caller did wrong (`transfer-out-of-bounds`, `transfer-stale`, `transfer-full`);
   * what goes wrong later is the transfer's error. The index arrays may be reused after the call.
   */
  transfer(
    operation: Operation,
    table: PreparedTable,
    localIndices: Uint32Array,
    remoteIndices: Uint32Array,
    options: TransferOptions = {},
  ): Transfer {
    this.#assertOpen();
    const { timeoutMs = DEFAULT_TIMEOUT_MS, message, signal } = options;
    checkTimeout(timeoutMs);
    if (message !== undefined) checkMessage(message);
    if (this.#active.size >= MAX_ACTIVE_TRANSFERS) {
      throw new DynamoError("transfer-full", `${MAX_ACTIVE_TRANSFERS} transfers are in progress`);
    }
    for (const region of table.localRegions) {
      if (!region.registered) throw new DynamoError("transfer-stale", "memory of the prepared table was deregistered");
    }
    const pairs = gatherPairs(table.local, table.remote, localIndices, remoteIndices);
    const postedMs = this.#clock.monotonicMs();
    const job = new TransferJob({
      owner: this,
      operation,
      backend: table.handler,
      peer: table.peer,
      pairs,
      blockCount: localIndices.length,
      localRegions: table.localRegions,
      message: message === undefined ? undefined : Buffer.from(message),
      postedMs,
      deadlineMs: postedMs + timeoutMs,
    });
    this.#active.add(job);
    for (const region of table.localRegions) region.pin();
    this.#wheel.add(job.timer, timeoutMs);
    job.handler.post(job);
    if (signal !== undefined) watch(signal, job);
    return job;
  }

  onJobStop(job: TransferJob): void {
    // The back end has this long; afterwards the transfer ends whatever it does.
    this.#wheel.cancel(job.timer);
    const force = this.#clock.setTimer(STOP_GRACE_MS, () => {
      if (!job.ended)
        this.#logger.error(
          { backend: job.backend, peer: job.peer.name },
          "a transfer did not let go of its memory in time",
        );
      job.abandon();
    });
    this.#stopping.set(job, force);
  }

  onJobEnd(job: TransferJob): void {
    this.#wheel.cancel(job.timer);
    this.#stopping.get(job)?.cancel();
    this.#stopping.delete(job);
    this.#active.delete(job);
    this.#statistics.onEnd(job, this.#clock.monotonicMs(), job.error);
    if (job.error === undefined && this.#statistics.isNewlySlow(job, this.#slowGigabytesPerSecond)) this.#onSlow(job);
  }

  #onSlow({ backend, peer, operation }: TransferJob): void {
    this.#metrics?.counter("dynamo_transfer_slow_paths_total").labels(backend).add();
    const limit = this.#slowGigabytesPerSecond;
    this.#logger.warn({ peer: peer.name, backend, operation, limit }, "transfers are slower than they should be");
  }

  onJobRelease(job: TransferJob): void {
    for (const region of job.localRegions) region.unpin();
  }

  get activeTransferCount(): number {
    return this.#active.size;
  }

  /** What a transfer of so many blocks and bytes through this table would cost now. */
  estimate(table: PreparedTable, operation: Operation, descriptorCount: number, byteCount: number): CostEstimate {
    return this.#statistics.cost(table.peer.name, table.handler, operation).estimate(descriptorCount, byteCount);
  }

  telemetry(): PairTelemetry[] {
    return this.#statistics.telemetry();
  }

  // ---- notifications ----

  /** Sends a message without a transfer; resolves when the peer has it. */
  async notify(peer: Peer, message: Uint8Array, options: { readonly timeoutMs?: number } = {}): Promise<void> {
    this.#assertOpen();
    checkMessage(message);
    const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
    checkTimeout(timeoutMs);
    const backend = this.#notifier(peer);
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const timer = this.#clock.setTimer(timeoutMs, () => {
      reject(new DynamoError("request-deadline", "the notification was not taken before its deadline"));
    });
    backend.notify(peer, Buffer.from(message), timeoutMs, (error) => (error === undefined ? resolve() : reject(error)));
    try {
      await promise;
    } finally {
      timer.cancel();
    }
  }

  #notifier(peer: Peer): TransferBackend {
    const memory = this.#backends.get("memory")!;
    const none = {
      peer,
      localKind: "host",
      remoteKind: "host",
      localRegions: [],
      remoteRegionIds: [],
      alignment: 4096,
    } as const;
    if (memory.obstacle(none) === undefined) return memory;
    for (const name of ["tcp", "shm", "nixl"] as const) {
      const backend = this.#backends.get(name);
      if (backend !== undefined && peer.metadata.backends.has(name)) return backend;
    }
    throw new DynamoError("transfer-no-path", `no back end carries messages to ${peer.name}`);
  }

  /** Calls `listener` for each message from now on, those that waited first. One listener at a time; it must not throw. */
  onNotification(listener: ((notification: Notification) => void) | undefined): void {
    this.#listener = listener;
    if (listener !== undefined) for (const notification of this.takeNotifications()) listener(notification);
  }

  /** The messages that came since the last call, for those who poll. */
  takeNotifications(): Notification[] {
    const taken = this.#notifications;
    this.#notifications = [];
    return taken;
  }

  #deliver(from: string, message: Uint8Array): void {
    if (this.#listener !== undefined) {
      this.#listener({ from, message });
      return;
    }
    if (this.#notifications.length >= MAX_QUEUED_NOTIFICATIONS) {
      throw new DynamoError("transfer-full", "the peer does not take its notifications");
    }
    this.#notifications.push({ from, message });
  }

  // ---- end ----

  #assertOpen(): void {
    if (this.#closed) throw new DynamoError("draining", "the transfer agent is closed");
  }

  /** Ends every transfer with `draining`, closes connections, files and mappings. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    const draining = new DynamoError("draining", "the transfer agent was closed");
    const running = [...this.#active];
    for (const job of running) job.stop(draining);
    await Promise.all(running.map((job) => job.done.catch(() => undefined)));
    // Whoever still reads or writes here goes first, then the memory.
    for (const backend of this.#backends.values()) await backend.close();
    for (const region of this.#regions.all()) {
      this.#metrics?.gauge("dynamo_transfer_registered_bytes").labels(region.kind).add(-region.byteLength);
      this.#regions.remove(region);
    }
    // Memory that a stuck transfer may still touch is left to the end of the process.
    for (const [region, mapped] of this.#mappings) if (!region.pinned) mapped.free();
    this.#mappings.clear();
  }
}

function watch(signal: AbortSignal, job: TransferJob): void {
  if (signal.aborted) {
    job.cancel();
    return;
  }
  const onAbort = (): void => job.cancel();
  signal.addEventListener("abort", onAbort, { once: true });
  const off = (): void => signal.removeEventListener("abort", onAbort);
  job.done.then(off, off);
}

function checkTimeout(timeoutMs: number): void {
  if (!(timeoutMs > 0 && timeoutMs <= 0x7fff_ffff)) {
    throw new DynamoError("transfer-out-of-bounds", `timeoutMs: expected 1 to 2147483647, got ${timeoutMs}`);
  }
}

function checkMessage(message: Uint8Array): void {
  if (message.length > MAX_MESSAGE_BYTES) {
    throw new DynamoError(
      "transfer-out-of-bounds",
      `message: expected at most ${MAX_MESSAGE_BYTES} bytes, got ${message.length}`,
    );
  }
}

function distinct(ids: Uint32Array): number[] {
  const found = new Set<number>();
  let last = -1;
  for (let i = 0; i < ids.length; i++) {
    if (ids[i] === last) continue;
    last = ids[i]!;
    found.add(last);
  }
  return [...found];
}

/** The largest power of two up to 4,096 that divides every offset and length. */
function alignmentOf(list: DescriptorList): number {
  let bits = 0;
  for (let i = 0; i < list.count; i++) bits |= (list.offsets[i]! % 4096) | (list.lengths[i]! % 4096);
  bits &= 4095;
  return bits === 0 ? 4096 : bits & -bits;
}

function hostIdentity(): string {
  let boot = "";
  try {
    boot = readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
  } catch {
    // Not Linux: the name has to do.
  }
  return createHash("sha256").update(`${boot}\n${hostname()}`).digest("hex").slice(0, 16);
}
