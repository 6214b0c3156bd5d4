import { pino } from "pino";
import { MOCK_BLOCK_BYTES, MockerEngine, mockerConfig } from "../../src/engines/mocker/index.ts";
import type { MockerEngineConfig } from "../../src/engines/index.ts";
import { startFrontend, type FrontendConfig, type RunningFrontendLoop } from "../../src/frontend/index.ts";
import { Metrics, silentLogger, type Logger } from "../../src/observability/index.ts";
import type { WorkerRole } from "../../src/protocol/index.ts";
import type { Planes, RunningRole } from "../../src/runtime/component/index.ts";
import { MemoryDiscovery, MemoryStore } from "../../src/runtime/discovery/index.ts";
import { MemoryEventBus, MemoryEventPlane } from "../../src/runtime/event-plane/index.ts";
import { TcpRequestPlane } from "../../src/runtime/request-plane/index.ts";
import { loadServedTokenizer, startWorker, type RunningWorker } from "../../src/worker/index.ts";
import { FaultyEngine } from "./faulty-engine.ts";
import { httpNetwork } from "./http-socket.ts";
import { SimNetwork } from "./network.ts";
import { planeNetwork } from "./plane-socket.ts";
import { WATCHED_KV } from "./balance-watch.ts";
import { SimDisk, SimStore } from "./disk.ts";
import { Fabric, type FabricShape } from "./fabric.ts";
import type { RolesShape } from "./roles.ts";
import { tieredEngine, type SeatTiers, type TiersShape } from "./tiers.ts";
import { SimTransfers } from "./transfers.ts";
import type { SimProcess, World } from "./world.ts";

/**
 * The cluster of one run: the real roles on simulated processes, planes and clocks. Each role is kept alive by a
 * supervisor, as `dynamo local` or Kubernetes would: whoever ends is started again after a second.
 */
export interface ClusterShape {
  readonly frontends: number;
  readonly workers: number;
  readonly engine: Partial<Omit<MockerEngineConfig, "kind">>;
  readonly frontend: Pick<
    FrontendConfig,
    "routerMode" | "router" | "routerReplicaSync" | "limits" | "stallLimitMs" | "disagg" | "handoffTimeoutMs"
  >;
  readonly maxQueuedRequests: number;
  /** Share of the events, beacons and replay requests that get lost while faults go on. */
  readonly eventLossShare: number;
  /** Share of the events that come once more, behind the next one, while faults go on. */
  readonly eventRepeatShare: number;
  /** Prefill apart from decode. @default every worker does all */
  readonly roles?: RolesShape | undefined;
  /** Chance that what a publisher sent waits a while for one reader, so that others overtake it; each time something comes. */
  readonly eventHoldShare: number;
  readonly fabric: FabricShape;
  /** @default engines have their own cache alone */
  readonly tiers?: TiersShape | undefined;
}

export const MODEL = "mock";
export const HTTP_PORT = 80;
const MAX_HOLD_MS = 30;
const PUSHED_BACK = /"reason":"(worker-full|stream-limit)"/;
const RESTART_MS = 1_000;
/** Shorter than the product's default, so that a run need not wait so long for the dead to be forgotten. */
const LEASE_TTL_MS = 4_000;
export const DRAIN_MS = 5_000;
/** The contract's bound on how late watchers are told. */
const DISCOVERY_DELAY_MS = 200;

export type RoleKind = "frontend" | "worker";

export type TroubleKind =
  /** Down, cut off, hung. */
  | "broken"
  /** Stopped for a while: whatever it does afterwards must be right. */
  | "frozen"
  /** Told to end, not ended: what it has begun it must finish. */
  | "draining"
  /** One connection broke: it was well before and after. */
  | "reset";

/** The same in every run, and it takes a millisecond. */
let tokenizer: ReturnType<typeof loadServedTokenizer> | undefined;

/** From when to when a seat was not what it should be: down, cut off, hung, or just hit. */
export interface Trouble {
  readonly kind: TroubleKind;
  readonly fromMs: number;
  untilMs: number;
}

