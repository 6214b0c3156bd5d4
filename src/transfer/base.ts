import type { DynamoError } from "../errors/index.ts";
import type { Region } from "./region.ts";

/**
 * The transfer plane's contract, in NIXL's vocabulary: an **agent** registers **memory**, publishes its **metadata**, loads
 * that of its peers, prepares tables of **descriptors** once and then moves blocks between them by index, one call per
 * batch, with at most one promise per batch. `agent.ts` implements it; `backend.ts` is what a back end adds.
 *
 * Transfers are one-sided: the initiator reads from or writes into memory that the peer registered for it; the peer's
 * program takes no part. A completed transfer may carry a message that the peer gets exactly once, after the bytes.
 *
 * What holds for every back end: a transfer ends exactly once; bytes outside its descriptors are never touched on either
 * side; when it has ended, whatever way, no back end writes to the initiator's memory for it any more. A transfer that
 * failed may have moved some of its bytes, and an object store may still finish a put that was on its way. Within a
 * transfer the order of blocks is not defined, so descriptors of one destination must not overlap. Whoever reads source memory sees what is there when its turn comes: leave it alone until
 * the end.
 */
export type MemoryKind = "device" | "host" | "file" | "object";
export const MEMORY_KINDS: readonly MemoryKind[] = ["device", "host", "file", "object"];

export type Operation = "read" | "write";

export const BACKEND_NAMES = ["memory", "shm", "tcp", "nixl", "file", "s3"] as const;
export type BackendName = (typeof BACKEND_NAMES)[number];

/** What a peer may do with a region: nothing, or one-sided reads, writes or both. */
export type RemoteAccess = "none" | "read" | "write" | "read-write";
export const REMOTE_ACCESS: readonly RemoteAccess[] = ["none", "read", "write", "read-write"];

/** Bytes of this process: a Buffer, a view of a SharedArrayBuffer, mapped memory. Must stay allocated until deregistered. */
export interface HostMemory {
  readonly kind: "host";
  readonly bytes: Uint8Array;
}

/** A slab in a file, made when it is missing and grown to `byteLength`. Never reachable from another process. */
export interface FileMemory {
  readonly kind: "file";
  readonly path: string;
  readonly byteLength: number;
  /** Past the page cache (O_DIRECT): memory from `agent.allocate`, offsets and lengths in multiples of 4,096. @default false */
  readonly direct?: boolean;
  /** A write ends after `fdatasync`. @default false */
  readonly sync?: boolean;
}

/**
 * Objects of one bucket as slots: bytes `[slot x slotBytes, (slot + 1) x slotBytes)` are the object `keyOf(slot)`. A write
 * fills a slot from its start, in one transfer; reads take any range of what is there. Never reachable from another process.
 */
export interface ObjectMemory {
  readonly kind: "object";
  readonly bucket: string;
  readonly slotBytes: number;
  readonly slotCount: number;
  readonly keyOf: (slot: number) => string;
  /** An object that is there already: left as it is (content-addressed blocks), an error, or replaced. @default "keep" */
  readonly onExists?: "keep" | "fail" | "replace";
}

/** Memory of a GPU. `handle` is what its back end needs so that a peer can reach it (a CUDA IPC handle). */
export interface DeviceMemory {
  readonly kind: "device";
  readonly deviceIndex: number;
  readonly address: bigint;
  readonly byteLength: number;
  readonly handle?: Uint8Array;
}

export type Memory = HostMemory | FileMemory | ObjectMemory | DeviceMemory;

export interface RegisterOptions {
  /** How a peer finds the region in our metadata, at most 128 bytes. @default "" */
  readonly label?: string;
  /** Host memory defaults to `read-write`, the others to `none`. */
  readonly remoteAccess?: RemoteAccess;
}

/** A region of a peer, as its metadata tells. */
export interface RemoteRegion {
  readonly id: number;
  readonly kind: MemoryKind;
  readonly byteLength: number;
  readonly remoteAccess: RemoteAccess;
  readonly label: string;
}

export interface TransferOptions {
  /** From now on. @default 30000 */
  readonly timeoutMs?: number;
  /** Delivered to the peer when the transfer is complete, at most 64 KiB. */
  readonly message?: Uint8Array;
  readonly signal?: AbortSignal;
}

export type TransferState = "in-progress" | "done" | "failed";

/** One posted batch. Poll `state`, or await `done`; both may be ignored when the peer's notification is all that counts. */
export interface Transfer {
  readonly operation: Operation;
  readonly backend: BackendName;
  readonly byteCount: number;
  readonly descriptorCount: number;
  readonly state: TransferState;
  /** Set when failed. */
  readonly error: DynamoError | undefined;
  /** Made at first use. Rejects with a `DynamoError`. */
  readonly done: Promise<void>;
  /** Ends the transfer with `cancelled` as soon as its back end has let go of the memory. No-op after the end. */
  cancel(): void;
}

export interface Notification {
  /** The peer's agent name: what it says of itself, proven only by the cluster secret. */
  readonly from: string;
  readonly message: Uint8Array;
}

/** What a table's transfers cost: time = set-up + descriptors x per-descriptor + bytes x per-byte. */
export interface CostEstimate {
  readonly totalMs: number;
  readonly setupMs: number;
  readonly perDescriptorUs: number;
  readonly gigabytesPerSecond: number;
  /** Transfers it was learnt from; 0: nothing but the back end's typical figures. */
  readonly sampleCount: number;
}

/** Counters of one pair of agents, back end and operation, since the agent started. Seconds are of whole transfers, summed. */
export interface PairTelemetry {
  readonly peer: string;
  readonly backend: BackendName;
  readonly operation: Operation;
  /** Why this back end, as of the last prepared table. */
  readonly reason: string;
  readonly isSlowPath: boolean;
  /** A transfer of a megabyte or more was below the agent's limit. */
  readonly isSlow: boolean;
  readonly transferCount: number;
  readonly byteCount: number;
  readonly descriptorCount: number;
  readonly seconds: number;
  readonly errorCount: number;
  /** Of the last transfer of a megabyte or more. */
  readonly lastGigabytesPerSecond: number;
  /** All completed bytes over all their seconds. */
  readonly meanGigabytesPerSecond: number;
}

/** Why a table uses its back end, for `dynamo status`. */
export interface BackendChoice {
  readonly backend: BackendName;
  /** One sentence, with what kept each faster back end from being used. */
  readonly reason: string;
  /** A faster back end is there on both sides, but this memory cannot use it. */
  readonly isSlowPath: boolean;
}

/** What to do when both agents have a faster back end than the memory of a table allows. */
export type SlowPathPolicy = "allow" | "warn" | "refuse";

export type { Region };
