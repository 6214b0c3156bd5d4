import type { ClientCall } from "./client.ts";
import { DRAIN_MS, MODEL, type Cluster, type Trouble } from "./cluster.ts";
import type { Marks } from "./marks.ts";
import { checkHandoffsAtRest, decodedAllThe, routedWorkers } from "./role-checks.ts";
import { checkTierView, checkTiersAtRest } from "./tier-checks.ts";
import type { RunPlan } from "./simulation.ts";

/** What must hold, whatever happened. Each checker adds one line per violation. */
export interface CallContext {
  readonly startMs: number;
  /** When the faults were over. */
  readonly calmMs: number;
  readonly hadFaults: boolean;
}

/** What the network and the wheel of deadlines may add to a deadline. */
const MARGIN_MS = 2_000;

/** Errors that a proper request may end with while things break. */
const FAULT_CODES = new Set([
  "no_workers",
  "draining",
  "worker_lost",
  "worker_unreachable",
  "worker_stalled",
  "engine_failed",
  "engine_stopped",
  "request_deadline",
  "endpoint_not_found",
  "connect_timeout",
  "cancelled",
  "model_not_found",
]);
const OVERLOAD_CODES = new Set(["too_many_requests", "worker_full", "stream_limit"]);

export function checkCalls(
  calls: readonly ClientCall[],
  context: CallContext,
  plan: RunPlan,
  cluster: Cluster,
  violations: string[],
): void {
  for (const call of calls) {
    const bad = (what: string): void => void violations.push(`${call.plan.id} at ${call.host}: ${what}`);
    for (const problem of call.problems) bad(problem);
    if (!call.isOver) {
      bad(`never ended: began at ${call.startedMs.toFixed(0)} ms`);
      continue;
    }
    checkTime(call, context, plan, cluster, bad);
    const { behaviour } = call.plan;
    if (behaviour.kind === "garbage") continue;
    markOutcome(call, cluster.world.marks);
    if (behaviour.kind === "hostile") checkHostile(call, behaviour.statuses, context, bad);
    else {
      checkProper(call, context, bad);
      checkSurvival(call, plan, cluster, bad);
      checkDrain(call, cluster, bad);
    }
  }
}

function markOutcome({ outcome, status, code }: ClientCall, marks: Marks): void {
  if (outcome === "refused") marks.mark("request failed before its headers");
  if (outcome === "refused" && status === 529) marks.mark("request refused for overload");
  if (outcome === "refused" && code === "draining") marks.mark("request refused while draining");
  if (outcome === "failed") marks.mark("stream failed after its headers");
  if (outcome === "unreachable") marks.mark("frontend unreachable");
  if (outcome === "cut off") marks.mark("connection lost with its frontend");
  if (code === "request_deadline") marks.mark("request ran out of time");
}

function checkHostile(
  { outcome, status, code, broken, plan }: ClientCall,
  statuses: readonly number[],
  { hadFaults }: CallContext,
  bad: (what: string) => void,
): void {
  if (broken !== undefined) {
    if (!hadFaults) bad(`its connection broke without a fault: ${broken}`);
    return;
  }
  // Some are only seen to be wrong once they have a place and the prompt its tokens.
  if (
    outcome === "refused" &&
    (statuses.includes(status) || OVERLOAD_CODES.has(code) || (isTrouble(code) && hadFaults))
  ) {
    return;
  }
  bad(`a hostile body got ${outcome} ${status} ${code}: ${plan.body.slice(0, 120)}`);
}

function checkProper(call: ClientCall, { hadFaults }: CallContext, bad: (what: string) => void): void {
  const { outcome, status, code, broken, plan } = call;
  if (outcome === "refused" || outcome === "failed") {
    if (OVERLOAD_CODES.has(code) || code === "request_deadline") return;
    if (!isTrouble(code)) bad(`a proper request got ${status} ${code}`);
    else if (!hadFaults) bad(`got ${status} ${code} without a fault`);
  } else if (broken !== undefined && !hadFaults && plan.behaviour.kind !== "reads slowly") {
    bad(`its connection broke without a fault: ${broken}`);
  }
}

/** Workers that queue this many push nobody back: a run has fewer requests. */
export const PLENTY_QUEUED = 64;

/** Above any answer of a run. */
const PLENTY_BYTES = 256 * 1024;

/** Time enough for a fault to be found (heartbeats take 3.25 s) and for the answer. */
const PLENTY_MS = 20_000;

/** Migrations per choice, the product's default. */
const MIGRATIONS = 3;

/**
 * A request whose frontend was well, and for which one worker was well all the time, is answered, whatever happened to the
 * others: unless more of them broke than a request may move, its time ran out, or it was pushed back for capacity. A
 * worker of which one connection broke once was well.
 */