/** After a role is ready: others have seen it in discovery, fetched its tokenizer and made a connection. */
const JOINED_MS = 1_000;

/** One place in the cluster: the role that runs there now, and its earlier lives. */
export class Seat {
  readonly kind: RoleKind;
  readonly host: string;
  process: SimProcess;
  role: RunningRole | undefined = undefined;
  frontend: RunningFrontendLoop | undefined = undefined;
  worker: RunningWorker | undefined = undefined;
  engine: FaultyEngine | undefined = undefined;
  discovery: MemoryDiscovery | undefined = undefined;
  planes: Planes | undefined = undefined;
  /** It starts with it. */
  workerRole: WorkerRole = "agg";
  /** Of its host; undefined without tiers. */
  disk: SimDisk | undefined = undefined;
  tiers: SeatTiers | undefined = undefined;
  /** What it was from when on. */
  readonly roles: { readonly role: WorkerRole; readonly fromMs: number }[] = [];
  isDraining = false;
  /** The supervisor's: false = stays down. */
  restarts = true;
  life = 0;
  readonly troubles: Trouble[] = [];

  constructor(kind: RoleKind, host: string, process: SimProcess) {
    this.kind = kind;
    this.host = host;
    this.process = process;
  }

  /** It serves and nobody has told it to end. */
  get isServing(): boolean {
    return this.role !== undefined && this.process.state === "running" && !this.isDraining;
  }
}

export class Cluster {
  readonly world: World;
  readonly network: SimNetwork;
  readonly shape: ClusterShape;
  readonly store: MemoryStore;
  readonly bus: MemoryEventBus;
  readonly frontends: Seat[] = [];
  readonly workers: Seat[] = [];
  readonly clients: SimProcess;
  eventsAreLost = true;
  /** Undefined where no worker prefills for others. */
  readonly transfers: SimTransfers | undefined;
  /** The object store of all; undefined without tiers. */
  readonly objects: SimStore | undefined;
  /** A worker's engine copied blocks out for another one. */
  onExport: ((seat: Seat) => void) | undefined = undefined;
  /** Log lines of requests that left a worker, though not for its being full. */
  readonly moves: string[] = [];
  /** Log lines of requests whose prompt the decode worker computed after all. */
  readonly fallbacks: string[] = [];
  /** For all, those that start meanwhile too. */
  discoveryIsDown = false;
  readonly #operator: SimProcess;
  readonly #fabric: Fabric;
  readonly #random;
  readonly #logger: Logger;

