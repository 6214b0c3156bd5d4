import { mockerConfig } from "../../src/engines/mocker/index.ts";
import { DEFAULT_LIMITS } from "../../src/frontend/index.ts";
import { SeededRandom } from "../../src/std/index.ts";
import { PLENTY_QUEUED, checkAtRest, checkCalls, checkHealthy, type CallContext } from "./checkers.ts";
import { ClientCall } from "./client.ts";
import { Cluster, MODEL, type ClusterShape } from "./cluster.ts";
import { EventLog } from "./event-log.ts";
import { watchBalance } from "./balance-watch.ts";
import { BoundsWatch } from "./bounds-watch.ts";
import { FAULT_KINDS, Nemesis, planFaults, type FaultKind, type PlannedFault } from "./faults.ts";
import { Marks } from "./marks.ts";
import { needlessFallbacks, routedWorkers } from "./role-checks.ts";
import { CLAIMS_END_MS, withRoles } from "./roles.ts";
import { withTiers } from "./draw-tiers.ts";
import { Draw, planWorkload, probeCall, type PlannedCall, type WorkloadShape } from "./workload.ts";
import { World } from "./world.ts";

/**
 * One run: a seed makes a cluster, a workload and faults; they play; the faults stop; time runs on until all is at rest;
 * then everything that must hold is checked. The same seed gives the same run, line by line.
 */
export interface RunOptions {
  readonly seed: number;
  /** Log lines kept for people. @default 200 */
  readonly keepLines?: number;
  /** Only these kinds. @default all */
  readonly faults?: readonly FaultKind[];
  /** Changes what the seed planned: for scenes of a known bug. */
  readonly change?: (plan: RunPlan) => RunPlan;
}

export interface RunResult {
  readonly seed: number;
  /** Of the whole event log. */
  readonly hash: string;
  readonly steps: number;
  readonly virtualMs: number;
  readonly calls: number;
  readonly outcomes: ReadonlyMap<string, number>;
  readonly faults: ReadonlyMap<FaultKind, number>;
  /** What did not hold; empty when all is well. */
  readonly violations: readonly string[];
  readonly lastLines: readonly string[];
  readonly marks: Marks;
  /** Blocks between workers: how long their transfers would have taken alone, and took. */
  /** Of what is bounded: the highest share of its bound. */
  readonly peaks: ReadonlyMap<string, number>;
  readonly transfers: { readonly count: number; readonly aloneMs: number; readonly tookMs: number };
}

/** A bus of a real engine: a block in a hundredth of a millisecond. */
const PLENTY_OF_BANDWIDTH = { cardBytesPerMs: 6_400, busBytesPerMs: 6_400, storeBytesPerMs: 6_400 };
/** After the workers are up: routers know them, indexes are restored. */
const SETTLE_MS = 2_000;
/** Discovery forgets the dead, events of the dead end, indexes are asked again. */
const RECOVER_MS = 7_000;
const PROBES = 2;
const START_LIMIT_MS = 10_000;

export async function runSeed({ seed, keepLines = 200, faults, change }: RunOptions): Promise<RunResult> {
  const log = new EventLog(keepLines);
  const marks = new Marks();
  const world = new World(seed, log, marks);
  const drawn = planRun(seed, faults);
  const plan = change?.(drawn) ?? drawn;
  const cluster = new Cluster(world, plan.cluster);
  const violations: string[] = [];
  const run = new Run(world, cluster, plan, violations);
  // A promise that nobody handles would have ended a real process.
  const onUnhandled = (error: unknown): void => void world.crashes.push({ process: "a process", error });
  process.on("unhandledRejection", onUnhandled);
  const balanceIsOver = watchBalance((violation) => void violations.push(violation));
  try {
    await run.play();
  } catch (error) {
    violations.push(
      `the simulation itself failed: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`,
    );
  }
  process.off("unhandledRejection", onUnhandled);
  if (balanceIsOver() > 0) marks.mark("balance looked at");
  for (const { process: name, error } of world.crashes) {
    violations.push(`${name}: uncaught ${error instanceof Error ? error.stack : String(error)}`);
  }
  return {
    seed,
    hash: log.hash,
    steps: world.steps,
    virtualMs: world.nowMs,
    calls: run.calls.length,
    outcomes: run.outcomes,
    faults: run.happened,
    violations,
    lastLines: log.last(keepLines),
    marks,
    peaks: run.bounds.peaks,
    transfers: cluster.transfers?.arrived ?? { count: 0, aloneMs: 0, tookMs: 0 },
  };
}

export interface RunPlan {
  readonly cluster: ClusterShape;
  readonly workload: WorkloadShape;
  readonly calls: readonly PlannedCall[];
  readonly faults: readonly PlannedFault[];
}

