import type { TokenLogprob } from "../../protocol/index.ts";
import { BLOCK_TOKENS, CUTOFF, GROUP_TOKENS, borrowRow, expOfNegative, type LogitRow } from "./logit-row.ts";

/**
 * Draws a token from a row, and reads logprobs off it: what the sampler does with a row once bias and penalties are in.
 * The passes over the whole vocabulary that can be vectorised are in `logit-row.ts`; here are those that pick candidates.
 * Nothing allocates in steady state.
 *
 * Scratch arrays belong to this module: one draw at a time per thread, which synchronous calls guarantee.
 * Cost: the draw from a whole row one sum; a filtered draw one pass more and work on the few that are left.
 */
let candidateIds = new Int32Array(0);
let candidateLogits = new Float32Array(0);
let candidateWeights = new Float64Array(0);
let candidateOrder = new Int32Array(0);
let candidateCount = 0;

function ensureScratch(vocabularySize: number): void {
  if (candidateIds.length >= vocabularySize) return;
  candidateIds = new Int32Array(vocabularySize);
  candidateLogits = new Float32Array(vocabularySize);
  candidateWeights = new Float64Array(vocabularySize);
  candidateOrder = new Int32Array(vocabularySize);
}

/** Index of the largest logit, the lowest one among equals; 0 when none is a number above -Infinity. */
export function argmax(logits: Float32Array): number {
  return bestOf(borrowRow(logits));
}

/** As `argmax`, of a row that is borrowed already. */
export function bestOf(row: LogitRow): number {
  const max = row.maximum();
  return max === -Infinity ? 0 : row.logits.indexOf(max, row.nextGroup(0, max));
}

/** A token drawn from the whole softmax: the first whose cumulated weight, by id, exceeds `uniform` x total. */
export function drawFromAll(row: LogitRow, max: number, perTemperature: number, uniform: number): number {
  const { logits, blockSums } = row;
  let left = uniform * row.sumWeights(max, perTemperature);
  // Rounding may leave a rest after the last block that weighs anything: then its last token is taken.
  let chosenBlock = 0;
  for (let block = 0; block < blockSums.length; block++) {
    const sum = blockSums[block]!;
    if (sum === 0) continue;
    chosenBlock = block;
    if (left < sum) break;
    left -= sum;
  }
  const start = chosenBlock * BLOCK_TOKENS;
  const end = Math.min(start + BLOCK_TOKENS, logits.length);
  let token = start;
  for (let i = start; i < end; i++) {
    const x = (logits[i]! - max) * perTemperature;
    // The row may have rounded a logit at the cutoff to the other side.
    if (!(x > -CUTOFF - 1)) continue;
    token = i;
    left -= expOfNegative(Math.max(-CUTOFF, x));
    if (left < 0) break;
  }
  return token;
}

export interface Filters {
  /** 0 = off. */
  readonly topK: number;
  /** 1 = off. */
  readonly topP: number;
  /** 0 = off. */
  readonly minP: number;
}

/** A token drawn from what top-k, then top-p, then min-p leave; by id among those, as `drawFromAll`. */
export function drawFiltered(
  row: LogitRow,
  max: number,
  perTemperature: number,
  uniform: number,
  filters: Filters,
): number {
  const { logits } = row;
  ensureScratch(logits.length);
  const { topK, topP, minP } = filters;
  let cut = -1;
  if (topK > 0 && topK < logits.length) {
    collectTopK(row, max, perTemperature, topK);
    if (topP < 1) cut = selectPrefix(topP * weighCandidates(max, perTemperature), candidateWeights);
    else weighCandidates(max, perTemperature);
  } else if (topP < 1) {
    cut = selectPrefix(topP * collectMass(row, max, perTemperature, topP), candidateWeights);
  } else {
    collectAbove(row, max + Math.max(-CUTOFF, Math.log(minP) - 1e-6) / perTemperature);
    weighCandidates(max, perTemperature);
  }
  return drawCandidate(cut, minP, uniform);
}

