import type { GaugeChild } from "../observability/index.ts";
import type { Instance, Planes } from "../runtime/component/index.ts";

/**
 * Workers that discovery has lost, though nobody took them away: the lease expired, and the connection lives. One that is
 * cut off from the store alone still serves, so it stays routable as long as its connection does (heartbeats end that of a
 * dead machine) and it has not said that it is leaving. Which of its two records are missing is noted here, so that they
 * go together when it goes. A worker that nobody here has a connection to is not kept. O(1) each; bounded by the workers
 * that joined. Owned by the model registry.
 */
export type WorkerPart = "instance" | "card";

interface Kept {
  readonly missing: Set<WorkerPart>;
  readonly stopListening: () => void;
}

export const KEPT = "its discovery lease expired; kept as long as its connection lives";

export class KeptWorkers {
  readonly #planes: Planes;
  readonly #onLeft: (instanceId: string) => void;
  readonly #kept = new Map<string, Kept>();
  readonly #gauge: GaugeChild;

  /** `onLeft`: the connection of one that was kept has ended, or it says that it is leaving. */
  constructor(planes: Planes, onLeft: (instanceId: string) => void) {
    this.#planes = planes;
    this.#onLeft = onLeft;
    this.#gauge = planes.metrics.gauge("dynamo_frontend_kept_workers").labels();
  }

  get size(): number {
    return this.#kept.size;
  }

  has(instanceId: string): boolean {
    return this.#kept.has(instanceId);
  }

  /** The lease of a record expired; false: it has no connection, and is gone. */
  keep({ instanceId, address }: Instance, part: WorkerPart): boolean {
    const known = this.#kept.get(instanceId);
    if (known !== undefined) {
      known.missing.add(part);
      return true;
    }
    const stopListening = this.#planes.request.client.onceLeft(address, () => this.#onLeft(instanceId));
    if (stopListening === undefined) return false;
    this.#kept.set(instanceId, { missing: new Set([part]), stopListening });
    this.#gauge.set(this.#kept.size);
    this.#planes.logger.warn({ instance: instanceId }, `worker degraded: ${KEPT}`);
    return true;
  }

  /** A record is there again. */
  back(instanceId: string, part: WorkerPart): void {
    const kept = this.#kept.get(instanceId);
    if (kept === undefined || !kept.missing.delete(part) || kept.missing.size > 0) return;
    this.release(instanceId);
    this.#planes.logger.info({ instance: instanceId }, "worker is in discovery again");
  }

  /** It is no longer kept: the records that are missing. */
  release(instanceId: string): readonly WorkerPart[] {
    const kept = this.#kept.get(instanceId);
    if (kept === undefined) return [];
    this.#kept.delete(instanceId);
    this.#gauge.set(this.#kept.size);
    kept.stopListening();
    return [...kept.missing];
  }

  close(): void {
    for (const instanceId of this.#kept.keys()) this.release(instanceId);
  }
}
