/**
 * Turns what arrives from one publisher (live events, its newest sequence number, replays) into what a subscriber is
 * promised: each event once, in order, every loss told. Pure: no socket, no clock, no timer; the back end feeds it and
 * carries out what it asks through the `SequenceSink`. One tracker per subscription and publisher, owned by that
 * subscription's event loop.
 *
 * ```
 *   live(n) ----> n == next? deliver            beacon(newest) --> newest >= next? something was lost
 *                 n <  next? duplicate                |
 *                 n >  next? hold back -------> ask(next, first held - 1)
 *                                                     |
 *                          replayed(...) / replayFailed(): deliver in order, lost(...) for what is gone
 * ```
 *
 * Guarantees, tested against `naive-sequence-tracker.ts`: sequences delivered or lost rise by one without overlap; one
 * replay is asked at a time; at most `heldEvents` events and `heldBytes` bytes are held back (more are dropped, seen as
 * a gap later and asked for again). An event in order costs a few comparisons and no allocation.
 */
export interface SequenceSink {
  deliver(sequence: number, payload: Uint8Array): void;
  /** `from` to `to` will not come any more. */
  lost(from: number, to: number): void;
  /** Ask the publisher's ring; answer with `replayed` or `replayFailed`, never from within this call. */
  ask(from: number, to: number): void;
  /** A live sequence number did not rise: a duplicate, or another publisher under the same id. A beacon will tell. */
  doubt(): void;
  /** The publisher is another one than before (its epoch changed); an ask still under way is void. */
  restarted(): void;
}

export interface SequenceTrackerOptions {
  /** Where to begin: `earliest` asks for what the ring still holds, `latest` takes the first thing seen as the start. */
  readonly start: "earliest" | "latest";
  readonly heldEvents: number;
  readonly heldBytes: number;
}

export class SequenceTracker {
  readonly #sink: SequenceSink;
  readonly #heldEvents: number;
  readonly #heldBytesMax: number;
  /** The sequence to deliver next; 0 until a start is known. */
  #next: number;
  /** Highest sequence known to have been published on the live path. */
  #newest = 0;
  #lastLive = 0;
  /** Last sequence of the replay under way, 0 when there is none. */
  #askedTo = 0;
  /** Nothing was delivered or lost yet: what the ring no longer held before the first event is not a gap. */
  #fresh = true;
  #epoch = "";
  #held = new Map<number, Uint8Array>();
  #heldBytes = 0;
  duplicateCount = 0;
  /** Events dropped because the hold-back buffer was full; they are asked for again. */
  overflowCount = 0;

  constructor(sink: SequenceSink, options: SequenceTrackerOptions) {
    this.#sink = sink;
    this.#heldEvents = options.heldEvents;
    this.#heldBytesMax = options.heldBytes;
    this.#next = options.start === "earliest" ? 1 : 0;
  }

  /** The sequence that is delivered next, 0 while the start is unknown. */
  get next(): number {
    return this.#next;
  }

  get heldCount(): number {
    return this.#held.size;
  }

  get isAsking(): boolean {
    return this.#askedTo !== 0;
  }

