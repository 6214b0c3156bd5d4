import { DynamoError, toDynamoError } from "../../errors/index.ts";
import type { CounterChild, GaugeChild, Logger, Metrics } from "../../observability/index.ts";
import { KV_EVENTS_TOPIC, decodeKvEventBatch, kvQueryEndpoint, type KvEvent } from "../../protocol/index.ts";
import type { EventPlane, EventSubscription } from "../../runtime/event-plane/index.ts";
import type { RequestPlaneClient } from "../../runtime/request-plane/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import type { ApplyStatus, KvIndex } from "../indexer/base.ts";
import { IndexGauges } from "./index-gauges.ts";
import { queryKvEvents } from "./kv-query-client.ts";
import { RankRecovery, type RankRecoverySink } from "./rank-recovery.ts";

/**
 * Feeds the KV indexes of a process: one subscription for all workers, a `RankRecovery` per rank, and the queries those ask
 * for, with deadlines, back-off and a bound on how many run at once. A worker is fed from `addWorker` to `removeWorker`;
 * events of others are not looked at. It starts with a full restore, so that a router that starts late is told everything.
 *
 * What cannot be decoded is dropped, counted and logged once per worker; nothing here throws into the event plane.
 * `health(index)` tells the router, at no cost, how far its index can be trusted right now.
 */
export interface KvEventFeedOptions {
  readonly events: EventPlane;
  readonly client: RequestPlaneClient;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly metrics: Metrics;
  /** Of one query. @default 2000 */
  readonly queryTimeoutMs?: number;
  /** Queries under way at once. @default 16 */
  readonly maxQueries?: number;
  /** A worker is asked once more this long after its first restore. @default 1000 */
  readonly checkDelayMs?: number;
}

export interface FedWorkerOptions {
  readonly instanceId: string;
  readonly model: string;
  /** On the request plane. */
  readonly address: string;
  /** `namespace.component`, where its query endpoints are. */
  readonly endpointPrefix: string;
  readonly dataParallelSize: number;
  readonly index: KvIndex;
}

/**
 * How true an index is; kept up to date by the feed. Read only for others, who may be in other threads: post them
 * `counts` and make another one over it there.
 */
export class KvFeedHealth {
  readonly counts: Int32Array<SharedArrayBuffer>;

  constructor(counts = new Int32Array(new SharedArrayBuffer(8))) {
    this.counts = counts;
  }

  /** Ranks that are fed. */
  get rankCount(): number {
    return this.counts[0]!;
  }

  set rankCount(count: number) {
    this.counts[0] = count;
  }

  /** Ranks whose part of the index may be wrong: not restored yet, or events of theirs are missing. */
  get recoveringCount(): number {
    return this.counts[1]!;
  }

  set recoveringCount(count: number) {
    this.counts[1] = count;
  }

  /** For a routing explanation; undefined when there is nothing to say. */
  get degradation(): string | undefined {
    if (this.recoveringCount === 0) return undefined;
    return `kv: ${this.recoveringCount} of ${this.rankCount} ranks recovering, their overlap may be wrong`;
  }
}

const QUERY_TIMEOUT_MS = 2_000;
const MAX_QUERIES = 16;
const BACK_OFF_MS = 25;
const CHECK_DELAY_MS = 1_000;
const MAX_BACK_OFF_MS = 5_000;
/** Ranks of one worker; a card that claims more is damaged. */
const MAX_RANKS = 1_024;

export class KvEventFeed {
  readonly #options: KvEventFeedOptions;
  readonly #workers = new Map<string, FedWorker>();
  readonly #healths = new WeakMap<KvIndex, KvFeedHealth>();
  readonly #counters: FeedCounters;
  /** Asks that wait for room, oldest first; at most one per rank that is not cancelled. */
  readonly #queue: { readonly ask: Ask; readonly isCancelled: () => boolean }[] = [];
  #querying = 0;
  #subscription: EventSubscription | undefined;
  #closed = false;

  constructor(options: KvEventFeedOptions) {
    this.#options = options;
    this.#counters = new FeedCounters(options.metrics);
    const gauges = new IndexGauges(options.metrics);
    options.metrics.onCollect(() => gauges.collect(this.#measured()));
  }

  /** Subscribes. Throws `event-plane-unavailable`. */
  async start(): Promise<void> {
    this.#subscription = await this.#options.events.subscribe(KV_EVENTS_TOPIC, {
      onEvent: (publisherId, _sequence, payload) => this.#onBatch(publisherId, payload),
      onGap: (publisherId, from, to) => this.#onGap(publisherId, to - from + 1),
      // Another life of the worker may follow under the same id; only it knows what it still has.
      onPublisherGone: (publisherId) => this.#onGap(publisherId, 0),
    });
  }

