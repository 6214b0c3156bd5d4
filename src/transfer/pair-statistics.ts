import type { DynamoError } from "../errors/index.ts";
import type { Metrics } from "../observability/index.ts";
import type { BackendName, Operation, PairTelemetry } from "./base.ts";
import type { Chosen } from "./choose-backend.ts";
import { CostModel, type TypicalCost } from "./cost-model.ts";
import type { TransferJob } from "./transfer-job.ts";

/**
 * What was moved, per peer, back end and operation: counters and the learnt cost. One entry per combination that was
 * prepared; entries of a peer go when the peer is removed. Metrics carry back end and operation, not the peer.
 */
const RATE_SAMPLE_BYTES = 1e6;

interface Entry {
  readonly peer: string;
  readonly backend: BackendName;
  readonly operation: Operation;
  readonly cost: CostModel;
  reason: string;
  isSlowPath: boolean;
  /** Somebody was told that it is slow. */
  isToldSlow: boolean;
  transferCount: number;
  byteCount: number;
  descriptorCount: number;
  seconds: number;
  errorCount: number;
  lastGigabytesPerSecond: number;
}

export class PairStatistics {
  readonly #entries = new Map<string, Entry>();
  readonly #metrics: Metrics | undefined;

  constructor(metrics: Metrics | undefined) {
    this.#metrics = metrics;
  }

  cost(
    peer: string,
    backend: { readonly name: BackendName; readonly typical: TypicalCost },
    operation: Operation,
  ): CostModel {
    return this.#entry(peer, backend, operation).cost;
  }

  #entry(
    peer: string,
    backend: { readonly name: BackendName; readonly typical: TypicalCost },
    operation: Operation,
  ): Entry {
    const key = `${backend.name}\n${operation}\n${peer}`;
    let entry = this.#entries.get(key);
    if (entry === undefined) {
      const cost = new CostModel(backend.typical);
      const zero = {
        transferCount: 0,
        byteCount: 0,
        descriptorCount: 0,
        seconds: 0,
        errorCount: 0,
        lastGigabytesPerSecond: 0,
        reason: "",
        isSlowPath: false,
        isToldSlow: false,
      };
      entry = { peer, backend: backend.name, operation, cost, ...zero };
      this.#entries.set(key, entry);
    }
    return entry;
  }

  /** Remembers why the pair's tables use this back end. */
  onChoice(peer: string, { handler, reason, isSlowPath }: Chosen): void {
    for (const operation of ["read", "write"] as const) {
      const entry = this.#entry(peer, handler, operation);
      entry.reason = reason;
      entry.isSlowPath = isSlowPath;
    }
  }

  /** True once per pair, when a transfer large enough to tell was slower than that. */
  isNewlySlow(job: TransferJob, gigabytesPerSecond: number): boolean {
    const entry = this.#entry(job.peer.name, job.handler, job.operation);
    if (entry.isToldSlow || job.byteCount < RATE_SAMPLE_BYTES) return false;
    entry.isToldSlow = entry.lastGigabytesPerSecond < gigabytesPerSecond;
    return entry.isToldSlow;
  }

  onEnd(job: TransferJob, nowMs: number, error: DynamoError | undefined): void {
    const entry = this.#entry(job.peer.name, job.handler, job.operation);
    const metrics = this.#metrics;
    if (error !== undefined) {
      entry.errorCount++;
      metrics
        ?.counter("dynamo_transfer_num_failed_transfers_total")
        .labels(job.backend, job.operation, error.reason)
        .add();
      return;
    }
    const elapsedMs = nowMs - job.postedMs;
    entry.transferCount++;
    entry.byteCount += job.byteCount;
    entry.descriptorCount += job.descriptorCount;
    entry.seconds += elapsedMs / 1_000;
    if (job.byteCount >= RATE_SAMPLE_BYTES) entry.lastGigabytesPerSecond = job.byteCount / 1e6 / elapsedMs;
    entry.cost.observe(job.descriptorCount, job.byteCount, elapsedMs);
    if (metrics === undefined) return;
    metrics
      .histogram("dynamo_transfer_xfer_time_seconds")
      .labels(job.backend, job.operation)
      .observe(elapsedMs / 1_000);
    metrics.counter("dynamo_transfer_bytes_transferred_total").labels(job.backend, job.operation).add(job.byteCount);
    metrics
      .counter("dynamo_transfer_num_descriptors_total")
      .labels(job.backend, job.operation)
      .add(job.descriptorCount);
  }

  forget(peer: string): void {
    for (const [key, entry] of this.#entries) if (entry.peer === peer) this.#entries.delete(key);
  }

  telemetry(): PairTelemetry[] {
    return [...this.#entries.values()]
      .filter((entry) => entry.transferCount + entry.errorCount > 0)
      .map(({ cost: _cost, isToldSlow, ...entry }) => ({
        ...entry,
        isSlow: isToldSlow,
        meanGigabytesPerSecond: entry.seconds > 0 ? entry.byteCount / 1e9 / entry.seconds : 0,
      }));
  }
}
