import type { RankState } from "./rank-state.ts";
import type { Sequence } from "./sequence.ts";

/**
 * One pass the way SGLang plans it: when any prompt can make progress the pass is prefill alone, else every running
 * sequence decodes. Admission leaves room for the output it expects of what runs: at most `clipMaxNewTokens` each, times a
 * ratio that falls while all goes well. When blocks run out while decoding, the running sequence with the fewest output
 * tokens (of equals the one with the longest prompt) is retracted, as long as one stays; its prefix stays cached, and the
 * ratio rises to what the output so far suggests.
 */
const RATIO_START = 0.7;
const RATIO_FLOOR_SHARE = 0.14;
const RATIO_DECAY_PASSES = 600;
/** After a retraction: decode steps that should go without another. */
const RETRACT_HEADROOM_STEPS = 20;
/** More waiting than this and matching them all costs more than the order gains. */
const LPM_MAX_WAITING = 128;

export class SglangPlanner {
  readonly #rank: RankState;
  readonly #ratioStart: number;
  readonly #ratioFloor: number;
  #ratio: number;

  constructor(rank: RankState) {
    this.#rank = rank;
    this.#ratioStart = Math.min(1, RATIO_START * rank.config.sglang.scheduleConservativeness);
    this.#ratioFloor = this.#ratioStart * RATIO_FLOOR_SHARE;
    this.#ratio = this.#ratioStart;
  }

  plan(nowMs: number): void {
    this.#planPrefill(nowMs);
    if (this.#rank.scheduled.length === 0) this.#planDecode();
  }

  #planPrefill(nowMs: number): void {
    const rank = this.#rank;
    const { waiting, running, config } = rank;
    const { maxPrefillTokens, chunkedPrefillSize, schedulePolicy } = config.sglang;
    let budget = Math.min(maxPrefillTokens, config.chunkedPrefill ? chunkedPrefillSize : maxPrefillTokens);
    const chunk = (sequence: Sequence): boolean => {
      const wanted = sequence.remainingTokens;
      const tokens = config.chunkedPrefill ? Math.min(wanted, budget) : wanted;
      if (!rank.trySchedule(sequence, tokens)) return false;
      budget -= tokens;
      return true;
    };
    // The one whose prompt was cut goes on first.
    for (const sequence of running) {
      if (budget > 0 && !sequence.isDecoding && !chunk(sequence)) return;
    }
    if (schedulePolicy === "lpm" && waiting.length > 1 && waiting.length <= LPM_MAX_WAITING) this.#sortByPrefix();
    while (waiting.length > 0 && rank.heldCount < config.maxSequences && budget > 0) {
      const sequence = waiting[0]!;
      if (!rank.tryAdmit(0, this.#reservedBlocks(sequence), nowMs)) break;
      if (running.at(-1) === sequence && !sequence.isDecoding && !chunk(sequence)) break;
    }
  }

  #planDecode(): void {
    const rank = this.#rank;
    const { running } = rank;
    let retracted = false;
    for (let at = 0; at < running.length;) {
      if (rank.trySchedule(running[at]!, running[at]!.remainingTokens)) {
        at++;
      } else if (running.length > 1) {
        const victim = fewestOutputTokens(running);
        if (victim < at) at--;
        rank.preempt(victim);
        retracted = true;
      } else {
        break;
      }
    }
    this.#ratio = retracted
      ? this.#ratioAfterRetraction()
      : Math.max(this.#ratioFloor, this.#ratio - this.#ratioStep());
  }

  #ratioStep(): number {
    return (this.#ratioStart - this.#ratioFloor) / RATIO_DECAY_PASSES;
  }

  #ratioAfterRetraction(): number {
    let generated = 0;
    let most = 0;
    for (const { generatedTokens, maxTokens } of this.#rank.running) {
      generated += generatedTokens + RETRACT_HEADROOM_STEPS;
      most += maxTokens;
    }
    return Math.min(1, most === 0 ? 1 : generated / most);
  }

  #reservedBlocks(next: Sequence): number {
    const { running, config } = this.#rank;
    const clip = config.sglang.clipMaxNewTokens;
    let tokens = Math.min(next.maxTokens - next.generatedTokens, clip);
    for (const { maxTokens, generatedTokens } of running) {
      tokens += Math.min(maxTokens - generatedTokens, clip) * this.#ratio;
    }
    return Math.ceil(tokens / config.blockSizeTokens);
  }

  /** Longest cached prefix first, among equal priorities; stable. */
  #sortByPrefix(): void {
    const rank = this.#rank;
    const prefixes = new Map<Sequence, number>();
    for (const sequence of rank.waiting) prefixes.set(sequence, rank.reusableBlocks(sequence));
    rank.waiting.sort((a, b) => b.priority - a.priority || prefixes.get(b)! - prefixes.get(a)!);
  }
}

function fewestOutputTokens(running: readonly Sequence[]): number {
  let fewest = 0;
  for (let i = 1; i < running.length; i++) {
    const a = running[i]!;
    const b = running[fewest]!;
    if (
      a.generatedTokens < b.generatedTokens ||
      (a.generatedTokens === b.generatedTokens && a.promptTokens > b.promptTokens)
    ) {
      fewest = i;
    }
  }
  return fewest;
}
