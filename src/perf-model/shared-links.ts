import assert from "node:assert/strict";
import type { Clock, TimerHandle } from "../std/index.ts";

/**
 * Links that transfers share: a bus, a disk, a network card, the way into an object store. A transfer crosses one or more
 * of them and is as fast as the fullest lets it be. Rates are max-min fair, as TCP's on a quiet network come close to be:
 * a link's bandwidth is divided evenly among its transfers, and what those that are held up elsewhere leave of their
 * part is divided among the others. So each transfer has one link that is full and on which nobody is faster.
 *
 *     worker A  disk ─┐                     ┌─ in  worker B
 *               bus  ─┴ host ── out ────────┴─ ...          one transfer A -> B: [A.out, B.in]
 *
 * Time comes from the clock. Cost: O(links x transfers under way) whenever one begins or ends.
 */
export interface SharedLink {
  readonly bytesPerMs: number;
}

interface Flow {
  readonly links: readonly SharedLink[];
  leftBytes: number;
  bytesPerMs: number;
  readonly onEnd: () => void;
}

/** Below this a transfer is over: rates are fractions. */
const NOTHING_BYTES = 1e-6;

export class SharedLinks {
  readonly #clock: Pick<Clock, "monotonicMs" | "setTimer">;
  readonly #flows = new Set<Flow>();
  #nowMs = 0;
  #timer: TimerHandle | undefined = undefined;

  constructor(clock: Pick<Clock, "monotonicMs" | "setTimer">) {
    this.#clock = clock;
  }

  /** Transfers under way. */
  get count(): number {
    return this.#flows.size;
  }

  /** Calls `onEnd` when so many bytes have crossed all of `links`; not after `cancel`, and never inside this call. */
  move(byteCount: number, links: readonly SharedLink[], onEnd: () => void): TimerHandle {
    assert(links.length > 0 && links.every(({ bytesPerMs }) => bytesPerMs > 0), "a transfer crosses links that move");
    this.#passTime();
    const flow: Flow = { links, leftBytes: Math.max(0, byteCount), bytesPerMs: 0, onEnd };
    this.#flows.add(flow);
    this.#share();
    return {
      cancel: () => {
        this.#passTime();
        if (this.#flows.delete(flow)) this.#share();
      },
    };
  }

  /** A link has another bandwidth from now on. */
  changed(): void {
    this.#passTime();
    this.#share();
  }

  /** Bytes a millisecond of each transfer under way, oldest first; for tests. */
  rates(): readonly { readonly links: readonly SharedLink[]; readonly bytesPerMs: number }[] {
    return Array.from(this.#flows, ({ links, bytesPerMs }) => ({ links, bytesPerMs }));
  }

  #passTime(): void {
    const nowMs = this.#clock.monotonicMs();
    const elapsedMs = nowMs - this.#nowMs;
    this.#nowMs = nowMs;
    if (elapsedMs > 0) for (const flow of this.#flows) flow.leftBytes -= flow.bytesPerMs * elapsedMs;
  }

  /** Gives every transfer its rate, by filling the fullest link first, and waits for the first end. */
  #share(): void {
    const left = new Map<SharedLink, { bytesPerMs: number; flows: Set<Flow> }>();
    for (const flow of this.#flows) {
      for (const link of flow.links) {
        const known = left.get(link);
        if (known === undefined) left.set(link, { bytesPerMs: link.bytesPerMs, flows: new Set([flow]) });
        else known.flows.add(flow);
      }
    }
    while (left.size > 0) {
      let fullest: { bytesPerMs: number; flows: Set<Flow> } | undefined;
      for (const link of left.values()) if (fullest === undefined || part(link) < part(fullest)) fullest = link;
      const bytesPerMs = part(fullest!);
      for (const flow of fullest!.flows) {
        flow.bytesPerMs = bytesPerMs;
        for (const link of flow.links) {
          const shared = left.get(link)!;
          if (!shared.flows.delete(flow)) continue;
          shared.bytesPerMs -= bytesPerMs;
          if (shared.flows.size === 0) left.delete(link);
        }
      }
    }
    this.#arm();
  }

  #arm(): void {
    this.#timer?.cancel();
    this.#timer = undefined;
    let firstMs = Infinity;
    for (const { leftBytes, bytesPerMs } of this.#flows)
      firstMs = Math.min(firstMs, Math.max(0, leftBytes) / bytesPerMs);
    if (firstMs !== Infinity) this.#timer = this.#clock.setTimer(firstMs, () => this.#end());
  }

  #end(): void {
    this.#passTime();
    const ended: Flow[] = [];
    for (const flow of this.#flows) if (flow.leftBytes <= NOTHING_BYTES) ended.push(flow);
    for (const flow of ended) this.#flows.delete(flow);
    this.#share();
    for (const { onEnd } of ended) onEnd();
  }
}

function part({ bytesPerMs, flows }: { bytesPerMs: number; flows: Set<Flow> }): number {
  return Math.max(Number.MIN_VALUE, bytesPerMs / flows.size);
}
