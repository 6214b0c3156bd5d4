import type { Sequence } from "../engines/mocker/index.ts";
import type { RoutingDecision, RoutingPolicy } from "../router/index.ts";
import { LogHistogram } from "./log-histogram.ts";
import {
  distributionOf,
  type Balance,
  type Distribution,
  type ReplayReport,
  type WorkerShare,
} from "./replay-report.ts";
import type { ReplayRank } from "./replay-worker.ts";

/** Gathers a replay's figures: exact per request, in a histogram per token. */
export class ReplayCollector {
  readonly #blockSizeTokens: number;
  readonly #ttftMs: number[] = [];
  readonly #e2eMs: number[] = [];
  readonly #engineQueueMs: number[] = [];
  readonly #routerQueueMs: number[] = [];
  readonly #itlMs = new LogHistogram();
  readonly #refused: Record<string, number> = {};
  #requests = 0;
  #promptTokens = 0;
  #cachedTokens = 0;
  #outputTokens = 0;
  #agreements = 0;
  eventsNotApplied = 0;

  constructor(blockSizeTokens: number) {
    this.#blockSizeTokens = blockSizeTokens;
  }

  arrived(): void {
    this.#requests++;
  }

  refused(reason: string): void {
    this.#refused[reason] = (this.#refused[reason] ?? 0) + 1;
  }

  firstToken(sequence: Sequence, decision: RoutingDecision, arrivalMs: number, nowMs: number): void {
    this.#ttftMs.push(nowMs - arrivalMs);
    this.#engineQueueMs.push(sequence.startedMs - sequence.arrivedMs);
    this.#routerQueueMs.push(sequence.arrivedMs - arrivalMs);
    this.#promptTokens += sequence.promptTokens;
    this.#cachedTokens += sequence.cachedTokens;
    // The router counts all blocks of the prompt; an engine computes the last token whatever it has.
    const reusable = Math.floor((sequence.promptTokens - 1) / this.#blockSizeTokens);
    const expected = Math.min(decision.overlapBlocks, reusable) * this.#blockSizeTokens;
    if (expected === sequence.cachedTokens) this.#agreements++;
  }

  nextToken(gapMs: number): void {
    this.#itlMs.observe(gapMs);
  }

  ended(sequence: Sequence, arrivalMs: number, nowMs: number): void {
    this.#e2eMs.push(nowMs - arrivalMs);
    this.#outputTokens += sequence.generatedTokens;
  }

  report(
    policy: RoutingPolicy,

    simulatedMs: number,
    workers: readonly { readonly instanceId: string; readonly ranks: readonly ReplayRank[] }[],
  ): ReplayReport {
    const perWorker = workers.map(({ instanceId, ranks }) => shareOf(instanceId, ranks, simulatedMs));
    const perSecond = (count: number): number => (simulatedMs === 0 ? 0 : (count * 1_000) / simulatedMs);
    const started = this.#ttftMs.length;
    return {
      policy: policy.name,
      workers: workers.length,
      requests: this.#requests,
      finished: this.#e2eMs.length,
      refused: this.#refused,
      simulatedMs,
      promptTokens: this.#promptTokens,
      outputTokens: this.#outputTokens,
      cachedTokens: this.#cachedTokens,
      hitRate: this.#promptTokens === 0 ? 0 : this.#cachedTokens / this.#promptTokens,
      overlapAgreement: policy.usesOverlap === true && started > 0 ? this.#agreements / started : undefined,
      eventsNotApplied: this.eventsNotApplied,
      ttftMs: distributionOf(this.#ttftMs),
      itlMs: ofHistogram(this.#itlMs),
      e2eMs: distributionOf(this.#e2eMs),
      engineQueueMs: distributionOf(this.#engineQueueMs),
      routerQueueMs: distributionOf(this.#routerQueueMs),
      requestsPerSecond: perSecond(this.#e2eMs.length),
      outputTokensPerSecond: perSecond(this.#outputTokens),
      preemptions: perWorker.reduce((sum, { preemptions }) => sum + preemptions, 0),
      balance: balanceOf(perWorker),
      perWorker,
    };
  }
}

function shareOf(instanceId: string, ranks: readonly ReplayRank[], simulatedMs: number): WorkerShare {
  let requests = 0;
  let computedTokens = 0;
  let busyMs = 0;
  let preemptions = 0;
  for (const rank of ranks) {
    requests += rank.requests;
    computedTokens += rank.computedTokens;
    busyMs += rank.busyMs;
    preemptions += rank.load().preemptions;
  }
  return {
    instanceId,
    requests,
    computedTokens,
    busy: simulatedMs === 0 ? 0 : busyMs / simulatedMs / ranks.length,
    preemptions,
  };
}

function balanceOf(shares: readonly WorkerShare[]): Balance {
  const maxOverMean = (values: readonly number[]): number => {
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    return mean === 0 ? 1 : Math.max(...values) / mean;
  };
  return {
    requests: maxOverMean(shares.map(({ requests }) => requests)),
    computedTokens: maxOverMean(shares.map(({ computedTokens }) => computedTokens)),
    busyMs: maxOverMean(shares.map(({ busy }) => busy)),
  };
}

function ofHistogram(histogram: LogHistogram): Distribution {
  const { mean, max } = histogram;
  return { mean, p50: histogram.quantile(0.5), p90: histogram.quantile(0.9), p99: histogram.quantile(0.99), max };
}
