import type { SequenceSink } from "./sequence-tracker.ts";

/**
 * The sequence tracker by brute force: remembers everything and decides per sequence number, with no hold-back limit. The
 * model that `sequence-tracker.test.ts` compares the real one with; never used in production.
 */
export class NaiveSequenceTracker {
  readonly #sink: SequenceSink;
  #known = new Map<number, Uint8Array>();
  #gone = new Map<number, "lost" | "forgiven">();
  #next: number;
  #newest = 0;
  #newestLive = 0;
  #askedTo = 0;
  #isFresh = true;
  #epoch = "";

  constructor(sink: SequenceSink, start: "earliest" | "latest") {
    this.#sink = sink;
    this.#next = start === "earliest" ? 1 : 0;
  }

  live(sequence: number, payload: Uint8Array): void {
    const isInOrder = sequence === this.#next && ![...this.#known.keys()].some((known) => known >= this.#next);
    if (sequence <= this.#newestLive && !isInOrder) this.#sink.doubt();
    this.#newestLive = isInOrder ? sequence : Math.max(this.#newestLive, sequence);
    this.#newest = Math.max(this.#newest, sequence);
    if (this.#next === 0) this.#next = sequence;
    if (sequence >= this.#next && !this.#known.has(sequence)) this.#known.set(sequence, payload);
    this.#settle();
  }

  beacon(epoch: string, newest: number): void {
    this.#enter(epoch, newest);
    if (this.#next === 0) this.#next = newest + 1;
    this.#newest = Math.max(this.#newest, newest);
    this.#settle();
  }

  replayed(epoch: string, first: number, newest: number, payloads: readonly Uint8Array[]): void {
    const to = this.#askedTo;
    if (to === 0) return;
    this.#askedTo = 0;
    if (this.#enter(epoch, newest)) {
      this.#newest = Math.max(this.#newest, newest);
      this.#settle();
      return;
    }
    payloads.forEach((payload, index) => {
      const sequence = first + index;
      if (sequence >= this.#next && !this.#known.has(sequence)) this.#known.set(sequence, payload);
    });
    const through = first + payloads.length - 1;
    const isComplete = payloads.length === 0 || newest < to || through < this.#next;
    const isForgiven = this.#isFresh && (payloads.length > 0 || first > to);
    for (let sequence = this.#next; sequence <= (isComplete ? to : through); sequence++) {
      if (this.#known.has(sequence)) continue;
      const isBeforeAnything = ![...this.#known.keys()].some((known) => known >= this.#next && known < sequence);
      this.#gone.set(sequence, isForgiven && isBeforeAnything ? "forgiven" : "lost");
    }
    this.#settle();
  }

  replayFailed(): void {
    const to = this.#askedTo;
    if (to === 0) return;
    this.#askedTo = 0;
    for (let sequence = this.#next; sequence <= to; sequence++) this.#gone.set(sequence, "lost");
    this.#settle();
  }

  finish(): void {
    if (this.#next === 0) return;
    for (let sequence = this.#next; sequence <= this.#newest; sequence++) this.#gone.set(sequence, "lost");
    this.#askedTo = 0;
    this.#settle();
  }

  #enter(epoch: string, newest: number): boolean {
    const isRestart = this.#epoch === "" ? newest + 1 < this.#next : this.#epoch !== epoch;
    this.#epoch = epoch;
    if (!isRestart) return false;
    this.#known = new Map();
    this.#gone = new Map();
    this.#next = 1;
    this.#newest = 0;
    this.#newestLive = 0;
    this.#askedTo = 0;
    this.#isFresh = true;
    this.#sink.restarted();
    return true;
  }

  #settle(): void {
    for (;;) {
      const payload = this.#known.get(this.#next);
      const gone = this.#gone.get(this.#next);
      if (payload !== undefined) this.#sink.deliver(this.#next, payload);
      else if (gone === "lost") this.#sink.lost(this.#next, this.#next);
      else if (gone === undefined) break;
      if (gone !== "forgiven") this.#isFresh = false;
      this.#next++;
    }
    if (this.#askedTo !== 0 || this.#next === 0 || this.#newest < this.#next) return;
    const ahead = [...this.#known.keys()].filter((sequence) => sequence > this.#next);
    this.#askedTo = Math.min(this.#newest, ...ahead.map((sequence) => sequence - 1));
    this.#sink.ask(this.#next, this.#askedTo);
  }
}
