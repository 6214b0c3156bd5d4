import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { Logger } from "../observability/index.ts";
import { decodeArtifact } from "../model/index.ts";
import {
  EARLY_PULL_ENDPOINT,
  GENERATE_ENDPOINT,
  LOAD_TOPIC,
  TOKENIZER_ENDPOINT,
  isModelCard,
  parseLoadReport,
  type ModelCard,
} from "../protocol/index.ts";
import {
  ModelRouters,
  SplitAdvisor,
  electFleet,
  fleetConflict,
  fleetKind,
  type BusyThresholds,
  type KvIndex,
  type ModelRouter,
  type Router,
  type RouterConfig,
  type SplitMode,
} from "../router/index.ts";
import { RouterServiceClient, type RemoteRouter } from "../router-service/index.ts";
import { formatEndpoint, watchCards, watchInstances, type Instance, type Planes } from "../runtime/component/index.ts";
import type { EventSubscription } from "../runtime/event-plane/index.ts";
import type { Watch } from "../runtime/discovery/index.ts";
import type { TimerHandle } from "../std/index.ts";
import { ModelPlaces } from "./admission.ts";
import type { FrontendLimits } from "./config.ts";
import { fetchArtifact } from "./fetch-artifact.ts";
import { ModelMetrics, WorkerGauges } from "./frontend-metrics.ts";
import {
  DEFAULT_DECODE_WAIT_MS,
  DEFAULT_HANDOFF_TIMEOUT_MS,
  DEFAULT_MIGRATION,
  DEFAULT_STALL_LIMIT_MS,
  type MigrationConfig,
} from "./config.ts";
import { KeptWorkers, type WorkerPart } from "./kept-workers.ts";
import { ProgressWatch } from "./progress-watch.ts";
import { Preprocessor } from "./preprocess/index.ts";
import { SplitLog } from "./split-log.ts";
import type { ThreadLink } from "./threads/thread-link.ts";

/**
 * The models this frontend serves and the workers behind each: follows instances, model cards and load reports. A worker
 * counts once both its instance and its card are there and the model's tokenizer was fetched from it and loaded. A
 * worker whose card does not agree with most of its model's (another tokenizer, block size, a shorter context; fleet.ts) is
 * left out, logged, counted and shown in `/health`. When discovery becomes unreadable the last known set stays, and so does a worker that only discovery
 * has lost (kept-workers.ts).
 */
export interface ServedModel {
  readonly name: string;
  /** Of its oldest worker, whose context length is the model's. */
  card: ModelCard;
  /** By instance id, of the workers that joined: engines and versions may differ. */
  readonly cards: Map<string, ModelCard>;
  /** Workers of its name that do not agree with these. */
  excludedCount: number;
  /** `namespace.component.generate` of its workers. */
  readonly generateEndpoint: string;
  /** Where its workers fetch blocks of prompts that are still being computed. */
  readonly earlyPullEndpoint: string;
  readonly preprocessor: Preprocessor;
  /** With a router service: only asked when that one does not answer. */
  readonly router: Router;
  /** The router service; undefined when this frontend routes by itself. */
  readonly remote: RemoteRouter | undefined;
  /** The workers that prefill for the others; undefined until the first of them joined. */
  prefill: PrefillPool | undefined;
  /** Whether to use them. */
  readonly advisor: SplitAdvisor;
  readonly splits: SplitLog;
  /** From a prefill worker's token to its handoff. */
  readonly handoffTimeoutMs: number;
  /** Before a prompt is computed, for a decode worker with a place and KV memory. */
  readonly decodeWaitMs: number;
  /** Of its workers' blocks, to be fed with their events; undefined when the router uses none, or one of another thread. */
  readonly kvIndex: KvIndex | undefined;
  readonly metrics: ModelMetrics;
  readonly progress: ProgressWatch;
  readonly migration: MigrationConfig;
  /** At the frontend's gate. */
  readonly places: ModelPlaces;
  /** By instance id, of the workers that joined. */
  readonly workerGauges: Map<string, WorkerGauges>;
}

export interface PrefillPool extends ModelRouter {
  /** `namespace.component.generate` of its workers. */
  readonly generateEndpoint: string;
}

