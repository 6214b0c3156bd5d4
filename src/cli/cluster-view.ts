import {
  LOAD_TOPIC,
  TRANSFERS_TOPIC,
  isModelCard,
  parseLoadReport,
  parseTransferReport,
  type KvTierUse,
  type LoadReport,
  type LoadSnapshot,
  type ModelCard,
  type TransferPairReport,
} from "../protocol/index.ts";
import { watchCards, watchInstances, type Instance } from "../runtime/component/index.ts";
import type { Discovery } from "../runtime/discovery/index.ts";
import type { EventPlane } from "../runtime/event-plane/index.ts";

/** What `dynamo status` shows: instances, the model each serves, and its load, kept up to date from the planes. */
export interface InstanceView {
  readonly instanceId: string;
  readonly component: string;
  readonly endpoints: readonly string[];
  readonly address: string;
  readonly pid: number;
  readonly host: string;
  readonly startedMs: number;
  readonly card: ModelCard | undefined;
  readonly load: LoadSnapshot | undefined;
  /** Below the engine's cache. */
  readonly kvTiers?: readonly KvTierUse[] | undefined;
  /** What it has fetched from, or written to, other workers; undefined: it has no part in handoffs, or has not told. */
  readonly transfers?: readonly TransferPairReport[] | undefined;
}

export class ClusterView {
  /** Called after each change. */
  onChange: (() => void) | undefined;
  /** By endpoint and id: a worker serves several endpoints with one id. */
  readonly #instances = new Map<string, Instance>();
  readonly #cards = new Map<string, ModelCard>();
  readonly #loads = new Map<string, LoadReport>();
  readonly #transfers = new Map<string, readonly TransferPairReport[]>();
  readonly #closes: (() => Promise<void>)[] = [];

  /** Resolves when the present state is known; loads come within about two seconds. */
  async open(discovery: Discovery, events: EventPlane, namespace: string): Promise<void> {
    const changed = (): void => this.onChange?.();
    const instances = await watchInstances(discovery, { namespace }, (change) => {
      if (change.type === "put")
        this.#instances.set(instanceKey(change.instance.instanceId, change.instance.endpoint), change.instance);
      else this.#instances.delete(instanceKey(change.instanceId, change.address.endpoint));
      changed();
    });
    const cards = await watchCards(discovery, { namespace }, (change) => {
      if (change.type === "put" && isModelCard(change.card)) this.#cards.set(change.instanceId, change.card);
      else if (change.type === "delete") {
        this.#cards.delete(change.instanceId);
        this.#loads.delete(change.instanceId);
        this.#transfers.delete(change.instanceId);
      }
      changed();
    });
    const loads = await events.subscribe(
      LOAD_TOPIC,
      {
        onEvent: (_publisher, _sequence, payload) => {
          const report = parseLoadReport(payload);
          // Only of who is registered: the map stays as small as discovery's.
          if (report === undefined || !this.#cards.has(report.instanceId)) return;
          this.#loads.set(report.instanceId, report);
          changed();
        },
        // The next report replaces a lost one.
        onGap: () => undefined,
      },
      { replay: true },
    );
    const transfers = await events.subscribe(
      TRANSFERS_TOPIC,
      {
        onEvent: (_publisher, _sequence, payload) => {
          const report = parseTransferReport(payload);
          if (report === undefined || !this.#cards.has(report.instanceId)) return;
          this.#transfers.set(report.instanceId, report.pairs);
          changed();
        },
        onGap: () => undefined,
      },
      { replay: true },
    );
    this.#closes.push(
      () => transfers.close(),
      () => instances.close(),
      () => cards.close(),
      () => loads.close(),
    );
  }

  /** True when every worker with a model has told its load, and those with a part in handoffs their transfers. */
  get isComplete(): boolean {
    return [...this.#cards].every(
      ([instanceId, { role }]) => this.#loads.has(instanceId) && (role === "agg" || this.#transfers.has(instanceId)),
    );
  }

  /** By component, then id. */
  instances(): InstanceView[] {
    const views = new Map<string, InstanceView & { endpoints: string[] }>();
    for (const instance of this.#instances.values()) {
      const { instanceId, component, endpoint, address, pid, host, startedMs } = instance;
      const known = views.get(instanceId);
      if (known !== undefined) known.endpoints.push(endpoint);
      else {
        const card = this.#cards.get(instanceId);
        const { load, kvTiers } = this.#loads.get(instanceId) ?? {};
        const transfers = this.#transfers.get(instanceId);
        views.set(instanceId, {
          instanceId,
          component,
          endpoints: [endpoint],
          address,
          pid,
          host,
          startedMs,
          card,
          load,
          kvTiers,
          transfers,
        });
      }
    }
    for (const view of views.values()) view.endpoints.sort();
    return [...views.values()].toSorted(
      (a, b) => a.component.localeCompare(b.component) || a.instanceId.localeCompare(b.instanceId),
    );
  }

  async close(): Promise<void> {
    await Promise.all(this.#closes.splice(0).map((close) => close()));
  }
}

function instanceKey(instanceId: string, endpoint: string): string {
  return `${instanceId}/${endpoint}`;
}
