import type { Clock } from "../../std/index.ts";
import { BusyShare } from "./busy-share.ts";
import { LineFit } from "./line-fit.ts";
import { PrefillRate } from "./prefill-rate.ts";
import { Speed } from "./speed.ts";

/**
 * Where there are prefill workers, how a request is served best: `split` over a prefill and a decode worker, or whole on one
 * of either kind, as every worker can do all of it. From what has been measured here, in milliseconds of delay, summed over
 * everybody it concerns:
 *
 *     whole   wait for the prompts before it + its own prompt, and the same again for each answer that runs on that worker,
 *             as its tokens come later while a prompt is computed beside them + its answer, and what it slows the others,
 *             stretched by the share of its time that such a worker has spent on prompts lately
 *     split   the same of the prompt at the prefill worker, of the answer at the decode worker + the handoff
 *
 * Prompts count without what is cached there. Prefill speed is learnt for both pools from the engines' own times; the time of
 * a step as a line over the answers that share it; the handoff from the time between the first token and the second word
 * of a request that was split, less a step, as a line over the blocks that moved. Until something was measured, the other
 * pool's speed and a cautious line stand in. A handoff that is not used is not measured either: now and then one that looks
 * a little worse is taken for news.
 *
 * Pure arithmetic on a few numbers; owned by the frontend's loop. Cost: about a microsecond.
 */
export type SplitMode = "auto" | "always" | "never";
export const SPLIT_MODES: readonly SplitMode[] = ["auto", "always", "never"];

/** Over two workers, or whole on one of the decode or of the prefill pool. */
export type SplitChoice = "split" | "decode" | "prefill";

/** How a pool would take the request: its best worker. */
export interface PoolOutlook {
  /** Of the prompt, in that worker's cache. */
  readonly cachedTokens: number;
  /** Prompt tokens in front of it. */
  readonly queuedTokens: number;
  /** Answers that run there. */
  readonly activeRequests: number;
  /** Ranks of the pool. */
  readonly rankCount: number;
  /** That worker has a place and KV memory for it. @default true */
  readonly hasRoom?: boolean;
}

export interface SplitQuestion {
  readonly promptTokens: number;
  /** At most. */
  readonly outputTokens: number;
  readonly decode: PoolOutlook;
  readonly prefill: PoolOutlook;
}

export interface SplitCost {
  readonly waitMs: number;
  readonly prefillMs: number;
  /** Of answers that run beside the prompt. */
  readonly interferenceMs: number;
  readonly handoffMs: number;
  /** The answer, and what it slows others. */
  readonly decodeMs: number;
  readonly totalMs: number;
}

export interface SplitAdvice {
  readonly choice: SplitChoice;
  /** One sentence. */
  readonly reason: string;
  /** Without what the decode worker has cached. */
  readonly effectiveTokens: number;
  readonly costs: Readonly<Record<SplitChoice, SplitCost>>;
}

export interface SplitAdvisorOptions {
  readonly mode: SplitMode;
  readonly clock: Clock;
  readonly blockSizeTokens: number;
  readonly blockBytes: number;
  /** Of an engine step. @default not known */
  readonly maxBatchedTokens?: number;
}

/** A handoff nobody has measured yet, after shared memory on a busy host: export, claim, copy, import. */
const ASSUMED_SETUP_MS = 15;
const ASSUMED_BYTES_PER_MS = 1_000_000;
/** An engine nobody has measured yet: a small model on a core. */
const ASSUMED_MS_PER_TOKEN = 1;
const ASSUMED_STEP_MS = 10;
const ASSUMED_STEP_MS_PER_ANSWER = 1;
const ASSUMED_OUTPUT_TOKENS = 64;
/** A short prompt's time is mostly not its tokens'. */
const MIN_MEASURED_TOKENS = 32;
/** Of a worker that is never done with prompts an answer still gets something. */
const MAX_BUSY = 0.9;
/** Splitting is tried when its figures are this old ... */
const STALE_MS = 30_000;
/** ... and it looks at most this much worse. */
const TRIAL_RATIO = 1.25;