/** Model names come from workers, which are trusted, but a bound costs nothing: the oldest without workers goes first. */
const MAX_MODELS = 256;
const FETCH_TIMEOUT_MS = 20_000;
const RETRY_MS = 1_000;

interface WorkerRecord {
  instance?: Instance;
  card?: ModelCard;
  /** The model whose router has this worker. */
  joined?: ServedModel;
  /** Its own, or its prefill pool. */
  router?: ModelRouter;
  /** Why it is not joined, for `/health`. */
  problem?: string;
}

export class ModelRegistry {
  readonly #planes: Planes;
  readonly #namespace: string;
  readonly #routers: ModelRouters;
  readonly #service: RouterServiceClient | undefined;
  readonly #thread: ThreadLink | undefined;
  readonly #logger: Logger;
  readonly #migration: MigrationConfig;
  readonly #stallLimitMs: number;
  readonly #splitMode: SplitMode;
  readonly #handoffTimeoutMs: number;
  readonly #decodeWaitMs: number;
  readonly #tokenizerCacheBytes: number;
  readonly #limits: Pick<FrontendLimits, "concurrentPerModel" | "capacityShare">;
  readonly #models = new Map<string, ServedModel>();
  /** Models whose tokenizer is being fetched: workers that come meanwhile wait for it. */
  readonly #loading = new Map<string, Promise<ServedModel>>();
  readonly #workers = new Map<string, WorkerRecord>();
  readonly #kept: KeptWorkers;
  readonly #retryTimers = new Set<TimerHandle>();
  /** Thresholds that another thread was given for a model that is not loaded here yet. */
  readonly #waitingThresholds = new Map<string, BusyThresholds>();
  #watches: (Watch | EventSubscription)[] = [];
  #closed = false;
  /** Set by the pipeline: a worker came or left, so that models may have more room or none. */
  onCapacity: (() => void) | undefined = undefined;

  /** Throws `invalid-config` for a router mode that nobody registered, and for a router service with several threads. */
  constructor(
    planes: Planes,
    options: {
      namespace: string;
      routerMode: string;
      router?: Partial<RouterConfig> | undefined;
      replicaSync?: boolean | undefined;
      /** When this is one of several threads: where the index is, and the other threads' routers. */
      thread?: ThreadLink | undefined;
      /** Ask a router service, and choose here by `routerMode` only when it does not answer. */
      service?: { readonly answerTimeoutMs: number } | undefined;
      /** @default as the options of the command line */
      migration?: MigrationConfig | undefined;
      /** How long a worker may give no token to requests it has begun; 0 = for ever. @default 30000 */
      stallLimitMs?: number | undefined;
      /** Whether requests are split where there are prefill workers. @default "auto" */
      disagg?: SplitMode | undefined;
      /** @default 5000 */
      handoffTimeoutMs?: number | undefined;
      /** @default 10000 */
      decodeWaitMs?: number | undefined;
      /** Per model. */
      tokenizerCacheBytes: number;
      limits: Pick<FrontendLimits, "concurrentPerModel" | "capacityShare">;
    },
  ) {
    this.#planes = planes;
    this.#namespace = options.namespace;
    const {
      thread,
      service,
      migration,
      stallLimitMs,
      disagg,
      handoffTimeoutMs,
      decodeWaitMs,
      tokenizerCacheBytes,
      limits,
      ...routing
    } = options;
    this.#migration = migration ?? DEFAULT_MIGRATION;
    this.#stallLimitMs = stallLimitMs ?? DEFAULT_STALL_LIMIT_MS;
    this.#splitMode = disagg ?? "auto";
    this.#handoffTimeoutMs = handoffTimeoutMs ?? DEFAULT_HANDOFF_TIMEOUT_MS;
    this.#decodeWaitMs = decodeWaitMs ?? DEFAULT_DECODE_WAIT_MS;
    this.#limits = limits;
    if (thread !== undefined && service !== undefined) {
      throw new DynamoError("invalid-config", "a router service is asked by one frontend thread alone");
    }
    this.#thread = thread;
    this.#routers = new ModelRouters(planes, { ...routing, shared: thread });
    this.#kept = new KeptWorkers(planes, (instanceId) => this.#onGone(instanceId, undefined, false));
    if (service !== undefined) {
      this.#service = new RouterServiceClient(planes, { namespace: options.namespace, ...service });
    }
    this.#logger = planes.logger;
    this.#tokenizerCacheBytes = tokenizerCacheBytes;
    planes.metrics.onCollect(() => {
      for (const { metrics, preprocessor } of this.#models.values()) {
        metrics.setTokenizerCache(preprocessor.tokenizer.cacheUse);
      }
    });
  }