/** From the seed alone. */
export function planRun(seed: number, kinds?: readonly FaultKind[]): RunPlan {
  const random = new SeededRandom(seed ^ 0x5eed);
  const draw = new Draw(random);
  const contextLength = 1_024;
  const engine = {
    contextLength,
    blockSizeTokens: 16,
    totalBlocks: draw.pick([40, 64, 128, 256]),
    maxSequences: draw.int(2, 12),
    maxBatchedTokens: draw.pick([128, 256, 512]),
    dataParallelSize: draw.chance(0.2) ? 2 : 1,
    engineType: draw.chance(0.2) ? "sglang" : "vllm",
    startupTimeMs: draw.pick([0, 100]),
    speedupRatio: draw.pick([1, 1, 4]),
  } as const;
  const isTight = draw.chance(0.25);
  const cluster: ClusterShape = {
    frontends: draw.int(1, 3),
    workers: draw.int(1, 5),
    engine,
    maxQueuedRequests: draw.chance(0.2) ? draw.int(0, 4) : PLENTY_QUEUED,
    eventLossShare: draw.chance(0.5) ? draw.pick([0.01, 0.1]) : 0,
    // Of seeds that are no known scene.
    eventHoldShare: seed % 4 === 0 ? 0.05 : 0,
    fabric: PLENTY_OF_BANDWIDTH,
    eventRepeatShare: draw.chance(0.2) ? 0.2 : 0,
    frontend: {
      routerMode: draw.pick(["kv", "kv", "kv", "round-robin", "random", "least-loaded", "power-of-two"]),
      routerReplicaSync: draw.chance(0.4),
      stallLimitMs: draw.pick([1_500, 5_000, 30_000]),
      ...(draw.chance(0.2) ? { router: { queueThreshold: draw.real(0.2, 2) } } : {}),
      limits: {
        ...DEFAULT_LIMITS,
        requestTimeoutMs: draw.pick([4_000, 10_000, 20_000]),
        bodyTimeoutMs: 3_000,
        concurrentRequests: isTight ? draw.int(2, 6) : 1_024,
        queuedRequests: isTight ? draw.int(0, 6) : 1_024,
        responseBufferBytes: draw.chance(0.3) ? 2_048 : DEFAULT_LIMITS.responseBufferBytes,
      },
    },
  };
  const workload: WorkloadShape = {
    calls: draw.int(10, 40),
    spanMs: draw.real(1_000, 6_000),
    model: MODEL,
    vocabularySize: mockerConfig(engine).vocabularySize,
    contextLength,
    maxTokens: draw.pick([8, 24, 64, 128]),
    oddShare: 0.1,
  };
  const faultCount = draw.chance(0.15) ? 0 : draw.int(1, 6);
  const plan: RunPlan = {
    cluster,
    workload,
    calls: planWorkload(workload, random),
    faults: planFaults(faultCount, workload.spanMs, kinds ?? FAULT_KINDS, random),
  };
  return withTiers(withRoles(plan, seed, kinds), seed, kinds);
}

class Run {
  readonly calls: ClientCall[] = [];
  readonly bounds: BoundsWatch;
  readonly #world: World;
  readonly #cluster: Cluster;
  readonly #plan: RunPlan;
  readonly #violations: string[];
  readonly #nemesis: Nemesis;
  readonly #draw: Draw;

  constructor(world: World, cluster: Cluster, plan: RunPlan, violations: string[]) {
    this.#world = world;
    this.#cluster = cluster;
    this.#plan = plan;
    this.#violations = violations;
    this.#nemesis = new Nemesis(cluster, world.fork());
    this.bounds = new BoundsWatch(cluster);
    this.#draw = new Draw(world.fork());
  }

  get happened(): ReadonlyMap<FaultKind, number> {
    return this.#nemesis.happened;
  }

