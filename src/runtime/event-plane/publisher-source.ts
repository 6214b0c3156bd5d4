import type { Logger } from "../../observability/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import type { EventHandler } from "./base.ts";
import { HELD_BYTES, HELD_EVENTS, REPLAY_DEADLINE_MS } from "./limits.ts";
import { SequenceTracker, type SequenceSink } from "./sequence-tracker.ts";
import type { EventPlaneStatistics } from "./statistics.ts";

/** What the sources of one plane share. */
export interface SourceContext {
  readonly clock: Clock;
  readonly logger: Logger;
  readonly statistics: EventPlaneStatistics;
}

/** How a source reaches its publisher; the back end's part. */
export interface SourceLink {
  /** Sends a replay request; the answer comes back through `source.replayed` with the same number. */
  ask(source: PublisherSource, askNumber: number, from: number, to: number): void;
  /** Asks the publisher for a beacon on the live path. */
  doubt(source: PublisherSource): void;
}

/**
 * One publisher as one subscription sees it: the sequence tracker with the handler on one side and the replay deadline on
 * the other. Both back ends build on it, so that they differ only in how bytes travel. Handlers never throw into a back
 * end: an exception is counted and logged once per source.
 */
export class PublisherSource implements SequenceSink {
  readonly topic: string;
  readonly publisherId: string;
  readonly #handler: EventHandler;
  readonly #context: SourceContext;
  readonly #link: SourceLink;
  readonly #tracker: SequenceTracker;
  #deadline: TimerHandle | undefined;
  #askNumber = 0;
  #isClosed = false;
  /** A beacon was asked for and has not come yet. */
  #isInDoubt = false;
  #hasLoggedHandler = false;
  #hasLoggedReplay = false;

  constructor(options: {
    readonly topic: string;
    readonly publisherId: string;
    readonly start: "earliest" | "latest";
    readonly handler: EventHandler;
    readonly context: SourceContext;
    readonly link: SourceLink;
  }) {
    this.topic = options.topic;
    this.publisherId = options.publisherId;
    this.#handler = options.handler;
    this.#context = options.context;
    this.#link = options.link;
    this.#tracker = new SequenceTracker(this, {
      start: options.start,
      heldEvents: HELD_EVENTS,
      heldBytes: HELD_BYTES,
    });
  }

  live(sequence: number, payload: Uint8Array): void {
    if (!this.#isClosed) this.#tracker.live(sequence, payload);
  }

  beacon(epoch: string, newest: number): void {
    if (this.#isClosed) return;
    this.#isInDoubt = false;
    this.#tracker.beacon(epoch, newest);
  }

  /** Answers to an ask that is no longer waited for are dropped. */
  replayed(askNumber: number, epoch: string, first: number, newest: number, payloads: readonly Uint8Array[]): void {
    if (!this.#endAsk(askNumber)) return;
    this.#tracker.replayed(epoch, first, newest, payloads);
  }

  replayFailed(askNumber: number): void {
    if (!this.#endAsk(askNumber)) return;
    this.#context.statistics.replaysFailed++;
    if (!this.#hasLoggedReplay) {
      this.#hasLoggedReplay = true;
      this.#context.logger.warn(
        { topic: this.topic, publisher_id: this.publisherId },
        "event plane: a replay was not answered, its events are lost; further ones of this publisher are only counted",
      );
    }
    this.#tracker.replayFailed();
  }

  /** The publisher left: the rest is delivered or lost, then the handler is told. */
  gone(): void {
    if (this.#isClosed) return;
    this.#tracker.finish();
    const wasClosedByHandler = this.#isClosed;
    this.close();
    if (!wasClosedByHandler) this.#tellGone();
  }

  /** No handler call after this one. Idempotent. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#deadline?.cancel();
    this.#deadline = undefined;
    this.#context.statistics.duplicates += this.#tracker.duplicateCount;
    this.#context.statistics.overflows += this.#tracker.overflowCount;
  }

  // SequenceSink, called by the tracker.

  deliver(sequence: number, payload: Uint8Array): void {
    if (this.#isClosed) return;
    this.#context.statistics.delivered++;
    try {
      this.#handler.onEvent(this.publisherId, sequence, payload);
    } catch (thrown) {
      this.#handlerFailed(thrown);
    }
  }

  lost(from: number, to: number): void {
    if (this.#isClosed) return;
    this.#context.statistics.gaps++;
    this.#context.statistics.lost += to - from + 1;
    try {
      this.#handler.onGap(this.publisherId, from, to);
    } catch (thrown) {
      this.#handlerFailed(thrown);
    }
  }

  ask(from: number, to: number): void {
    if (this.#isClosed) return;
    const askNumber = ++this.#askNumber;
    this.#context.statistics.replaysAsked++;
    this.#deadline = this.#context.clock.setTimer(REPLAY_DEADLINE_MS, () => this.replayFailed(askNumber));
    this.#link.ask(this, askNumber, from, to);
  }

  doubt(): void {
    if (this.#isClosed || this.#isInDoubt) return;
    this.#isInDoubt = true;
    this.#link.doubt(this);
  }

  restarted(): void {
    this.#endAsk(this.#askNumber);
    if (!this.#isClosed) this.#tellGone();
  }

  /** False when this ask is not the one waited for. */
  #endAsk(askNumber: number): boolean {
    if (this.#isClosed || this.#deadline === undefined || askNumber !== this.#askNumber) return false;
    this.#deadline.cancel();
    this.#deadline = undefined;
    return true;
  }

  #tellGone(): void {
    try {
      this.#handler.onPublisherGone?.(this.publisherId);
    } catch (thrown) {
      this.#handlerFailed(thrown);
    }
  }

  #handlerFailed(thrown: unknown): void {
    this.#context.statistics.handlerErrors++;
    if (this.#hasLoggedHandler) return;
    this.#hasLoggedHandler = true;
    this.#context.logger.error(
      { err: thrown, topic: this.topic, publisher_id: this.publisherId },
      "event plane: a handler threw; further exceptions of this publisher's events are only counted",
    );
  }
}
