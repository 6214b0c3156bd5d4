import { DynamoError } from "../errors/index.ts";
import type { Logger } from "../observability/index.ts";
import { GENERATE_ENDPOINT, LOAD_TOPIC, isModelCard, parseLoadReport, type ModelCard } from "../protocol/index.ts";
import {
  ModelRouters,
  electFleet,
  fleetConflict,
  fleetKind,
  type ModelRouter,
  type ModelRoutersOptions,
} from "../router/index.ts";
import { watchCards, watchInstances, type Instance, type Planes } from "../runtime/component/index.ts";

/**
 * The models that workers serve, each with a router, kept up by discovery and load reports: what a frontend's model
 * registry does, without tokenizers. A worker counts once its instance and its card are both there; one whose card does
 * not agree with its model's other workers is left out and logged. When discovery becomes unreadable the last known set stays.
 */
export interface RoutedModel extends ModelRouter {
  /** Of its oldest worker. */
  card: ModelCard;
  /** Of the workers that prefill for the others; undefined until the first of them joined. */
  prefill: ModelRouter | undefined;
}

/** Names come from workers, which are trusted, but a bound costs nothing: one without workers goes first. */
const MAX_MODELS = 256;

interface WorkerRecord {
  instance?: Instance;
  card?: ModelCard;
  /** The model whose router has this worker. */
  joined?: RoutedModel;
  /** Its own, or its prefill pool. */
  router?: ModelRouter;
  /** Why it was left out, as logged. */
  problem?: string;
}

interface Closing {
  close(): Promise<void>;
}

export class RoutedModels {
  readonly #planes: Planes;
  readonly #namespace: string;
  readonly #routers: ModelRouters;
  readonly #logger: Logger;
  readonly #models = new Map<string, RoutedModel>();
  readonly #workers = new Map<string, WorkerRecord>();
  readonly #watches: Closing[] = [];

  /** Throws `invalid-config` for a router mode that nobody registered. */
  constructor(planes: Planes, options: ModelRoutersOptions & { readonly namespace: string }) {
    this.#planes = planes;
    this.#namespace = options.namespace;
    this.#routers = new ModelRouters(planes, options);
    this.#logger = planes.logger;
  }

