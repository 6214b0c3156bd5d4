import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { Logger } from "../observability/index.ts";
import { decodeArtifact } from "../model/index.ts";
import {
  GENERATE_ENDPOINT,
  LOAD_TOPIC,
  TOKENIZER_ENDPOINT,
  isModelCard,
  parseLoadReport,
  type ModelCard,
} from "../protocol/index.ts";
import {
  DEFAULT_ROUTER_CONFIG,
  FlatKvIndex,
  KvEventFeed,
  ReplicaSync,
  Router,
  findPolicy,
  type BusyThresholds,
  type KvIndex,
  type RouterConfig,
  type RoutingPolicy,
} from "../router/index.ts";
import { formatEndpoint, watchCards, watchInstances, type Instance, type Planes } from "../runtime/component/index.ts";
import type { EventSubscription } from "../runtime/event-plane/index.ts";
import type { Watch } from "../runtime/discovery/index.ts";
import type { TimerHandle } from "../std/index.ts";
import { fetchArtifact } from "./fetch-artifact.ts";
import { ModelMetrics, WorkerGauges } from "./frontend-metrics.ts";
import { Preprocessor } from "./preprocess/index.ts";
import type { ThreadLink } from "./threads/thread-link.ts";

/**
 * The models this frontend serves and the workers behind each: follows instances, model cards and load reports. A worker
 * counts once both its instance and its card are there and the model's tokenizer was fetched from it and loaded. A
 * worker whose card does not agree with its model (another tokenizer, context or block size) is left out, logged and
 * shown in `/health`. When discovery becomes unreadable the last known set stays.
 */
export interface ServedModel {
  readonly name: string;
  readonly card: ModelCard;
  /** `namespace.component.generate` of its workers. */
  readonly generateEndpoint: string;
  readonly preprocessor: Preprocessor;
  readonly router: Router;
  /** Of its workers' blocks, to be fed with their events; undefined when the router uses none, or one of another thread. */
  readonly kvIndex: KvIndex | undefined;
  readonly metrics: ModelMetrics;
  /** By instance id, of the workers that joined. */
  readonly workerGauges: Map<string, WorkerGauges>;
}

/** Model names come from workers, which are trusted, but a bound costs nothing: the oldest without workers goes first. */
const MAX_MODELS = 256;
const FETCH_TIMEOUT_MS = 20_000;
const RETRY_MS = 1_000;
/** Data-parallel ranks of one worker; a card that claims more is wrong. */
const MAX_RANKS = 1_024;

interface WorkerRecord {
  instance?: Instance;
  card?: ModelCard;
  /** The model whose router has this worker. */
  joined?: ServedModel;
  /** Why it is not joined, for `/health`. */
  problem?: string;
}

export class ModelRegistry {
  readonly #planes: Planes;
  readonly #namespace: string;
  readonly #policy: RoutingPolicy;
  readonly #routerConfig: RouterConfig;
  readonly #logger: Logger;
  readonly #models = new Map<string, ServedModel>();
  /** Models whose tokenizer is being fetched: workers that come meanwhile wait for it. */
  readonly #loading = new Map<string, Promise<ServedModel>>();
  readonly #workers = new Map<string, WorkerRecord>();
  readonly #retryTimers = new Set<TimerHandle>();
  /** Keeps the models' KV indexes; undefined when the router does not use them. */
  readonly #kvFeed: KvEventFeed | undefined;
  /** Tells other routers what this one books; undefined when not asked for. */
  readonly #replicaSync: ReplicaSync | undefined;
  /** When this is one of several threads: where the index is, and the other threads' routers. */
  readonly #thread: ThreadLink | undefined;
  /** Thresholds that another thread was given for a model that is not loaded here yet. */
  readonly #waitingThresholds = new Map<string, BusyThresholds>();
  #watches: (Watch | EventSubscription)[] = [];
  #closed = false;

  /** Throws `invalid-config` for a router mode that nobody registered. */
  constructor(
    planes: Planes,
    options: {
      namespace: string;
      routerMode: string;
      router?: Partial<RouterConfig> | undefined;
      replicaSync?: boolean | undefined;
      thread?: ThreadLink | undefined;
    },
  ) {
    this.#planes = planes;
    this.#namespace = options.namespace;
    const policy = findPolicy(options.routerMode);
    if (policy === undefined) throw new DynamoError("invalid-config", `there is no router mode ${options.routerMode}`);
    this.#policy = policy;
    this.#routerConfig = { ...DEFAULT_ROUTER_CONFIG, ...options.router };
    this.#logger = planes.logger;
    const { events, request, clock, logger, metrics } = planes;
    const { thread, replicaSync = false } = options;
    this.#thread = thread;
    // With several threads the host feeds the index.
    const usesKvEvents = policy.usesOverlap === true && this.#routerConfig.kvEvents && thread === undefined;
    this.#kvFeed = usesKvEvents
      ? new KvEventFeed({ events, client: request.client, clock, logger, metrics })
      : undefined;
    // Threads always tell each other; those of other processes hear it too when asked for.
    const bookings = replicaSync ? events : thread?.bookings;
    this.#replicaSync = bookings && new ReplicaSync({ events: bookings, clock, logger, metrics });
  }