  health(index: KvIndex): KvFeedHealth {
    let health = this.#healths.get(index);
    if (health === undefined) this.#healths.set(index, (health = new KvFeedHealth()));
    return health;
  }

  /** Begins to feed a worker, with a full restore. A known worker with the same address stays as it is. */
  addWorker(options: FedWorkerOptions): void {
    const known = this.#workers.get(options.instanceId);
    if (this.#closed || (known?.options.address === options.address && known.options.index === options.index)) return;
    this.removeWorker(options.instanceId);
    const worker = new FedWorker(options);
    this.#workers.set(options.instanceId, worker);
    const health = this.health(options.index);
    const rankCount = Math.min(MAX_RANKS, Math.max(1, options.dataParallelSize));
    for (let dpRank = 0; dpRank < rankCount; dpRank++) {
      const rank = new FedRank(this, worker, dpRank, options.index.rankOf(options.instanceId, dpRank), this.#counters);
      worker.ranks.push(rank);
      health.rankCount++;
      health.recoveringCount++;
    }
    this.#counters.recovering(options.model).add(rankCount);
    for (const rank of worker.ranks) rank.recovery.start();
  }

  /**
   * Forgets the worker and its blocks. To be called before the owner of the rank numbers (the router) takes them back:
   * after it they may be another worker's.
   */
  removeWorker(instanceId: string): void {
    const worker = this.#workers.get(instanceId);
    if (worker === undefined) return;
    this.#workers.delete(instanceId);
    const { index, model } = worker.options;
    const health = this.health(index);
    for (const rank of worker.ranks) {
      rank.leave();
      health.rankCount--;
      if (!rank.isRecovering) continue;
      health.recoveringCount--;
      this.#counters.recovering(model).add(-1);
    }
    this.#pump();
  }

  /** The worker is at another address now, so that it may be another life of it: it is forgotten until it is added again. */
  removeMoved(instanceId: string, address: string): void {
    const known = this.#workers.get(instanceId);
    if (known !== undefined && known.options.address !== address) this.removeWorker(instanceId);
  }

  /** Where the feed stands with a rank: the last event applied, and if it is being restored. For tests and operators. */
  cursor(
    instanceId: string,
    dpRank = 0,
  ): { readonly id: number; readonly epoch: number; readonly recovering: boolean } | undefined {
    const recovery = this.#workers.get(instanceId)?.ranks[dpRank]?.recovery;
    return recovery && { id: recovery.cursor.id, epoch: recovery.cursor.epoch, recovering: recovery.recovering };
  }

  async close(): Promise<void> {
    this.#closed = true;
    for (const instanceId of this.#workers.keys()) this.removeWorker(instanceId);
    await this.#subscription?.close();
  }

  *#measured() {
    for (const { options, ranks } of this.#workers.values()) {
      let eventsBehind = 0;
      for (const { recovery } of ranks) eventsBehind += recovery.eventsBehind;
      yield { model: options.model, index: options.index, eventsBehind };
    }
  }

  #onBatch(publisherId: string, payload: Uint8Array): void {
    const worker = this.#workers.get(publisherId);
    if (worker === undefined) return;
    try {
      const batch = decodeKvEventBatch(payload);
      const rank = worker.ranks[batch.dpRank];
      if (rank === undefined) {
        const diagnostic = `rank ${batch.dpRank}, the worker has ${worker.ranks.length}`;
        throw new DynamoError("malformed-frame", "KV events of a rank that the worker does not have", { diagnostic });
      }
      const { epoch, firstEventId, events } = batch;
      for (let i = 0; i < events.length; i++) rank.recovery.onEvent(epoch, firstEventId + i, events[i]!);
      this.#afterEvents(rank);
    } catch (thrown) {
      this.#counters.malformed.add();
      if (worker.hasLoggedMalformed) return;
      worker.hasLoggedMalformed = true;
      const { publicMessage, diagnostic } = toDynamoError(thrown);
      this.#options.logger.warn(
        { instance: publisherId, diagnostic },
        `KV events dropped: ${publicMessage}; further ones of this worker are only counted`,
      );
    }
  }

