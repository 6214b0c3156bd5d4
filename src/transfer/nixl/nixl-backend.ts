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
import type { DescriptorList } from "../descriptor-list.ts";
import { MAX_REGIONS } from "../limits.ts";
import { peerGone } from "../memory-backend.ts";
import type { Region } from "../region.ts";
import type { TransferJob } from "../transfer-job.ts";
import { openNixl, type Handle, type NixlFunction, type NixlLibrary } from "./nixl-library.ts";

/**
 * Transfers by NVIDIA's NIXL over UCX: InfiniBand, NVLink and TCP, whatever UCX finds. The real library does the work; this
 * file turns our batches into its requests and its messages into our notifications.
 *
 * - NIXL's own default polls a core away. Here its progress thread sleeps a millisecond between looks (1.3 % of a core
 *   measured), and calls that can take long (post, status) run on the thread pool, not on the loop that serves the network.
 * - Transfers are one-sided and UCX does not ask the owner: bounds and access are checked by the initiator against the
 *   peer's metadata. Anybody who reaches the UCX port can write this process's memory: for trusted networks only, and
 *   memory is to be deregistered after its peers have stopped.
 * - A posted request cannot be called back: a stopped transfer ends when NIXL is through with it.
 */
export interface NixlOptions {
  /** Where `libnixl_capi.so` is. @default see nixl-library.ts */
  readonly libraryFolder?: string;
  /** NIXL's plugin. @default "UCX" */
  readonly plugin?: string;
  /** Sleep of NIXL's progress thread between looks. @default 1000 */
  readonly progressDelayUs?: number;
}

const OK = 0;
const IN_PROGRESS = 1;
const DRAM = 0;
const READ = 0;
const WRITE = 1;
const THREAD_SYNC_STRICT = 1;
/** Status is asked again at once so many times, then every millisecond. */
const EAGER_POLLS = 16;
const POLL_MS = 1;
/** How often messages are looked for: while some came lately, and otherwise. */
const NOTIFICATION_MS = { busy: 2, idle: 20 };
const BUSY_FOR_MS = 500;

interface PeerPart {
  readonly nixlName: string;
  readonly addresses: ReadonlyMap<number, bigint>;
  readonly metadata: Buffer;
}

export class NixlBackend implements TransferBackend {
  readonly name: BackendName = "nixl";
  readonly typical = { setupMs: 1, perDescriptorUs: 5, gigabytesPerSecond: 1 };
  readonly #context: AgentContext;
  readonly #library: NixlLibrary;
  readonly #nixlName: string;
  readonly #agent: Handle;
  readonly #backend: Handle;
  readonly #options: Handle;
  readonly #notifications: Handle;
  readonly #registered = new Map<number, { readonly list: Handle; readonly address: bigint }>();
  readonly #loaded = new Map<bigint, Peer>();
  readonly #running = new Set<TransferJob>();
  #published: Buffer | undefined = undefined;
  #poll: NodeJS.Timeout | undefined = undefined;
  #lastMessageMs = Number.NEGATIVE_INFINITY;
  #closed = false;

  /** Throws `library-unavailable`. */
  static open(context: AgentContext, options: NixlOptions): Promise<NixlBackend> {
    // A promise, as the agent's other back ends need one: what it throws becomes a rejection.
    return Promise.resolve().then(() => new NixlBackend(context, options));
  }

  private constructor(context: AgentContext, options: NixlOptions) {
    this.#context = context;
    this.#library = openNixl(options.libraryFolder);
    this.#nixlName = `${context.name}#${context.incarnation.toString(16)}`;
    const config = {
      enable_prog_thread: true,
      enable_listen_thread: false,
      listen_port: 0,
      thread_sync: THREAD_SYNC_STRICT,
      num_workers: 1,
      pthr_delay_us: options.progressDelayUs ?? 1_000,
      lthr_delay_us: 100_000,
      capture_telemetry: false,
    };
    const plugin = options.plugin ?? "UCX";
    this.#agent = this.#make("create_configured_agent", this.#nixlName, config);
    const memories: [Handle | null] = [null];
    const parameters: [Handle | null] = [null];
    this.#must("get_plugin_params", this.#agent, plugin, memories, parameters);
    this.#backend = this.#make("create_backend", this.#agent, plugin, parameters[0]);
    this.#must("destroy_mem_list", memories[0]);
    this.#must("destroy_params", parameters[0]);
    this.#options = this.#make("create_opt_args");
    this.#must("opt_args_add_backend", this.#options, this.#backend);
    this.#notifications = this.#make("create_notif_map");
    this.#schedulePoll();
  }