  /** An event from the live path. */
  live(sequence: number, payload: Uint8Array): void {
    if (sequence === this.#next && this.#held.size === 0) {
      this.#lastLive = sequence;
      if (sequence > this.#newest) this.#newest = sequence;
      this.#deliver(sequence, payload);
      return;
    }
    if (sequence <= this.#lastLive) this.#sink.doubt();
    else this.#lastLive = sequence;
    if (sequence > this.#newest) this.#newest = sequence;
    if (this.#next === 0) this.#next = sequence;
    if (sequence < this.#next || this.#held.has(sequence)) {
      this.duplicateCount++;
      return;
    }
    this.#hold(sequence, payload);
    this.#advance();
  }

  /** The publisher says that `newest` (0: nothing yet) is its newest sequence; all up to it was sent on the live path. */
  beacon(epoch: string, newest: number): void {
    this.#enterEpoch(epoch, newest);
    if (this.#next === 0) this.#next = newest + 1;
    if (newest > this.#newest) this.#newest = newest;
    this.#advance();
  }

  /**
   * The answer to the last `ask`: the events from `first` on, consecutive. Nothing before `first` is kept any more. An
   * answer that ends before what was asked, while `newest` says there is more, is a page: the rest is asked for.
   */
  replayed(epoch: string, first: number, newest: number, payloads: readonly Uint8Array[]): void {
    const to = this.#askedTo;
    if (to === 0) return;
    this.#askedTo = 0;
    if (this.#enterEpoch(epoch, newest)) {
      if (newest > this.#newest) this.#newest = newest;
      this.#advance();
      return;
    }
    const before = this.#next;
    for (let i = 0; i < payloads.length; i++) {
      const sequence = first + i;
      if (sequence > this.#next) this.#skipTo(sequence, this.#fresh);
      if (sequence === this.#next) this.#deliver(sequence, this.#takeHeld(sequence) ?? payloads[i]!);
    }
    const isPage = payloads.length > 0 && newest >= to && this.#next > before;
    if (!isPage) this.#skipTo(to + 1, this.#fresh && first > to);
    this.#advance();
  }

  /** The last `ask` was not answered in time, or the publisher is not there. */
  replayFailed(): void {
    const to = this.#askedTo;
    if (to === 0) return;
    this.#askedTo = 0;
    this.#skipTo(to + 1, false);
    this.#advance();
  }

  /** The publisher is gone: delivers what is held back and reports the rest as lost. */
  finish(): void {
    this.#askedTo = 0;
    if (this.#next !== 0) this.#skipTo(this.#newest + 1, false);
  }

  /** True when this is another publisher than before; the state then starts anew at 1. */
  #enterEpoch(epoch: string, newest: number): boolean {
    if (epoch === this.#epoch) return false;
    // The first epoch heard of is the one we were in already, unless its publisher is behind what we have.
    const isRestart = this.#epoch !== "" || newest + 1 < this.#next;
    this.#epoch = epoch;
    if (!isRestart) return false;
    // What is held back may be of either publisher; of the new one it comes again by replay.
    this.#held.clear();
    this.#heldBytes = 0;
    this.#next = 1;
    this.#newest = 0;
    this.#lastLive = 0;
    this.#askedTo = 0;
    this.#fresh = true;
    this.#sink.restarted();
    return true;
  }

  #deliver(sequence: number, payload: Uint8Array): void {
    this.#next = sequence + 1;
    this.#fresh = false;
    this.#sink.deliver(sequence, payload);
  }

  #hold(sequence: number, payload: Uint8Array): void {
    // The next one in order leaves at once and needs no room.
    const isFull = this.#held.size >= this.#heldEvents || this.#heldBytes + payload.length > this.#heldBytesMax;
    if (isFull && sequence !== this.#next) {
      this.overflowCount++;
      return;
    }
    this.#held.set(sequence, payload);
    this.#heldBytes += payload.length;
  }

  #takeHeld(sequence: number): Uint8Array | undefined {
    const payload = this.#held.get(sequence);
    if (payload === undefined) return undefined;
    this.#held.delete(sequence);
    this.#heldBytes -= payload.length;
    return payload;
  }

  /**
   * Moves `next` to `limit`: delivers what is held on the way, reports the rest as lost, unless it is `forgiven` (before
   * the very first event). Cost by the events held, not by the distance: sequences come from outside.
   */
  #skipTo(limit: number, forgiven: boolean): void {
    if (limit <= this.#next) return;
    const onTheWay = [...this.#held.keys()].filter((sequence) => sequence < limit).sort((a, b) => a - b);
    let isForgiven = forgiven;
    for (const sequence of onTheWay) {
      if (sequence > this.#next) this.#lose(sequence, isForgiven);
      isForgiven = false;
      this.#deliver(sequence, this.#takeHeld(sequence)!);
    }
    if (limit > this.#next) this.#lose(limit, isForgiven);
  }

  #lose(limit: number, forgiven: boolean): void {
    const from = this.#next;
    this.#next = limit;
    if (forgiven) return;
    this.#fresh = false;
    this.#sink.lost(from, limit - 1);
  }

  /** Delivers what is in order now, and asks for what is missing in front of the rest. */
  #advance(): void {
    for (;;) {
      const payload = this.#takeHeld(this.#next);
      if (payload === undefined) break;
      this.#deliver(this.#next, payload);
    }
    if (this.#askedTo !== 0 || this.#newest < this.#next) return;
    let to = this.#newest;
    for (const sequence of this.#held.keys()) if (sequence <= to) to = sequence - 1;
    this.#askedTo = to;
    this.#sink.ask(this.#next, to);
  }
}