  #onGap(publisherId: string, count: number): void {
    const worker = this.#workers.get(publisherId);
    if (worker === undefined) return;
    this.#counters.lost.add(count);
    for (const rank of worker.ranks) {
      rank.recovery.suspect();
      this.#afterEvents(rank);
    }
  }

  /** Keeps the counts of recovering ranks, and says once per worker that events are missing. */
  #afterEvents(rank: FedRank): void {
    rank.countDropped();
    const { recovering } = rank.recovery;
    if (recovering === rank.isRecovering) return;
    rank.isRecovering = recovering;
    const { index, model, instanceId } = rank.worker.options;
    this.health(index).recoveringCount += recovering ? 1 : -1;
    this.#counters.recovering(model).add(recovering ? 1 : -1);
    if (!recovering) rank.checkOnce(this.#options.clock, this.#options.checkDelayMs ?? CHECK_DELAY_MS);
    if (!recovering || rank.worker.hasLoggedGap) return;
    rank.worker.hasLoggedGap = true;
    this.#options.logger.info(
      { instance: instanceId, model, dp_rank: rank.dpRank },
      "KV events of this worker are missing and are being restored; further times are only counted",
    );
  }

  /** Called by a rank: asks the worker after `delayMs`, when there is room for one more query. */
  schedule(ask: Ask, delayMs: number): TimerHandle {
    let cancelled = false;
    const enqueue = (): void => {
      this.#queue.push(waiting);
      this.#pump();
    };
    const waiting = { ask, isCancelled: () => cancelled };
    const timer = delayMs === 0 ? undefined : this.#options.clock.setTimer(delayMs, enqueue);
    const handle = {
      cancel: () => {
        cancelled = true;
        timer?.cancel();
      },
    };
    if (timer === undefined) enqueue();
    return handle;
  }

  #pump(): void {
    const limit = this.#options.maxQueries ?? MAX_QUERIES;
    while (this.#querying < limit && !this.#closed) {
      const waiting = this.#queue.shift();
      if (waiting === undefined) return;
      if (!waiting.isCancelled()) this.#query(waiting.ask);
    }
  }

  #query({ rank, askNumber, start }: Ask): void {
    const { client, queryTimeoutMs = QUERY_TIMEOUT_MS } = this.#options;
    const { address, endpointPrefix } = rank.worker.options;
    const endpoint = `${endpointPrefix}.${kvQueryEndpoint(rank.dpRank)}`;
    this.#querying++;
    let ended = false;
    const end = (): void => {
      if (!ended) this.#querying--;
      ended = true;
    };
    const query = queryKvEvents(
      { client, address, endpoint, dpRank: rank.dpRank, start, timeoutMs: queryTimeoutMs },
      {
        onAnswer: (answer) => {
          const isWhole = answer.type !== "tree-dump" || answer.page === answer.pageCount - 1;
          if (isWhole) {
            end();
            this.#counters.restored(answer.type === "tree-dump" ? "full" : "incremental", "ok");
          }
          rank.recovery.onAnswer(askNumber, answer);
          this.#afterEvents(rank);
        },
        onEnd: (error) => {
          end();
          if (error !== undefined) {
            this.#onFailure(rank, start, error);
            rank.recovery.onFailure(askNumber);
          }
          this.#pump();
        },
      },
    );
    rank.began({
      cancel: () => {
        query.cancel();
        end();
      },
    });
  }

  #onFailure(rank: FedRank, start: number | undefined, error: DynamoError): void {
    this.#counters.restored(start === undefined ? "full" : "incremental", "failed");
    if (rank.worker.hasLoggedFailure) return;
    rank.worker.hasLoggedFailure = true;
    this.#options.logger.warn(
      {
        instance: rank.worker.options.instanceId,
        dp_rank: rank.dpRank,
        reason: error.reason,
        diagnostic: error.diagnostic,
      },
      `cannot restore the KV events of this worker, trying again: ${error.publicMessage}`,
    );
  }
}

interface Ask {
  readonly rank: FedRank;
  readonly askNumber: number;
  readonly start: number | undefined;
}

class FedWorker {
  readonly options: FedWorkerOptions;
  readonly ranks: FedRank[] = [];
  hasLoggedMalformed = false;
  hasLoggedGap = false;
  hasLoggedFailure = false;

  constructor(options: FedWorkerOptions) {
    this.options = options;
  }
}

