import { MOCK_BLOCK_BYTES } from "../../src/engines/mocker/index.ts";
import type { ServedModel } from "../../src/frontend/model-registry.ts";
import type { Cluster, Seat } from "./cluster.ts";

/** What must hold of handoffs, and what is known of workers with roles. */

/** Workers that the frontend routes to, of either pool. */
export function routedWorkers(model: ServedModel | undefined): ServedModel["router"]["workers"][number][] {
  return model === undefined ? [] : [...model.router.workers, ...(model.prefill?.router.workers ?? [])];
}

/** It takes whole requests: those that a client could have been answered by. */
export function decodes({ worker, workerRole }: Seat): boolean {
  return (worker?.role ?? workerRole) !== "prefill";
}

/** It did so all the time from `fromMs` to `untilMs`. */
export function decodedAllThe({ roles }: Seat, fromMs: number, untilMs: number): boolean {
  return roles.every(({ role, fromMs: since }, i) => {
    const until = roles[i + 1]?.fromMs ?? Infinity;
    return role !== "prefill" || since > untilMs || until < fromMs;
  });
}

/** Every handoff is over: nothing is kept for anybody, nothing is on its way. */
export function checkHandoffsAtRest(cluster: Cluster, violations: string[]): void {
  for (const { worker, process } of cluster.workers) {
    const handoffs = worker?.handoffs;
    if (handoffs === undefined) continue;
    const bad = (what: string): void => void violations.push(`${process.name}: ${what} at rest`);
    if (handoffs.heldBlocks > 0) bad(`${handoffs.heldBlocks} handed-off blocks are kept`);
    if (handoffs.landingBytes > 0) bad(`${handoffs.landingBytes} bytes of handoffs are being fetched`);
    if (handoffs.agent.activeTransferCount > 0) bad(`${handoffs.agent.activeTransferCount} transfers run`);
  }
}

/** Reasons for which a split request is computed by its decode worker though nothing broke: memory is bounded. */
const FULL_REASONS = /"reason":"(transfer-full|handoff-gone|worker-full|stream-limit|first-token-timeout)"/;

/** Over a card of this pace, a burst of prompts that share it takes longer than a handoff may. */
const SLOW_CARD_BYTES_PER_MS = MOCK_BLOCK_BYTES;

export function needlessFallbacks({ fallbacks, shape }: Cluster): readonly string[] {
  const isSlow = shape.fabric.cardBytesPerMs < SLOW_CARD_BYTES_PER_MS;
  return fallbacks.filter((line) => !FULL_REASONS.test(line) && !(isSlow && line.includes('"request-deadline"')));
}
