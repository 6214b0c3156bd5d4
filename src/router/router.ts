import { DynamoError, toDynamoError } from "../errors/index.ts";
import { silentLogger, type Logger, type Metrics } from "../observability/index.ts";
import type { PlaneHealth } from "../runtime/component/index.ts";
import type { LoadSnapshot } from "../protocol/index.ts";
import type { Clock, Random, TimerHandle } from "../std/index.ts";
import { blockHashSeed, hashBlocks, type BlockHashes } from "../tokens/index.ts";
import { BookedDecision, type DecisionOwner } from "./booked-decision.ts";
import { DEFAULT_ROUTER_CONFIG, type RouterConfig } from "./config.ts";
import type { PoolOutlook } from "./disagg/index.ts";
import { Degradations, EMPTY_INDEX, NO_DEGRADATION, NO_INDEX, SESSION_MOVED } from "./degradations.ts";
import { eligibleRanks, hasRoom, isRankBusy, type Eligible } from "./eligibility.ts";
import { DecisionLog, DecisionRecord } from "./explain/decision-log.ts";
import { renderDecision, type DecisionExplanation } from "./explain/render.ts";
import { OverlapScores, type KvIndexReader } from "./indexer/base.ts";
import type { PolicySettings, RoutingPolicy } from "./policies/index.ts";
import { RemoteBookings, type RemoteResult } from "./remote-bookings.ts";
import type { BookingEvent, RouteRequest, RoutingDecision } from "./route-request.ts";
import { RouterMetrics } from "./router-metrics.ts";
import { ActiveSequences, type Booking } from "./scheduling/active-sequences.ts";
import { ApproximateIndex } from "./scheduling/approximate-index.ts";
import { hasThresholds, type BusyThresholds } from "./scheduling/busy.ts";
import { CandidateColumns, computeCosts, overlapOf, type CostWeights, type PromptShape } from "./scheduling/cost.ts";
import { RouteQueue, type QueueItem, type Waiting } from "./scheduling/queue.ts";
import { SessionAffinity, type Binding } from "./scheduling/session-affinity.ts";
import { Worker, preferenceMultiplier, type Rank, type WorkerDetails } from "./worker-set.ts";

/**
 * Which worker takes a request, of the workers that serve one model. Owns the set of workers, what runs on each, the
 * queue in front of them, and the record of every decision; asks its policy. In memory and synchronous but for the
 * queue: README.md tells how a decision is made and what it costs. Whoever feeds it (the frontend's model registry)
 * adds and removes workers as discovery tells, and hands in load reports.
 *
 * The only way onto a worker is `route` or `routeWhenReady`, and every decision must be released.
 */
export interface RouterOptions {
  readonly model: string;
  readonly policy: RoutingPolicy;
  readonly clock: Clock;
  readonly random: Random;
  readonly metrics: Metrics;
  /** @default says nothing */
  readonly logger?: Logger;
  /** Of the model. @default 16 */
  readonly blockSizeTokens?: number;
  /** What is not given has Dynamo's default. */
  readonly config?: Partial<RouterConfig>;
  /** Which worker holds which blocks, kept up by events. @default none: see `config.kvEvents` */
  readonly index?: RouterIndex;
  /** @default one of its own */
  readonly log?: DecisionLog;
}

/** Discovery tells within 200 ms that a worker went, and within as much that it is back: twice that and a margin. */
const WORKER_RETURN_MS = 1_000;

/** The KV index as the router uses it. The router gives out and takes back the ranks of its workers. */
export interface RouterIndex extends KvIndexReader {
  rankOf(instanceId: string, dpRank: number): number;
  removeWorker(instanceId: string): void;
}

/** How far the index can be trusted right now; asked at each decision. */
export interface IndexHealth {
  /** Such as `kv: 1 of 4 ranks recovering`; undefined when all is well. */
  readonly degradation: string | undefined;
}

/** A request that could not be placed at once. */
export type WaitingRoute = Waiting<RoutingDecision>;

export { renderRestored, type DecisionExplanation } from "./explain/render.ts";

interface QueuedRoute extends QueueItem {
  readonly request: RouteRequest;
}

/** What one look at the workers gave, in columns; between `#evaluate` and the choice nothing else may run. */
interface Evaluation {
  readonly eligible: Eligible;
  readonly prompt: PromptShape;
  readonly weights: CostWeights & PolicySettings;
  readonly hashes: BlockHashes | undefined;
  readonly degradations: readonly string[];
}