/** One rank: its recovery, the ask that is waiting or under way, and its number in the index. */
class FedRank implements RankRecoverySink {
  readonly worker: FedWorker;
  readonly dpRank: number;
  readonly recovery: RankRecovery = new RankRecovery(this);
  readonly #feed: KvEventFeed;
  readonly #rankNumber: number;
  readonly #counters: FeedCounters;
  isRecovering = true;
  readonly #counted = { duplicate: 0, stale: 0, overflow: 0 };
  #timer: TimerHandle | undefined;
  #check: TimerHandle | undefined;
  #query: { cancel(): void } | undefined;

  constructor(feed: KvEventFeed, worker: FedWorker, dpRank: number, rankNumber: number, counters: FeedCounters) {
    this.worker = worker;
    this.dpRank = dpRank;
    this.#feed = feed;
    this.#rankNumber = rankNumber;
    this.#counters = counters;
  }

  apply(event: KvEvent): void {
    this.#counters.applied(event.type, this.worker.options.index.apply(this.#rankNumber, event));
  }

  clear(): void {
    this.worker.options.index.clearRank(this.#rankNumber);
    this.#counters.applied("cleared", "ok");
  }

  /** Puts what the recovery left out since the last call on the counters. */
  countDropped(): void {
    const { duplicateCount, staleCount, overflowCount } = this.recovery;
    const counted = this.#counted;
    this.#counters.dropped("duplicate", duplicateCount - counted.duplicate);
    this.#counters.dropped("former_life", staleCount - counted.stale);
    this.#counters.dropped("buffer_full", overflowCount - counted.overflow);
    counted.duplicate = duplicateCount;
    counted.stale = staleCount;
    counted.overflow = overflowCount;
  }

  ask(askNumber: number, start: number | undefined, fruitless: number): void {
    this.cancel();
    const delayMs = fruitless === 0 ? 0 : Math.min(MAX_BACK_OFF_MS, BACK_OFF_MS * 2 ** (fruitless - 1));
    this.#timer = this.#feed.schedule({ rank: this, askNumber, start }, delayMs);
  }

  /** The ask of that number is being answered; `query` ends it. */
  began(query: { cancel(): void }): void {
    this.#query = query;
  }

  /** Some time after the first restore, asks what came while the subscription's link was perhaps not up yet. */
  checkOnce(clock: Clock, delayMs: number): void {
    this.#check ??= clock.setTimer(delayMs, () => this.recovery.suspect());
  }

  leave(): void {
    this.#check?.cancel();
    this.cancel();
    this.worker.options.index.clearRank(this.#rankNumber);
  }

  /** Ends the ask, waiting or under way, without an answer. */
  cancel(): void {
    this.#timer?.cancel();
    this.#query?.cancel();
    this.#timer = undefined;
    this.#query = undefined;
  }
}

type Restore = "incremental" | "full";

/** The feed's metric children, resolved once; see metric-names.ts. */
class FeedCounters {
  readonly #metrics: Metrics;
  readonly #applied: Record<KvEvent["type"], Record<ApplyStatus, CounterChild>>;
  readonly malformed: CounterChild;
  readonly lost: CounterChild;

  constructor(metrics: Metrics) {
    this.#metrics = metrics;
    const applied = metrics.counter("dynamo_component_kv_cache_events_applied");
    const byStatus = (type: KvEvent["type"]): Record<ApplyStatus, CounterChild> => ({
      ok: applied.labels("ok", type),
      "parent-block-not-found": applied.labels("parent_block_not_found", type),
      "block-not-found": applied.labels("block_not_found", type),
      "invalid-block": applied.labels("invalid_block", type),
    });
    this.#applied = { stored: byStatus("stored"), removed: byStatus("removed"), cleared: byStatus("cleared") };
    this.malformed = metrics.counter("dynamo_router_kv_events_dropped_total").labels("malformed");
    this.lost = metrics.counter("dynamo_router_kv_events_lost_total").labels();
  }

  applied(type: KvEvent["type"], status: ApplyStatus): void {
    this.#applied[type][status].add();
  }

  restored(kind: Restore, outcome: "ok" | "failed"): void {
    this.#metrics.counter("dynamo_router_kv_restores_total").labels(kind, outcome).add();
  }

  /** What a recovery left out since the last time it was looked at. */
  dropped(reason: "duplicate" | "former_life" | "buffer_full", count: number): void {
    if (count > 0) this.#metrics.counter("dynamo_router_kv_events_dropped_total").labels(reason).add(count);
  }

  recovering(model: string): GaugeChild {
    return this.#metrics.gauge("dynamo_router_kv_ranks_recovering").labels(model);
  }
}