  async start(): Promise<void> {
    const { discovery, events } = this.#planes;
    const scope = { namespace: this.#namespace };
    await this.#routers.start();
    this.#watches.push(
      await watchInstances(discovery, { ...scope, endpoint: GENERATE_ENDPOINT }, (change) => {
        if (change.type === "put") this.#onInstance(change.instance);
        else this.#onGone(change.instanceId, "instance");
      }),
    );
    this.#watches.push(
      await watchCards(discovery, scope, (change) => {
        if (change.type === "put") this.#onCard(change.instanceId, change.card);
        else this.#onGone(change.instanceId, "card");
      }),
    );
    this.#watches.push(
      await events.subscribe(LOAD_TOPIC, {
        onEvent: (_publisher, _sequence, payload) => this.#onLoad(payload),
        // A lost load report is replaced by the next one.
        onGap: () => undefined,
      }),
    );
  }

  find(name: string): RoutedModel | undefined {
    return this.#models.get(name);
  }

  all(): RoutedModel[] {
    return [...this.#models.values()];
  }

  async close(): Promise<void> {
    for (const { router, prefill } of this.#models.values()) {
      router.close(leaving());
      prefill?.router.close(leaving());
    }
    await Promise.all([...this.#watches.splice(0).map((watch) => watch.close()), this.#routers.close()]);
  }

  #record(instanceId: string): WorkerRecord {
    let record = this.#workers.get(instanceId);
    if (record === undefined) this.#workers.set(instanceId, (record = {}));
    return record;
  }

  #onInstance(instance: Instance): void {
    const record = this.#record(instance.instanceId);
    record.instance = instance;
    if (record.joined === undefined) this.#join(instance.instanceId, record);
    else this.#routers.join(record.router!, instance, record.card ?? record.joined.card);
  }

  #onCard(instanceId: string, card: unknown): void {
    if (!isModelCard(card)) {
      this.#logger.warn({ instance: instanceId }, "worker left out: its model card has another version or is damaged");
      return;
    }
    const record = this.#record(instanceId);
    // It changed its role, and between two looks at discovery it was gone and back.
    if (record.card !== undefined && record.card.role !== card.role) this.#leave(instanceId, record);
    record.card = card;
    if (record.joined === undefined) this.#join(instanceId, record);
    else this.#settle(card.name);
  }

  #onGone(instanceId: string, part: "instance" | "card"): void {
    const record = this.#workers.get(instanceId);
    if (record === undefined) return;
    const { card } = record;
    delete record[part];
    this.#leave(instanceId, record);
    if (record.instance === undefined && record.card === undefined) this.#workers.delete(instanceId);
    if (card !== undefined) this.#settle(card.name);
  }

  #leave(instanceId: string, record: WorkerRecord): void {
    if (record.router === undefined) return;
    this.#routers.leave(record.router, instanceId);
    this.#logger.info({ instance: instanceId, model: record.router.name }, "worker left");
    delete record.joined;
    delete record.router;
  }

  #onLoad(payload: Uint8Array): void {
    const report = parseLoadReport(payload);
    if (report === undefined) return;
    this.#workers.get(report.instanceId)?.router?.router.updateLoad(report.instanceId, report.load);
  }

  #join(instanceId: string, record: WorkerRecord): void {
    const { instance, card } = record;
    if (instance === undefined || card === undefined) return;
    const known = this.#models.get(card.name);
    // The usual case, at the cost of one worker: it is one more of those that are there.
    const isOneMore = known !== undefined && workerCount(known) > 0 && card.created > known.card.created;
    if (isOneMore && fleetConflict(known.card, card) === undefined)
      this.#add(known, instanceId, record, instance, card);
    else this.#settle(card.name);
  }

  #add(model: RoutedModel, instanceId: string, record: WorkerRecord, instance: Instance, card: ModelCard): void {
    if (card.role === "prefill") model.prefill ??= this.#routers.createPrefill(model, model.card);
    const router = card.role === "prefill" ? model.prefill! : model;
    this.#routers.join(router, instance, card);
    record.joined = model;
    record.router = router;
    delete record.problem;
    const workers = router.router.workers.length;
    this.#logger.info({ instance: instanceId, model: router.name, workers }, "worker joined");
  }

  /** Whoever of that name serves together now; the frontends find the same (router/fleet.ts). */
  #settle(name: string): void {
    const known = [...this.#workers].filter(([, { instance, card }]) => instance !== undefined && card?.name === name);
    if (known.length === 0) return;
    const { leader, problems } = electFleet(known.map(([instanceId, { card }]) => ({ instanceId, card: card! })));
    const before = this.#models.get(name);
    const startsOver = before === undefined || fleetKind(before.card) !== fleetKind(leader);
    for (const [instanceId, record] of known) {
      const problem = problems.get(instanceId);
      if (problem !== undefined || startsOver) this.#leave(instanceId, record);
      if (problem === undefined || record.problem === problem) continue;
      record.problem = problem;
      this.#logger.warn({ instance: instanceId, model: name }, `worker left out: ${problem}`);
    }
    if (startsOver && before !== undefined) this.#forget(before);
    const model = startsOver ? this.#newModel(leader) : before;
    if (model === undefined) return;
    model.card = leader;
    for (const [instanceId, record] of known) {
      if (problems.has(instanceId) || record.joined !== undefined) continue;
      this.#add(model, instanceId, record, record.instance!, record.card!);
    }
  }

  /** Undefined, and a log line, when there are too many. */
  #newModel(card: ModelCard): RoutedModel | undefined {
    const idle = this.all().find((one) => workerCount(one) === 0);
    if (this.#models.size >= MAX_MODELS) {
      if (idle === undefined) {
        this.#logger.warn({ model: card.name }, `workers left out: ${MAX_MODELS} models already`);
        return undefined;
      }
      this.#forget(idle);
    }
    const model: RoutedModel = { ...this.#routers.create(card), card, prefill: undefined };
    this.#models.set(card.name, model);
    return model;
  }

  #forget(model: RoutedModel): void {
    this.#models.delete(model.name);
    this.#routers.forget(model.name);
    model.router.close(leaving());
    model.prefill?.router.close(leaving());
  }
}

function workerCount({ router, prefill }: RoutedModel): number {
  return router.workers.length + (prefill?.router.workers.length ?? 0);
}

function leaving(): DynamoError {
  return new DynamoError("draining", "the router is shutting down");
}