  get outcomes(): ReadonlyMap<string, number> {
    const counts = new Map<string, number>();
    for (const { outcome, status, code } of this.calls) {
      const name = outcome === "refused" || outcome === "failed" ? `${outcome} ${status} ${code}` : (outcome ?? "open");
      counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    return counts;
  }

  async play(): Promise<void> {
    const world = this.#world;
    const cluster = this.#cluster;
    cluster.startAll();
    if (!(await this.#untilHealthy())) return;
    await this.#pass(SETTLE_MS);
    // The faults and the load.
    const { calls, faults, workload } = this.#plan;
    const context: CallContext = { startMs: world.nowMs, calmMs: Infinity, hadFaults: faults.length > 0 };
    this.#nemesis.schedule(faults);
    this.bounds.start();
    for (const call of calls) world.timer(call.atMs, () => this.#begin(call));
    await this.#pass(workload.spanMs);
    this.#nemesis.stop();
    world.record("the faults are over");
    const calmMs = world.nowMs;
    const { requestTimeoutMs } = this.#plan.cluster.frontend.limits;
    await world.run(
      calmMs + requestTimeoutMs + 25_000,
      () => this.calls.length >= calls.length && this.calls.every((call) => call.isOver),
    );
    this.bounds.stop();
    this.#violations.push(...this.bounds.violations, ...this.#nemesis.recovery.violations);
    if (faults.length === 0) this.#violations.push(...this.#cluster.moves.map((move) => `without a fault: ${move}`));
    if (faults.length === 0)
      this.#violations.push(...needlessFallbacks(cluster).map((line) => `without a fault: ${line}`));
    checkCalls(this.calls, { ...context, calmMs }, this.#plan, cluster, this.#violations);
    if (!(await this.#untilHealthy())) return;
    await this.#pass(RECOVER_MS);
    if (cluster.transfers !== undefined) await this.#pass(CLAIMS_END_MS - RECOVER_MS);
    checkHealthy(cluster, this.#violations);
    checkAtRest(cluster, this.#violations);
    await this.#probe();
    await this.#pass(1_000);
    checkAtRest(cluster, this.#violations);
    await this.#leave();
  }

  #begin(plan: PlannedCall): void {
    const { frontends } = this.#cluster;
    const call = new ClientCall(this.#cluster, plan, this.#draw.pick(frontends).host);
    this.calls.push(call);
    const { behaviour } = plan;
    if (behaviour.kind === "hostile") this.#world.marks.mark("client sent a hostile body");
    if (behaviour.kind === "garbage") this.#world.marks.mark("client sent garbage");
  }

  async #pass(ms: number): Promise<void> {
    await this.#world.run(this.#world.nowMs + ms);
  }

  /** Every seat serves, and every frontend has every worker. */
  async #untilHealthy(): Promise<boolean> {
    const cluster = this.#cluster;
    const isHealthy = (): boolean =>
      cluster.seats.every((seat) => seat.isServing) &&
      cluster.frontends.every(({ frontend }) => {
        const known = routedWorkers(frontend!.models.find(MODEL));
        return cluster.workers.every(({ worker }) => known.some(({ instanceId }) => instanceId === worker!.instanceId));
      });
    const ended = await this.#world.run(this.#world.nowMs + START_LIMIT_MS + RECOVER_MS, isHealthy);
    if (ended === "done") return true;
    const states = cluster.seats.map((seat) => {
      const known = routedWorkers(seat.frontend?.models.find(MODEL)).map(({ instanceId }) => instanceId);
      return `${seat.process.name} ${seat.process.state}${seat.role === undefined ? " no role" : ""}${seat.isDraining ? " draining" : ""} ${seat.worker?.instanceId ?? known.join(",")}`;
    });
    this.#violations.push(`the cluster did not become healthy: ${states.join("; ")}`);
    return false;
  }

  /** New requests on every frontend: all succeed, at once. */
  async #probe(): Promise<void> {
    const world = this.#world;
    const random = world.fork();
    const probes: ClientCall[] = [];
    for (const [index, { host }] of this.#cluster.frontends.entries()) {
      for (let i = 0; i < PROBES; i++) {
        const call = probeCall(`probe-${host}-${i}`, 0, { ...this.#plan.workload, maxTokens: 8 }, random);
        // One after the other, so that even the tightest gate takes them.
        world.timer(i * 600 + index * 200, () => probes.push(new ClientCall(this.#cluster, call, host)));
      }
    }
    const count = PROBES * this.#cluster.frontends.length;
    await world.run(world.nowMs + 20_000, () => probes.length === count && probes.every((probe) => probe.isOver));
    for (const probe of probes) {
      this.#violations.push(...probe.problems.map((problem) => `${probe.plan.id}: ${problem}`));
      if (probe.outcome !== "finished") {
        this.#violations.push(
          `${probe.plan.id}: a request to the healthy cluster: ${probe.outcome ?? "open"} ${probe.status} ${probe.code}`,
        );
      }
    }
  }

  /** All roles drain; nothing stays behind. */
  async #leave(): Promise<void> {
    const cluster = this.#cluster;
    const world = this.#world;
    for (const seat of [...cluster.frontends, ...cluster.workers]) {
      seat.restarts = false;
      const { role, process } = seat;
      process.enqueue(() => void role!.drain(5_000));
    }
    await world.run(world.nowMs + 30_000, () => cluster.seats.every(({ process }) => process.state === "dead"));
    for (const { process } of cluster.seats) {
      if (process.state !== "dead") this.#violations.push(`${process.name} did not leave when drained`);
    }
    // What hangs on the world's own timers: leases of the killed, their publishers.
    const ended = await world.run(world.nowMs + 120_000);
    if (ended !== "idle") this.#violations.push(`${world.timerCount} timers still run after everybody left`);
    if (cluster.store.entries.size > 0)
      this.#violations.push(`discovery still has ${[...cluster.store.entries.keys()].join(", ")}`);
    if (cluster.bus.topicCount > 0) this.#violations.push(`the event bus still has ${cluster.bus.topicCount} topics`);
    if (cluster.network.ends.size > 0)
      this.#violations.push(`${cluster.network.ends.size} ends of connections are still open`);
  }
}
