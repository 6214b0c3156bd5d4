/**
 * Collects the connections that have something to send and flushes them together: on demand (`flush`) and otherwise at
 * the end of the loop turn. One scheduled call per turn however much is written. Owned by one client or one server.
 */
export interface Flushable {
  /** True while it waits in a flusher; set and cleared by the flusher only. */
  dirty: boolean;
  flushOutbox(): void;
}

/** Runs `run` on a later turn, in the order of the calls. */
export type Schedule = (run: () => void) => void;

export const onNextTurn: Schedule = (run) => {
  setImmediate(run);
};

export class Flusher {
  readonly #schedule: Schedule;
  readonly #onTurn: () => void;
  #dirty: Flushable[] = [];
  #spare: Flushable[] = [];
  #scheduled = false;

  constructor(schedule: Schedule = onNextTurn) {
    this.#schedule = schedule;
    this.#onTurn = () => {
      this.#scheduled = false;
      this.flush();
    };
  }

  /** The caller has seen that `flushable` is not dirty yet. */
  add(flushable: Flushable): void {
    flushable.dirty = true;
    this.#dirty.push(flushable);
    if (this.#scheduled) return;
    this.#scheduled = true;
    this.#schedule(this.#onTurn);
  }

  flush(): void {
    const dirty = this.#dirty;
    if (dirty.length === 0) return;
    this.#dirty = this.#spare;
    for (const flushable of dirty) {
      flushable.dirty = false;
      flushable.flushOutbox();
    }
    dirty.length = 0;
    this.#spare = dirty;
  }
}
