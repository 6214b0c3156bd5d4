import type { Logger } from "../../observability/index.ts";
import { GENERATE_ENDPOINT, isModelCard, type ModelCard } from "../../protocol/index.ts";
import { FlatKvIndex, KvEventFeed } from "../../router/index.ts";
import { watchCards, watchInstances, type Instance, type Planes } from "../../runtime/component/index.ts";
import type { Watch } from "../../runtime/discovery/index.ts";
import type { HostMessage } from "./messages.ts";

/**
 * The one writer of the KV indexes that a frontend's threads read: an index per model, fed by the workers' KV events, and
 * the numbers of their ranks, told to the threads as they come and go. It takes every worker that says it serves a
 * model; whether a worker counts is the threads' business, and the blocks of one they leave out are never looked up.
 *
 * Lives in the host thread, which serves no HTTP. A model's index goes with its last worker.
 */
type Tell = (message: HostMessage) => void;

/** As many as the model registry serves. */
const MAX_MODELS = 256;
/** Data-parallel ranks of one worker; a card that claims more is wrong. */
const MAX_RANKS = 1_024;

interface WorkerRecord {
  instance?: Instance;
  card?: ModelCard;
  /** What it is fed as; a change of one of these makes it a new worker. */
  fed?: { readonly model: KeptModel; readonly address: string; readonly rankCount: number };
}

interface KeptModel {
  readonly name: string;
  readonly index: FlatKvIndex;
  workerCount: number;
}

export class KvIndexKeeper {
  readonly #planes: Planes;
  readonly #namespace: string;
  readonly #tell: Tell;
  readonly #logger: Logger;
  readonly #feed: KvEventFeed;
  readonly #workers = new Map<string, WorkerRecord>();
  readonly #models = new Map<string, KeptModel>();
  #watches: Watch[] = [];
  #hasLoggedFull = false;

  constructor(planes: Planes, namespace: string, tell: Tell) {
    this.#planes = planes;
    this.#namespace = namespace;
    this.#tell = tell;
    this.#logger = planes.logger;
    const { events, request, clock, logger, metrics } = planes;
    this.#feed = new KvEventFeed({ events, client: request.client, clock, logger, metrics });
  }

  /** Throws what the planes throw. */
  async start(): Promise<void> {
    await this.#feed.start();
    const scope = { namespace: this.#namespace };
    this.#watches.push(
      await watchInstances(this.#planes.discovery, { ...scope, endpoint: GENERATE_ENDPOINT }, (change) => {
        if (change.type === "put") this.#update(change.instance.instanceId, { instance: change.instance });
        else this.#forget(change.instanceId, "instance");
      }),
      await watchCards(this.#planes.discovery, scope, (change) => {
        if (change.type === "delete") this.#forget(change.instanceId, "card");
        else if (isModelCard(change.card)) this.#update(change.instanceId, { card: change.card });
      }),
    );
  }

  async close(): Promise<void> {
    const watches = this.#watches;
    this.#watches = [];
    await Promise.all([...watches.map((watch) => watch.close()), this.#feed.close()]);
  }

  #update(instanceId: string, news: { readonly instance: Instance } | { readonly card: ModelCard }): void {
    const record: WorkerRecord = { ...this.#workers.get(instanceId), ...news };
    this.#workers.set(instanceId, record);
    const { instance, card, fed } = record;
    if (instance === undefined || card === undefined) return;
    const rankCount = Math.max(1, Math.min(card.dataParallelSize, MAX_RANKS));
    const isSame = fed?.model.name === card.name && fed.address === instance.address && fed.rankCount === rankCount;
    if (isSame) return;
    this.#starve(instanceId, record);
    this.#startFeeding(record, instance, card, rankCount);
  }

  #startFeeding(record: WorkerRecord, instance: Instance, card: ModelCard, rankCount: number): void {
    const model = this.#model(card.name);
    if (model === undefined) return;
    const { instanceId, address, namespace, component } = instance;
    const { index } = model;
    const ranks = Array.from({ length: rankCount }, (_, dpRank) => index.rankOf(instanceId, dpRank));
    record.fed = { model, address, rankCount };
    model.workerCount++;
    this.#tell({ type: "kv-ranks", model: model.name, instanceId, ranks });
    const endpointPrefix = `${namespace}.${component}`;
    this.#feed.addWorker({
      instanceId,
      model: model.name,
      address,
      endpointPrefix,
      dataParallelSize: rankCount,
      index,
    });
  }

  #forget(instanceId: string, part: "instance" | "card"): void {
    const record = this.#workers.get(instanceId);
    if (record === undefined) return;
    delete record[part];
    this.#starve(instanceId, record);
    if (record.instance === undefined && record.card === undefined) this.#workers.delete(instanceId);
  }

  /** The threads hear of it before its rank numbers can be another worker's. */
  #starve(instanceId: string, record: WorkerRecord): void {
    const { fed } = record;
    if (fed === undefined) return;
    delete record.fed;
    const { model } = fed;
    this.#tell({ type: "kv-ranks", model: model.name, instanceId, ranks: [] });
    this.#feed.removeWorker(instanceId);
    model.index.removeWorker(instanceId);
    if (--model.workerCount > 0) return;
    this.#models.delete(model.name);
    this.#tell({ type: "kv-index", model: model.name, index: undefined });
  }

  #model(name: string): KeptModel | undefined {
    const known = this.#models.get(name);
    if (known !== undefined) return known;
    if (this.#models.size >= MAX_MODELS) {
      if (!this.#hasLoggedFull) this.#logger.warn({ model: name }, `KV indexes are kept for ${MAX_MODELS} models only`);
      this.#hasLoggedFull = true;
      return undefined;
    }
    const model: KeptModel = { name, index: new FlatKvIndex(), workerCount: 0 };
    this.#models.set(name, model);
    const health = this.#feed.health(model.index).counts;
    this.#tell({ type: "kv-index", model: name, index: { share: model.index.share(), health } });
    return model;
  }
}