export class SplitAdvisor {
  readonly mode: SplitMode;
  readonly #clock: Clock;
  readonly #blockSizeTokens: number;
  readonly #blockBytes: number;
  readonly #prefill = { decode: new PrefillRate(), prefill: new PrefillRate() };
  readonly #busy = { decode: new BusyShare(), prefill: new BusyShare() };
  readonly #output = new Speed();
  readonly #step = new LineFit(ASSUMED_STEP_MS, ASSUMED_STEP_MS_PER_ANSWER);
  readonly #handoff: LineFit;
  readonly #chunkBlocks: number;
  /** Of the blocks of prompts longer than a chunk. */
  readonly #lateShare = new Speed();
  #lastSplitMs: number;

  constructor(options: SplitAdvisorOptions) {
    this.mode = options.mode;
    this.#clock = options.clock;
    this.#blockSizeTokens = options.blockSizeTokens;
    this.#blockBytes = options.blockBytes;
    this.#handoff = new LineFit(ASSUMED_SETUP_MS, options.blockBytes / ASSUMED_BYTES_PER_MS);
    const { maxBatchedTokens = 0, blockSizeTokens } = options;
    this.#chunkBlocks = maxBatchedTokens > 0 ? Math.ceil(maxBatchedTokens / blockSizeTokens) : Infinity;
    this.#lastSplitMs = -STALE_MS;
  }

  decide(question: SplitQuestion): SplitAdvice {
    const advice = this.compare(question);
    const nowMs = this.#clock.monotonicMs();
    let { choice, reason } = advice;
    if (this.mode !== "auto") {
      choice = this.mode === "always" ? "split" : "decode";
      reason = `--disagg ${this.mode}`;
    } else if (choice !== "split" && nowMs - this.#lastSplitMs > STALE_MS) {
      const { costs } = advice;
      if (costs.split.totalMs < TRIAL_RATIO * costs[choice].totalMs) {
        reason = `split for news: ${ms(costs.split.totalMs)} of delay against ${ms(costs[choice].totalMs)}, but not measured for ${STALE_MS / 1_000} s`;
        choice = "split";
      }
    }
    if (choice === "split") this.#lastSplitMs = nowMs;
    return { ...advice, choice, reason };
  }