  async start(): Promise<void> {
    const scope = { namespace: this.#namespace };
    // Before the first worker joins.
    await this.#kvFeed?.start();
    await this.#replicaSync?.start();
    this.#watches.push(
      await watchInstances(this.#planes.discovery, { ...scope, endpoint: GENERATE_ENDPOINT }, (change) => {
        if (change.type === "put") this.#onInstance(change.instance);
        else this.#onGone(change.instanceId, "instance");
      }),
      await watchCards(this.#planes.discovery, scope, (change) => {
        if (change.type === "put") this.#onCard(change.instanceId, change.card);
        else this.#onGone(change.instanceId, "card");
      }),
      await this.#planes.events.subscribe(LOAD_TOPIC, {
        onEvent: (_publisher, _sequence, payload) => this.#onLoad(payload),
        // A lost load report is replaced by the next one.
        onGap: () => undefined,
      }),
    );
  }

  /** A model that has a worker. */
  find(name: string): ServedModel | undefined {
    return this.#models.get(name);
  }

  /** Models that can be answered right now. */
  list(): ServedModel[] {
    return [...this.#models.values()].filter((model) => model.router.workers.length > 0);
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

  /** For `/health`: every worker known to discovery, and why it does not serve if it does not. */
  instances(): { instance: Instance; problem: string | undefined }[] {
    return [...this.#workers.values()].flatMap(({ instance, problem, joined }) =>
      instance === undefined
        ? []
        : [{ instance, problem: joined === undefined ? (problem ?? "no model card yet") : undefined }],
    );
  }

  async close(): Promise<void> {
    this.#closed = true;
    for (const timer of this.#retryTimers) timer.cancel();
    const watches = this.#watches;
    this.#watches = [];
    for (const model of this.#models.values())
      model.router.close(new DynamoError("draining", "the server is shutting down"));
    await Promise.all([...watches.map((watch) => watch.close()), this.#kvFeed?.close(), this.#replicaSync?.close()]);
  }

  #record(instanceId: string): WorkerRecord {
    let record = this.#workers.get(instanceId);
    if (record === undefined) this.#workers.set(instanceId, (record = {}));
    return record;
  }

  #onInstance(instance: Instance): void {
    const record = this.#record(instance.instanceId);
    record.instance = instance;
    if (record.joined !== undefined) this.#joinRouter(record.joined, instance, record.joined.card);
    this.#join(instance.instanceId);
  }

  #onCard(instanceId: string, card: unknown): void {
    const record = this.#record(instanceId);
    if (!isModelCard(card)) {
      record.problem = "its model card has another version or is damaged";
      this.#logger.warn({ instance: instanceId }, `worker left out: ${record.problem}`);
      return;
    }
    record.card = card;
    this.#join(instanceId);
  }

  #onGone(instanceId: string, part: "instance" | "card"): void {
    const record = this.#workers.get(instanceId);
    if (record === undefined) return;
    delete record[part];
    if (record.joined !== undefined) {
      this.#kvFeed?.removeWorker(instanceId);
      record.joined.router.removeWorker(instanceId);
      record.joined.workerGauges.get(instanceId)?.remove();
      record.joined.workerGauges.delete(instanceId);
      this.#logger.info(
        { instance: instanceId, model: record.joined.name, left: record.joined.router.workers.length },
        "worker left",
      );
      record.joined.metrics.setReady(record.joined.router.workers.length > 0);
      delete record.joined;
    }
    if (record.instance === undefined && record.card === undefined) this.#workers.delete(instanceId);
  }

  #onLoad(payload: Uint8Array): void {
    const report = parseLoadReport(payload);
    if (report === undefined) return;
    const model = this.#workers.get(report.instanceId)?.joined;
    if (model === undefined) return;
    model.router.updateLoad(report.instanceId, report.load);
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
      this.#add(model, instanceId, record, instance, card);
      return;
    }
    let loading = this.#loading.get(card.name);
    if (loading === undefined) {
      loading = this.#load(instance, card);
      this.#loading.set(card.name, loading);
      const settle = (): void => void this.#loading.delete(card.name);
      loading.then(settle, settle);
    }
    loading.then(
      () => this.#join(instanceId),
      (thrown: unknown) => {
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

  #add(model: ServedModel, instanceId: string, record: WorkerRecord, instance: Instance, card: ModelCard): void {
    const conflict = cardConflict(model.card, card);
    if (conflict !== undefined && model.router.workers.length > 0) {
      record.problem = conflict;
      this.#logger.warn({ instance: instanceId, model: model.name }, `worker left out: ${conflict}`);
      return;
    }
    if (conflict !== undefined) {
      // The last worker of the old kind is gone: the model starts over with the new card.
      this.#models.delete(model.name);
      this.#replicaSync?.detach(model.name);
      this.#join(instanceId);
      return;
    }
    this.#joinRouter(model, instance, card);
    model.workerGauges.set(instanceId, new WorkerGauges(this.#planes.metrics, instanceId));
    record.joined = model;
    delete record.problem;
    model.metrics.setReady(true);
    this.#logger.info(
      { instance: instanceId, model: model.name, workers: model.router.workers.length },
      "worker joined",
    );
  }

  #joinRouter(model: ServedModel, instance: Instance, card: ModelCard): void {
    const { maxSequences, maxBatchedTokens, totalBlocks } = card;
    const { instanceId, address, namespace, component } = instance;
    const dataParallelSize = Math.max(1, Math.min(card.dataParallelSize, MAX_RANKS));
    this.#kvFeed?.removeMoved(instanceId, address);
    model.router.addWorker(instanceId, address, {
      dataParallelSize,
      capacity: { maxSequences, maxBatchedTokens, totalBlocks },
    });
    if (model.kvIndex === undefined) return;
    const endpointPrefix = `${namespace}.${component}`;
    this.#kvFeed?.addWorker({
      instanceId,
      model: model.name,
      address,
      endpointPrefix,
      dataParallelSize,
      index: model.kvIndex,
    });
  }

  async #load(instance: Instance, card: ModelCard): Promise<ServedModel> {
    const { clock, random, metrics, request } = this.#planes;
    const bytes = await fetchArtifact(request.client, {
      address: instance.address,
      endpoint: formatEndpoint({ ...instance, endpoint: TOKENIZER_ENDPOINT }),
      bytes: card.tokenizerBytes,
      sha256: card.tokenizerSha256,
      timeoutMs: FETCH_TIMEOUT_MS,
    });
    const preprocessor = await Preprocessor.create(decodeArtifact(bytes), card);
    const usesKvEvents = this.#policy.usesOverlap === true && this.#routerConfig.kvEvents;
    const kvIndex = usesKvEvents && this.#thread === undefined ? new FlatKvIndex() : undefined;
    const sharedIndex = usesKvEvents ? this.#thread?.kvIndex(card.name) : undefined;
    const index = kvIndex ?? sharedIndex?.index;
    const router = new Router({
      model: card.name,
      policy: this.#policy,
      clock,
      random,
      metrics,
      blockSizeTokens: card.blockSizeTokens,
      config: this.#routerConfig,
      ...(index === undefined ? {} : { index }),
    });
    const model: ServedModel = {
      name: card.name,
      card,
      generateEndpoint: formatEndpoint({ ...instance, endpoint: GENERATE_ENDPOINT }),
      preprocessor,
      router,
      kvIndex,
      metrics: new ModelMetrics(metrics, card.name),
      workerGauges: new Map(),
    };
    router.indexHealth = kvIndex === undefined ? sharedIndex : this.#kvFeed?.health(kvIndex);
    const thresholds = this.#waitingThresholds.get(card.name);
    if (thresholds !== undefined) router.busyThresholds = thresholds;
    this.#waitingThresholds.delete(card.name);
    model.metrics.setCard(card);
    this.#evictIdle();
    this.#models.set(card.name, model);
    this.#replicaSync?.attach(card.name, router);
    return model;
  }

  #evictIdle(): void {
    if (this.#models.size < MAX_MODELS) return;
    const idle = [...this.#models.values()].find((model) => model.router.workers.length === 0);
    if (idle === undefined) throw new DynamoError("stream-limit", `${MAX_MODELS} models are served already`);
    this.#models.delete(idle.name);
    this.#replicaSync?.detach(idle.name);
    idle.router.close(new DynamoError("no-workers", `no worker that serves ${idle.name} is available`));
  }
}

/** What must agree between all workers of one model, or requests would mean different things on each. */
function cardConflict(known: ModelCard, card: ModelCard): string | undefined {
  const fields = ["tokenizerSha256", "contextLength", "blockSizeTokens", "vocabularySize"] as const;
  const field = fields.find((name) => known[name] !== card[name]);
  if (field === undefined) return undefined;
  return `its ${field} is ${card[field]}, the model's other workers have ${known[field]}`;
}