/** Candidates: every token above `floor`, by id. */
function collectAbove(row: LogitRow, floor: number): void {
  const { logits } = row;
  const ids = candidateIds;
  const kept = candidateLogits;
  let count = 0;
  for (let group = row.nextGroup(0, floor); group < logits.length; group = row.nextGroup(group + GROUP_TOKENS, floor)) {
    const end = Math.min(group + GROUP_TOKENS, logits.length);
    for (let id = group; id < end; id++) {
      const logit = logits[id]!;
      if (logit > floor) {
        ids[count] = id;
        kept[count++] = logit;
      }
    }
  }
  candidateCount = count;
}

/**
 * Candidates: the k best, by id. Keeps a pool of some times k; when it is full the k best stay and the k-th becomes the
 * floor, which few later tokens pass.
 */
function collectTopK(row: LogitRow, max: number, perTemperature: number, k: number): void {
  const { logits } = row;
  const poolSize = Math.min(logits.length, Math.max(4 * k, 512));
  const ids = candidateIds;
  const kept = candidateLogits;
  let floor = max - CUTOFF / perTemperature;
  let count = 0;
  for (let group = row.nextGroup(0, floor); group < logits.length; group = row.nextGroup(group + GROUP_TOKENS, floor)) {
    const end = Math.min(group + GROUP_TOKENS, logits.length);
    for (let id = group; id < end; id++) {
      const logit = logits[id]!;
      if (!(logit > floor)) continue;
      ids[count] = id;
      kept[count++] = logit;
      if (count < poolSize) continue;
      candidateCount = count;
      keepTopK(k);
      count = candidateCount;
      // Equal logits further on lose to the lower ids that are in already.
      floor = lowestLogit();
    }
  }
  candidateCount = count;
  keepTopK(k);
}

function keepTopK(k: number): void {
  if (candidateCount <= k) return;
  const cut = selectPrefix(k, undefined);
  const cutLogit = candidateLogits[cut]!;
  const cutId = candidateIds[cut]!;
  let kept = 0;
  for (let i = 0; i < candidateCount; i++) {
    const logit = candidateLogits[i]!;
    const id = candidateIds[i]!;
    if (logit > cutLogit || (logit === cutLogit && id <= cutId)) {
      candidateIds[kept] = id;
      candidateLogits[kept++] = logit;
    }
  }
  candidateCount = kept;
}

function lowestLogit(): number {
  let lowest = Infinity;
  for (let i = 0; i < candidateCount; i++) if (candidateLogits[i]! < lowest) lowest = candidateLogits[i]!;
  return lowest;
}

function weighCandidates(max: number, perTemperature: number): number {
  const logits = candidateLogits;
  const weights = candidateWeights;
  let total = 0;
  for (let i = 0; i < candidateCount; i++) {
    // A logit at the floor of -30 may round to a hair below it.
    const weight = expOfNegative(Math.max(-CUTOFF, (logits[i]! - max) * perTemperature));
    weights[i] = weight;
    total += weight;
  }
  return total;
}

/**
 * Candidates: enough of the best tokens to hold `topP` of the mass; returns the whole mass. Takes what lies within 8 of
 * the best at first, which is nearly always enough, and widens that when it is not.
 */
function collectMass(row: LogitRow, max: number, perTemperature: number, topP: number): number {
  const total = row.sumWeights(max, perTemperature);
  for (let reach = 8; ; reach *= 2) {
    collectAbove(row, max - Math.min(reach, CUTOFF) / perTemperature);
    if (weighCandidates(max, perTemperature) >= topP * total || reach >= CUTOFF) return total;
  }
}

/**
 * The candidate that ends the shortest run of best candidates (larger logit first, lower id among equals) whose weights
 * sum to `target`; -1 when all together do not. Weights undefined = 1 each. A quickselect: linear on average.
 */