function checkSurvival(
  call: ClientCall,
  plan: RunPlan,
  { frontends, workers, shape }: Cluster,
  bad: (what: string) => void,
): void {
  const hadTime =
    shape.frontend.limits.requestTimeoutMs >= PLENTY_MS && (shape.frontend.stallLimitMs ?? Infinity) < PLENTY_MS;
  // What waited while an engine hung or a frontend was frozen comes at once: more than a tiny buffer holds.
  if (call.outcome === "cut off" && shape.frontend.limits.responseBufferBytes < PLENTY_BYTES) return;
  if (call.outcome === "finished" || call.outcome === "left" || call.plan.behaviour.kind !== "reads") return;
  if (OVERLOAD_CODES.has(call.code) || (call.code === "request_deadline" && !hadTime)) return;
  const isHit = ({ fromMs, untilMs }: Trouble): boolean => fromMs <= call.endedMs && untilMs >= call.startedMs;
  const frontend = frontends.find(({ host }) => host === call.host)!;
  const own = frontend.troubles.filter(isHit);
  // A frontend that was stopped has lost time, and must not take its own pause for the workers' fault.
  if (own.some(({ kind }) => kind !== "frozen") || (own.length > 0 && call.code === "request_deadline")) return;
  // What joined while it was stopped it hears of when it is through with the requests that waited.
  if (own.length > 0 && call.code === "model_not_found") return;
  const steady = workers.filter((seat) => {
    const hit = seat.troubles.filter(isHit);
    if (!decodedAllThe(seat, call.startedMs, call.endedMs)) return false;
    return hit.length === 0 || (hit.length === 1 && hit[0]!.kind === "reset");
  });
  const hits = workers.reduce((sum, { troubles }) => sum + troubles.filter(isHit).length, 0);
  if (steady.length === 0 || hits > MIGRATIONS) return;
  if (call.code === "request_deadline" && neededMs(plan) / steady.length > PLENTY_MS / 2) return;
  const left = steady.map(({ host }) => host).join();
  bad(
    `${call.outcome} ${call.status} ${call.code}, though ${left} could have answered and only ${hits} faults hit workers`,
  );
}

/** About what one worker needs for all of a run's answers, when its blocks or places are what it lacks: they run in shifts. */
function neededMs({ cluster: { engine }, calls }: RunPlan): number {
  const { blockSizeTokens = 16, totalBlocks = 1, maxSequences = 1, speedupRatio = 1, engineType } = engine;
  let blockMs = 0;
  let placeMs = 0;
  for (const { asked } of calls) {
    for (const { prompt, maxTokens } of asked) {
      placeMs += maxTokens * (STEP_MS / speedupRatio);
      blockMs += Math.ceil((prompt.length + maxTokens) / blockSizeTokens) * maxTokens * (STEP_MS / speedupRatio);
    }
  }
  // It sets blocks aside for tokens that may still come: about half of them stand empty.
  const share = engineType === "sglang" ? 0.5 : 1;
  return Math.max(blockMs / (share * totalBlocks), placeMs / maxSequences);
}

/** Of the mock engine's model, about. */
const STEP_MS = 12;

/** A frontend that drains finishes what it has begun, as far as its grace goes. */
function checkDrain(call: ClientCall, { frontends, shape }: Cluster, bad: (what: string) => void): void {
  if (call.outcome !== "cut off" || call.plan.behaviour.kind !== "reads") return;
  // As in `checkSurvival`: what a hung engine held back comes at once.
  if (shape.frontend.limits.responseBufferBytes < PLENTY_BYTES) return;
  const { troubles } = frontends.find(({ host }) => host === call.host)!;
  const hits = troubles.filter(({ fromMs, untilMs }) => fromMs <= call.endedMs && untilMs >= call.startedMs);
  const isOnlyDrained = hits.length > 0 && hits.every(({ kind }) => kind === "draining");
  // One that came after the drain began may find the door closing.
  if (!isOnlyDrained || call.startedMs > hits[0]!.fromMs - MARGIN_OF_ARRIVAL_MS) return;
  if (call.endedMs < hits[0]!.fromMs + DRAIN_MS - 100)
    bad("cut off by a frontend that drained, before its grace was over");
}

/** A request that is still on its way to the frontend. */
const MARGIN_OF_ARRIVAL_MS = 50;

function isTrouble(code: string): boolean {
  return FAULT_CODES.has(code) || OVERLOAD_CODES.has(code);
}

/** Its deadline, counted from its arrival; a frontend that is frozen answers when it thaws. */
function checkTime(
  call: ClientCall,
  { calmMs }: CallContext,
  plan: RunPlan,
  { frontends }: Cluster,
  bad: (what: string) => void,
): void {
  const { behaviour } = call.plan;
  if (behaviour.kind === "garbage" || behaviour.kind === "leaves") return;
  const pauseMs = behaviour.kind === "reads slowly" ? behaviour.pauseMs : 0;
  const limitMs = plan.cluster.frontend.limits.requestTimeoutMs + MARGIN_MS;
  // One that came to a frontend in trouble has arrived when that one reads again.
  const { troubles } = frontends.find(({ host }) => host === call.host)!;
  let arrivedMs = call.startedMs;
  for (const { fromMs, untilMs } of troubles) {
    if (fromMs <= arrivedMs + MARGIN_OF_ARRIVAL_MS && untilMs > arrivedMs) arrivedMs = Math.min(calmMs, untilMs);
  }
  const byMs = Math.max(arrivedMs + limitMs, Math.min(calmMs, call.startedMs + limitMs + 15_000) + MARGIN_MS) + pauseMs;
  if (call.endedMs > byMs) {
    bad(
      `ended ${(call.endedMs - byMs).toFixed(0)} ms after its deadline and margin: ${call.outcome} ${call.status} ${call.code}`,
    );
  }
}