export class Router implements DecisionOwner {
  readonly #options: RouterOptions;
  readonly #config: RouterConfig;
  readonly #policy: RoutingPolicy;
  readonly #blockSizeTokens: number;
  readonly #sequences: ActiveSequences;
  readonly #remote: RemoteBookings;
  readonly #index: RouterIndex | undefined;
  /** Own decisions: in place of the index, or beside it. Ranks are slots. */
  readonly #approximate: ApproximateIndex | undefined;
  readonly #queue: RouteQueue<QueuedRoute, RoutingDecision>;
  /** Of those that wait for a place and KV memory. */
  readonly #roomQueue: RouteQueue<QueuedRoute, RoutingDecision>;
  readonly #sessions: SessionAffinity | undefined;
  readonly #log: DecisionLog;
  readonly #degraded: Degradations;
  readonly #live = new Set<BookedDecision>();
  /** Of decisions whose session is bound by them. */
  readonly #leases = new Map<BookedDecision, Binding>();
  /** By instance id, so that the same set gives the same order on every router; a new array at every change. */
  #workers: readonly Worker[] = [];
  #ranks: readonly Rank[] = [];
  readonly #byId = new Map<string, Worker>();
  #turn = 0;
  #requestCount = 0;
  #inhibitedUntilMs = -Infinity;
  /** While it runs, `no-workers` is not yet said to those in the queue. */
  #verdictTimer: TimerHandle | undefined;
  #thresholds: BusyThresholds;
  // Reused from decision to decision.
  readonly #columns = new CandidateColumns();
  readonly #indexScores = new OverlapScores();
  readonly #ownScores = new OverlapScores();
  #shared = new Uint32Array(64);
  readonly metrics: RouterMetrics;

  /** Called for each own booking, so that replicas can be told; the event may be kept. */
  onBooking: ((event: BookingEvent) => void) | undefined = undefined;
  /** Set by whoever feeds the index: what is to be said of it in explanations while it may know too little. */
  indexHealth: IndexHealth | undefined = undefined;
  /** The same of the planes that tell of workers and of their load. */
  planeHealth: PlaneHealth | undefined = undefined;

