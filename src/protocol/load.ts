import { parseKvTierUse, type KvTierUse } from "./kv-tier-use.ts";

/** Load of one worker, as the engine sees it; published on the event plane about four times a second and on change. */
export interface LoadSnapshot {
  /** Streams that are decoding or prefilling. */
  readonly runningRequests: number;
  /** Streams accepted but not started. */
  readonly waitingRequests: number;
  /** KV blocks that running streams use. */
  readonly activeBlocks: number;
  /** KV blocks kept only because they may be reused. */
  readonly cachedBlocks: number;
  readonly totalBlocks: number;
  /** Prompt tokens accepted but not yet computed. */
  readonly pendingPrefillTokens: number;
  /** Engine steps since start. */
  readonly steps: number;
  readonly generatedTokens: number;
  readonly promptTokens: number;
  /** Prompt tokens that came from the cache. */
  readonly cachedPromptTokens: number;
  readonly preemptions: number;
}

export const EMPTY_LOAD: LoadSnapshot = Object.freeze({
  runningRequests: 0,
  waitingRequests: 0,
  activeBlocks: 0,
  cachedBlocks: 0,
  totalBlocks: 0,
  pendingPrefillTokens: 0,
  steps: 0,
  generatedTokens: 0,
  promptTokens: 0,
  cachedPromptTokens: 0,
  preemptions: 0,
});

/** What a worker publishes on the `load` topic. */
export interface LoadReport {
  /** 16 hex digits. */
  readonly instanceId: string;
  readonly load: LoadSnapshot;
  /** Since the engine's last step, in ms, to a quarter of a second; undefined: the worker does not say. */
  readonly stillMs?: number;
  /** Of a worker with KV tiers. */
  readonly kvTiers?: readonly KvTierUse[];
}

/** Reads a report from foreign bytes; undefined when it is not one. */
export function parseLoadReport(payload: Uint8Array): LoadReport | undefined {
  try {
    const value = JSON.parse(
      Buffer.from(payload.buffer, payload.byteOffset, payload.byteLength).toString("utf8"),
    ) as unknown;
    if (typeof value !== "object" || value === null) return undefined;
    const { instanceId, load, stillMs } = value as Record<string, unknown>;
    if (typeof instanceId !== "string" || typeof load !== "object" || load === null) return undefined;
    const numbers = load as Record<string, unknown>;
    for (const field of Object.keys(EMPTY_LOAD)) if (typeof numbers[field] !== "number") return undefined;
    const kvTiers = parseKvTierUse((value as Record<string, unknown>)["kvTiers"]);
    return {
      instanceId,
      load: load as LoadSnapshot,
      ...(typeof stillMs === "number" ? { stillMs } : {}),
      ...(kvTiers === undefined ? {} : { kvTiers }),
    };
  } catch {
    return undefined;
  }
}
