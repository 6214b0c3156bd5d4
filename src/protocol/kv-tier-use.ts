/** How one KV tier below an engine's cache is used; part of a worker's load report, for `dynamo status`. */
export interface KvTierUse {
  readonly tier: "host" | "disk" | "object";
  readonly usedBytes: number;
  /** Absent when nothing bounds the tier. */
  readonly capacityBytes?: number;
  /** Prompt blocks found in it, of `lookedUpBlocks` that the engine's cache did not have. Since the worker's start. */
  readonly hitBlocks: number;
  readonly lookedUpBlocks: number;
  /** Blocks that came back from it into the engine's cache. */
  readonly restoredBlocks: number;
  /** It failed and is left alone for a while. */
  readonly isDegraded: boolean;
}

const TIERS: readonly unknown[] = ["host", "disk", "object"];
const COUNTS = ["usedBytes", "hitBlocks", "lookedUpBlocks", "restoredBlocks"] as const;

/** Reads foreign data; undefined when it is not a list of tiers. */
export function parseKvTierUse(value: unknown): readonly KvTierUse[] | undefined {
  return Array.isArray(value) && value.length <= TIERS.length && value.every(isKvTierUse) ? value : undefined;
}

function isKvTierUse(value: unknown): value is KvTierUse {
  if (typeof value !== "object" || value === null) return false;
  const fields = value as Record<string, unknown>;
  return (
    TIERS.includes(fields["tier"]) &&
    COUNTS.every((name) => typeof fields[name] === "number") &&
    (fields["capacityBytes"] === undefined || typeof fields["capacityBytes"] === "number") &&
    typeof fields["isDegraded"] === "boolean"
  );
}
