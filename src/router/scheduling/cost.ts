/**
 * What it would cost to run a request on each candidate, in blocks; the lowest wins. Dynamo's formula, so that its
 * weights and experience carry over (`kv-router`, scheduling; our reference example is in cost.test.ts):
 *
 *   raw      = (active prefill tokens + prompt tokens) / block size              0 when prefill is not tracked
 *   decay    = 1 / (1 + credit decay x backlog over the least loaded, in prompts)
 *   credit   = overlap credit x decay x device + host weight x host + disk weight x disk + shared weight x shared
 *   cost     = prefill scale x max(0, raw - credit) + decode blocks + request weight x active requests
 *   cost    *= multiplier of the preferred taints
 *
 * When prefill is not tracked (a decode pool) the credit comes off the decode blocks: max(0, decode - credit).
 * Pure, over columns that the caller reuses: no allocation. `costTerms` gives the parts of one candidate, for people.
 */
export interface CostWeights {
  readonly overlapScoreCredit: number;
  readonly overlapScoreCreditDecay: number;
  readonly prefillLoadScale: number;
  readonly hostCacheHitWeight: number;
  readonly diskCacheHitWeight: number;
  /** For blocks of a store that workers share, beyond those on the device, in host memory and on disk. */
  readonly sharedCacheMultiplier: number;
  readonly decodeActiveRequestWeight: number;
  readonly trackPrefillTokens: boolean;
}

export interface PromptShape {
  readonly tokens: number;
  /** Complete blocks. */
  readonly blocks: number;
  readonly blockSizeTokens: number;
}

/** One element per candidate in each array; only the first `count` mean something. Reused from decision to decision. */
export class CandidateColumns {
  count = 0;
  /** Leading prompt blocks on the device, then those that continue them in host memory, then on disk. */
  device = new Float64Array(16);
  host = new Float64Array(16);
  disk = new Float64Array(16);
  /** Then those that continue them in a store which workers share. */
  shared = new Float64Array(16);
  /** Prompt tokens that the candidate still has to compute, without this request. */
  prefillTokens = new Float64Array(16);
  /** KV blocks in use if the request joined: its own counted once. */
  decodeBlocks = new Float64Array(16);
  activeRequests = new Float64Array(16);
  /** Of the preferred taints; 1 = none. */
  multiplier = new Float64Array(16);
  cost = new Float64Array(16);

  /** Makes room for `count` candidates; contents are the caller's to fill. */
  resize(count: number): void {
    this.count = count;
    if (count <= this.cost.length) return;
    const size = Math.max(count, this.cost.length * 2);
    this.device = new Float64Array(size);
    this.host = new Float64Array(size);
    this.disk = new Float64Array(size);
    this.shared = new Float64Array(size);
    this.prefillTokens = new Float64Array(size);
    this.decodeBlocks = new Float64Array(size);
    this.activeRequests = new Float64Array(size);
    this.multiplier = new Float64Array(size);
    this.cost = new Float64Array(size);
  }
}

/** Leading prompt blocks of a candidate in all tiers together. */
export function overlapOf({ device, host, disk, shared }: CandidateColumns, index: number): number {
  return device[index]! + host[index]! + disk[index]! + shared[index]!;
}

/** Fills `columns.cost`. */
export function computeCosts(columns: CandidateColumns, prompt: PromptShape, weights: CostWeights): void {
  const { count, device, host, disk, shared, prefillTokens, decodeBlocks, activeRequests, multiplier, cost } = columns;
  const { overlapScoreCredit, hostCacheHitWeight, diskCacheHitWeight, sharedCacheMultiplier } = weights;
  const { decodeActiveRequestWeight, prefillLoadScale, trackPrefillTokens } = weights;
  const { blockSizeTokens, tokens } = prompt;
  const decaying = weights.overlapScoreCreditDecay > 0;
  const least = decaying ? leastPrefillTokens(columns) : 0;
  for (let i = 0; i < count; i++) {
    const decay = decaying ? creditDecay(prefillTokens[i]! - least, prompt, weights) : 1;
    const credit =
      overlapScoreCredit * decay * device[i]! +
      hostCacheHitWeight * host[i]! +
      diskCacheHitWeight * disk[i]! +
      sharedCacheMultiplier * shared[i]!;
    let sum: number;
    if (trackPrefillTokens) {
      const raw = (prefillTokens[i]! + tokens) / blockSizeTokens;
      sum = prefillLoadScale * Math.max(0, raw - credit) + decodeBlocks[i]!;
    } else sum = Math.max(0, decodeBlocks[i]! - credit);
    cost[i] = (sum + decodeActiveRequestWeight * activeRequests[i]!) * multiplier[i]!;
  }
}

/** The parts of one candidate's cost. */
export interface CostTerms {
  readonly rawPrefillBlocks: number;
  readonly creditDecay: number;
  readonly creditBlocks: number;
  /** Prefill after the credit, before its scale. */
  readonly adjustedPrefillBlocks: number;
  readonly prefill: number;
  readonly decode: number;
  readonly activeRequests: number;
  readonly multiplier: number;
  readonly total: number;
}

export function costTerms(
  columns: CandidateColumns,
  index: number,
  prompt: PromptShape,
  weights: CostWeights,
): CostTerms {
  const over = columns.prefillTokens[index]! - leastPrefillTokens(columns);
  const decay = weights.overlapScoreCreditDecay > 0 ? creditDecay(over, prompt, weights) : 1;
  const credit =
    weights.overlapScoreCredit * decay * columns.device[index]! +
    weights.hostCacheHitWeight * columns.host[index]! +
    weights.diskCacheHitWeight * columns.disk[index]! +
    weights.sharedCacheMultiplier * columns.shared[index]!;
  const raw = weights.trackPrefillTokens ? (columns.prefillTokens[index]! + prompt.tokens) / prompt.blockSizeTokens : 0;
  const adjusted = Math.max(0, raw - credit);
  const decodeBlocks = columns.decodeBlocks[index]!;
  const prefill = weights.prefillLoadScale * adjusted;
  const decode = weights.trackPrefillTokens ? decodeBlocks : Math.max(0, decodeBlocks - credit);
  const activeRequests = weights.decodeActiveRequestWeight * columns.activeRequests[index]!;
  const multiplier = columns.multiplier[index]!;
  return {
    rawPrefillBlocks: raw,
    creditDecay: decay,
    creditBlocks: credit,
    adjustedPrefillBlocks: adjusted,
    prefill,
    decode,
    activeRequests,
    multiplier,
    total: (prefill + decode + activeRequests) * multiplier,
  };
}

/** A cached prefix is worth less on a worker that first has a longer backlog to compute than the others. */
function creditDecay(tokensOverLeast: number, prompt: PromptShape, weights: CostWeights): number {
  const promptBlocks = Math.max(1, prompt.tokens / prompt.blockSizeTokens);
  const backlogPrompts = tokensOverLeast / prompt.blockSizeTokens / promptBlocks;
  return 1 / (1 + weights.overlapScoreCreditDecay * backlogPrompts);
}

function leastPrefillTokens({ count, prefillTokens }: CandidateColumns): number {
  let least = Infinity;
  for (let i = 0; i < count; i++) least = Math.min(least, prefillTokens[i]!);
  return least;
}

/** exp(-tanh(sum of the weights of the preferred taints a worker has)): 0.368 (all wanted) to 2.718 (all unwanted). */
export function taintMultiplier(matchingWeight: number): number {
  return Math.exp(-Math.tanh(matchingWeight));
}