  constructor(world: World, shape: ClusterShape) {
    this.world = world;
    this.shape = shape;
    this.network = new SimNetwork(world);
    this.#fabric = new Fabric(world, shape.fabric);
    if (shape.roles !== undefined) this.transfers = new SimTransfers(world, this.network, this.#fabric);
    this.#random = world.fork();
    this.#operator = world.process("operator");
    this.clients = world.process("clients");
    this.store = new MemoryStore({ clock: this.#operator.clock });
    this.bus = new MemoryEventBus({
      drop: (kind, _topic, publisherId, _sequence, to) => this.#dropsEvent(kind, publisherId, to),
      repeat: () => this.#repeatsEvent(),
      ...(shape.eventHoldShare > 0 ? { hold: (_topic, publisherId, to) => this.#holdsEvents(publisherId, to) } : {}),
    });
    this.#logger = pino(
      { level: "info", base: null, timestamp: false, messageKey: "message" },
      { write: (line: string) => this.#onLogLine(line) },
    ) as Logger;
    if (shape.tiers !== undefined) this.objects = new SimStore(world, this.#fabric);
    for (let i = 0; i < shape.workers; i++) {
      const seat = this.#seat("worker", `w${i}`);
      if (shape.roles !== undefined) seat.workerRole = shape.roles.workers[i] ?? "decode";
      seat.roles.push({ role: seat.workerRole, fromMs: 0 });
      if (shape.tiers !== undefined) seat.disk = new SimDisk(world, shape.tiers.diskBytesPerMs);
      this.workers.push(seat);
    }
    for (let i = 0; i < shape.frontends; i++) this.frontends.push(this.#seat("frontend", `f${i}`));
  }

  #onLogLine(line: string): void {
    const { world } = this;
    world.record(line.trimEnd());
    if (line.includes("lease was lost: registering again")) world.marks.mark("lease lost");
    if (line.includes('"reason":"slow-reader"')) world.marks.mark("client cut off as a slow reader");
    if (line.includes("goes on with another worker") && !PUSHED_BACK.test(line)) this.moves.push(line.trimEnd());
    if (line.includes("computed by the decode worker")) {
      this.fallbacks.push(line.trimEnd());
      world.marks.mark("prompt computed by the decode worker instead");
    }
    if (line.includes('"reason":"transfer-full"')) world.marks.mark("memory of handoffs full");
    if (line.includes("handoff: request-deadline")) world.marks.mark("transfer ran out of time");
    if (line.includes('"migrations":') && !line.includes('"migrations":0')) world.marks.mark("request migrated");
  }

  get seats(): Seat[] {
    return [...this.workers, ...this.frontends];
  }

  #seat(kind: RoleKind, host: string): Seat {
    return new Seat(kind, host, this.world.process(`${host}#0`));
  }

  startAll(): void {
    for (const seat of this.seats) this.start(seat);
  }

  /** A new life on the seat. */
  start(seat: Seat): void {
    const life = ++seat.life;
    const process = this.world.process(`${seat.host}#${life}`);
    seat.process = process;
    seat.isDraining = false;
    seat.role = undefined;
    seat.frontend = undefined;
    seat.worker = undefined;
    const planes = this.#planes(seat, process);
    process.enqueue(() => {
      const starting: Promise<RunningRole> =
        seat.kind === "worker" ? this.#startWorker(seat, planes) : this.#startFrontend(seat, planes);
      starting.then(
        (role) => {
          if (seat.process !== process || process.state === "dead") return;
          seat.role = role;
          seat.roles.push({ role: seat.workerRole, fromMs: this.world.nowMs });
          this.recovered(seat);
          this.world.record(`${process.name} is ready`);
          if (life > 1 && (seat.tiers?.disk?.usedBytes ?? 0) > 0) {
            this.world.marks.mark("blocks found again after a restart");
          }
          if (life > 1) this.world.marks.mark(seat.kind === "worker" ? "worker restarted" : "frontend restarted");
          role.done.then(
            () => this.#exited(seat, process, "done"),
            (error: unknown) => this.#exited(seat, process, String(error)),
          );
        },
        (error: unknown) => this.#exited(seat, process, `start failed: ${String(error)}`),
      );
    });
  }

  /** Ends the process at once. `isSilent`: its host with it, so that no kernel closes its connections. */
  kill(seat: Seat, isSilent = false): void {
    const { process } = seat;
    if (process.state === "dead") return;
    this.trouble(seat);
    this.world.record(`${process.name} is killed${isSilent ? " with its host" : ""}`);
    process.kill();
    this.network.closeAllOf(process, isSilent);
    this.transfers?.lost(process, isSilent);
    seat.disk?.lost(process, isSilent);
    this.#leave(seat);
    if (seat.restarts) this.world.timer(RESTART_MS, () => this.start(seat));
  }

  /** SIGTERM: drains, then leaves; the supervisor starts it again. */
  drain(seat: Seat): void {
    if (!seat.isServing) return;
    seat.isDraining = true;
    this.trouble(seat, Infinity, "draining");
    const { role, process } = seat;
    this.world.record(`${process.name} is drained`);
    process.enqueue(() => void role!.drain(DRAIN_MS));
  }

  /** The seat is in trouble, for a time or until its next life is up. */
  trouble(seat: Seat, forMs = Infinity, kind: TroubleKind = "broken"): void {
    const { nowMs } = this.world;
    seat.troubles.push({ kind, fromMs: nowMs, untilMs: nowMs + forMs + JOINED_MS });
  }

  /** One connection of the worker broke. */
  wasReset(seat: Seat): void {
    const { nowMs } = this.world;
    seat.troubles.push({ kind: "reset", fromMs: nowMs, untilMs: nowMs });
  }

  discoveryGoesDown(): void {
    this.discoveryIsDown = true;
    this.store.isDown = true;
    for (const { discovery } of this.seats) if (discovery !== undefined) discovery.isReachable = false;
  }

  /** Discovery can be read by all again: who came up meanwhile will be known. */
  discoveryIsBack(): void {
    this.discoveryIsDown = false;
    this.store.isDown = false;
    for (const { discovery } of this.seats) if (discovery !== undefined) discovery.isReachable = true;
    for (const seat of this.seats) if (seat.isServing) this.recovered(seat);
  }

  /** What it was in trouble with is over, once others know it again. */
  recovered({ troubles }: Seat): void {
    if (this.seats.some(({ discovery }) => discovery?.isReachable === false)) return;
    const untilMs = this.world.nowMs + JOINED_MS;
    for (const trouble of troubles) if (trouble.untilMs === Infinity) trouble.untilMs = untilMs;
  }

  #exited(seat: Seat, process: SimProcess, how: string): void {
    if (seat.process !== process || process.state === "dead") return;
    if (!seat.isDraining) this.trouble(seat);
    this.world.record(`${process.name} exited: ${how}`);
    const { planes } = seat;
    // What `cli/` does after a role: close the planes, then the process ends.
    const closing = Promise.all([planes!.events.close(), planes!.request.close(), planes!.discovery.close()]);
    const gone = (): void => {
      if (process.state === "dead") return;
      process.kill();
      this.network.closeAllOf(process, false);
      this.transfers?.lost(process, false);
      seat.disk?.lost(process, false);
      this.#leave(seat);
      if (seat.restarts) this.world.timer(RESTART_MS, () => this.start(seat));
    };
    closing.then(gone, gone);
  }

  /** The planes of a process that is dead. */
  #leave(seat: Seat): void {
    const { planes, process } = seat;
    if (planes === undefined) return;
    (planes.discovery as MemoryDiscovery).abandon();
    const events = planes.events as MemoryEventPlane;
    events.abandon();
    // Subscribers learn of it from discovery, when its lease ends.
    this.world.timer(LEASE_TTL_MS, () => void events.close());
    if (seat.process === process) {
      seat.role = undefined;
      seat.engine = undefined;
      seat.tiers = undefined;
    }
  }

  #planes(seat: Seat, process: SimProcess): Planes {
    const { clock, random } = process;
    const logger = this.#logger.child({ p: process.name });
    const metrics = new Metrics();
    const later = (maxMs: number) => (run: () => void) => {
      this.world.timer(this.#random.nextFloat() * maxMs, () => process.interrupt(run));
    };
    const discovery = new MemoryDiscovery({
      store: this.store,
      clock,
      logger,
      random,
      ttlMs: LEASE_TTL_MS,
      schedule: later(DISCOVERY_DELAY_MS),
    });
    const planes: Planes = {
      discovery,
      request: new TcpRequestPlane({
        host: seat.host,
        clock,
        logger,
        metrics,
        random,
        network: planeNetwork(this.network, process),
      }),
      events: new MemoryEventPlane({ bus: this.bus, clock, logger, random, name: seat.host, schedule: later(1) }),
      http: httpNetwork(this.network, process),
      clock,
      random,
      logger,
      metrics,
    };
    if (this.discoveryIsDown) discovery.isReachable = false;
    seat.planes = planes;
    seat.discovery = discovery;
    return planes;
  }

  async #startWorker(seat: Seat, planes: Planes): Promise<RunningRole> {
    const { process } = seat;
    const { roles } = this.shape;
    const worker = await startWorker(
      {
        namespace: "dynamo",
        component: "backend",
        engine: mockerConfig(this.shape.engine),
        modelName: MODEL,
        maxQueuedRequests: this.shape.maxQueuedRequests,
        drainTimeoutMs: DRAIN_MS,
        systemPort: undefined,
        ...(roles === undefined
          ? {}
          : {
              role: seat.workerRole,
              handoff: {
                ...roles.handoff,
                transfer: { memory: this.transfers!.networkOf(process), tcp: false, shm: false },
              },
            }),
      },
      planes,
      new AbortController().signal,
      {
        tokenizer: await (tokenizer ??= loadServedTokenizer({ engine: mockerConfig({}) }, silentLogger)),
        makeEngine: (config, { clock, logger }) => {
          const mocker = config as MockerEngineConfig;
          const share = MOCK_BLOCK_BYTES / (mocker.blockSizeTokens * mocker.kvBytesPerToken);
          const bus = this.#fabric.bus(process, share);
          const links = { imports: bus, host: bus };
          seat.engine = new FaultyEngine(new MockerEngine(mocker, { clock, logger, links }));
          seat.engine.onWrongBlock = (error) => this.world.crashes.push({ process: process.name, error });
          seat.engine.onExport = () => this.onExport?.(seat);
          const { tiers } = this.shape;
          if (tiers === undefined) return Promise.resolve(seat.engine);
          const tiered = tieredEngine({
            shape: tiers,
            engine: seat.engine,
            process,
            clock,
            logger,
            marks: this.world.marks,
            disk: seat.disk!,
            store: this.objects!,
            onTiers: (made) => {
              if (seat.process === process) seat.tiers = made;
            },
          });
          return Promise.resolve(tiered);
        },
      },
    );
    this.#publishers.set(worker.instanceId, seat.host);
    seat.worker = worker;
    return worker;
  }

  async #startFrontend(seat: Seat, planes: Planes): Promise<RunningRole> {
    const frontend = await startFrontend(
      {
        namespace: "dynamo",
        httpHost: seat.host,
        httpPort: HTTP_PORT,
        drainTimeoutMs: DRAIN_MS,
        ...this.shape.frontend,
        ...(this.shape.frontend.routerMode === "kv" ? { routerMode: WATCHED_KV } : {}),
      },
      planes,
      new AbortController().signal,
    );
    seat.frontend = frontend;
    return frontend;
  }

  /** Host of a publisher, for partitions. Ids that nobody registered are of frontends. */
  readonly #publishers = new Map<string, string>();

  #repeatsEvent(): boolean {
    const { eventRepeatShare } = this.shape;
    if (eventRepeatShare === 0 || !this.eventsAreLost || this.#random.nextFloat() >= eventRepeatShare) return false;
    this.world.marks.mark("event repeated");
    return true;
  }

  /** Until when, by publisher and reader. */
  readonly #held = new Map<string, number>();

  #holdsEvents(publisherId: string, to: string): boolean {
    const { nowMs, marks } = this.world;
    const key = `${publisherId}>${to}`;
    const untilMs = this.#held.get(key);
    if (untilMs !== undefined && nowMs < untilMs) return true;
    this.#held.delete(key);
    if (untilMs !== undefined || this.#random.nextFloat() >= this.shape.eventHoldShare) return false;
    marks.mark("events overtaken by another publisher's");
    this.#held.set(key, nowMs + this.#random.nextFloat() * MAX_HOLD_MS);
    return true;
  }

  #dropsEvent(kind: "event" | "beacon" | "replay", publisherId: string, to: string): boolean {
    const from = this.#publishers.get(publisherId);
    const isCut = from !== undefined && (this.network.fault(from, to).blocked || this.network.fault(to, from).blocked);
    const isLost = isCut || (this.eventsAreLost && this.#random.nextFloat() < this.shape.eventLossShare);
    if (isLost) this.world.marks.mark(kind === "replay" ? "replay lost" : "event lost");
    return isLost;
  }
}