  async start(): Promise<void> {
    const scope = { namespace: this.#namespace };
    // Before the first worker joins.
    await this.#routers.start();
    await this.#service?.start();
    this.#watches.push(
      await watchInstances(this.#planes.discovery, { ...scope, endpoint: GENERATE_ENDPOINT }, (change) => {
        if (change.type === "put") this.#onInstance(change.instance);
        else this.#onGone(change.instanceId, "instance", change.expired === true);
      }),
      await watchCards(this.#planes.discovery, scope, (change) => {
        if (change.type === "put") this.#onCard(change.instanceId, change.card);
        else this.#onGone(change.instanceId, "card", change.expired === true);
      }),
      await this.#planes.events.subscribe(LOAD_TOPIC, {
        onEvent: (_publisher, _sequence, payload) => this.#onLoad(payload),
        // A lost load report is replaced by the next one.
        onGap: () => undefined,
      }),
    );
  }

  /**
   * Resolves when the models of the workers that are known now are loaded, or cannot be; or after `timeoutMs`. A frontend
   * that is started anew beside others must not say of their models that there are none.
   */
  async loaded(timeoutMs: number): Promise<void> {
    const timeout = Promise.withResolvers<void>();
    const timer = this.#planes.clock.setTimer(timeoutMs, () => timeout.resolve());
    let isLate = false;
    void timeout.promise.then(() => (isLate = true));
    // One that could not be loaded from a worker is loaded from the next.
    while (this.#loading.size > 0 && !isLate) {
      await Promise.race([Promise.allSettled(this.#loading.values()), timeout.promise]);
    }
    timer.cancel();
  }

  /** A model that has a worker. */
  find(name: string): ServedModel | undefined {
    return this.#models.get(name);
  }

  /** Models that can be answered right now. */
  list(): ServedModel[] {
    return [...this.#models.values()].filter((model) => model.router.workers.length > 0);
  }

  /** Those of them that clients may be told of: with several threads, what each thread can answer. */
  listed(): ServedModel[] {
    const thread = this.#thread;
    return thread === undefined ? this.list() : this.list().filter(({ name }) => thread.isListed(name));
  }

  /** With those that have no worker now. */
  all(): ServedModel[] {
    return [...this.#models.values()];
  }

  /** Of one model, as another thread was told; kept for a model that is still to come. */
  setBusyThresholds(name: string, thresholds: BusyThresholds): void {
    const model = this.#models.get(name);
    if (model !== undefined) model.router.busyThresholds = thresholds;
    else if (this.#waitingThresholds.size < MAX_MODELS) this.#waitingThresholds.set(name, thresholds);
  }

  /** For `/health`: every worker known to discovery, why it does not serve if it does not, and whether it is kept without a lease. */
  instances(): { instance: Instance; problem: string | undefined; isKept: boolean }[] {
    return [...this.#workers.values()].flatMap(({ instance, problem, joined }) =>
      instance === undefined
        ? []
        : [
            {
              instance,
              problem: joined === undefined ? (problem ?? "no model card yet") : undefined,
              isKept: this.#kept.has(instance.instanceId),
            },
          ],
    );
  }

  async close(): Promise<void> {
    this.#closed = true;
    for (const timer of this.#retryTimers) timer.cancel();
    const watches = this.#watches;
    this.#watches = [];
    this.#kept.close();
    for (const model of this.#models.values()) {
      model.router.close(new DynamoError("draining", "the server is shutting down"));
      model.prefill?.router.close(new DynamoError("draining", "the server is shutting down"));
      model.progress.close();
    }
    await Promise.all([...watches.map((watch) => watch.close()), this.#routers.close(), this.#service?.close()]);
  }

  #record(instanceId: string): WorkerRecord {
    let record = this.#workers.get(instanceId);
    if (record === undefined) this.#workers.set(instanceId, (record = {}));
    return record;
  }

  #onInstance(instance: Instance): void {
    const record = this.#record(instance.instanceId);
    record.instance = instance;
    this.#back(instance.instanceId, "instance");
    if (record.router !== undefined) this.#routers.join(record.router, instance, record.card ?? record.joined!.card);
    this.#join(instance.instanceId);
  }

  #onCard(instanceId: string, card: unknown): void {
    const record = this.#record(instanceId);
    if (!isModelCard(card)) {
      record.problem = "its model card has another version or is damaged";
      this.#logger.warn({ instance: instanceId }, `worker left out: ${record.problem}`);
      return;
    }
    // It changed its role, and between two looks at discovery it was gone and back.
    if (record.card !== undefined && record.card.role !== card.role) this.#leave(instanceId, record);
    record.card = card;
    this.#back(instanceId, "card");
    if (record.joined?.cards.has(instanceId) === true) {
      record.joined.cards.set(instanceId, card);
      this.#settle(card.name);
    } else this.#join(instanceId);
  }

  #back(instanceId: string, part: WorkerPart): void {
    this.#kept.back(instanceId, part);
    this.#routers.keptWorkers = this.#kept.size;
  }

  /** `part` undefined: the connection of one that was kept has ended. */
  #onGone(instanceId: string, part: WorkerPart | undefined, isExpired: boolean): void {
    const record = this.#workers.get(instanceId);
    if (record === undefined) return;
    const stays =
      isExpired &&
      part !== undefined &&
      record.joined !== undefined &&
      record.instance !== undefined &&
      this.#kept.keep(record.instance, part);
    const { card } = record;
    if (!stays) {
      if (part !== undefined) delete record[part];
      for (const missing of this.#kept.release(instanceId)) delete record[missing];
    }
    this.#routers.keptWorkers = this.#kept.size;
    if (stays) return;
    this.#leave(instanceId, record);
    if (record.instance === undefined && record.card === undefined) this.#workers.delete(instanceId);
    if (card === undefined) return;
    const model = this.#models.get(card.name);
    // Nobody waits to take its place, and it was not what the others are held against.
    if (model !== undefined && (model.excludedCount > 0 || model.card === card)) this.#settle(card.name);
  }

  #leave(instanceId: string, record: WorkerRecord): void {
    const { joined: model, router } = record;
    if (model === undefined || router === undefined) return;
    this.#routers.leave(router, instanceId);
    model.workerGauges.get(instanceId)?.remove();
    model.workerGauges.delete(instanceId);
    model.cards.delete(instanceId);
    this.#logger.info({ instance: instanceId, model: router.name, left: router.router.workers.length }, "worker left");
    this.#setReady(model);
    delete record.joined;
    delete record.router;
    this.onCapacity?.();
  }

  #onLoad(payload: Uint8Array): void {
    const report = parseLoadReport(payload);
    if (report === undefined) return;
    const { joined: model, router } = this.#workers.get(report.instanceId) ?? {};
    if (model === undefined) return;
    router!.router.updateLoad(report.instanceId, report.load);
    // With nobody waiting, no stream was put back: each running one is to get its tokens.
    const isShort = report.load.waitingRequests > 0;
    model.progress.reported(report.instanceId, isShort ? (report.stillMs ?? Infinity) : Infinity);
    const gauges = model.workerGauges.get(report.instanceId);
    gauges?.activeBlocks.set(report.load.activeBlocks);
    gauges?.prefillTokens.set(report.load.pendingPrefillTokens);
  }

  #join(instanceId: string): void {
    const record = this.#workers.get(instanceId);
    if (record?.instance === undefined || record.card === undefined || record.joined !== undefined || this.#closed)
      return;
    const { instance, card } = record;
    const model = this.#models.get(card.name);
    if (model !== undefined) {
      // The usual case, at the cost of one worker: it is one more of those that are there.
      const isOneMore = workerCount(model) > 0 && card.created > model.card.created;
      if (isOneMore && fleetConflict(model.card, card) === undefined)
        this.#add(model, instanceId, record, instance, card);
      else this.#settle(card.name);
      return;
    }
    let loading = this.#loading.get(card.name);
    const isFromThisOne = loading === undefined;
    if (loading === undefined) {
      loading = this.#load(instance, card);
      this.#loading.set(card.name, loading);
      const settle = (): void => void this.#loading.delete(card.name);
      loading.then(settle, settle);
    }
    loading.then(
      () => this.#join(instanceId),
      (thrown: unknown) => {
        // Another worker could not give it, a dead one maybe that discovery still knows: this one is asked next.
        if (!isFromThisOne) return this.#join(instanceId);
        const error = toDynamoError(thrown);
        record.problem = error.publicMessage;
        this.#logger.warn(
          { instance: instanceId, model: card.name, reason: error.reason, diagnostic: error.diagnostic },
          `cannot load the model's tokenizer: ${error.publicMessage}`,
        );
        this.#later(() => this.#join(instanceId));
      },
    );
  }

  #later(run: () => void): void {
    if (this.#closed) return;
    const timer = this.#planes.clock.setTimer(RETRY_MS, () => {
      this.#retryTimers.delete(timer);
      run();
    });
    this.#retryTimers.add(timer);
  }

  /** Whoever of that name serves together now: found anew from all that are known, so that all frontends find the same. */
  #settle(name: string): void {
    const model = this.#models.get(name);
    if (model === undefined || this.#closed) return;
    const known = [...this.#workers].filter(([, { instance, card }]) => instance !== undefined && card?.name === name);
    const members = known.map(([instanceId, { card }]) => ({ instanceId, card: card! }));
    if (members.length === 0) {
      model.excludedCount = 0;
      return model.metrics.setExcludedWorkers(0);
    }
    const { leader, problems } = electFleet(members);
    for (const [instanceId, record] of known) {
      const problem = problems.get(instanceId);
      if (problem === undefined) continue;
      this.#leave(instanceId, record);
      if (record.problem === problem) continue;
      record.problem = problem;
      this.#logger.warn({ instance: instanceId, model: name }, `worker left out: ${problem}`);
    }
    model.excludedCount = problems.size;
    model.metrics.setExcludedWorkers(problems.size);
    if (fleetKind(model.card) !== fleetKind(leader)) {
      // Most of its workers are of another kind now, or the last of the old kind is gone: the model starts over with them.
      for (const [instanceId, record] of known) this.#leave(instanceId, record);
      this.#models.delete(name);
      this.#routers.forget(name);
    } else if (model.card !== leader) {
      model.card = leader;
      model.preprocessor.contextLength = leader.contextLength;
      model.metrics.setCard(leader);
    }
    for (const [instanceId, record] of known) {
      if (problems.has(instanceId) || record.joined !== undefined) continue;
      if (this.#models.get(name) === model) this.#add(model, instanceId, record, record.instance!, record.card!);
      else this.#join(instanceId);
    }
  }

  #add(model: ServedModel, instanceId: string, record: WorkerRecord, instance: Instance, card: ModelCard): void {
    const router = card.role === "prefill" ? this.#prefillPool(model, instance) : model;
    this.#routers.join(router, instance, card);
    record.router = router;
    model.workerGauges.set(instanceId, new WorkerGauges(this.#planes.metrics, instanceId));
    record.joined = model;
    model.cards.set(instanceId, card);
    delete record.problem;
    this.#setReady(model);
    this.#logger.info(
      { instance: instanceId, model: router.name, mode: card.role, workers: router.router.workers.length },
      "worker joined",
    );
    this.onCapacity?.();
  }

  #prefillPool(model: ServedModel, instance: Instance): PrefillPool {
    model.prefill ??= {
      ...this.#routers.createPrefill(model, model.card),
      generateEndpoint: formatEndpoint({ ...instance, endpoint: GENERATE_ENDPOINT }),
    };
    if (model.remote !== undefined) model.remote.prefill = model.prefill.router;
    return model.prefill;
  }

  #setReady({ name, router, metrics }: ServedModel): void {
    const isReady = router.workers.length > 0;
    metrics.setReady(isReady);
    this.#thread?.setServed(name, isReady);
  }

  async #load(instance: Instance, card: ModelCard): Promise<ServedModel> {
    const { metrics, request, clock } = this.#planes;
    const bytes = await fetchArtifact(request.client, {
      address: instance.address,
      endpoint: formatEndpoint({ ...instance, endpoint: TOKENIZER_ENDPOINT }),
      bytes: card.tokenizerBytes,
      sha256: card.tokenizerSha256,
      timeoutMs: FETCH_TIMEOUT_MS,
    });
    const preprocessor = await Preprocessor.create(decodeArtifact(bytes), card, clock, this.#tokenizerCacheBytes);
    this.#evictIdle();
    const modelRouter = this.#routers.create(card);
    const model: ServedModel = {
      ...modelRouter,
      remote: this.#service?.forModel(modelRouter.router, card),
      prefill: undefined,
      splits: new SplitLog(),
      handoffTimeoutMs: this.#handoffTimeoutMs,
      decodeWaitMs: this.#decodeWaitMs,
      advisor: new SplitAdvisor({
        mode: this.#splitMode,
        clock,
        blockSizeTokens: card.blockSizeTokens,
        blockBytes: card.blockBytes,
        maxBatchedTokens: card.maxBatchedTokens,
      }),
      card,
      generateEndpoint: formatEndpoint({ ...instance, endpoint: GENERATE_ENDPOINT }),
      earlyPullEndpoint: formatEndpoint({ ...instance, endpoint: EARLY_PULL_ENDPOINT }),
      preprocessor,
      metrics: new ModelMetrics(metrics, card.name),
      progress: new ProgressWatch({ clock, limitMs: this.#stallLimitMs }),
      migration: this.#migration,
      cards: new Map(),
      excludedCount: 0,
      places: new ModelPlaces(() => capacityOf(modelRouter.router.availableCount, model.cards, this.#limits)),
      workerGauges: new Map(),
    };
    const thresholds = this.#waitingThresholds.get(card.name);
    if (thresholds !== undefined) model.router.busyThresholds = thresholds;
    this.#waitingThresholds.delete(card.name);
    model.metrics.setCard(card);
    model.metrics.setMigrationLimit(this.#migration.limit);
    this.#models.set(card.name, model);
    return model;
  }

  #evictIdle(): void {
    if (this.#models.size < MAX_MODELS) return;
    const idle = [...this.#models.values()].find((model) => workerCount(model) === 0);
    if (idle === undefined) throw new DynamoError("stream-limit", `${MAX_MODELS} models are served already`);
    this.#models.delete(idle.name);
    this.#routers.forget(idle.name);
    idle.router.close(new DynamoError("no-workers", `no worker that serves ${idle.name} is available`));
  }
}

function workerCount({ router, prefill }: ServedModel): number {
  return router.workers.length + (prefill?.router.workers.length ?? 0);
}

/** Requests that wait on a rank, so that its next step finds one when a sequence ends: more would only wait longer there. */
const WAITING_PER_RANK = 8;

/**
 * Answers that a model's workers can work on, without those that just failed: what they had fills the others. Without a worker nobody waits at the gate: all are to hear that there is none.
 */
function capacityOf(
  workers: number,
  cards: ReadonlyMap<string, ModelCard>,
  { concurrentPerModel, capacityShare }: Pick<FrontendLimits, "concurrentPerModel" | "capacityShare">,
): number {
  if (workers === 0) return Infinity;
  if (concurrentPerModel !== undefined) return concurrentPerModel;
  let all = 0;
  let answering = 0;
  for (const { role, maxSequences, dataParallelSize } of cards.values()) {
    if (role === "prefill") continue;
    answering++;
    all += dataParallelSize * (maxSequences + Math.min(WAITING_PER_RANK, Math.ceil(maxSequences / 4)));
  }
  // Which of them are available is not asked: on average.
  return Math.max(1, Math.floor((workers / Math.max(1, answering)) * all * capacityShare));
}
