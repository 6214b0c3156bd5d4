import { DynamoError } from "../errors/index.ts";
import type { CounterChild, GaugeChild, HistogramChild, Metrics } from "../observability/index.ts";
import { EMPTY_LOAD, type LoadSnapshot } from "../protocol/index.ts";
import type { Clock, Random } from "../std/index.ts";
import type { RoutingPolicy, WorkerCandidate } from "./policies/index.ts";

/**
 * Which worker takes a request, of the workers that serve one model. Owns the set of workers, counts what it sent to
 * each, leaves out the ones that just failed, and asks its policy. Synchronous and in memory: a decision over 100
 * workers costs microseconds. Whoever feeds it (the frontend's model registry) adds and removes workers as discovery
 * tells, and hands in load reports.
 */
export interface RouteRequest {
  /** length = prompt tokens. What a KV-aware policy will hash. */
  readonly tokenIds: Uint32Array;
  /** Workers already tried for this request. */
  readonly excluded?: ReadonlySet<string>;
}

export interface RoutingDecision {
  readonly instanceId: string;
  readonly address: string;
  readonly policy: string;
  readonly reason: string;
  readonly candidateCount: number;
  /** Must be called exactly when the request left the worker, however it ended. Further calls do nothing. */
  release(): void;
}

export interface RouterOptions {
  readonly model: string;
  readonly policy: RoutingPolicy;
  readonly clock: Clock;
  readonly random: Random;
  readonly metrics: Metrics;
}

/** Dynamo's default for local inhibition: long enough for discovery to catch up, short enough to forgive. */
export const INHIBITION_MS = 5_000;

class Worker implements WorkerCandidate {
  readonly instanceId: string;
  readonly address: string;
  activeRequests = 0;
  reportedLoad: LoadSnapshot = EMPTY_LOAD;
  inhibitedUntilMs = -Infinity;

  constructor(instanceId: string, address: string) {
    this.instanceId = instanceId;
    this.address = address;
  }
}

export class Router {
  readonly #options: RouterOptions;
  /** Sorted by instance id, so that the same set gives the same order on every router. */
  #workers: Worker[] = [];
  #turn = 0;
  readonly #routed: CounterChild;
  readonly #unroutable: CounterChild;
  readonly #workerCount: GaugeChild;
  readonly #overhead: HistogramChild;

  constructor(options: RouterOptions) {
    this.#options = options;
    const requests = options.metrics.counter("dynamo_component_router_requests_total");
    this.#routed = requests.labels(options.model, options.policy.name, "routed");
    this.#unroutable = requests.labels(options.model, options.policy.name, "no-workers");
    this.#workerCount = options.metrics.gauge("dynamo_frontend_router_workers").labels(options.model);
    this.#overhead = options.metrics.histogram("dynamo_router_overhead_total").labels(options.model);
  }

  get workers(): readonly WorkerCandidate[] {
    return this.#workers;
  }

  /** A worker that is already there keeps its counts; a new address replaces the old one. */
  addWorker(instanceId: string, address: string): void {
    const known = this.#workers.find((worker) => worker.instanceId === instanceId);
    if (known?.address === address) return;
    this.removeWorker(instanceId);
    this.#workers = [...this.#workers, new Worker(instanceId, address)].toSorted((a, b) =>
      a.instanceId < b.instanceId ? -1 : 1,
    );
    this.#workerCount.set(this.#workers.length);
  }

  removeWorker(instanceId: string): void {
    this.#workers = this.#workers.filter((worker) => worker.instanceId !== instanceId);
    this.#workerCount.set(this.#workers.length);
  }

  updateLoad(instanceId: string, load: LoadSnapshot): void {
    const worker = this.#workers.find((candidate) => candidate.instanceId === instanceId);
    if (worker !== undefined) worker.reportedLoad = load;
  }

  /** Leaves the worker out for a while: it refused, broke or did not answer. It comes back by itself. */
  inhibit(instanceId: string): void {
    const worker = this.#workers.find((candidate) => candidate.instanceId === instanceId);
    if (worker !== undefined) worker.inhibitedUntilMs = this.#options.clock.monotonicMs() + INHIBITION_MS;
  }

  /** Throws `no-workers` when none is left. When every worker is inhibited, all of them count again: one must be tried. */
  route(request: RouteRequest): RoutingDecision {
    const { clock, policy, random } = this.#options;
    const startMs = clock.monotonicMs();
    const candidates = this.#eligible(request.excluded, startMs);
    if (candidates.length === 0) {
      this.#unroutable.add();
      throw new DynamoError("no-workers", `no worker that serves ${this.#options.model} is available`, {
        diagnostic: `${this.#workers.length} known, ${request.excluded?.size ?? 0} already tried`,
      });
    }
    const choice = policy.choose({ candidates, turn: this.#turn, random });
    this.#turn = (this.#turn + 1) % 0x40000000;
    const worker = candidates[choice.index]!;
    worker.activeRequests++;
    this.#routed.add();
    this.#overhead.observe(clock.monotonicMs() - startMs);
    let held = true;
    return {
      instanceId: worker.instanceId,
      address: worker.address,
      policy: policy.name,
      reason: choice.reason,
      candidateCount: candidates.length,
      release() {
        if (held) worker.activeRequests--;
        held = false;
      },
    };
  }

  #eligible(excluded: ReadonlySet<string> | undefined, nowMs: number): readonly Worker[] {
    let allowed = this.#workers;
    if (excluded !== undefined && excluded.size > 0) {
      allowed = allowed.filter((worker) => !excluded.has(worker.instanceId));
    }
    const healthy = allowed.filter((worker) => worker.inhibitedUntilMs <= nowMs);
    return healthy.length > 0 ? healthy : allowed;
  }
}
