import type { Metrics } from "../../observability/index.ts";
import type { KvIndex } from "../indexer/base.ts";

/** A rank-owning worker as the gauges see it. */
export interface MeasuredWorker {
  readonly model: string;
  readonly index: KvIndex;
  /** Events known of that wait for earlier ones, all ranks together. */
  readonly eventsBehind: number;
}

/**
 * The `dynamo_kvindexer_` gauges of the indexes that a feed fills. Read when somebody scrapes, one pass over the workers;
 * keeping them costs nothing. A model whose last worker left goes away with its labels.
 */
export class IndexGauges {
  readonly #metrics: Metrics;
  #shown: ReadonlySet<string> = new Set();

  constructor(metrics: Metrics) {
    this.#metrics = metrics;
  }

  collect(workers: Iterable<MeasuredWorker>): void {
    const byModel = new Map<string, { readonly index: KvIndex; workers: number; behind: number }>();
    for (const { model, index, eventsBehind } of workers) {
      let sums = byModel.get(model);
      if (sums === undefined) byModel.set(model, (sums = { index, workers: 0, behind: 0 }));
      sums.workers++;
      sums.behind += eventsBehind;
    }
    const families = this.#families();
    families.models.labels().set(byModel.size);
    for (const [model, { index, workers: workerCount, behind }] of byModel) {
      const { blocks, memberships, bytes, evictedBlocks } = index.stats();
      families.workers.labels(model).set(workerCount);
      families.blocks.labels(model).set(blocks);
      families.memberships.labels(model).set(memberships);
      families.bytes.labels(model).set(bytes);
      families.behind.labels(model).set(behind);
      // The index counts for itself; a new index of the model starts from 0, as a new process does.
      families.evicted.labels(model).value = evictedBlocks;
    }
    for (const model of this.#shown) {
      if (byModel.has(model)) continue;
      const { models: _ofAll, ...perModel } = families;
      for (const family of Object.values(perModel)) family.remove(model);
    }
    this.#shown = new Set(byModel.keys());
  }

  #families() {
    const metrics = this.#metrics;
    return {
      models: metrics.gauge("dynamo_kvindexer_models"),
      workers: metrics.gauge("dynamo_kvindexer_workers"),
      blocks: metrics.gauge("dynamo_kvindexer_blocks"),
      memberships: metrics.gauge("dynamo_kvindexer_memberships"),
      bytes: metrics.gauge("dynamo_kvindexer_bytes"),
      behind: metrics.gauge("dynamo_kvindexer_events_behind"),
      evicted: metrics.counter("dynamo_kvindexer_evicted_blocks_total"),
    };
  }
}
