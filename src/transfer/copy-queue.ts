import type { Clock } from "../std/index.ts";
import type { DescriptorList } from "./descriptor-list.ts";
import { COPY_SLICE_BYTES } from "./limits.ts";
import type { TransferJob } from "./transfer-job.ts";

/**
 * Copies batches within memory this process can see, on the event loop, in slices of 2 MiB with a turn of the loop between
 * them and the jobs taking turns: a transfer of a gigabyte delays nobody by more than a slice. Used by `memory` and `shm`.
 */
export interface CopyOrder {
  readonly job: TransferJob;
  readonly from: DescriptorList;
  readonly to: DescriptorList;
  /** The bytes of a region, or undefined when it is gone. */
  readonly source: (regionId: number) => Buffer | undefined;
  readonly destination: (regionId: number) => Buffer | undefined;
  /** All copied (no argument), or a region vanished. */
  readonly onCopied: (isStale: boolean) => void;
}

interface Running extends CopyOrder {
  index: number;
  inside: number;
}

export class CopyQueue {
  readonly #clock: Pick<Clock, "nextTurn">;
  readonly #running: Running[] = [];
  #next = 0;
  #isScheduled = false;

  constructor(clock: Pick<Clock, "nextTurn">) {
    this.#clock = clock;
  }

  add(order: CopyOrder): void {
    this.#running.push({ ...order, index: 0, inside: 0 });
    this.#schedule();
  }

  /** Forgets a job; its memory is not touched afterwards. */
  remove(job: TransferJob): void {
    const at = this.#running.findIndex((order) => order.job === job);
    if (at >= 0) this.#running.splice(at, 1);
  }

  get size(): number {
    return this.#running.length;
  }

  #schedule(): void {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    this.#clock.nextTurn(() => {
      this.#isScheduled = false;
      this.#slice();
      if (this.#running.length > 0) this.#schedule();
    });
  }

  #slice(): void {
    if (this.#running.length === 0) return;
    if (this.#next >= this.#running.length) this.#next = 0;
    const order = this.#running[this.#next]!;
    const outcome = copySlice(order, COPY_SLICE_BYTES);
    if (outcome === "more") {
      this.#next++;
      return;
    }
    this.#running.splice(this.#next, 1);
    order.onCopied(outcome === "stale");
  }
}

function copySlice(order: Running, budgetBytes: number): "more" | "copied" | "stale" {
  const { from, to } = order;
  let left = budgetBytes;
  let knownFrom = -1;
  let knownTo = -1;
  let source: Buffer | undefined;
  let destination: Buffer | undefined;
  while (order.index < from.count) {
    if (left === 0) return "more";
    const i = order.index;
    if (from.regionIds[i] !== knownFrom) {
      knownFrom = from.regionIds[i]!;
      source = order.source(knownFrom);
    }
    if (to.regionIds[i] !== knownTo) {
      knownTo = to.regionIds[i]!;
      destination = order.destination(knownTo);
    }
    if (source === undefined || destination === undefined) return "stale";
    const byteCount = Math.min(left, from.lengths[i]! - order.inside);
    const start = from.offsets[i]! + order.inside;
    source.copy(destination, to.offsets[i]! + order.inside, start, start + byteCount);
    left -= byteCount;
    order.inside += byteCount;
    if (order.inside === from.lengths[i]!) {
      order.index++;
      order.inside = 0;
    }
  }
  return "copied";
}