  /** What each way would cost; nothing is decided or counted. */
  compare({ promptTokens, outputTokens, decode, prefill }: SplitQuestion): SplitAdvice {
    const output = Math.min(outputTokens, this.outputTokens);
    const effectiveTokens = Math.max(1, promptTokens - decode.cachedTokens);
    const movedBlocks = Math.floor(effectiveTokens / this.#blockSizeTokens);
    const costs = {
      decode: cost(this.#prompt("decode", promptTokens, decode), this.#answer("decode", output, decode), 0),
      prefill: cost(this.#prompt("prefill", promptTokens, prefill), this.#answer("prefill", output, prefill), 0),
      split: cost(
        this.#prompt("prefill", promptTokens, prefill),
        this.#answer("decode", output, decode),
        this.#handoff.at(this.#lateBlocks(movedBlocks)),
      ),
    };
    const choice = cheapest(costs, decode.hasRoom !== false, prefill.hasRoom !== false);
    const others = CHOICES.filter((each) => each !== choice).map((each) => `${WORDS[each]} ${ms(costs[each].totalMs)}`);
    const reason = `${WORDS[choice]}: ${ms(costs[choice].totalMs)} of delay; ${others.join(", ")}`;
    return { choice, reason, effectiveTokens, costs };
  }

  #prompt(pool: Pool, promptTokens: number, at: PoolOutlook): PromptCost {
    const msPerToken = pool === "decode" ? this.decodeMsPerToken : this.prefillMsPerToken;
    const prefillMs = Math.max(1, promptTokens - at.cachedTokens) * msPerToken;
    return {
      waitMs: at.queuedTokens * msPerToken,
      prefillMs,
      interferenceMs: prefillMs * at.activeRequests,
    };
  }

  /** Its own steps, and what each step of the others takes longer for it; prompts that come meanwhile stretch all of it. */
  #answer(pool: Pool, outputTokens: number, { activeRequests, rankCount }: PoolOutlook): number {
    const share = this.#busy[pool].at(this.#clock.monotonicMs()) / Math.max(1, rankCount);
    const stepMs = this.stepMs(activeRequests + 1) + activeRequests * this.#step.slope;
    return (outputTokens * stepMs) / (1 - Math.min(MAX_BUSY, share));
  }

  // ---- What has been seen ----

  /** An engine's first word on a prompt: that worker computed so many tokens in so long. */
  sawPrefill(pool: Pool, worker: string, computedTokens: number, milliseconds: number): void {
    if (computedTokens < MIN_MEASURED_TOKENS || !(milliseconds > 0)) return;
    const nowMs = this.#clock.monotonicMs();
    const ownMs = this.#prefill[pool].add(worker, computedTokens, milliseconds, nowMs);
    this.#busy[pool].add(ownMs, nowMs);
  }

  /**
   * From a request's first token to the decode worker's first, between which so many blocks moved; the others of `allBlocks`
   * came while the prompt was computed.
   */
  sawHandoff(movedBlocks: number, milliseconds: number, allBlocks = movedBlocks): void {
    this.#handoff.add(movedBlocks, Math.max(0, milliseconds - this.stepMs(1)));
    if (allBlocks > this.#chunkBlocks) this.#lateShare.add(movedBlocks / allBlocks);
  }

  /** Of those that travel, how many are left to after the first token. A prompt of one chunk has all of them there. */
  #lateBlocks(blocks: number): number {
    if (blocks <= this.#chunkBlocks) return blocks;
    return Math.max(this.#chunkBlocks, blocks * (this.#lateShare.value ?? 1));
  }

  /** Time per token of an answer under way, on a worker with so many. */
  sawStep(activeRequests: number, milliseconds: number): void {
    this.#step.add(activeRequests, milliseconds);
  }

  /** Tokens of an answer that ended. */
  sawOutput(tokens: number): void {
    this.#output.add(tokens);
  }

  get decodeMsPerToken(): number {
    return this.#prefill.decode.msPerToken ?? this.#prefill.prefill.msPerToken ?? ASSUMED_MS_PER_TOKEN;
  }

  get prefillMsPerToken(): number {
    return this.#prefill.prefill.msPerToken ?? this.#prefill.decode.msPerToken ?? ASSUMED_MS_PER_TOKEN;
  }

  get outputTokens(): number {
    return this.#output.value ?? ASSUMED_OUTPUT_TOKENS;
  }

  /** Of a worker with so many answers. */
  stepMs(activeRequests: number): number {
    return this.#step.at(activeRequests);
  }

  /** What the figures rest on, for the report. */
  measured(): {
    readonly decodePrefillSamples: number;
    readonly prefillPrefillSamples: number;
    readonly handoffSamples: number;
    readonly handoffSetupMs: number;
    readonly handoffMsPerBlock: number;
    readonly blockBytes: number;
  } {
    return {
      decodePrefillSamples: this.#prefill.decode.count,
      prefillPrefillSamples: this.#prefill.prefill.count,
      handoffSamples: this.#handoff.count,
      handoffSetupMs: this.#handoff.intercept,
      handoffMsPerBlock: this.#handoff.slope,
      blockBytes: this.#blockBytes,
    };
  }
}

type Pool = "prefill" | "decode";
type PromptCost = Pick<SplitCost, "waitMs" | "prefillMs" | "interferenceMs">;

function cost(prompt: PromptCost, decodeMs: number, handoffMs: number): SplitCost {
  const totalMs = prompt.waitMs + prompt.prefillMs + prompt.interferenceMs + handoffMs + decodeMs;
  return { ...prompt, handoffMs, decodeMs, totalMs };
}

const CHOICES: readonly SplitChoice[] = ["split", "decode", "prefill"];

/** Where there is room for the answer; if there is none anywhere, of all. */
function cheapest(
  costs: Readonly<Record<SplitChoice, SplitCost>>,
  hasDecodeRoom: boolean,
  hasPrefillRoom: boolean,
): SplitChoice {
  const isOpen = (choice: SplitChoice): boolean => (choice === "prefill" ? hasPrefillRoom : hasDecodeRoom);
  const open = hasDecodeRoom || hasPrefillRoom ? ORDER.filter(isOpen) : ORDER;
  let choice = open[0]!;
  for (const each of open) if (costs[each].totalMs < costs[choice].totalMs) choice = each;
  return choice;
}

/** Which one is taken of two that cost the same: the one with less to go wrong. */
const ORDER: readonly SplitChoice[] = ["decode", "prefill", "split"];
const WORDS = { split: "split", decode: "whole on a decode worker", prefill: "whole on a prefill worker" } as const;

function ms(milliseconds: number): string {
  return `${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms`;
}
