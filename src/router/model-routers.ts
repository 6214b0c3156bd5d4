import { DynamoError } from "../errors/index.ts";
import type { ModelCard } from "../protocol/index.ts";
import { PlaneHealth, type Instance, type Planes } from "../runtime/component/index.ts";
import type { EventPlane } from "../runtime/event-plane/index.ts";
import { DEFAULT_ROUTER_CONFIG, type RouterConfig } from "./config.ts";
import { KvEventFeed, ReplicaSync } from "./events/index.ts";
import { FlatKvIndex, type KvIndex } from "./indexer/index.ts";
import { findPolicy, type RoutingPolicy } from "./policies/index.ts";
import { Router, type IndexHealth, type RouterIndex } from "./router.ts";

/**
 * The routers of one process, one per model, and what feeds them: KV events of their workers and the bookings of other
 * routers. Whoever follows discovery (the frontend's model registry, the router service) makes one router per model
 * here and tells which workers joined and left. Owned by that follower.
 */
export interface ModelRouter {
  readonly name: string;
  readonly router: Router;
  /** Of its workers' blocks, fed here; undefined when the router uses none, or a shared one. */
  readonly kvIndex: KvIndex | undefined;
}

/** An index that another thread writes. */
interface StarvingIndex {
  /** Lookups that found nothing because the index never stood still. */
  readonly starvedLookups: number;
}

/** Of routers that share: indexes that someone else feeds, and a plane of their own to tell each other what they book. */
export interface SharedRouting {
  /** The index of a model, which may be empty still, and how it is. */
  readonly kvIndex: (model: string) => IndexHealth & { readonly index: RouterIndex & StarvingIndex };
  readonly bookings: EventPlane;
}

export interface ModelRoutersOptions {
  readonly routerMode: string;
  /** What is not given has Dynamo's default. */
  readonly router?: Partial<RouterConfig> | undefined;
  /** Tell other routers what is booked here, and listen to them. @default false */
  readonly replicaSync?: boolean | undefined;
  /** @default these routers have their own indexes and share with nobody */
  readonly shared?: SharedRouting | undefined;
}

/** Data-parallel ranks of one worker; a card that claims more is wrong. */
const MAX_RANKS = 1_024;

export class ModelRouters {
  readonly #planes: Planes;
  readonly #policy: RoutingPolicy;
  readonly #config: RouterConfig;
  readonly #kvFeed: KvEventFeed | undefined;
  readonly #replicaSync: ReplicaSync | undefined;
  readonly #shared: SharedRouting | undefined;
  readonly #planeHealth: PlaneHealth;

  /** Throws `invalid-config` for a router mode that nobody registered. */
  constructor(planes: Planes, { routerMode, router, replicaSync, shared }: ModelRoutersOptions) {
    this.#planes = planes;
    this.#planeHealth = new PlaneHealth(planes);
    const policy = findPolicy(routerMode);
    if (policy === undefined) throw new DynamoError("invalid-config", `there is no router mode ${routerMode}`);
    this.#policy = policy;
    this.#config = { ...DEFAULT_ROUTER_CONFIG, ...router };
    const { events, request, clock, logger, metrics } = planes;
    this.#shared = shared;
    if (this.#usesKvEvents && shared === undefined) {
      this.#kvFeed = new KvEventFeed({ events, client: request.client, clock, logger, metrics });
    }
    // Routers that share always tell each other; those of other processes hear it too when asked for.
    const bookings = replicaSync === true ? events : shared?.bookings;
    if (bookings !== undefined) this.#replicaSync = new ReplicaSync({ events: bookings, clock, logger, metrics });
  }

  get #usesKvEvents(): boolean {
    return this.#policy.usesOverlap === true && this.#config.kvEvents;
  }

  /** Workers that only discovery has lost: said in explanations. */
  set keptWorkers(count: number) {
    this.#planeHealth.keptWorkers = count;
  }

  /** Before the first worker joins. */
  async start(): Promise<void> {
    await this.#kvFeed?.start();
    await this.#replicaSync?.start();
  }

  /** A router for the model of `card`, without workers. */
  create(card: ModelCard): ModelRouter {
    const { clock, random, metrics, logger } = this.#planes;
    const shared = this.#usesKvEvents ? this.#shared?.kvIndex(card.name) : undefined;
    const kvIndex = this.#usesKvEvents && shared === undefined ? new FlatKvIndex({ random }) : undefined;
    const index = kvIndex ?? shared?.index;
    const router = new Router({
      model: card.name,
      policy: this.#policy,
      clock,
      random,
      metrics,
      logger,
      blockSizeTokens: card.blockSizeTokens,
      config: this.#config,
      ...(index === undefined ? {} : { index }),
    });
    router.indexHealth = kvIndex === undefined ? shared : this.#kvFeed?.health(kvIndex);
    router.planeHealth = this.#planeHealth;
    this.#replicaSync?.attach(card.name, router);
    if (shared !== undefined) {
      const starved = metrics.counter("dynamo_kvindexer_starved_lookups_total").labels(card.name);
      metrics.onCollect(() => (starved.value = shared.index.starvedLookups));
    }
    return { name: card.name, router, kvIndex };
  }

  /**
   * The router of the workers that prefill for the model's other ones: the same policy, index and record of decisions, but
   * blocks of running answers do not count, as none runs there. Its metrics and replicas know it as `NAME:prefill`.
   */
  createPrefill({ router: main, kvIndex }: ModelRouter, card: ModelCard): ModelRouter {
    const { clock, random, metrics, logger } = this.#planes;
    const shared = this.#usesKvEvents ? this.#shared?.kvIndex(card.name) : undefined;
    const index = kvIndex ?? shared?.index;
    const name = `${card.name}:prefill`;
    const router = new Router({
      model: name,
      policy: this.#policy,
      clock,
      random,
      metrics,
      logger,
      blockSizeTokens: card.blockSizeTokens,
      config: { ...this.#config, trackActiveBlocks: false },
      log: main.log,
      ...(index === undefined ? {} : { index }),
    });
    router.indexHealth = kvIndex === undefined ? shared : this.#kvFeed?.health(kvIndex);
    router.planeHealth = this.#planeHealth;
    this.#replicaSync?.attach(name, router);
    return { name, router, kvIndex };
  }

  /** The model is no longer served: other routers are not told of it any more. */
  forget(name: string): void {
    this.#replicaSync?.detach(name);
    this.#replicaSync?.detach(`${name}:prefill`);
  }

  /** A worker joined, or says something new of itself. */
  join({ name, router, kvIndex }: ModelRouter, instance: Instance, card: ModelCard): void {
    const { maxSequences, maxBatchedTokens, totalBlocks } = card;
    const { instanceId, address, namespace, component } = instance;
    const dataParallelSize = Math.max(1, Math.min(card.dataParallelSize, MAX_RANKS));
    this.#kvFeed?.removeMoved(instanceId, address);
    router.addWorker(instanceId, address, {
      dataParallelSize,
      capacity: { maxSequences, maxBatchedTokens, totalBlocks },
    });
    if (kvIndex === undefined) return;
    const endpointPrefix = `${namespace}.${component}`;
    this.#kvFeed?.addWorker({ instanceId, model: name, address, endpointPrefix, dataParallelSize, index: kvIndex });
  }

  leave({ router }: ModelRouter, instanceId: string): void {
    this.#kvFeed?.removeWorker(instanceId);
    router.removeWorker(instanceId);
  }

  async close(): Promise<void> {
    await Promise.all([this.#kvFeed?.close(), this.#replicaSync?.close()]);
  }
}
