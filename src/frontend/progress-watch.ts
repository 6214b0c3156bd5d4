import { DynamoError } from "../errors/index.ts";
import type { Clock, TimerHandle } from "../std/index.ts";

/**
 * Finds workers that answer pings but give no token: for each worker of a model, whether any item came while at least
 * one stream that has begun, and whose client reads, waits for one. After `limitMs` without any, every stream on that
 * worker is told so and can go on elsewhere. Streams that wait for their first token prove nothing: a long prompt takes its
 * time.
 *
 * An engine short of KV memory may put all streams of one frontend back and work on another's. Its load reports tell that
 * it works and that some wait: while it makes steps it is not stuck, whatever a frontend sees of its own streams.
 *
 * One timer per model while it has streams, four times per limit; per item one addition. A frontend that was itself held
 * up must not blame its workers: however long the pause, a look counts as one.
 */
export interface WatchedStream {
  readonly isExpecting: boolean;
  onStalled(error: DynamoError): void;
}

export class WorkerProgress {
  /** Counted up by the streams. */
  items = 0;
  /** At the last look. */
  seenItems = 0;
  /** Looks in a row without an item. */
  misses = 0;
  /** When its engine made a step, by its last report. */
  steppedMs = -Infinity;
  readonly streams = new Set<WatchedStream>();
}

const LOOKS = 4;
/** Two reports of a worker that works: one may be lost. */
const REPORTS_MS = 500;

export class ProgressWatch {
  readonly #clock: Clock;
  readonly #limitMs: number;
  readonly #workers = new Map<string, WorkerProgress>();
  #timer: TimerHandle | undefined;

  /** `limitMs` 0 = no watch. */
  constructor({ clock, limitMs }: { readonly clock: Clock; readonly limitMs: number }) {
    this.#clock = clock;
    this.#limitMs = limitMs;
  }

  get streamCount(): number {
    let count = 0;
    for (const { streams } of this.#workers.values()) count += streams.size;
    return count;
  }

  enter(instanceId: string, stream: WatchedStream): WorkerProgress {
    let worker = this.#workers.get(instanceId);
    if (worker === undefined) this.#workers.set(instanceId, (worker = new WorkerProgress()));
    worker.streams.add(stream);
    if (this.#limitMs > 0) this.#timer ??= this.#nextLook();
    return worker;
  }

  leave(instanceId: string, stream: WatchedStream): void {
    const worker = this.#workers.get(instanceId);
    if (worker?.streams.delete(stream) !== true || worker.streams.size > 0) return;
    this.#workers.delete(instanceId);
  }

  /** A load report of the worker came: its engine made no step for `stillMs`; Infinity: nobody waits there. The last one counts, not the best one. */
  reported(instanceId: string, stillMs: number): void {
    const worker = this.#workers.get(instanceId);
    if (worker !== undefined) worker.steppedMs = this.#clock.monotonicMs() - stillMs;
  }

  /** Of this frontend, on that worker. */
  streamCountOf(instanceId: string): number {
    return this.#workers.get(instanceId)?.streams.size ?? 0;
  }

  close(): void {
    this.#timer?.cancel();
    this.#timer = undefined;
  }

  #nextLook(): TimerHandle {
    return this.#clock.setTimer(this.#limitMs / LOOKS, () => this.#look());
  }

  #look(): void {
    // An idle model costs no timer; one that comes and goes does not set one each time.
    this.#timer = this.#workers.size > 0 ? this.#nextLook() : undefined;
    const workingSinceMs = this.#clock.monotonicMs() - Math.max(REPORTS_MS, this.#limitMs / 2);
    for (const [instanceId, worker] of this.#workers) {
      const isSilent = worker.items === worker.seenItems && isExpected(worker);
      worker.misses = isSilent ? worker.misses + 1 : 0;
      worker.seenItems = worker.items;
      if (worker.misses >= LOOKS && worker.steppedMs < workingSinceMs) this.#stalled(instanceId, worker);
    }
  }

  #stalled(instanceId: string, worker: WorkerProgress): void {
    worker.misses = 0;
    const error = new DynamoError("worker-stalled", "the worker gave no token for any of its requests for too long", {
      diagnostic: `worker ${instanceId}, ${worker.streams.size} streams, ${this.#limitMs} ms`,
    });
    for (const stream of Array.from(worker.streams)) stream.onStalled(error);
  }
}

function isExpected({ streams }: WorkerProgress): boolean {
  for (const stream of streams) if (stream.isExpecting) return true;
  return false;
}
