import type { KvAnswer, KvEvent } from "../../protocol/index.ts";

/**
 * Keeps one rank's part of the index true although its events come over a plane that loses, repeats and reorders them.
 * Pure: no clock, no socket; the feed hands in what arrives and carries out `ask`. One object per rank, owned by the feed.
 *
 *   cursor   initial               nothing is known: the first thing to do is a full restore
 *            live(id)              everything up to event `id` is applied
 *            fresh-after-barrier   the same, and the rank was empty at `id`: a cleared event made the past irrelevant
 *
 *   event    id <= cursor          dropped as a duplicate
 *            id == cursor + 1      applied
 *            beyond                kept aside; ask for what is missing, from cursor + 1 on
 *            cleared, beyond       a barrier: applied at once, a restore under way is void (it tells of before)
 *            of another epoch      kept aside; full restore: only the worker can say which life is the present one
 *
 * A restore gives events (applied in order) or a dump (the rank is emptied, then filled page by page). After it the kept
 * events follow; a hole among them asks again. At most `maxKept` events are kept, the oldest go first; that some are gone
 * is seen by their numbers. Guarantee, tested against the worker's truth: while recovering the rank may miss blocks or
 * still have removed ones; when `recovering` is false and nothing is on the way, it has exactly the worker's.
 */
export interface RankRecoverySink {
  /** The next event in order. */
  apply(event: KvEvent): void;
  /** The rank has no blocks now. */
  clear(): void;
  /**
   * Ask the worker for the events from `start` on, or for everything when undefined; answer with `onAnswer` or `onFailure`
   * and the same number, never within this call. `fruitless`: asks since the cursor last moved; wait longer the more.
   */
  ask(askNumber: number, start: number | undefined, fruitless: number): void;
}

interface Kept {
  readonly epoch: number;
  readonly id: number;
  readonly event: KvEvent;
}

export const MAX_KEPT_EVENTS = 1_024;
/** Former epochs remembered: a worker that restarts more often than events are late does not exist. */
const MAX_RETIRED = 16;

export type CursorKind = "initial" | "live" | "fresh-after-barrier";

export class RankRecovery {
  readonly #sink: RankRecoverySink;
  readonly #maxKept: number;
  /** 0 until a restore told it. */
  #epoch = 0;
  #cursor: CursorKind = "initial";
  /** The last event applied; 0 with an initial cursor. */
  #id = 0;
  /** Number of the ask under way, 0 when there is none. */
  #asked = 0;
  #askCount = 0;
  /** Epochs that were seen before the ask under way was sent. */
  #epochsAtAsk = new Set<number>();
  #fruitless = 0;
  /** Somebody said that more may be missing, while a restore was under way. */
  #askAgain = false;
  #kept: Kept[] = [];
  /** Highest number seen of the present epoch. */
  #newestSeen = 0;
  readonly #retired = new Set<number>();
  // For metrics and explanations.
  appliedCount = 0;
  duplicateCount = 0;
  /** Events of a former life of the worker. */
  staleCount = 0;
  /** Kept events that had to go. */
  overflowCount = 0;
  /** Events that came by a restore of events, not live; those that a dump stood in for are not counted. */
  missedCount = 0;
  fullRestoreCount = 0;
  discardedAnswerCount = 0;

  constructor(sink: RankRecoverySink, options: { readonly maxKept?: number } = {}) {
    this.#sink = sink;
    this.#maxKept = options.maxKept ?? MAX_KEPT_EVENTS;
  }

  /** True from the first sign of a hole until it is filled: the rank's part of the index may be wrong. */
  get recovering(): boolean {
    return this.#asked !== 0 || this.#cursor === "initial";
  }

