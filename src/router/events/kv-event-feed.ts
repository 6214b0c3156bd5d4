import { DynamoError, toDynamoError } from "../../errors/index.ts";
import type { CounterChild, GaugeChild, Logger, Metrics } from "../../observability/index.ts";
import { KV_EVENTS_TOPIC, decodeKvEventBatch, kvQueryEndpoint, type KvAnswer, type KvEvent } from "../../protocol/index.ts";
import type { EventPlane, EventSubscription } from "../../runtime/event-plane/index.ts";
import type { RequestPlaneClient } from "../../runtime/request-plane/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import type { ApplyStatus, KvIndex } from "../indexer/base.ts";
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

/** How true an index is; kept up to date by the feed. Read only for others. */
export class KvFeedHealth {
  /** Ranks that are fed. */
  rankCount = 0;
  /** Ranks whose part of the index may be wrong: not restored yet, or events of theirs are missing. */
  recoveringCount = 0;

  /** For a routing explanation; undefined when there is nothing to say. */
  get degradation(): string | undefined {
    if (this.recoveringCount === 0) return undefined;
    return `kv: ${this.recoveringCount} of ${this.rankCount} ranks recovering, their overlap may be wrong`;
  }
}

const QUERY_TIMEOUT_MS = 2_000;
const MAX_QUERIES = 16;
const BACK_OFF_MS = 25;
const MAX_BACK_OFF_MS = 5_000;
/** Ranks of one worker; a card that claims more is damaged. */
const MAX_RANKS = 1_024;
const STATUSES: Record<ApplyStatus, string> = {
  ok: "ok",
  "parent-block-not-found": "parent_block_not_found",
  "block-not-found": "block_not_found",
  "invalid-block": "invalid_block",
};

export class KvEventFeed {
  readonly #options: KvEventFeedOptions;
  readonly #workers = new Map<string, FedWorker>();
  readonly #healths = new Map<KvIndex, KvFeedHealth>();
  readonly #counters: FeedCounters;
  readonly #queue: FedRank[] = [];
  #querying = 0;
  #subscription: EventSubscription | undefined;
  #closed = false;

  constructor(options: KvEventFeedOptions) {
    this.#options = options;
    this.#counters = new FeedCounters(options.metrics);
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

  /** Forgets the worker and its blocks. */
  removeWorker(instanceId: string): void {
    const worker = this.#workers.get(instanceId);
    if (worker === undefined) return;
    this.#workers.delete(instanceId);
    const { index, model } = worker.options;
    const health = this.health(index);
    for (const rank of worker.ranks) {
      rank.close();
      health.rankCount--;
      if (!rank.isRecovering) continue;
      health.recoveringCount--;
      this.#counters.recovering(model).add(-1);
    }
    if (health.rankCount === 0) this.#healths.delete(index);
    index.removeWorker(instanceId);
    this.#pump();
  }

  /** Where the feed stands with a rank: the last event applied, and if it is being restored. For tests and operators. */
  cursor(instanceId: string, dpRank = 0): { readonly id: number; readonly epoch: number; readonly recovering: boolean } | undefined {
    const recovery = this.#workers.get(instanceId)?.ranks[dpRank]?.recovery;
    return recovery && { id: recovery.cursor.id, epoch: recovery.cursor.epoch, recovering: recovery.recovering };
  }

  async close(): Promise<void> {
    this.#closed = true;
    for (const instanceId of [...this.#workers.keys()]) this.removeWorker(instanceId);
    await this.#subscription?.close();
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

  // Called by the ranks.

  /** Keeps the counts of recovering ranks, and says once per worker and cause when one begins. */
  #afterEvents(rank: FedRank): void {
    const { recovering } = rank.recovery;
    if (recovering === rank.isRecovering) return;
    rank.isRecovering = recovering;
    const { index, model, instanceId } = rank.worker.options;
    this.health(index).recoveringCount += recovering ? 1 : -1;
    this.#counters.recovering(model).add(recovering ? 1 : -1);
    if (!recovering || rank.worker.hasLoggedGap) return;
    rank.worker.hasLoggedGap = true;
    this.#options.logger.info(
      { instance: instanceId, model, dp_rank: rank.dpRank },
      "KV events of this worker are missing and are being restored; further times are only counted",
    );
  }

  schedule(rank: FedRank, delayMs: number): void {
    if (delayMs === 0) {
      this.#enqueue(rank);
      return;
    }
    rank.timer = this.#options.clock.setTimer(delayMs, () => this.#enqueue(rank));
  }

  #enqueue(rank: FedRank): void {
    this.#queue.push(rank);
    this.#pump();
  }

  #pump(): void {
    const limit = this.#options.maxQueries ?? MAX_QUERIES;
    while (this.#querying < limit && !this.#closed) {
      const rank = this.#queue.shift();
      if (rank === undefined) return;
      if (!rank.isClosed) this.#query(rank);
    }
  }

