import type { RestoredBlocks } from "../protocol/index.ts";
import type { Clock } from "../std/index.ts";
import type { DecisionRecord } from "./explain/decision-log.ts";
import type { DecisionExplanation } from "./explain/render.ts";
import type { RouterMetrics } from "./router-metrics.ts";
import type { BookingEvent, RequestEnd, RoutingDecision } from "./route-request.ts";
import type { Booking } from "./scheduling/active-sequences.ts";
import type { Rank } from "./worker-set.ts";

/** What a decision needs of the router that made it. */
export interface DecisionOwner {
  readonly clock: Clock;
  readonly metrics: RouterMetrics;
  readonly trackOutputBlocks: boolean;
  prefillDone(decision: BookedDecision): void;
  addOutput(booking: Booking, tokens: number): void;
  free(decision: BookedDecision): void;
  explainRecord(record: DecisionRecord): DecisionExplanation;
}

/** One request on one worker, from the decision to its release; the router's side of it. */
export class BookedDecision implements RoutingDecision {
  readonly requestId: string;
  readonly rank: Rank;
  readonly policy: string;
  readonly candidateCount: number;
  readonly booking: Booking;
  readonly record: DecisionRecord;
  /** What replicas are told. */
  readonly announcement: BookingEvent;
  readonly sessionId: string | undefined;
  readonly #owner: DecisionOwner;
  readonly #startMs: number;
  #firstTokenMs = -1;
  #lastTokenMs = -1;
  #held = true;

  constructor(
    owner: DecisionOwner,
    details: {
      readonly requestId: string;
      readonly rank: Rank;
      readonly candidateCount: number;
      readonly booking: Booking;
      readonly record: DecisionRecord;
      readonly announcement: BookingEvent;
      readonly sessionId: string | undefined;
      readonly startMs: number;
    },
  ) {
    this.#owner = owner;
    this.requestId = details.requestId;
    this.rank = details.rank;
    this.policy = details.record.policy;
    this.candidateCount = details.candidateCount;
    this.booking = details.booking;
    this.record = details.record;
    this.announcement = details.announcement;
    this.sessionId = details.sessionId;
    this.#startMs = details.startMs;
  }

  get instanceId(): string {
    return this.rank.instanceId;
  }

  get address(): string {
    return this.rank.address;
  }

  get dpRank(): number {
    return this.rank.dpRank;
  }

  get reason(): string {
    return this.record.reason;
  }

  get overlapBlocks(): number {
    return this.record.overlapBlocks;
  }

  get queuedMs(): number {
    return this.record.queuedMs;
  }

  firstToken(cachedTokens: number): void {
    if (!this.#held) return;
    if (this.#firstTokenMs >= 0) {
      this.record.cachedTokens = cachedTokens;
      return;
    }
    const nowMs = this.#owner.clock.monotonicMs();
    this.#firstTokenMs = nowMs;
    this.#lastTokenMs = nowMs;
    this.record.cachedTokens = cachedTokens;
    this.record.firstTokenMs = nowMs - this.#startMs;
    this.#owner.metrics.timeToFirstToken.observe((nowMs - this.#startMs) / 1_000);
    this.#owner.prefillDone(this);
  }

  restored(blocks: RestoredBlocks): void {
    if (this.#held) this.record.restored = blocks;
  }

  addTokens(count: number): void {
    if (!this.#held || count === 0) return;
    const isFirst = this.record.outputTokens === 0;
    this.record.outputTokens += count;
    if (this.#owner.trackOutputBlocks) this.#owner.addOutput(this.booking, count);
    const nowMs = this.#owner.clock.monotonicMs();
    if (!isFirst) this.#owner.metrics.interTokenLatency.observe((nowMs - this.#lastTokenMs) / 1_000 / count, count);
    this.#lastTokenMs = nowMs;
  }

  explain(): DecisionExplanation {
    return this.#owner.explainRecord(this.record);
  }

  release(end?: RequestEnd): void {
    if (!this.#held) return;
    this.#held = false;
    this.record.durationMs = this.#owner.clock.monotonicMs() - this.#startMs;
    this.record.outcome = end?.outcome ?? "finished";
    this.#owner.metrics.outputTokens.observe(this.record.outputTokens);
    this.#owner.free(this);
  }
}