  get cursor(): { readonly kind: CursorKind; readonly id: number; readonly epoch: number } {
    return { kind: this.#cursor, id: this.#id, epoch: this.#epoch };
  }

  /** How far the cursor is behind the newest event heard of; without a cursor, what is kept. */
  get eventsBehind(): number {
    return this.#cursor === "initial" ? this.#kept.length : Math.max(0, this.#newestSeen - this.#id);
  }

  get keptCount(): number {
    return this.#kept.length;
  }

  /** The worker joined: get everything. */
  start(): void {
    if (this.#asked === 0) this.#ask();
  }

  /** The plane lost something of this worker, or somebody has a doubt: ask what follows the cursor. */
  suspect(): void {
    if (this.#asked === 0) this.#ask();
    else this.#askAgain = true;
  }

  onEvent(epoch: number, id: number, event: KvEvent): void {
    if (this.#retired.has(epoch)) {
      this.staleCount++;
      return;
    }
    if (epoch !== this.#epoch) {
      this.#keep(epoch, id, event);
      if (this.#asked === 0) this.#ask();
      return;
    }
    if (id > this.#newestSeen) this.#newestSeen = id;
    if (this.#cursor === "initial") this.#keep(epoch, id, event);
    else if (id <= this.#id) this.duplicateCount++;
    else if (event.type === "cleared") this.#barrier(id);
    else if (this.#asked !== 0) this.#keep(epoch, id, event);
    else if (id === this.#id + 1) this.#applyNext(id, event);
    else {
      this.#keep(epoch, id, event);
      this.#ask();
    }
  }

  /** Pages of a dump come in order, each with the ask's number; further answers to the same ask follow only after them. */
  onAnswer(askNumber: number, answer: KvAnswer): void {
    if (askNumber !== this.#asked) {
      this.discardedAnswerCount++;
      return;
    }
    if (answer.type === "tree-dump") this.#onDumpPage(answer);
    else if (answer.type !== "events" && answer.type !== "too-new") this.#restart();
    else if (answer.epoch !== this.#epoch || this.#cursor === "initial") this.#restart();
    else if (answer.type === "too-new") this.#finish();
    else this.#onEvents(answer);
  }

  /** No answer, or one that cannot be used. */
  onFailure(askNumber: number): void {
    if (askNumber === this.#asked) this.#ask();
  }

  #onDumpPage(answer: KvAnswer & { readonly type: "tree-dump" }): void {
    if (answer.page === 0) {
      this.fullRestoreCount++;
      this.#sink.clear();
      this.#cursor = "initial";
      this.#id = 0;
      if (answer.epoch !== this.#epoch) this.#enter(answer.epoch);
    }
    for (const event of answer.events) this.#sink.apply(event);
    if (answer.page < answer.pageCount - 1) return;
    this.#cursor = "live";
    this.#id = answer.atEventId;
    // A dump that others fetched too may be a little older.
    if (answer.lastEventId > this.#newestSeen) this.#newestSeen = answer.lastEventId;
    this.#fruitless = 0;
    this.#finish();
  }

  #onEvents(answer: KvAnswer & { readonly type: "events" }): void {
    // Without progress, or with a hole, the answer is of no use.
    const lastId = answer.firstEventId + answer.events.length - 1;
    if (answer.firstEventId > this.#id + 1 || lastId <= this.#id) {
      this.#restart();
      return;
    }
    for (let i = this.#id + 1 - answer.firstEventId; i < answer.events.length; i++) {
      this.missedCount++;
      this.#applyNext(answer.firstEventId + i, answer.events[i]!);
    }
    if (answer.lastEventId > this.#id) this.#ask();
    else this.#finish();
  }

  /** The worker is in another life than we thought: what was seen before the ask is of a former one. */
  #enter(epoch: number): void {
    if (this.#epoch !== 0) this.#retire(this.#epoch);
    for (const seen of this.#epochsAtAsk) if (seen !== epoch) this.#retire(seen);
    this.#retired.delete(epoch);
    this.#epoch = epoch;
    this.#newestSeen = 0;
  }

  #retire(epoch: number): void {
    this.#retired.add(epoch);
    if (this.#retired.size <= MAX_RETIRED) return;
    const [oldest] = this.#retired;
    this.#retired.delete(oldest!);
  }

  /** The restore is done: what was kept meanwhile follows. */
  #finish(): void {
    this.#asked = 0;
    for (const seen of this.#epochsAtAsk) if (seen !== this.#epoch) this.#retire(seen);
    this.#drain();
    if (this.#asked === 0 && this.#askAgain) this.#ask();
  }

  #drain(): void {
    const kept = this.#kept;
    this.#kept = [];
    const ours: Kept[] = [];
    for (const entry of kept) {
      if (entry.epoch === this.#epoch) ours.push(entry);
      else if (this.#retired.has(entry.epoch)) this.staleCount++;
      else this.#kept.push(entry);
    }
    ours.sort((a, b) => a.id - b.id);
    const cleared = ours.findLast((entry) => entry.event.type === "cleared" && entry.id > this.#id);
    if (cleared !== undefined) this.#moveToBarrier(cleared.id);
    for (const entry of ours) {
      if (entry.id > this.#newestSeen) this.#newestSeen = entry.id;
      if (entry.id === cleared?.id) continue;
      if (entry.id <= this.#id) this.duplicateCount++;
      else if (entry.id === this.#id + 1) this.#applyNext(entry.id, entry.event);
      else this.#kept.push(entry);
    }
    // A hole, a life we do not know, or events that were dropped from the full buffer.
    if (this.#kept.length > 0 || this.#newestSeen > this.#id) this.#ask();
  }

  /** A cleared event ahead of the cursor: nothing before it matters, so nothing before it needs to be restored. */
  #barrier(id: number): void {
    this.#moveToBarrier(id);
    this.#asked = 0;
    this.#drain();
    if (this.#asked === 0 && this.#askAgain) this.#ask();
  }

  #moveToBarrier(id: number): void {
    this.#sink.clear();
    this.#cursor = "fresh-after-barrier";
    this.#id = id;
    this.#fruitless = 0;
    this.appliedCount++;
  }

  #applyNext(id: number, event: KvEvent): void {
    this.#fruitless = 0;
    this.#id = id;
    this.appliedCount++;
    if (event.type === "cleared") {
      this.#cursor = "fresh-after-barrier";
      this.#sink.clear();
      return;
    }
    this.#cursor = "live";
    this.#sink.apply(event);
  }

  #keep(epoch: number, id: number, event: KvEvent): void {
    if (this.#kept.length >= this.#maxKept) {
      this.#kept.shift();
      this.overflowCount++;
    }
    this.#kept.push({ epoch, id, event });
  }

  /** What we have is of no use as a base: get everything. */
  #restart(): void {
    this.#cursor = "initial";
    this.#id = 0;
    this.#ask();
  }

  #ask(): void {
    this.#asked = ++this.#askCount;
    this.#askAgain = false;
    this.#epochsAtAsk = new Set(this.#kept.map((entry) => entry.epoch));
    // With events of a life we do not know only a dump tells which one is the present one.
    const foreign = this.#kept.some((entry) => entry.epoch !== this.#epoch);
    const start = this.#cursor === "initial" || foreign ? undefined : this.#id + 1;
    this.#sink.ask(this.#asked, start, this.#fruitless++);
  }
}
