import type { Engine } from "../engines/index.ts";
import type { KvTierUse, LoadReport } from "../protocol/index.ts";
import type { EventPublisher } from "../runtime/event-plane/index.ts";
import type { Clock, TimerHandle } from "../std/index.ts";
import type { WorkerMetrics } from "./worker-metrics.ts";

/** Fast enough that a burst is seen before it is over, slow enough to cost nothing. */
const INTERVAL_MS = 250;
/** An unchanged load is repeated so that a late subscriber learns it. */
const REPEAT_MS = 2_000;

export interface PublishLoadOptions {
  readonly publisher: EventPublisher;
  readonly engine: Engine;
  readonly kvTiers: (() => readonly KvTierUse[]) | undefined;
  readonly instanceId: string;
  readonly clock: Clock;
  readonly metrics: WorkerMetrics;
}

/**
 * Publishes the engine's load four times a second when it changed or the engine has work, and keeps the load gauges: one
 * that has work and stands still must be told from one whose reports are lost. Returns its stop.
 */
export function publishLoad({
  publisher,
  engine,
  kvTiers: useOfTiers,
  instanceId,
  clock,
  metrics,
}: PublishLoadOptions): () => void {
  const startedMs = clock.monotonicMs();
  let lastText = "";
  let lastMs = -Infinity;
  let steps = -1;
  let steppedMs = startedMs;
  let timer: TimerHandle;
  const tick = (): void => {
    const nowMs = clock.monotonicMs();
    const load = engine.load();
    metrics.uptime.set((nowMs - startedMs) / 1_000);
    metrics.totalBlocks.set(load.totalBlocks);
    metrics.cacheUsage.set(load.totalBlocks === 0 ? 0 : load.activeBlocks / load.totalBlocks);
    if (load.steps !== steps) {
      steps = load.steps;
      steppedMs = nowMs;
    }
    const kvTiers = useOfTiers?.();
    const text = JSON.stringify([load, kvTiers]);
    if (text !== lastText || load.runningRequests > 0 || nowMs - lastMs >= REPEAT_MS) {
      const report: LoadReport = {
        instanceId,
        load,
        stillMs: Math.round(nowMs - steppedMs),
        ...(kvTiers && { kvTiers }),
      };
      publisher.publish(Buffer.from(JSON.stringify(report)));
      lastText = text;
      lastMs = nowMs;
    }
    timer = clock.setTimer(INTERVAL_MS, tick);
  };
  tick();
  return () => timer.cancel();
}
