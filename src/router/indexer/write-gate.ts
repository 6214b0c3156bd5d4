import { CONTROL } from "./flat-kv-memory.ts";

/**
 * How one writer and many readers share the index: a sequence lock with a courtesy. The writer makes the sequence odd
 * while it changes anything; a reader takes an even sequence, reads, and throws its result away when the sequence has
 * moved. So a reader never blocks the writer and never returns a mixture of two states. A reader that keeps losing asks
 * for a pause; the writer gives one between two sections, once per request and never longer than `PAUSE_SPINS`, so that
 * a reader that died after asking costs one pause.
 *
 * Sections are short: long changes are made in slices, and every slice leaves a state that is true for its time (a chain
 * stored or removed in part). All orderings are made by read-modify-write operations, which are full fences on every
 * platform Node runs on; a plain store or load would be enough on x86 only.
 */
/** About 20 us: a lookup of a few hundred blocks. */
const PAUSE_SPINS = 4_000;
/** Lost attempts before a reader asks for a pause. */
const POLITE_ATTEMPTS = 3;
/** Lost attempts before a lookup gives up: some milliseconds, many times what a section lasts. */
export const MAX_READ_ATTEMPTS = 1_000;
/** Spins of one attempt on an odd sequence. */
const WAIT_SPINS = 1_000;

export class WriteGate {
  readonly #control: Int32Array;

  constructor(control: Int32Array) {
    this.#control = control;
  }

  open(): void {
    Atomics.add(this.#control, CONTROL.sequence, 1);
  }

  close(): void {
    const control = this.#control;
    Atomics.add(control, CONTROL.sequence, 1);
    if (control[CONTROL.wanted] !== 0) this.#pause();
  }

  #pause(): void {
    const control = this.#control;
    Atomics.store(control, CONTROL.wanted, 0);
    const served = Atomics.load(control, CONTROL.served);
    for (let i = 0; i < PAUSE_SPINS && Atomics.load(control, CONTROL.served) === served; i++);
  }
}

/** One thread's side of the gate. */
export class ReadGate {
  readonly #control: Int32Array;
  /** Of this reader alone: an operation on it is a fence that disturbs nobody. */
  readonly #fence = new Int32Array(new SharedArrayBuffer(64));

  constructor(control: Int32Array) {
    this.#control = control;
  }

  /** Before reading: an even sequence, or -1 when the writer stayed inside a section for too long. `tries` counts from 0. */
  enter(tries: number): number {
    const control = this.#control;
    if (tries >= POLITE_ATTEMPTS) Atomics.store(control, CONTROL.wanted, 1);
    let sequence = Atomics.load(control, CONTROL.sequence);
    for (let i = 0; (sequence & 1) === 1 && i < WAIT_SPINS; i++) sequence = Atomics.load(control, CONTROL.sequence);
    return (sequence & 1) === 1 ? -1 : sequence;
  }

  /** After reading: whether what was read since `enter` is one state. */
  leave(sequence: number, tries: number): boolean {
    const control = this.#control;
    Atomics.add(this.#fence, 0, 1);
    if (Atomics.load(control, CONTROL.sequence) !== sequence) return false;
    if (tries >= POLITE_ATTEMPTS) Atomics.add(control, CONTROL.served, 1);
    return true;
  }
}
