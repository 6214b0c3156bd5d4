import { DEFAULT_LIMITS as PLANE_LIMITS } from "../../src/runtime/request-plane/index.ts";
import { MODEL, type Cluster, type Seat } from "./cluster.ts";
import { liveHttpSockets } from "./http-socket.ts";
import { livePlaneSockets } from "./plane-socket.ts";

/**
 * What is bounded, looked at while the run goes on, not only at rest: twenty times a second of virtual time every queue and
 * map that clients, workers or events fill is held against its bound. A bound speaks of what is there (requests, choices,
 * blocks, limits of the configuration), so a leak shows long before memory is short.
 */
const LOOK_EVERY_MS = 50;
/** A write of one turn goes out before the limit is looked at. */
const ONE_TURN_BYTES = 64 * 1024;
/** Events that were lost leave blocks in an index until it is restored. */
const LOST_EVENTS_FACTOR = 2;
/** Of a process by itself: planes, reports, watches. */
const OWN_TIMERS = 60;
/** Of a request or a stream: deadline, stage, credit, retry, hold. */
const TIMERS_EACH = 8;
/** Of a connection: heartbeat, hello, idle, back-off. */
const TIMERS_PER_CONNECTION = 6;

export class BoundsWatch {
  readonly violations: string[] = [];
  /** Highest share of its bound that each has reached. */
  readonly peaks = new Map<string, number>();
  readonly #cluster: Cluster;
  #isOn = false;

  constructor(cluster: Cluster) {
    this.#cluster = cluster;
  }

  start(): void {
    this.#isOn = true;
    const look = (): void => {
      if (!this.#isOn) return;
      this.#look();
      this.#cluster.world.timer(LOOK_EVERY_MS, look);
    };
    look();
  }

  stop(): void {
    this.#isOn = false;
  }

  #look(): void {
    const { frontends, workers } = this.#cluster;
    for (const seat of frontends)
      if (seat.process.state !== "dead" && seat.frontend !== undefined) this.#frontend(seat);
    for (const seat of workers) if (seat.process.state !== "dead" && seat.worker !== undefined) this.#worker(seat);
  }

  #frontend(seat: Seat): void {
    const { shape, workers } = this.#cluster;
    const { limits } = shape.frontend;
    const { live } = seat.frontend!.pipeline;
    const views = live.view(10_000);
    const choices = views.reduce((sum, view) => sum + view.choices, 0);
    this.#atMost(seat, "requests", views.length, limits.concurrentRequests + limits.queuedRequests);
    const model = seat.frontend!.models.find(MODEL);
    // Every choice is with one worker at a time; split, it has a place with the one that will decode, too.
    const places = shape.roles === undefined ? 1 : 2;
    const bookings = (model?.router.liveBookings().length ?? 0) + (model?.prefill?.router.liveBookings().length ?? 0);
    this.#atMost(seat, "bookings", bookings, places * choices);
    const lives = workers.reduce((sum, { life }) => sum + life, 0);
    const known = (model?.router.workers.length ?? 0) + (model?.prefill?.router.workers.length ?? 0);
    this.#atMost(seat, "workers", known, lives);
    this.#atMost(seat, "workers with gauges", model?.workerGauges.size ?? 0, lives);
    if (model?.kvIndex !== undefined) {
      const { memberships, ranks } = model.kvIndex.stats();
      this.#atMost(seat, "index entries", memberships, ranks * this.#blocksOfRank());
    }
    for (const { writableLength } of liveHttpSockets(seat.process)) {
      this.#atMost(seat, "bytes for one client", writableLength, limits.responseBufferBytes + ONE_TURN_BYTES);
    }
    this.#connections(seat, choices);
  }

  #worker(seat: Seat): void {
    const { shape } = this.#cluster;
    const { maxSequences = 1, dataParallelSize = 1 } = shape.engine;
    const load = seat.worker!.load();
    const { engine, tiers } = seat;
    // Continuations of a worker that is gone have as much room again.
    this.#atMost(seat, "streams", engine!.live.size, 2 * (maxSequences * dataParallelSize + shape.maxQueuedRequests));
    this.#atMost(seat, "blocks", load.activeBlocks + load.cachedBlocks, load.totalBlocks);
    const { handoffs } = seat.worker!;
    if (handoffs !== undefined && shape.roles !== undefined) {
      const { memoryBytes } = shape.roles.handoff;
      this.#atMost(seat, "bytes handed over", handoffs.heldBlocks * MOCK_BLOCK_BYTES, memoryBytes);
      this.#atMost(seat, "bytes being fetched", handoffs.landingBytes, memoryBytes);
      this.#atMost(seat, "transfers", handoffs.agent.activeTransferCount, engine!.live.size + MAX_PULLS);
    }
    if (tiers !== undefined) {
      this.#atMost(seat, "bytes in host memory", tiers.host.usedBytes, tiers.host.capacityBytes);
      if (tiers.disk !== undefined) this.#atMost(seat, "bytes on disk", tiers.disk.usedBytes, tiers.disk.capacityBytes);
    }
    this.#connections(seat, engine!.live.size + (handoffs?.heldBlocks ?? 0));
  }

  /** What waits in its connections, and timers. */
  #connections(seat: Seat, streams: number): void {
    const { network } = this.#cluster;
    for (const { writableLength } of livePlaneSockets(seat.process)) {
      this.#atMost(seat, "bytes for one peer", writableLength, 2 * PLANE_LIMITS.queuedBytesPerConnection);
    }
    let connections = 0;
    for (const end of network.ends) if (end.process === seat.process) connections++;
    const most = OWN_TIMERS + TIMERS_EACH * streams + TIMERS_PER_CONNECTION * connections;
    this.#atMost(seat, "timers", seat.process.timerCount, most);
  }

  /** Of all tiers, the store that all share included. */
  #blocksOfRank(): number {
    const { shape, objects } = this.#cluster;
    const { engine, tiers } = shape;
    const own = (engine.totalBlocks ?? 0) + (tiers?.hostBlocks ?? 0) + (tiers?.diskBlocks ?? 0);
    return LOST_EVENTS_FACTOR * own + (objects?.blockCount ?? 0);
  }

  #atMost({ process, kind }: Seat, what: string, count: number, most: number): void {
    const name = `${kind}: ${what}`;
    if (most > 0) this.peaks.set(name, Math.max(this.peaks.get(name) ?? 0, count / most));
    if (count > most && this.violations.length < 10) {
      this.violations.push(
        `${process.name} at ${this.#cluster.world.nowMs.toFixed(0)} ms: ${count} ${what}, at most ${most}`,
      );
    }
  }
}

const MOCK_BLOCK_BYTES = 64;
/** Pulls whose request is not with the engine yet. */
const MAX_PULLS = 64;