  #query(rank: FedRank): void {
    const { askNumber, start } = rank;
    const { client, queryTimeoutMs = QUERY_TIMEOUT_MS, logger } = this.#options;
    const { address, endpointPrefix, instanceId } = rank.worker.options;
    const endpoint = `${endpointPrefix}.${kvQueryEndpoint(rank.dpRank)}`;
    this.#querying++;
    let done = false;
    const finish = (): void => {
      if (done) return;
      done = true;
      this.#querying--;
      delete rank.cancelQuery;
    };
    const query = queryKvEvents(
      { client, address, endpoint, dpRank: rank.dpRank, start, timeoutMs: queryTimeoutMs },
      {
        onAnswer: (answer: KvAnswer) => {
          const isLast = answer.type !== "tree-dump" || answer.page === answer.pageCount - 1;
          if (isLast) {
            finish();
            this.#counters.restored(answer.type === "tree-dump" ? "full" : "incremental", "ok");
          }
          rank.recovery.onAnswer(askNumber, answer);
          this.#afterEvents(rank);
          if (isLast) this.#pump();
        },
        onEnd: (error) => {
          finish();
          if (error !== undefined) {
            this.#counters.restored(start === undefined ? "full" : "incremental", "failed");
            if (!rank.worker.hasLoggedFailure) {
              rank.worker.hasLoggedFailure = true;
              logger.warn(
                { instance: instanceId, dp_rank: rank.dpRank, reason: error.reason, diagnostic: error.diagnostic },
                `cannot restore KV events, trying again: ${error.publicMessage}`,
              );
            }
            rank.recovery.onFailure(askNumber);
          }
          this.#pump();
        },
      },
    );
    if (!done) {
      rank.cancelQuery = () => {
        finish();
        query.cancel();
      };
    }
  }
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
  isClosed = false;
  askNumber = 0;
  start: number | undefined;
  timer: TimerHandle | undefined;
  cancelQuery?: () => void;
  #counted = { duplicate: 0, stale: 0, overflow: 0, missed: 0 };

  constructor(feed: KvEventFeed, worker: FedWorker, dpRank: number, rankNumber: number, counters: FeedCounters) {
    this.#feed = feed;
    this.worker = worker;
    this.dpRank = dpRank;
    this.#rankNumber = rankNumber;
    this.#counters = counters;
    counters.ranks.add(this);
  }

  apply(event: KvEvent): void {
    const status = this.worker.options.index.apply(this.#rankNumber, event);
    this.#counters.applied(event.type, status);
  }

  clear(): void {
    this.worker.options.index.clearRank(this.#rankNumber);
    this.#counters.applied("cleared", "ok");
  }

  ask(askNumber: number, start: number | undefined, fruitless: number): void {
    this.timer?.cancel();
    this.cancelQuery?.();
    const isWaiting = this.askNumber !== 0 && this.#isQueued;
    this.askNumber = askNumber;
    this.start = start;
    if (isWaiting) return;
    this.#feed.schedule(this, fruitless === 0 ? 0 : Math.min(MAX_BACK_OFF_MS, BACK_OFF_MS * 2 ** (fruitless - 1)));
  }
}