/** After recovery: every router sees what the workers are. */
export function checkHealthy(cluster: Cluster, violations: string[]): void {
  for (const seat of cluster.frontends) {
    const model = seat.frontend!.models.find(MODEL)!;
    const routed = routedWorkers(model);
    const known = routed.map(({ instanceId }) => instanceId);
    const live = cluster.workers.map(({ worker }) => worker!.instanceId).toSorted();
    if (known.toSorted().join() !== live.join()) {
      violations.push(`${seat.process.name} routes to ${known.join()}, but ${live.join()} are there`);
    }
    for (const worker of routed) {
      if (worker.inhibition.untilMs > cluster.world.nowMs)
        violations.push(`${seat.process.name} still leaves ${worker.instanceId} out`);
    }
  }
}

/** Nothing runs: nothing is booked, held or promised anywhere. */
export function checkAtRest(cluster: Cluster, violations: string[]): void {
  checkHandoffsAtRest(cluster, violations);
  checkTiersAtRest(cluster, violations);
  const truth = new Map<string, readonly Uint32Array[]>();
  for (const seat of cluster.workers) {
    const { engine, worker, process } = seat;
    const load = worker!.load();
    if (load.runningRequests + load.waitingRequests > 0) {
      violations.push(`${process.name} still runs ${load.runningRequests} and has ${load.waitingRequests} waiting`);
    }
    if (load.activeBlocks > 0) violations.push(`${process.name} has ${load.activeBlocks} blocks in use at rest`);
    if (load.preemptions > 0) cluster.world.marks.mark("sequence preempted");
    try {
      truth.set(worker!.instanceId, engine!.mocker.check());
    } catch (error) {
      violations.push(`${process.name}: its blocks: ${String(error)}`);
    }
  }
  for (const seat of cluster.frontends) {
    const { frontend, process } = seat;
    const model = frontend!.models.find(MODEL)!;
    for (const kind of ["incremental", "full"]) {
      const restores = seat.planes!.metrics.counter("dynamo_router_kv_restores_total").labels(kind, "ok");
      if (restores.value > 0) cluster.world.marks.mark(`index restored: ${kind as "incremental" | "full"}`);
    }
    if (frontend!.pipeline.live.size > 0) {
      violations.push(`${process.name} still has ${frontend!.pipeline.live.size} requests`);
    }
    const bookings = [...model.router.liveBookings(), ...(model.prefill?.router.liveBookings() ?? [])];
    if (bookings.length > 0) violations.push(`${process.name} has ${bookings.length} bookings at rest`);
    for (const worker of routedWorkers(model)) {
      for (const rank of worker.ranks) {
        if (rank.activeRequests !== 0 || rank.prefillTokens !== 0 || rank.decodeBlocks !== 0) {
          violations.push(
            `${process.name} counts ${rank.activeRequests} requests, ${rank.prefillTokens} tokens, ${rank.decodeBlocks} blocks on ${worker.instanceId}/${rank.dpRank} at rest`,
          );
        }
        if (model.kvIndex !== undefined) {
          const held = truth.get(worker.instanceId)?.[rank.dpRank];
          const where = `${process.name} on ${worker.instanceId}/${rank.dpRank}`;
          const known = model.kvIndex.dump(rank.indexRank);
          const device = known.filter((event) => event.type !== "stored" || event.tier === "device");
          compareBlocks(where, held, device, violations);
          checkTierView(cluster, where, worker.instanceId, known, violations);
        }
      }
    }
  }
}

function compareBlocks(
  where: string,
  held: Uint32Array | undefined,
  events: readonly { readonly type: string; readonly sequenceHashes?: Uint32Array }[],
  violations: string[],
): void {
  if (held === undefined) return;
  const truth = hashSet(held);
  const known = new Set<string>();
  for (const { sequenceHashes } of events)
    if (sequenceHashes !== undefined) for (const hash of hashSet(sequenceHashes)) known.add(hash);
  const missing = [...truth].filter((hash) => !known.has(hash)).length;
  const extra = [...known].filter((hash) => !truth.has(hash)).length;
  if (missing + extra > 0)
    violations.push(
      `${where}: the index lacks ${missing} blocks and has ${extra} that are not there, of ${truth.size}`,
    );
}

function hashSet(pairs: Uint32Array): Set<string> {
  const set = new Set<string>();
  for (let i = 0; i < pairs.length; i += 2) set.add(`${pairs[i]}:${pairs[i + 1]}`);
  return set;
}
