import { MAX_REPORTED_PAIRS, type TransferPairReport, type TransferReport } from "../protocol/index.ts";
import type { EventPublisher } from "../runtime/event-plane/index.ts";
import type { Clock, TimerHandle } from "../std/index.ts";

const INTERVAL_MS = 2_000;

/** A transfer agent, or an engine that moves blocks itself. */
export interface TransferTeller {
  telemetry(): readonly TransferPairReport[];
}

/** Publishes what an agent has moved, at once and then every two seconds if it changed. Returns its stop. */
export function publishTransfers(
  publisher: EventPublisher,
  agent: TransferTeller,
  instanceId: string,
  clock: Clock,
): () => void {
  let lastText = "";
  let timer: TimerHandle;
  const tick = (): void => {
    const report: TransferReport = { instanceId, pairs: pairsOf(agent) };
    const text = JSON.stringify(report);
    if (text !== lastText) publisher.publish(Buffer.from(text));
    lastText = text;
    timer = clock.setTimer(INTERVAL_MS, tick);
  };
  tick();
  return () => timer.cancel();
}

function pairsOf(agent: TransferTeller): TransferPairReport[] {
  return agent
    .telemetry()
    .toSorted((a, b) => b.byteCount - a.byteCount)
    .slice(0, MAX_REPORTED_PAIRS)
    .map((pair) => ({
      peer: pair.peer,
      backend: pair.backend,
      operation: pair.operation,
      reason: pair.reason,
      isSlowPath: pair.isSlowPath,
      isSlow: pair.isSlow,
      transferCount: pair.transferCount,
      byteCount: pair.byteCount,
      errorCount: pair.errorCount,
      lastGigabytesPerSecond: rounded(pair.lastGigabytesPerSecond),
      meanGigabytesPerSecond: rounded(pair.meanGigabytesPerSecond),
    }));
}

function rounded(value: number): number {
  return Math.round(value * 1_000) / 1_000;
}
