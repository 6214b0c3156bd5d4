import type { SamplingOptions, TokenLogprob } from "../../protocol/index.ts";
import { SeededRandom } from "../../std/index.ts";
import type { SamplerOptions } from "./sampler.ts";

/**
 * The sampler in the plainest way: a full softmax in float64 and a full sort for every token. The model that tests hold
 * `Sampler` to, and the baseline of its benchmark. Same steps, same order, same random numbers.
 */
export interface NaiveChoice {
  readonly tokenId: number;
  /** What may come, by id, with probabilities that sum to 1. */
  readonly candidates: readonly { readonly id: number; readonly probability: number }[];
  /** The random number that chose; undefined for greedy. */
  readonly uniform: number | undefined;
}

export class NaiveSampler {
  readonly #sampling: SamplingOptions;
  readonly #promptTokenIds: readonly number[];
  readonly #random: SeededRandom;
  readonly #generated: number[] = [];

  constructor(sampling: SamplingOptions, options: SamplerOptions) {
    this.#sampling = sampling;
    this.#promptTokenIds = [...options.promptTokenIds];
    this.#random = new SeededRandom(options.seed);
    for (const id of options.resumedTokenIds ?? []) {
      this.accept(id);
      if (sampling.temperature !== 0) this.#random.nextFloat();
    }
  }

  accept(tokenId: number): void {
    this.#generated.push(tokenId);
  }

  sample(logits: Float32Array, suppress: readonly number[] = []): NaiveChoice {
    const { temperature, topK, topP, minP } = this.#sampling;
    const adjusted = this.#adjust(logits, suppress);
    const ranked = adjusted
      .map((logit, id) => ({ id, logit }))
      .filter(({ logit }) => logit > -Infinity)
      .sort((a, b) => b.logit - a.logit || a.id - b.id);
    const uniform = temperature === 0 ? undefined : this.#random.nextFloat();
    const best = ranked[0];
    if (best === undefined) return { tokenId: 0, candidates: [], uniform };
    if (uniform === undefined) return { tokenId: best.id, candidates: [{ id: best.id, probability: 1 }], uniform };

    let kept = ranked.map(({ id, logit }) => ({ id, weight: Math.exp((logit - best.logit) / temperature) }));
    if (topK > 0) kept = kept.slice(0, topK);
    if (topP < 1) {
      const target = topP * sumOf(kept);
      let reached = 0;
      kept = kept.filter(({ weight }) => {
        const isWanted = reached < target;
        reached += weight;
        return isWanted;
      });
    }
    kept = kept.filter(({ weight }) => weight >= minP).sort((a, b) => a.id - b.id);
    const total = sumOf(kept);
    const candidates = kept.map(({ id, weight }) => ({ id, probability: weight / total }));
    let left = uniform;
    const chosen = candidates.find(({ probability }) => (left -= probability) < 0) ?? candidates.at(-1)!;
    return { tokenId: chosen.id, candidates, uniform };
  }

  #adjust(logits: Float32Array, suppress: readonly number[]): number[] {
    const { logitBias = [], repetitionPenalty, frequencyPenalty, presencePenalty } = this.#sampling;
    const row = [...logits].map((logit) => (Number.isNaN(logit) ? -Infinity : logit));
    for (const id of suppress) if (id < row.length) row[id] = -Infinity;
    for (const [id, bias] of logitBias) if (id < row.length) row[id] = Math.fround(row[id]! + bias);
    const seen = new Set([...this.#promptTokenIds, ...this.#generated]);
    for (const id of seen) {
      if (id >= row.length) continue;
      const count = this.#generated.filter((generated) => generated === id).length;
      let logit = row[id]! > 0 ? row[id]! / repetitionPenalty : row[id]! * repetitionPenalty;
      if (count > 0) logit -= frequencyPenalty * count + presencePenalty;
      row[id] = Math.fround(logit);
    }
    return row;
  }
}

export function naiveLogprob(logits: Float32Array, tokenId: number, top: number): TokenLogprob {
  const row = [...logits].map((logit) => (Number.isNaN(logit) ? -Infinity : logit));
  const max = row.reduce((a, b) => Math.max(a, b), -Infinity);
  const logSum = max + Math.log(row.reduce((sum, logit) => sum + Math.exp(logit - max), 0));
  const ranked = row
    .map((logit, id) => ({ id, logit }))
    .filter(({ logit }) => logit > -Infinity)
    .sort((a, b) => b.logit - a.logit || a.id - b.id)
    .slice(0, top);
  return {
    logprob: Math.max(-9999, row[tokenId]! - logSum),
    topIds: ranked.map(({ id }) => id),
    topLogprobs: ranked.map(({ logit }) => Math.max(-9999, logit - logSum)),
  };
}

function sumOf(items: readonly { readonly weight: number }[]): number {
  return items.reduce((sum, { weight }) => sum + weight, 0);
}
