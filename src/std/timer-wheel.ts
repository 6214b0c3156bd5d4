import type { Clock, TimerHandle } from "./clock.ts";

/**
 * Deadlines for tens of thousands of requests on one timer of the clock: a hashed wheel (Varghese and Lauck, 1987).
 *
 *     tick 0    1    2    ...   511        slot = due tick & (slots - 1); a timer due in a later
 *        [ ]  [a]  [b-c] [ ]  [d]          round stays in its slot until its own tick comes
 *
 * Never early; late by at most one tick (default 25 ms), a millisecond, and the delay of the event loop. `add` and `cancel` are O(1) and
 * allocate nothing; firing is O(due). The clock's timer is set for the next slot in use, so an idle wheel wakes nobody.
 * A timer object belongs to its user, sits in one wheel at a time and can be added again. Not for sub-tick precision.
 */
export interface Expiring {
  onExpire(): void;
}

export class WheelTimer {
  readonly target: Expiring;
  /** Set by the wheel only. */
  next: WheelTimer | undefined = undefined;
  previous: WheelTimer | undefined = undefined;
  dueTick = 0;

  constructor(target: Expiring) {
    this.target = target;
  }

  /** True from `add` until it fires or is cancelled. */
  get pending(): boolean {
    return this.next !== undefined;
  }
}

const NOBODY: Expiring = { onExpire: () => undefined };
const MAX_TIMER_MS = 2_147_483_647;

/** A ring with itself as its only member. */
function emptyList(): WheelTimer {
  const head = new WheelTimer(NOBODY);
  head.next = head;
  head.previous = head;
  return head;
}

function append(head: WheelTimer, timer: WheelTimer): void {
  const last = head.previous!;
  last.next = timer;
  timer.previous = last;
  timer.next = head;
  head.previous = timer;
}

function unlink(timer: WheelTimer): void {
  timer.previous!.next = timer.next;
  timer.next!.previous = timer.previous;
  timer.next = undefined;
  timer.previous = undefined;
}

export interface TimerWheelOptions {
  readonly clock: Clock;
  /** @default 25 */
  readonly tickMs?: number;
  /** A power of two. @default 512 */
  readonly slotCount?: number;
}

export class TimerWheel {
  readonly #clock: Clock;
  readonly #tickMs: number;
  readonly #originMs: number;
  readonly #slots: WheelTimer[];
  readonly #mask: number;
  /** Timers taken out of their slots by the run of `#advance` that is under way. */
  readonly #firing = emptyList();
  readonly #onWake: () => void;
  /** The last tick that was handled. */
  #tick = 0;
  #size = 0;
  #wake: TimerHandle | undefined = undefined;
  #wakeTick = 0;

  constructor({ clock, tickMs = 25, slotCount = 512 }: TimerWheelOptions) {
    if (slotCount < 2 || (slotCount & (slotCount - 1)) !== 0) {
      throw new RangeError(`Expected slotCount to be a power of two from 2 up, got ${slotCount}`);
    }
    this.#clock = clock;
    this.#tickMs = tickMs;
    this.#originMs = clock.monotonicMs();
    this.#slots = Array.from({ length: slotCount }, emptyList);
    this.#mask = slotCount - 1;
    this.#onWake = () => {
      this.#wake = undefined;
      this.#advance();
    };
  }

  /** Timers that have not fired yet. */
  get size(): number {
    return this.#size;
  }

  /** Fires `timer` once `delayMs` have passed; a pending timer is moved. */
  add(timer: WheelTimer, delayMs: number): void {
    if (timer.pending) this.cancel(timer);
    const elapsedMs = this.#clock.monotonicMs() - this.#originMs;
    if (this.#size === 0) this.#tick = Math.floor(elapsedMs / this.#tickMs);
    timer.dueTick = Math.max(this.#tick + 1, Math.ceil((elapsedMs + Math.max(0, delayMs)) / this.#tickMs));
    append(this.#slots[timer.dueTick & this.#mask]!, timer);
    this.#size++;
    if (this.#wake === undefined || timer.dueTick < this.#wakeTick) this.#wakeAt(timer.dueTick, elapsedMs);
  }

  /** No-op for a timer that is not pending. */
  cancel(timer: WheelTimer): void {
    if (!timer.pending) return;
    unlink(timer);
    this.#size--;
  }

  /** Forgets all timers without firing them. */
  close(): void {
    for (const head of [...this.#slots, this.#firing]) {
      while (head.next !== head) this.cancel(head.next!);
    }
    this.#wake?.cancel();
    this.#wake = undefined;
  }

  #wakeAt(tick: number, elapsedMs: number): void {
    this.#wake?.cancel();
    this.#wakeTick = tick;
    // Whole milliseconds, at least one: sums of fractional times may fall a hair short of the tick, and a wake-up that found
    // nothing due would ask for a time that no clock can add.
    const delayMs = Math.min(MAX_TIMER_MS, Math.max(1, Math.ceil(tick * this.#tickMs - elapsedMs)));
    this.#wake = this.#clock.setTimer(delayMs, this.#onWake);
  }

  #advance(): void {
    // Rounded down: when the clock's timer came a moment early nothing is due, and it is asked once more.
    const nowTick = Math.floor((this.#clock.monotonicMs() - this.#originMs) / this.#tickMs);
    const passed = Math.min(nowTick - this.#tick, this.#slots.length);
    for (let i = 1; i <= passed; i++) {
      const head = this.#slots[(this.#tick + i) & this.#mask]!;
      for (let timer = head.next!; timer !== head;) {
        const following = timer.next!;
        if (timer.dueTick <= nowTick) {
          unlink(timer);
          append(this.#firing, timer);
        }
        timer = following;
      }
    }
    this.#tick = Math.max(this.#tick, nowTick);
    try {
      while (this.#firing.next !== this.#firing) {
        const timer = this.#firing.next!;
        unlink(timer);
        this.#size--;
        timer.target.onExpire();
      }
    } finally {
      // Only after a target threw is something left: it fires on the next tick.
      while (this.#firing.next !== this.#firing) {
        const timer = this.#firing.next!;
        unlink(timer);
        timer.dueTick = this.#tick + 1;
        append(this.#slots[timer.dueTick & this.#mask]!, timer);
      }
      this.#sleep();
    }
  }

  /** Sets the wake-up for the next slot in use; its timers may belong to a later round, then it wakes for nothing. */
  #sleep(): void {
    if (this.#size === 0) return;
    const slots = this.#slots;
    for (let tick = this.#tick + 1; tick <= this.#tick + slots.length; tick++) {
      const head = slots[tick & this.#mask]!;
      if (head.next === head) continue;
      this.#wakeAt(tick, this.#clock.monotonicMs() - this.#originMs);
      return;
    }
  }
}
