import type { OfferedHandoff, PullResult } from "../protocol/index.ts";
import type { RoutingDecision, SplitAdvice, SplitChoice, SplitMode } from "../router/index.ts";
import type { ClientStream } from "../runtime/request-plane/index.ts";
import type { TimerHandle } from "../std/index.ts";
import type { Attempt } from "./attempt.ts";

/**
 * Where a choice stands that may be split over two workers, and what is told of it:
 *
 *     reserve: a decode worker has a place and KV memory, and keeps them; nobody has for too long: decode
 *        │
 *     prefill ──first token──► handoff ──the prefill worker's descriptor──► decode
 *        └──────────┴── whatever fails: decode, where the prompt is computed (again)
 *     whole: all of it on a prefill worker; if that fails, decode
 *
 * While `decode` has not said how it fared, the prefill worker's stream is held open: it is the claim to the blocks there,
 * and ends with the choice.
 */
export type SplitPhase = "reserve" | "prefill" | "handoff" | "decode" | "whole";

export interface SplitView {
  readonly mode: SplitMode;
  /** Over two workers, or whole on one of that pool. */
  readonly choice: SplitChoice;
  readonly reason: string;
  readonly effective_tokens: number;
  /** For a decode worker with a place and KV memory, before the prompt was computed. */
  readonly waited_ms: number;
  readonly costs: SplitAdvice["costs"];
  readonly prefill_worker: string | null;
  /** null until the prefill worker offered its blocks. */
  readonly handoff: {
    readonly blocks: number;
    readonly bytes: number;
    /** null until the decode worker told. */
    readonly pull: {
      readonly outcome: string;
      readonly backend: string;
      readonly held_blocks: number;
      readonly pulled_blocks: number;
      /** Of those, while the prompt was still being computed. */
      readonly early_blocks: number;
      readonly bytes: number;
      readonly ms: number;
    } | null;
    readonly first_to_second_token_ms: number | null;
  } | null;
  /** Why the prompt was computed by the decode worker in the end; null when it was not. */
  readonly fallback: string | null;
}

const FIRST_PHASES = { split: "reserve", decode: "decode", prefill: "whole" } as const;

export class SplitStage {
  readonly mode: SplitMode;
  readonly advice: SplitAdvice;
  phase: SplitPhase;
  prefillWorker = "";
  offered: Pick<OfferedHandoff, "blockCount" | "blockBytes"> | undefined = undefined;
  /** For the next attempt; gone once one has told how it fared. */
  handoff: string | undefined = undefined;
  pull: PullResult | undefined = undefined;
  fallback: string | undefined = undefined;
  firstTokenMs = -1;
  gapMs = -1;
  waitedMs = 0;
  #hold: Attempt | undefined = undefined;
  /** Where the answer is to go on: booked from before the prompt is computed. */
  #reserved: RoutingDecision | undefined = undefined;
  /** The decode worker fetches what is there of the prompt's blocks. */
  #early: ClientStream | undefined = undefined;
  #timer: TimerHandle | undefined = undefined;

  constructor(mode: SplitMode, advice: SplitAdvice) {
    this.mode = mode;
    this.advice = advice;
    this.phase = FIRST_PHASES[advice.choice];
  }

  get isWithPrefillWorker(): boolean {
    return this.phase !== "decode" && this.phase !== "reserve";
  }

  /** Only the first token is asked for. */
  get isPrefillOnly(): boolean {
    return this.phase === "prefill";
  }

  reserve(decision: RoutingDecision): void {
    this.#reserved = decision;
    this.phase = "prefill";
  }

  /** `open` asks the decode worker that was kept to fetch blocks while the prompt is still being computed. */
  begin(open: (decision: RoutingDecision) => ClientStream): void {
    if (this.#reserved !== undefined) this.#early ??= open(this.#reserved);
  }

  /** The reservation is the caller's now; undefined when there is none. */
  takeReserved(): RoutingDecision | undefined {
    const reserved = this.#reserved;
    this.#reserved = undefined;
    return reserved;
  }

  /** The blocks' stream stays open, deaf, until `settled` or `close`. */
  offer({ blockCount, blockBytes, bytes }: OfferedHandoff, attempt: Attempt): void {
    this.#timer?.cancel();
    this.offered = { blockCount, blockBytes };
    this.handoff = bytes.toString("base64");
    this.phase = "decode";
    attempt.mute();
    this.#hold = attempt;
  }

  /** For the time between first token and descriptor. */
  guard(timer: TimerHandle): void {
    this.#timer = timer;
  }

  fallBack(reason: string): void {
    this.fallback = reason;
    this.phase = "decode";
    this.close();
  }

  /** The decode worker told how it fared: the handoff is used up. */
  settled(pull: PullResult): void {
    this.pull = pull;
    this.handoff = undefined;
    this.#hangUpEarly();
    if (pull.outcome !== "pulled") {
      this.fallback = pull.outcome;
      this.close();
    }
    // Else the reader has told the prefill worker, which ends the stream itself.
    this.#hold = undefined;
  }

  /** Whatever is held at the prefill worker is let go. */
  close(): void {
    this.#timer?.cancel();
    this.#timer = undefined;
    this.handoff = undefined;
    this.#hold?.hangUp();
    this.#hold = undefined;
    this.#hangUpEarly();
    this.takeReserved()?.release({ outcome: "not-used" });
  }

  #hangUpEarly(): void {
    this.#early?.cancel();
    this.#early = undefined;
  }

  view(): SplitView {
    const { advice, offered, pull } = this;
    return {
      mode: this.mode,
      choice: advice.choice,
      reason: advice.reason,
      effective_tokens: advice.effectiveTokens,
      waited_ms: Math.round(this.waitedMs * 100) / 100,
      costs: advice.costs,
      prefill_worker: this.prefillWorker === "" ? null : this.prefillWorker,
      handoff:
        offered === undefined
          ? null
          : {
              blocks: offered.blockCount,
              bytes: offered.blockCount * offered.blockBytes,
              pull:
                pull === undefined
                  ? null
                  : {
                      outcome: pull.outcome,
                      backend: pull.backend,
                      held_blocks: pull.heldBlocks,
                      pulled_blocks: pull.pulledBlocks,
                      early_blocks: pull.earlyBlocks,
                      bytes: pull.byteCount,
                      ms: Math.round(pull.milliseconds * 100) / 100,
                    },
              first_to_second_token_ms: this.gapMs < 0 ? null : Math.round(this.gapMs * 100) / 100,
            },
      fallback: this.fallback ?? null,
    };
  }
}