  constructor(options: RouterOptions) {
    this.#options = options;
    this.#config = { ...DEFAULT_ROUTER_CONFIG, ...options.config };
    this.#policy = options.policy;
    this.#blockSizeTokens = options.blockSizeTokens ?? 16;
    this.#sequences = new ActiveSequences(this.#blockSizeTokens);
    this.#log = options.log ?? new DecisionLog();
    this.#degraded = new Degradations({ ...options, logger: options.logger ?? silentLogger });
    this.#thresholds = this.#config.busyThresholds;
    this.metrics = new RouterMetrics(options.metrics, options.model, options.policy.name);
    const { clock } = options;
    const { kvEvents, ttlMs, predictedTtlMs, sessionAffinityTtlMs } = this.#config;
    if (this.#policy.usesOverlap === true) {
      if (kvEvents) this.#index = options.index;
      if (!kvEvents) this.#approximate = new ApproximateIndex({ clock, ttlMs });
      else if (predictedTtlMs !== undefined) this.#approximate = new ApproximateIndex({ clock, ttlMs: predictedTtlMs });
    }
    if (sessionAffinityTtlMs !== undefined)
      this.#sessions = new SessionAffinity({ clock, ttlMs: sessionAffinityTtlMs });
    this.#remote = new RemoteBookings({
      sequences: this.#sequences,
      sessions: this.#sessions,
      decisions: this.#approximate,
      rankOf: (instanceId, dpRank) => this.#byId.get(instanceId)?.ranks[dpRank],
    });
    this.#queue = new RouteQueue<QueuedRoute, RoutingDecision>({
      clock,
      policy: this.#config.queuePolicy,
      limit: this.#config.queueLimit,
      refreshAfterMs: this.#config.overlapRefreshAfterMs,
      place: ({ request }, waitedMs) => this.#placeQueued(request, waitedMs),
      cachedTokens: ({ request }) => this.#bestOverlapTokens(request),
      onChange: (entries, promptTokens, cachedTokens) => {
        this.metrics.queued.set(entries);
        this.metrics.queuedTokens.set(promptTokens);
        this.metrics.queuedCachedTokens.set(cachedTokens);
      },
    });
    this.#roomQueue = new RouteQueue<QueuedRoute, RoutingDecision>({
      clock,
      policy: "fcfs",
      limit: this.#config.queueLimit,
      refreshAfterMs: 0,
      place: ({ request }, waitedMs) => this.#place(() => this.#bookWithRoom(request, waitedMs)),
      cachedTokens: () => 0,
    });
    options.metrics.onCollect(() => this.#collectStates());
  }

  // ---- Workers ----

  get workers(): readonly Worker[] {
    return this.#workers;
  }

  /** Workers that requests go to now: without those that just failed, unless all did. */
  get availableCount(): number {
    const nowMs = this.#options.clock.monotonicMs();
    if (nowMs >= this.#inhibitedUntilMs) return this.#workers.length;
    let count = 0;
    for (const { inhibition } of this.#workers) if (inhibition.untilMs <= nowMs) count++;
    return count === 0 ? this.#workers.length : count;
  }

  /** A worker that is already there keeps its counts; a new address replaces the old one. */
  addWorker(instanceId: string, address: string, details: WorkerDetails = {}): void {
    if (this.#byId.get(instanceId)?.address === address) return;
    this.removeWorker(instanceId);
    const worker = new Worker(instanceId, address, details, this.#sequences, (dpRank) =>
      this.#index === undefined ? -1 : this.#index.rankOf(instanceId, dpRank),
    );
    this.#byId.set(instanceId, worker);
    this.#setWorkers();
    this.#drain();
  }

  /** Its bookings end, and what the indexes know of it is forgotten. */
  removeWorker(instanceId: string): void {
    const worker = this.#byId.get(instanceId);
    if (worker === undefined) return;
    this.#byId.delete(instanceId);
    for (const { slot } of worker.ranks) {
      this.#sequences.removeSlot(slot);
      this.#approximate?.clearRank(slot);
    }
    this.#index?.removeWorker(instanceId);
    this.#setWorkers();
    this.#holdVerdicts();
    this.#drain();
  }

  /**
   * A worker that registers anew (its lease was revoked) is gone for as long as discovery takes to tell both: what waits in
   * the queue anyway is not told meanwhile that there is none.
   */
  #holdVerdicts(): void {
    if (this.#queue.length + this.#roomQueue.length === 0) return;
    this.#verdictTimer?.cancel();
    this.#verdictTimer = this.#options.clock.setTimer(WORKER_RETURN_MS, () => {
      this.#verdictTimer = undefined;
      this.#drain();
    });
  }

  updateLoad(instanceId: string, load: LoadSnapshot): void {
    this.#byId.get(instanceId)?.report(load);
    // A worker that was above a busy threshold may be below it now.
    this.#drain();
  }

  /** Leaves the worker out for a while: it broke, or did not answer. It comes back by itself. */
  inhibit(instanceId: string): void {
    const worker = this.#byId.get(instanceId);
    if (worker === undefined || !worker.inhibition.fail(this.#options.clock.monotonicMs())) return;
    this.#inhibitedUntilMs = Math.max(this.#inhibitedUntilMs, worker.inhibition.untilMs);
  }

  get busyThresholds(): BusyThresholds {
    return this.#thresholds;
  }

  set busyThresholds(thresholds: BusyThresholds) {
    this.#thresholds = thresholds;
    this.#drain();
  }

  // ---- Decisions ----

  /**
   * A worker at once, whatever its backlog. Throws `no-workers` when none is left, `worker-full` when all are busy. When
   * every worker is inhibited, all of them count again: one must be tried.
   */
  route(request: RouteRequest): RoutingDecision {
    try {
      return this.#book(request, this.#eligible(request), 0);
    } catch (thrown) {
      throw this.#refused(thrown);
    }
  }

  /**
   * A worker at once in the usual case. With a queue threshold, and every worker's backlog above it, the request waits
   * for its turn: see queue.ts; so does one that needs room where there is none. Throws as `route` does, and
   * `too-many-requests` when the queue is full; a waiting one is rejected with the same, or with `request-deadline`.
   */
  routeWhenReady(request: RouteRequest): RoutingDecision | WaitingRoute {
    if (request.needsRoom === true) return this.#routeWithRoom(request);
    const { queueThreshold } = this.#config;
    if (queueThreshold === undefined || request.resumedTokens !== undefined) return this.route(request);
    try {
      const eligible = this.#eligible(request);
      if (this.#queue.length === 0 && !this.#isSaturated(eligible.ranks, queueThreshold)) {
        return this.#book(request, eligible, 0);
      }
      const waiting = this.#queue.enter(queueItem(request));
      this.#queue.drain();
      return waiting;
    } catch (thrown) {
      const error = this.#refused(thrown);
      if (error.reason === "too-many-requests") this.metrics.backpressure("queue_full");
      throw error;
    }
  }

  #routeWithRoom(request: RouteRequest): RoutingDecision | WaitingRoute {
    try {
      const isFirst = this.#roomQueue.length === 0;
      const decision = isFirst ? this.#bookWithRoom(request, 0) : undefined;
      return decision ?? this.#roomQueue.enter(queueItem(request));
    } catch (thrown) {
      throw this.#refused(thrown);
    }
  }

  /** undefined when no rank has room now. */
  #bookWithRoom(request: RouteRequest, waitedMs: number): RoutingDecision | undefined {
    const eligible = this.#withRoom(request, this.#eligible(request));
    return eligible === undefined ? undefined : this.#book(request, eligible, waitedMs);
  }

  /** Those that have room; all of them when none will ever have as much. */
  #withRoom(request: RouteRequest, eligible: Eligible): Eligible | undefined {
    const { ranks, leftOut } = eligible;
    // The prompt and a block to grow.
    const blocks = Math.floor(promptTokensOf(request) / this.#blockSizeTokens) + 1;
    const free = ranks.filter((rank) => hasRoom(rank, blocks, this.#sequences));
    if (free.length === ranks.length) return eligible;
    if (free.length > 0) {
      return { ranks: free, leftOut: { ...leftOut, busy: leftOut.busy + ranks.length - free.length } };
    }
    return ranks.some(({ capacity: { totalBlocks } }) => totalBlocks === 0 || totalBlocks >= blocks)
      ? undefined
      : eligible;
  }

  /** Where the request would go now, without sending it: nothing is booked or counted. Throws as `route` does. */
  preview(request: RouteRequest): DecisionExplanation {
    const evaluation = this.#evaluate(request, this.#eligible(request));
    return renderDecision(this.#choose(request, evaluation, 0), this.#columns);
  }

  /** The decisions for a request, its retries and its samples, oldest first; empty when they are too long ago. */
  explain(requestId: string): DecisionExplanation[] {
    return this.#log.find(requestId).map((record) => this.explainRecord(record));
  }

  explainRecord(record: DecisionRecord): DecisionExplanation {
    return renderDecision(record, this.#log.columnsOf(record));
  }

  /** The requests that wait are refused with `error`. */
  close(error: DynamoError): void {
    this.#verdictTimer?.cancel();
    this.#verdictTimer = undefined;
    this.#queue.close(error);
    this.#roomQueue.close(error);
  }

  /**
   * How the best eligible rank would take the request, by cost: what of the prompt it has, what it has before it, what runs
   * there. Nothing is booked or counted. Throws as `route` does.
   */
  outlook(request: RouteRequest): PoolOutlook {
    const all = this.#eligible(request);
    const withRoom = this.#withRoom(request, all);
    const { eligible, prompt } = this.#evaluate(request, withRoom ?? all);
    const { cost } = this.#columns;
    let best = 0;
    for (let i = 1; i < eligible.ranks.length; i++) if (cost[i]! < cost[best]!) best = i;
    const { slot } = eligible.ranks[best]!;
    return {
      cachedTokens: overlapOf(this.#columns, best) * prompt.blockSizeTokens,
      queuedTokens: this.#sequences.prefillTokens(slot),
      activeRequests: this.#sequences.requests(slot),
      rankCount: all.ranks.length,
      hasRoom: withRoom !== undefined,
    };
  }

  /** Requests that routers have on a worker; 0 when it is not one of ours. */
  activeRequestsOf(instanceId: string): number {
    return this.#byId.get(instanceId)?.activeRequests ?? 0;
  }

  get log(): DecisionLog {
    return this.#log;
  }

  // ---- Replicas ----

  /** Own bookings that are alive, as they were announced: for a replica that joins. */
  liveBookings(): BookingEvent[] {
    return [...this.#live].map((decision) => decision.announcement);
  }

  /** What another router booked, finished prefilling, or freed. Own events must not come back here. */
  applyRemoteBooking(routerId: string, event: BookingEvent): RemoteResult {
    const result = this.#remote.apply(routerId, event);
    if (event.type !== "add") this.#drain();
    return result;
  }

  /** The other router is gone: what it booked no longer counts. */
  dropRemoteRouter(routerId: string): void {
    this.#remote.drop(routerId);
    this.#drain();
  }

  // ---- For decisions ----

  get clock(): Clock {
    return this.#options.clock;
  }

  get trackOutputBlocks(): boolean {
    return this.#config.trackOutputBlocks;
  }

  prefillDone(decision: BookedDecision): void {
    this.#sequences.prefillDone(decision.booking);
    if (decision.sessionId !== undefined) this.#bindSession(decision, decision.sessionId);
    this.onBooking?.({ type: "prefill-completed", requestId: decision.requestId });
    this.#drain();
  }

  addOutput(booking: Booking, tokens: number): void {
    this.#sequences.addOutput(booking, tokens);
  }

  free(decision: BookedDecision): void {
    this.#sequences.free(decision.booking);
    if (decision.record.outcome === "finished") decision.rank.worker.inhibition.succeed();
    this.#live.delete(decision);
    this.#releaseSession(decision);
    this.onBooking?.({ type: "free", requestId: decision.requestId });
    this.#drain();
  }

  // ---- Inside ----

  #drain(): void {
    this.#roomQueue.drain();
    this.#queue.drain();
  }

  #setWorkers(): void {
    this.#workers = [...this.#byId.values()].toSorted((a, b) => (a.instanceId < b.instanceId ? -1 : 1));
    this.#ranks = this.#workers.flatMap((worker) => worker.ranks);
    this.metrics.workers.set(this.#workers.length);
  }

  #refused(thrown: unknown): DynamoError {
    const error = toDynamoError(thrown);
    this.metrics.refused(error.reason);
    return error;
  }

  #eligible(request: RouteRequest): Eligible {
    if (this.#policy.name === "direct" && request.pinned === undefined) {
      throw new DynamoError(
        "invalid-field",
        "nvext.backend_instance_id: expected the worker's id, as this server only routes directly, got nothing",
        {
          param: "nvext.backend_instance_id",
        },
      );
    }
    return eligibleRanks(request, {
      model: this.#options.model,
      ranks: this.#ranks,
      nowMs: this.#options.clock.monotonicMs(),
      inhibitedUntilMs: this.#inhibitedUntilMs,
      thresholds: this.#thresholds,
      sequences: this.#sequences,
    });
  }

  /** Whether every rank has more than `threshold` batches to prefill. One whose batch is not known never has. */
  #isSaturated(ranks: readonly Rank[], threshold: number): boolean {
    for (const { slot, capacity } of ranks) {
      const limit = threshold * capacity.maxBatchedTokens;
      if (capacity.maxBatchedTokens === 0 || this.#sequences.prefillTokens(slot) <= limit) return false;
    }
    return true;
  }

  #placeQueued(request: RouteRequest, waitedMs: number): RoutingDecision | undefined {
    return this.#place(() => {
      const eligible = this.#eligible(request);
      if (this.#isSaturated(eligible.ranks, this.#config.queueThreshold ?? Infinity)) return undefined;
      return this.#book(request, eligible, waitedMs);
    });
  }

  /** From a queue: undefined = it goes on waiting. */
  #place(book: () => RoutingDecision | undefined): RoutingDecision | undefined {
    try {
      return book();
    } catch (thrown) {
      const error = toDynamoError(thrown);
      if (this.#verdictTimer !== undefined && error.reason === "no-workers") return undefined;
      throw this.#refused(error);
    }
  }

  #bestOverlapTokens(request: RouteRequest): number {
    const hashes = this.#hash(request);
    if (hashes === undefined || hashes.blockCount === 0) return 0;
    const scores = this.#indexScores;
    const index = this.#index ?? this.#approximate;
    if (index === undefined) return 0;
    index.findMatches(hashes.sequenceHashes, hashes.blockCount, scores);
    let best = 0;
    for (let rank = 0; rank < index.rankCount; rank++) {
      const inMemory = scores.device[rank]! + scores.host[rank]!;
      best = Math.max(best, inMemory + scores.disk[rank]! + scores.shared[rank]!);
    }
    return best * this.#blockSizeTokens;
  }

  /** Hashed once per request, and only when somebody looks at blocks. */
  #hash(request: RouteRequest): BlockHashes | undefined {
    if (this.#policy.usesOverlap !== true) return undefined;
    if (request.hashes !== undefined) return request.hashes;
    const startMs = this.#options.clock.monotonicMs();
    const { cacheNamespace } = request;
    const seed =
      cacheNamespace === undefined || cacheNamespace === "" ? SHARED_SEED : blockHashSeed({ cacheNamespace });
    request.hashes = hashBlocks(request.tokenIds, this.#blockSizeTokens, seed);
    this.metrics.blockHashing.observe(this.#options.clock.monotonicMs() - startMs);
    return request.hashes;
  }

  /** Overlap, load and cost of every eligible rank, into the columns. */
  #evaluate(request: RouteRequest, eligible: Eligible): Evaluation {
    const config = this.#config;
    const weights = request.overrides === undefined ? config : { ...config, ...request.overrides };
    const hashes = this.#hash(request);
    const tokens = promptTokensOf(request);
    const blockSizeTokens = this.#blockSizeTokens;
    const prompt: PromptShape = {
      tokens,
      blocks: hashes?.blockCount ?? Math.floor(tokens / blockSizeTokens),
      blockSizeTokens,
    };
    const isLooked = hashes !== undefined && this.#findMatches(hashes);
    this.#fillColumns(eligible.ranks, prompt, isLooked, hashes, request);
    computeCosts(this.#columns, prompt, weights);
    return { eligible, prompt, weights, hashes, degradations: this.#degradations(isLooked, request) };
  }

  /** Leading blocks per rank, of the index and of own decisions. False when there is no index at all. */
  #findMatches({ sequenceHashes, blockCount }: BlockHashes): boolean {
    const index = this.#index;
    const own = this.#approximate;
    if (index === undefined && own === undefined) return false;
    const startMs = this.#options.clock.monotonicMs();
    index?.findMatches(sequenceHashes, blockCount, this.#indexScores);
    own?.findMatches(sequenceHashes, blockCount, this.#ownScores);
    this.metrics.findMatches.observe(this.#options.clock.monotonicMs() - startMs);
    return true;
  }

  #fillColumns(
    ranks: readonly Rank[],
    prompt: PromptShape,
    isLooked: boolean,
    hashes: BlockHashes | undefined,
    request: RouteRequest,
  ): void {
    const columns = this.#columns;
    const sequences = this.#sequences;
    const count = ranks.length;
    columns.resize(count);
    const { device, host, disk, prefillTokens, decodeBlocks, activeRequests, multiplier } = columns;
    const { trackActiveBlocks } = this.#config;
    const isShared = this.#fillShared(request, hashes);
    const shared = this.#shared;
    for (let i = 0; i < count; i++) {
      const { slot } = ranks[i]!;
      prefillTokens[i] = sequences.prefillTokens(slot);
      activeRequests[i] = sequences.requests(slot);
      decodeBlocks[i] = trackActiveBlocks
        ? sequences.decodeBlocks(slot) + prompt.blocks - (isShared ? shared[slot]! : 0)
        : 0;
    }
    device.fill(0, 0, count);
    host.fill(0, 0, count);
    disk.fill(0, 0, count);
    columns.shared.fill(0, 0, count);
    multiplier.fill(1, 0, count);
    if (isLooked) this.#fillOverlap(ranks);
    if (request.preferredTaints !== undefined) {
      for (let i = 0; i < count; i++) multiplier[i] = preferenceMultiplier(ranks[i]!.worker, request.preferredTaints);
    }
  }

  /** Prompt blocks in use already, per slot, into `#shared`. False when nothing can be shared. */
  #fillShared(request: RouteRequest, hashes: BlockHashes | undefined): boolean {
    if (hashes === undefined || !this.#config.trackActiveBlocks) return false;
    if (!(request.overrides?.assumeKvReuse ?? this.#config.assumeKvReuse)) return false;
    const slots = this.#sequences.slotCount;
    if (this.#shared.length < slots) this.#shared = new Uint32Array(2 * slots);
    else this.#shared.fill(0, 0, slots);
    this.#sequences.sharedInto(hashes.sequenceHashes, hashes.blockCount, this.#shared);
    return true;
  }

  /** Own decisions extend what the index says of the device, and take as much from what follows in the other tiers. */
  #fillOverlap(ranks: readonly Rank[]): void {
    const { device, host, disk, shared } = this.#columns;
    const known = this.#indexScores;
    const knownRanks = this.#index === undefined ? 0 : Math.min(this.#index.rankCount, known.device.length);
    const own = this.#ownScores.device;
    const ownRanks = this.#approximate === undefined ? 0 : Math.min(this.#approximate.rankCount, own.length);
    for (let i = 0; i < ranks.length; i++) {
      const { slot, indexRank } = ranks[i]!;
      if (indexRank >= 0 && indexRank < knownRanks) {
        device[i] = known.device[indexRank]!;
        host[i] = known.host[indexRank]!;
        disk[i] = known.disk[indexRank]!;
        shared[i] = known.shared[indexRank]!;
      }
      if (slot >= ownRanks) continue;
      let more = own[slot]! - device[i]!;
      if (more <= 0) continue;
      device[i] = own[slot]!;
      for (const below of [host, disk, shared]) {
        const taken = Math.min(more, below[i]!);
        below[i]! -= taken;
        more -= taken;
      }
    }
  }

  #degradations(isLooked: boolean, request: RouteRequest): readonly string[] {
    const ofPlanes = this.planeHealth?.degradations ?? NO_DEGRADATION;
    const own = this.#routingDegradations(isLooked, request);
    return ofPlanes.length === 0 ? own : [...own, ...ofPlanes];
  }

  #routingDegradations(isLooked: boolean, { degradation: known }: RouteRequest): readonly string[] {
    if (known !== undefined) return [known];
    if (this.#policy.usesOverlap !== true) return NO_DEGRADATION;
    if (!isLooked) return NO_INDEX;
    const degradation = this.indexHealth?.degradation;
    if (degradation !== undefined) return [degradation];
    if (this.#index !== undefined && !this.#hasOverlap() && this.#index.stats().blocks === 0) return EMPTY_INDEX;
    return NO_DEGRADATION;
  }

  #hasOverlap(): boolean {
    for (let i = 0; i < this.#columns.count; i++) if (overlapOf(this.#columns, i) > 0) return true;
    return false;
  }

  /** Session, or policy. */
  #choose(request: RouteRequest, evaluation: Evaluation, queuedMs: number): DecisionRecord {
    const { eligible, prompt, weights } = evaluation;
    const bound = this.#sessionRank(request, eligible);
    const record = new DecisionRecord({
      requestId: request.requestId ?? "",
      atMs: this.#options.clock.wallMs(),
      policy: this.#policy.name,
      prompt,
      weights,
      candidates: eligible.ranks,
      leftOut: eligible.leftOut,
      degradations: bound === -2 ? [...evaluation.degradations, SESSION_MOVED] : evaluation.degradations,
      queuedMs,
      resumedTokens: request.resumedTokens ?? 0,
      stage: request.stage ?? "aggregated",
    });
    if (bound >= 0) {
      record.chosen = bound;
      record.reason = "the session's worker";
    } else {
      const choice = this.#policy.choose({
        candidates: eligible.ranks,
        columns: this.#columns,
        prompt,
        settings: weights,
        turn: this.#turn,
        random: this.#options.random,
      });
      record.chosen = choice.index;
      record.reason = request.pinned === undefined ? choice.reason : "named by the caller";
    }
    record.overlapBlocks = overlapOf(this.#columns, record.chosen);
    return record;
  }

  #book(request: RouteRequest, eligible: Eligible, queuedMs: number): BookedDecision {
    const { clock } = this.#options;
    const startMs = clock.monotonicMs();
    this.metrics.started.add();
    const evaluation = this.#evaluate(request, eligible);
    const scheduleMs = clock.monotonicMs();
    const record = this.#choose(request, evaluation, queuedMs);
    this.#turn = (this.#turn + 1) % 0x40000000;
    this.#log.add(record, this.#columns);
    this.#degraded.note(record.degradations);
    this.#countOverlap(record);
    const decision = this.#hold(request, evaluation, record, startMs);
    this.metrics.routed.add();
    const endMs = clock.monotonicMs();
    this.metrics.scheduling.observe(endMs - scheduleMs);
    this.metrics.total.observe(endMs - startMs);
    return decision;
  }

  #hold(request: RouteRequest, evaluation: Evaluation, record: DecisionRecord, startMs: number): BookedDecision {
    const { eligible, prompt, hashes, weights } = evaluation;
    const rank = eligible.ranks[record.chosen]!;
    const assumeKvReuse = request.overrides?.assumeKvReuse ?? this.#config.assumeKvReuse;
    const requestId = request.requestId ?? `r${this.#requestCount++}`;
    const sessionId = this.#sessions === undefined ? undefined : request.sessionId;
    const booked = {
      sequenceHashes: assumeKvReuse ? hashes?.sequenceHashes : undefined,
      blockCount: this.#config.trackActiveBlocks ? prompt.blocks : 0,
      prefillTokens: weights.trackPrefillTokens
        ? Math.max(0, prompt.tokens - record.overlapBlocks * prompt.blockSizeTokens)
        : 0,
      expectedOutputTokens: request.expectedOutputTokens ?? 0,
    };
    const decision = new BookedDecision(this, {
      requestId,
      rank,
      candidateCount: eligible.ranks.length,
      booking: this.#sequences.add(rank.slot, booked),
      record,
      announcement: {
        type: "add",
        requestId,
        instanceId: rank.instanceId,
        dpRank: rank.dpRank,
        ...booked,
        ...(sessionId === undefined ? {} : { sessionId }),
      },
      sessionId,
      startMs,
    });
    this.#live.add(decision);
    if (hashes !== undefined) this.#approximate?.record(rank.slot, hashes.sequenceHashes, hashes.blockCount);
    this.metrics.inputTokens.observe(prompt.tokens);
    this.onBooking?.(decision.announcement);
    return decision;
  }

  #countOverlap({ overlapBlocks, prompt }: DecisionRecord): void {
    if (this.#policy.usesOverlap !== true || prompt.blocks === 0) return;
    let best = 0;
    for (let i = 0; i < this.#columns.count; i++) best = Math.max(best, overlapOf(this.#columns, i));
    this.metrics.hitRate.observe(overlapBlocks / prompt.blocks);
    if (best === overlapBlocks) return;
    this.metrics.nonMaxOverlap.add();
    this.metrics.overlapLost.add(best - overlapBlocks);
  }

  // Sessions.

  /** Index of the session's rank among the eligible; -1 without a binding, -2 when it is bound to another one. */
  #sessionRank({ sessionId, pinned }: RouteRequest, { ranks }: Eligible): number {
    if (this.#sessions === undefined || sessionId === undefined || pinned !== undefined) return -1;
    const binding = this.#sessions.find(sessionId);
    if (binding === undefined) return -1;
    const index = ranks.findIndex((rank) => rank.instanceId === binding.instanceId && rank.dpRank === binding.dpRank);
    return index < 0 ? -2 : index;
  }

  #bindSession(decision: BookedDecision, sessionId: string): void {
    const { instanceId, dpRank } = decision;
    const lease = this.#sessions?.lease(sessionId, { instanceId, dpRank });
    if (lease !== undefined) this.#leases.set(decision, lease);
  }

  #releaseSession(decision: BookedDecision): void {
    const { sessionId } = decision;
    if (this.#sessions === undefined || sessionId === undefined) return;
    const lease = this.#leases.get(decision);
    this.#leases.delete(decision);
    if (lease !== undefined) this.#sessions.release(sessionId, lease);
    // The worker failed it before its first token: the session does not go there again.
    else if (FAILED_OUTCOME.test(decision.record.outcome)) this.#sessions.invalidate(sessionId);
  }

  #collectStates(): void {
    const nowMs = this.#options.clock.monotonicMs();
    let inhibited = 0;
    let busy = 0;
    for (const worker of this.#workers) {
      if (worker.inhibition.untilMs > nowMs) inhibited++;
      else if (
        hasThresholds(this.#thresholds) &&
        worker.ranks.every((rank) => isRankBusy(rank, this.#thresholds, this.#sequences))
      )
        busy++;
    }
    this.metrics.workerState("eligible", "", this.#workers.length - inhibited - busy);
    this.metrics.workerState("inhibited", "failed", inhibited);
    this.metrics.workerState("busy", "threshold", busy);
  }
}

const SHARED_SEED = blockHashSeed();
/** Reasons of the catalogue that speak of the worker, not of the request or its client. */
const FAILED_OUTCOME = /^(worker|engine)-/;

function promptTokensOf({ tokenIds, promptTokenCount }: RouteRequest): number {
  return promptTokenCount ?? tokenIds.length;
}

function queueItem(request: RouteRequest): QueuedRoute {
  const { excluded, allowed, pinned, requiredTaints } = request;
  return {
    request,
    promptTokens: promptTokensOf(request),
    strictPriority: request.strictPriority ?? 0,
    priorityJump: request.priorityJump ?? 0,
    deadlineMs: request.deadlineMs,
    isConstrained:
      (excluded?.size ?? 0) > 0 || allowed !== undefined || pinned !== undefined || (requiredTaints?.length ?? 0) > 0,
  };
}