function selectPrefix(target: number, weights: Float64Array | undefined): number {
  const order = candidateOrder;
  const logits = candidateLogits;
  for (let i = 0; i < candidateCount; i++) order[i] = i;
  let low = 0;
  let high = candidateCount;
  let left = target;
  while (low < high) {
    const middle = (low + high) >>> 1;
    const pivot = order[middle]!;
    order[middle] = order[high - 1]!;
    order[high - 1] = pivot;
    const pivotLogit = logits[pivot]!;
    let store = low;
    let sum = 0;
    for (let i = low; i < high - 1; i++) {
      const candidate = order[i]!;
      const logit = logits[candidate]!;
      // Positions are in order of id.
      if (logit > pivotLogit || (logit === pivotLogit && candidate < pivot)) {
        order[i] = order[store]!;
        order[store++] = candidate;
        sum += weights === undefined ? 1 : weights[candidate]!;
      }
    }
    if (sum >= left) {
      high = store;
      continue;
    }
    left -= sum + (weights === undefined ? 1 : weights[pivot]!);
    if (left <= 0) return pivot;
    low = store;
    high--;
  }
  return -1;
}

function drawCandidate(cut: number, minP: number, uniform: number): number {
  const ids = candidateIds;
  const weights = candidateWeights;
  const cutLogit = cut < 0 ? -Infinity : candidateLogits[cut]!;
  let kept = 0;
  let total = 0;
  for (let i = 0; i < candidateCount; i++) {
    const logit = candidateLogits[i]!;
    const weight = weights[i]!;
    if (weight < minP || logit < cutLogit || (logit === cutLogit && i > cut && cut >= 0)) continue;
    ids[kept] = ids[i]!;
    weights[kept++] = weight;
    total += weight;
  }
  let left = uniform * total;
  let at = 0;
  for (; at < kept - 1; at++) {
    left -= weights[at]!;
    if (left < 0) break;
  }
  return ids[at]!;
}

/** What stands for an impossible token: JSON has no infinity, and OpenAI's servers write the same. */
const LOWEST_LOGPROB = -9999;
/** Alternatives are few (20 at most): an insertion into a sorted list is cheapest. */
const bestIds: number[] = [];
const bestLogits: number[] = [];

/**
 * log-softmax of unmodified logits: of `tokenId`, and of the `top` best tokens, best first, lower id among equals.
 * Impossible tokens have -9999. Cost: one copy, one maximum, one sum, one pass for the best.
 */
export function tokenLogprob(logits: Float32Array, tokenId: number, top: number): TokenLogprob {
  const row = borrowRow(logits);
  const max = row.maximum();
  if (!Number.isFinite(max)) return { logprob: LOWEST_LOGPROB, topIds: [], topLogprobs: [] };
  const logSum = max + Math.log(row.sumWeights(max, 1));
  const logprob = (logit: number): number => (logit >= LOWEST_LOGPROB + logSum ? logit - logSum : LOWEST_LOGPROB);
  if (top > 0) collectBest(row, top);
  else bestIds.length = bestLogits.length = 0;
  return { logprob: logprob(logits[tokenId]!), topIds: bestIds.slice(), topLogprobs: bestLogits.map(logprob) };
}

function collectBest(row: LogitRow, top: number): void {
  const { logits } = row;
  bestIds.length = 0;
  bestLogits.length = 0;
  let floor = -Infinity;
  for (let group = row.nextGroup(0, floor); group < logits.length; group = row.nextGroup(group + GROUP_TOKENS, floor)) {
    const end = Math.min(group + GROUP_TOKENS, logits.length);
    for (let id = group; id < end; id++) {
      const logit = logits[id]!;
      if (logit > floor) floor = insertBest(id, logit, top);
    }
  }
}

/** Returns the new floor: what a further logit has to exceed. */
function insertBest(id: number, logit: number, top: number): number {
  let at = bestLogits.length < top ? bestLogits.length : top - 1;
  for (; at > 0 && bestLogits[at - 1]! < logit; at--) {
    bestIds[at] = bestIds[at - 1]!;
    bestLogits[at] = bestLogits[at - 1]!;
  }
  bestIds[at] = id;
  bestLogits[at] = logit;
  return bestLogits.length === top ? bestLogits[top - 1]! : -Infinity;
}