  #must(name: NixlFunction, ...args: unknown[]): void {
    const status = this.#library.functions[name](...args);
    if (status !== OK) throw nixlFailed(name, status);
  }

  /** Calls a function whose last argument is a handle that it gives back; for some another one follows. */
  #make(name: NixlFunction, ...args: unknown[]): Handle {
    const made: [Handle | null] = [null];
    this.#must(name, ...args, made);
    return made[0]!;
  }

  // ---- memory and metadata ----

  register(region: Region): Promise<void> {
    if (region.kind !== "host") return Promise.resolve();
    const address = region.address ?? this.#library.addressOf(region.bytes);
    const list = this.#make("create_reg_dlist", DRAM);
    this.#must("reg_dlist_add_desc", list, address, region.byteLength, 0, null, 0);
    const status = this.#library.functions.register_mem(this.#agent, list, this.#options);
    if (status !== OK) {
      this.#must("destroy_reg_dlist", list);
      return Promise.reject(nixlFailed("register_mem", status));
    }
    this.#registered.set(region.id, { list, address });
    this.#published = undefined;
    return Promise.resolve();
  }

  deregister(region: Region): Promise<void> {
    const registered = this.#registered.get(region.id);
    if (registered === undefined) return Promise.resolve();
    this.#registered.delete(region.id);
    this.#published = undefined;
    this.#must("deregister_mem", this.#agent, registered.list, this.#options);
    this.#must("destroy_reg_dlist", registered.list);
    return Promise.resolve();
  }

  publish(): Uint8Array {
    this.#published ??= this.#encode();
    return this.#published;
  }

  #encode(): Buffer {
    const data: [Handle | null] = [null];
    const length: [number] = [0];
    this.#must("get_local_md", this.#agent, data, length);
    const metadata = this.#library.copy(data[0]!, Number(length[0]));
    this.#library.free(data[0]!);
    const part = new ByteWriter(1024);
    part.text(this.#nixlName);
    part.u16(this.#registered.size);
    for (const [regionId, { address }] of this.#registered) {
      part.u32(regionId);
      part.u64(address);
    }
    part.bytes(metadata);
    return part.copy();
  }

  obstacle({ peer, localKind, remoteKind, remoteRegionIds }: PairQuestion): Obstacle | undefined {
    if (peer.isSelf) return unfit("the peer is this agent");
    if (localKind !== "host" || remoteKind !== "host") return unfit("moves host memory only");
    try {
      const { addresses } = decodePart(peer);
      if (remoteRegionIds.some((id) => !addresses.has(id)))
        return avoidable("the peer's memory is not registered with NIXL");
    } catch (thrown) {
      return unfit((thrown as Error).message);
    }
    return undefined;
  }

  /** Hands the peer's metadata to NIXL, once per set. */
  #load(peer: Peer): PeerPart {
    const part = decodePart(peer);
    const { incarnation } = peer.metadata;
    if (this.#loaded.get(incarnation) === peer) return part;
    if (this.#loaded.has(incarnation)) this.#must("invalidate_remote_md", this.#agent, part.nixlName);
    this.#make("load_remote_md", this.#agent, part.metadata, part.metadata.length);
    this.#loaded.set(incarnation, peer);
    return part;
  }

  // ---- transfers ----

  post(job: TransferJob): void {
    let request: { readonly handle: Handle; readonly options: Handle };
    try {
      checkAccess(job);
      request = this.#request(job);
    } catch (thrown) {
      setImmediate(() => job.end(thrown as DynamoError));
      return;
    }
    this.#running.add(job);
    const onStatus = (error: Error | null, status: number): void => {
      if (error === null && status === IN_PROGRESS) {
        this.#follow(job, request.handle, 0, onStatus);
        return;
      }
      const failed = this.#release(request);
      this.#running.delete(job);
      if (error !== null || status !== OK) job.end(peerGone(job.peer));
      else job.end(failed ?? this.#sendMessage(job));
    };
    this.#library.functions.post_xfer_req.async(this.#agent, request.handle, request.options, onStatus);
  }

  /** NIXL could attach it to the request, but then a transfer that was stopped would announce itself. */
  #sendMessage(job: TransferJob): DynamoError | undefined {
    if (job.message === undefined || job.stopError !== undefined) return undefined;
    return this.#notify(job.peer, job.message);
  }

  #request(job: TransferJob): { handle: Handle; options: Handle } {
    const { nixlName, addresses } = this.#load(job.peer);
    const { local, remote } = job.pairs;
    const own = (id: number): bigint => this.#registered.get(id)!.address;
    const localList = this.#list(local, own);
    const remoteList = this.#list(remote, (id) => addresses.get(id)!);
    const options = this.#make("create_opt_args");
    try {
      this.#must("opt_args_add_backend", options, this.#backend);
      const operation = job.operation === "read" ? READ : WRITE;
      const made: [Handle | null] = [null];
      this.#must("create_xfer_req", this.#agent, operation, localList, remoteList, nixlName, made, options);
      return { handle: made[0]!, options };
    } catch (thrown) {
      this.#must("destroy_opt_args", options);
      throw thrown;
    } finally {
      this.#must("destroy_xfer_dlist", localList);
      this.#must("destroy_xfer_dlist", remoteList);
    }
  }

  #list(list: DescriptorList, addressOf: (regionId: number) => bigint): Handle {
    const handle = this.#make("create_xfer_dlist", DRAM);
    const add = this.#library.functions.xfer_dlist_add_desc;
    let knownId = -1;
    let base = 0;
    for (let i = 0; i < list.count; i++) {
      if (list.regionIds[i] !== knownId) {
        knownId = list.regionIds[i]!;
        // User-space addresses are under 2^47: exact as a number.
        base = Number(addressOf(knownId));
      }
      add(handle, base + list.offsets[i]!, list.lengths[i]!, 0);
    }
    return handle;
  }

  #follow(
    job: TransferJob,
    handle: Handle,
    polls: number,
    onStatus: (error: Error | null, status: number) => void,
  ): void {
    this.#library.functions.get_xfer_status.async(this.#agent, handle, (error: Error | null, status: number) => {
      if (error !== null || status !== IN_PROGRESS) onStatus(error, status);
      else if (polls < EAGER_POLLS) this.#follow(job, handle, polls + 1, onStatus);
      else setTimeout(() => this.#follow(job, handle, polls, onStatus), POLL_MS);
    });
  }

  #release({ handle, options }: { readonly handle: Handle; readonly options: Handle }): DynamoError | undefined {
    const { release_xfer_req, destroy_xfer_req, destroy_opt_args } = this.#library.functions;
    const status = release_xfer_req(this.#agent, handle);
    destroy_xfer_req(handle);
    destroy_opt_args(options);
    return status === OK ? undefined : nixlFailed("release_xfer_req", status);
  }

  /** Nothing to do: it ends when NIXL is through, which it tells when the peer is gone too. */
  stop(): void {}

  // ---- messages ----

  /** Ends when NIXL has taken the message; that the peer has it, NIXL does not tell. */
  notify(peer: Peer, message: Uint8Array, _timeoutMs: number, done: (error?: DynamoError) => void): void {
    const failed = this.#notify(peer, message);
    setImmediate(() => done(failed));
  }

  #notify(peer: Peer, message: Uint8Array): DynamoError | undefined {
    try {
      const { nixlName } = this.#load(peer);
      this.#must("gen_notif", this.#agent, nixlName, framed(message), message.length + 1, this.#options);
      return undefined;
    } catch (thrown) {
      return thrown as DynamoError;
    }
  }

  #schedulePoll(): void {
    const isBusy = performance.now() - this.#lastMessageMs < BUSY_FOR_MS || this.#running.size > 0;
    this.#poll = setTimeout(
      () => {
        this.#takeMessages();
        if (!this.#closed) this.#schedulePoll();
      },
      NOTIFICATION_MS[isBusy ? "busy" : "idle"],
    );
    this.#poll.unref();
  }

  #takeMessages(): void {
    const { functions } = this.#library;
    const map = this.#notifications;
    const size: [number] = [0];
    if (functions.get_notifs(this.#agent, map, this.#options) !== OK) return;
    if (functions.notif_map_size(map, size) !== OK || Number(size[0]) === 0) return;
    this.#lastMessageMs = performance.now();
    for (let i = 0; i < Number(size[0]); i++) {
      const from: [string] = [""];
      const count: [number] = [0];
      this.#must("notif_map_get_agent_at", map, i, from);
      this.#must("notif_map_get_notifs_size", map, from[0], count);
      for (let j = 0; j < Number(count[0]); j++) {
        const data: [Handle | null] = [null];
        const length: [number] = [0];
        this.#must("notif_map_get_notif", map, from[0], j, data, length);
        this.#deliver(from[0], this.#library.copy(data[0]!, Number(length[0])).subarray(1));
      }
    }
    this.#must("notif_map_clear", map);
  }

  #deliver(from: string, message: Buffer): void {
    try {
      this.#context.deliver(from.replace(/#[0-9a-f]+$/, ""), message);
    } catch (thrown) {
      // NIXL cannot tell the sender.
      this.#context.logger.error({ from, why: (thrown as Error).message }, "transfers: a notification was dropped");
    }
  }

  // ---- end ----

  forget(peer: Peer): void {
    const { incarnation } = peer.metadata;
    if (!this.#loaded.delete(incarnation)) return;
    this.#library.functions.invalidate_remote_md(this.#agent, decodePart(peer).nixlName);
  }

  close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#poll);
    // An agent that still moves bytes is left to the end of the process.
    if (this.#running.size > 0) return Promise.resolve();
    const { functions } = this.#library;
    for (const { list } of this.#registered.values()) {
      functions.deregister_mem(this.#agent, list, this.#options);
      functions.destroy_reg_dlist(list);
    }
    this.#registered.clear();
    functions.destroy_notif_map(this.#notifications);
    functions.destroy_opt_args(this.#options);
    functions.destroy_backend(this.#backend);
    functions.destroy_agent(this.#agent);
    return Promise.resolve();
  }
}

/** NIXL has no empty message: ours are one byte longer there. */
function framed(message: Uint8Array): Buffer {
  return Buffer.concat([Buffer.of(1), message]);
}

function checkAccess(job: TransferJob): void {
  for (const id of new Set(job.pairs.remote.regionIds)) {
    const { remoteAccess } = job.peer.metadata.regions.get(id)!;
    if (remoteAccess === "read-write" || remoteAccess === job.operation) continue;
    throw new DynamoError("transfer-out-of-bounds", `the memory is not registered for remote ${job.operation}`);
  }
}

const parts = new WeakMap<Peer, PeerPart>();

function decodePart(peer: Peer): PeerPart {
  let part = parts.get(peer);
  if (part !== undefined) return part;
  const bytes = peer.metadata.backends.get("nixl");
  if (bytes === undefined) throw new DynamoError("transfer-no-path", `${peer.name} has no NIXL`);
  try {
    const body = new ByteReader(bytes);
    const nixlName = body.text(256);
    const count = body.u16();
    if (count > MAX_REGIONS) throw new TruncatedBytes(`${count} regions`);
    const addresses = new Map<number, bigint>();
    for (let i = 0; i < count; i++) addresses.set(body.u32(), body.u64());
    part = { nixlName, addresses, metadata: Buffer.from(body.bytes(body.remaining)) };
  } catch (thrown) {
    if (!(thrown instanceof TruncatedBytes)) throw thrown;
    throw new DynamoError("malformed-frame", "the peer's NIXL metadata are malformed", { diagnostic: thrown.message });
  }
  parts.set(peer, part);
  return part;
}

function nixlFailed(name: string, status: number): DynamoError {
  return new DynamoError("transfer-peer-lost", "NIXL refused a call", {
    diagnostic: `nixl_capi_${name} returned ${status}`,
  });
}
