import { DynamoError } from "../errors/index.ts";
import { WheelTimer, type Expiring } from "../std/index.ts";
import type { BackendName, Operation, Transfer, TransferState } from "./base.ts";
import type { Peer, TransferBackend } from "./backend.ts";
import type { DescriptorPairs } from "./descriptor-list.ts";
import type { Region } from "./region.ts";

/**
 * One posted batch: the caller's `Transfer` and the back end's order in one object. It ends exactly once.
 *
 *     in-progress ──end()──────────────────────────────> done | failed
 *         └──cancel, deadline: stopError set, backend.stop()──end() | abandon()──> failed with stopError
 */
export interface JobOwner {
  onJobEnd(job: TransferJob): void;
  /** The back end no longer touches the job's memory: at its end, or later when it was abandoned. */
  onJobRelease(job: TransferJob): void;
  /** Cancelled or out of time: the job still runs. */
  onJobStop(job: TransferJob): void;
}

export interface JobOptions {
  readonly owner: JobOwner;
  readonly operation: Operation;
  readonly backend: TransferBackend;
  readonly peer: Peer;
  readonly pairs: DescriptorPairs;
  /** Blocks as the caller counts them, before neighbours were merged. */
  readonly blockCount: number;
  readonly localRegions: readonly Region[];
  readonly message: Uint8Array | undefined;
  readonly postedMs: number;
  readonly deadlineMs: number;
}

export class TransferJob implements Transfer, Expiring {
  readonly operation: Operation;
  readonly peer: Peer;
  readonly pairs: DescriptorPairs;
  readonly byteCount: number;
  readonly descriptorCount: number;
  readonly localRegions: readonly Region[];
  readonly message: Uint8Array | undefined;
  readonly postedMs: number;
  /** On the agent's monotonic clock. */
  readonly deadlineMs: number;
  readonly timer = new WheelTimer(this);
  readonly handler: TransferBackend;
  /** Why it must stop; set once. */
  stopError: DynamoError | undefined = undefined;
  readonly #owner: JobOwner;
  #released = false;
  #state: TransferState = "in-progress";
  #error: DynamoError | undefined = undefined;
  #settle: { promise: Promise<void>; resolve: () => void; reject: (error: DynamoError) => void } | undefined =
    undefined;

  constructor(options: JobOptions) {
    this.#owner = options.owner;
    this.operation = options.operation;
    this.handler = options.backend;
    this.peer = options.peer;
    this.pairs = options.pairs;
    this.byteCount = options.pairs.byteCount;
    this.descriptorCount = options.blockCount;
    this.localRegions = options.localRegions;
    this.message = options.message;
    this.postedMs = options.postedMs;
    this.deadlineMs = options.deadlineMs;
  }

  get backend(): BackendName {
    return this.handler.name;
  }

  get state(): TransferState {
    return this.#state;
  }

  get error(): DynamoError | undefined {
    return this.#error;
  }

  get ended(): boolean {
    return this.#state !== "in-progress";
  }

  get done(): Promise<void> {
    if (this.#settle === undefined) {
      this.#settle = Promise.withResolvers<void>();
      if (this.#state === "done") this.#settle.resolve();
      else if (this.#error !== undefined) this.#settle.reject(this.#error);
    }
    return this.#settle.promise;
  }

  cancel(): void {
    this.stop(new DynamoError("cancelled", "the transfer was cancelled"));
  }

  onExpire(): void {
    this.stop(new DynamoError("request-deadline", "the transfer did not finish before its deadline"));
  }

  /** Asks the back end to let go; the first reason counts. */
  stop(error: DynamoError): void {
    if (this.ended || this.stopError !== undefined) return;
    this.stopError = error;
    this.#owner.onJobStop(this);
    if (!this.ended) this.handler.stop(this);
  }

  /** By the back end, when it no longer touches the memory; once. */
  end(error?: DynamoError): void {
    if (this.#released) return;
    this.#released = true;
    // A transfer whose last byte came while it was being stopped has still failed: its caller was told to expect that.
    if (!this.ended) this.#finish(this.stopError ?? error);
    this.#owner.onJobRelease(this);
  }

  /** By the agent, when the back end does not let go: ends the transfer for its caller, its memory stays pinned. */
  abandon(): void {
    if (!this.ended) this.#finish(this.stopError);
  }

  #finish(outcome: DynamoError | undefined): void {
    this.#state = outcome === undefined ? "done" : "failed";
    this.#error = outcome;
    this.#owner.onJobEnd(this);
    if (outcome === undefined) this.#settle?.resolve();
    else this.#settle?.reject(outcome);
  }
}
