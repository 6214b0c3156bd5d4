/**
 * What a worker publishes of its KV transfers on the `transfers` topic: per peer, back end and operation the choice, why, and
 * the measured speed, for `dynamo status`. JSON; the newest report replaces the ones before.
 */
export interface TransferPairReport {
  /** Agent name of the other side, `namespace.component.instance`. */
  readonly peer: string;
  readonly backend: string;
  readonly operation: string;
  /** Why this back end. */
  readonly reason: string;
  /** A faster back end is there, but could not be used. */
  readonly isSlowPath: boolean;
  /** A transfer was slower than it should be. */
  readonly isSlow: boolean;
  readonly transferCount: number;
  readonly byteCount: number;
  readonly errorCount: number;
  /** Of the last transfer of a megabyte or more; 0 = there was none. */
  readonly lastGigabytesPerSecond: number;
  /** All bytes over all their time. */
  readonly meanGigabytesPerSecond: number;
}

export interface TransferReport {
  /** 16 hex digits. */
  readonly instanceId: string;
  readonly pairs: readonly TransferPairReport[];
}

/** Pairs in a report, those with most bytes. */
export const MAX_REPORTED_PAIRS = 64;
const TEXTS = ["peer", "backend", "operation", "reason"] as const;
const SWITCHES = ["isSlowPath", "isSlow"] as const;
const NUMBERS = [
  "transferCount",
  "byteCount",
  "errorCount",
  "lastGigabytesPerSecond",
  "meanGigabytesPerSecond",
] as const;

/** Reads a report from foreign bytes; undefined when it is not one. */
export function parseTransferReport(payload: Uint8Array): TransferReport | undefined {
  try {
    const text = Buffer.from(payload.buffer, payload.byteOffset, payload.byteLength).toString("utf8");
    const { instanceId, pairs } = JSON.parse(text) as Record<string, unknown>;
    if (typeof instanceId !== "string" || !Array.isArray(pairs) || pairs.length > MAX_REPORTED_PAIRS) return undefined;
    return pairs.every(isPair) ? { instanceId, pairs } : undefined;
  } catch {
    return undefined;
  }
}

function isPair(value: unknown): value is TransferPairReport {
  if (typeof value !== "object" || value === null) return false;
  const fields = value as Record<string, unknown>;
  return (
    TEXTS.every((name) => typeof fields[name] === "string") &&
    SWITCHES.every((name) => typeof fields[name] === "boolean") &&
    NUMBERS.every((name) => Number.isFinite(fields[name]))
  );
}
