import type { Cluster, Seat } from "./cluster.ts";
import type { SimProcess } from "./world.ts";

/**
 * How long requests may wait for a worker that will not answer: they are noted when the fault strikes, and looked at again
 * when the product's limit and a margin are over. A frontend in trouble itself is let off.
 */
const MARGIN_MS = 300;
/** Of the product: a broken connection is seen at once, 3 beats of a second and a quarter without a byte end one. */
const LIMITS_MS = { killed: 0, silent: 3_250 } as const;

interface Held {
  readonly seat: Seat;
  readonly process: SimProcess;
  readonly ids: ReadonlySet<string>;
}

export class RecoveryWatch {
  readonly #cluster: Cluster;
  readonly violations: string[] = [];

  constructor(cluster: Cluster) {
    this.#cluster = cluster;
  }

  /** Before it happens: the worker is killed, or falls silent for as long as `isStill`. */
  lost(seat: Seat, kind: keyof typeof LIMITS_MS, isStill: () => boolean): void {
    this.#expect(seat, LIMITS_MS[kind], new Set(["dispatch", "decode"]), isStill);
  }

  /** The worker answers pings but gives no token for as long as `isStill`: seen by those that it has begun. */
  hangs(seat: Seat, isStill: () => boolean): void {
    const { stallLimitMs = 30_000 } = this.#cluster.shape.frontend;
    // The first of four looks may still see a token.
    this.#expect(seat, stallLimitMs * 1.25, new Set(["decode"]), isStill);
  }

  #expect(worker: Seat, limitMs: number, stages: ReadonlySet<string>, isStill: () => boolean): void {
    const { world } = this.#cluster;
    const { instanceId } = worker.worker!;
    const name = worker.process.name;
    const fromMs = world.nowMs;
    const held = this.#cluster.frontends.flatMap((seat): Held[] => {
      const ids = waitingFor(seat, instanceId, stages, 0);
      return ids.length === 0 ? [] : [{ seat, process: seat.process, ids: new Set(ids) }];
    });
    if (held.length === 0) return;
    const waitMs = limitMs + MARGIN_MS;
    world.timer(waitMs, () => {
      if (!isStill()) return;
      for (const { seat, process, ids } of held) {
        const isHit = seat.troubles.some((trouble) => trouble.untilMs >= fromMs && trouble.fromMs <= world.nowMs);
        if (isHit || seat.process !== process) continue;
        world.marks.mark("recovery time looked at");
        const late = waitingFor(seat, instanceId, stages, waitMs - 1).filter((id) => ids.has(id));
        if (late.length > 0)
          this.violations.push(`${process.name} still waits for ${name} after ${waitMs} ms: ${late.join()}`);
      }
    });
  }
}

/** Requests of a frontend that have stood on that worker for so long. */
function waitingFor({ frontend }: Seat, instanceId: string, stages: ReadonlySet<string>, leastMs: number): string[] {
  const views = frontend?.pipeline.live.view(10_000) ?? [];
  return views
    .filter(({ owner, stage, stage_ms: stageMs }) => owner === instanceId && stages.has(stage) && stageMs >= leastMs)
    .map(({ id }) => id);
}
