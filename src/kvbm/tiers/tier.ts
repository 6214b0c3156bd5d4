import type { BlockIdentity } from "./block-identity.ts";

/** The tiers below the engine's own cache (G1): host memory (G2), local disk (G3), object store or shared folder (G4). */
export type TierName = "host" | "disk" | "object";

/** Why a block could not be kept or brought back. Each is counted; none makes a request fail. */
export type TierFailure =
  /** More wait to go down than the queue holds. */
  | "queue-full"
  /** Every block of the tier is in use. */
  | "no-room"
  /** It left the tier above before its turn came. */
  | "gone"
  /** The tier does not answer or refuses; it is left alone for a while. */
  | "degraded"
  | "write-failed"
  | "read-failed"
  /** The entry is not what was written: torn, or a bit flipped. */
  | "corrupt"
  /** The entry belongs to another model, layout or block. */
  | "foreign"
  | "deadline"
  /** The engine took fewer blocks than were offered. */
  | "not-taken"
  /** Too many requests wait for their blocks already. */
  | "busy";

export interface ReadOptions {
  readonly signal: AbortSignal;
  /** On the clock's monotonic time. */
  readonly deadlineMs: number;
}

/**
 * A tier below host memory. Its calls never reject: what goes wrong is a failure that the tier reports. Blocks come and go
 * in runs, in which each block follows the one before it; a tier that keeps single blocks has runs of one.
 */
export interface LowerTier {
  readonly name: "disk" | "object";
  readonly usedBytes: number;
  /** Infinity when nothing bounds it. */
  readonly capacityBytes: number;
  /** Finds what an earlier life left. */
  open(): Promise<void>;
  /** A guess from memory, at once. */
  has(lo: number, hi: number): boolean;
  /** False while it is left alone after a failure. */
  isWritable(): boolean;
  /** Longest run that one write takes. */
  readonly maxRunBlocks: number;
  /** How many of these consecutive blocks one read takes, from the first on: at least 1. */
  runLength(blocks: readonly BlockIdentity[]): number;
  /** A piece of `data` per block, which must stay as it is until it resolves: true when all are stored, now or before. */
  write(run: readonly BlockIdentity[], data: readonly Uint8Array[]): Promise<boolean>;
  /** Per block: whether its piece holds its bytes, verified. Nothing writes to the pieces once it has resolved. */
  read(run: readonly BlockIdentity[], into: readonly Uint8Array[], options: ReadOptions): Promise<readonly boolean[]>;
  /** Called when blocks came or went by themselves; `takeStored` and `takeRemoved` tell which. */
  onChange?: (() => void) | undefined;
  /** What came since the last call, to be told to routers; what came and left in between, and the reverse, is not told. */
  takeStored(): BlockIdentity[];
  /** (lo, hi) of what left since the last call. */
  takeRemoved(): Uint32Array;
  /** Forgets what is this worker's alone; returns how many blocks. */
  clear(): Promise<number>;
  close(): Promise<void>;
}

/** Where numbers go. */
export interface TierMeters {
  /** Blocks that arrived in a tier from the one above. */
  offloaded(to: TierName, blocks: number): void;
  /** Blocks that came back into the engine's cache. */
  onboarded(from: TierName, blocks: number): void;
  /** Of one request: blocks beyond those of the engine's cache that were looked up, and found per tier. */
  matched(lookedUp: number, found: Readonly<Record<TierName, number>>): void;
  /** A request was held up until its blocks had come from below the host, or for as long as it may be. */
  parked(ms: number, outcome: "restored" | "late"): void;
  failed(tier: TierName, failure: TierFailure, blocks?: number): void;
  used(tier: TierName, bytes: number, capacityBytes: number): void;
  degraded(tier: TierName, isDegraded: boolean): void;
  waiting(tier: TierName, blocks: number): void;
}
