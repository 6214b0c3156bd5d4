import type { BackendName, MemoryKind } from "./base.ts";
import type { AgentMetadata } from "./metadata.ts";
import type { Region } from "./region.ts";
import type { TransferJob } from "./transfer-job.ts";
import type { DynamoError } from "../errors/index.ts";
import type { Clock } from "../std/index.ts";
import type { Logger } from "../observability/index.ts";
import type { RegionTable } from "./region.ts";

/**
 * What a back end adds to an agent: a way to move bytes between some kinds of memory. The agent checks arguments, bounds,
 * deadlines and limits, pins regions and counts; a back end moves. All calls come on the agent's event loop.
 *
 * A device back end (CUDA IPC and a gather kernel) fits as it is: `register` exports the handle, `publish` carries it,
 * `prepare` uploads a block table, `post` is one launch for the whole batch, an event says when it is over.
 */
export interface AgentContext {
  readonly name: string;
  readonly incarnation: bigint;
  readonly regions: RegionTable;
  readonly clock: Clock;
  readonly logger: Logger;
  readonly clusterSecret: string | undefined;
  /** Hands a peer's message to this agent's program. Throws `transfer-full`: tell the sender. */
  deliver(from: string, message: Uint8Array): void;
}

/** Another agent, or this one itself (`isSelf`): its metadata as it was loaded last. */
export interface Peer {
  readonly name: string;
  readonly isSelf: boolean;
  readonly metadata: AgentMetadata;
}

/** The memory of one prepared table, as far as the choice of a back end needs it. */
export interface PairQuestion {
  readonly peer: Peer;
  readonly localKind: MemoryKind;
  readonly remoteKind: MemoryKind;
  readonly localRegions: readonly Region[];
  /** Ids in the peer's metadata; of this agent's own regions when the peer is itself. */
  readonly remoteRegionIds: readonly number[];
  /** Every length and offset is a multiple of this on both sides; at most 4096. */
  readonly alignment: number;
}

/** One sentence. Avoidable: memory registered otherwise could use it, so taking a slower back end is a slow path. */
export interface Obstacle {
  readonly why: string;
  readonly isAvoidable: boolean;
}

export function unfit(why: string): Obstacle {
  return { why, isAvoidable: false };
}

export function avoidable(why: string): Obstacle {
  return { why, isAvoidable: true };
}

export interface TransferBackend {
  readonly name: BackendName;
  /** Typical figures until something was measured. */
  readonly typical: { readonly setupMs: number; readonly perDescriptorUs: number; readonly gigabytesPerSecond: number };
  /** Its part of the agent's metadata; undefined: peers cannot use it towards us. */
  publish(): Uint8Array | undefined;
  register(region: Region): Promise<void>;
  /** The region is unpinned already. */
  deregister(region: Region): Promise<void>;
  /** What keeps this pair from using it, or undefined when nothing does. Does not wait. */
  obstacle(question: PairQuestion): Obstacle | undefined;
  /**
   * Starts a batch; never throws, ends it through `job.end`. Not inside this call, so that callers see `in-progress` first.
   * A message of the job is delivered by the back end, after the bytes.
   */
  post(job: TransferJob): void;
  /** Lets go of the job's memory and then ends it; the job knows why (`job.stopError`). */
  stop(job: TransferJob): void;
  /** A message without a transfer. */
  notify(peer: Peer, message: Uint8Array, timeoutMs: number, done: (error?: DynamoError) => void): void;
  /** The peer was removed or replaced by a later incarnation. */
  forget(peer: Peer): void;
  close(): Promise<void>;
}
