import type { RankState } from "./rank-state.ts";

/**
 * One pass the way vLLM v1 plans it (Dynamo's mocker describes the same): a budget of tokens goes to the running sequences
 * first, oldest first, one token for those that decode and a chunk of the prompt for the others; what is left admits
 * waiting ones. When blocks run out a running sequence is preempted and admission stops for this pass.
 *
 * `trtllm` differs at admission only: the whole output has its room reserved, so that nothing is ever preempted.
 */
export function planVllmPass(rank: RankState, nowMs: number): void {
  const budget = planRunning(rank);
  if (budget > 0) admit(rank, budget, nowMs);
}

/** Returns what is left of the budget; 0 when a sequence was preempted. */
function planRunning(rank: RankState): number {
  const { running, scheduled } = rank;
  const { maxBatchedTokens, chunkedPrefill, preemptionMode } = rank.config;
  const preemptionsBefore = rank.preemptions;
  let budget = maxBatchedTokens;
  let at = 0;
  while (at < running.length && budget > 0) {
    const sequence = running[at]!;
    const wanted = sequence.remainingTokens;
    if (wanted > budget && !chunkedPrefill && scheduled.length > 0) break;
    const tokens = chunkedPrefill ? Math.min(wanted, budget) : wanted;
    if (rank.trySchedule(sequence, tokens)) {
      budget -= tokens;
      at++;
      continue;
    }
    // It may be the victim itself; otherwise it tries again with the blocks that came free.
    const victim = preemptionMode === "lifo" ? running.length - 1 : 0;
    if (victim < at) at--;
    budget += rank.preempt(victim);
  }
  return rank.preemptions > preemptionsBefore ? 0 : budget;
}

function admit(rank: RankState, tokenBudget: number, nowMs: number): void {
  const { waiting, running, scheduled } = rank;
  const { maxSequences, chunkedPrefill, engineType } = rank.config;
  let budget = tokenBudget;
  while (waiting.length > 0 && rank.heldCount < maxSequences && budget > 0) {
    const sequence = waiting[0]!;
    if (!chunkedPrefill && scheduled.length > 0) {
      const wanted = sequence.knownTokens - rank.reusableBlocks(sequence) * rank.config.blockSizeTokens;
      if (wanted > budget) break;
    }
    const reserved = engineType === "trtllm" ? reservedForOutput(rank) : rank.watermarkBlocks;
    if (!rank.tryAdmit(0, reserved, nowMs)) break;
    // Those whose KV cache comes over the link are planned when it is here.
    if (running.at(-1) !== sequence) continue;
    const tokens = chunkedPrefill ? Math.min(sequence.remainingTokens, budget) : sequence.remainingTokens;
    if (!rank.trySchedule(sequence, tokens)) break;
    budget -= tokens;
  }
}

/** Blocks that everything admitted, and the next to come, may still grow by. */
function reservedForOutput({ running, parked, waiting, config }: RankState): number {
  const { blockSizeTokens } = config;
  let blocks = 0;
  for (const held of [running, parked]) {
    for (const { promptTokens, maxTokens, table } of held) {
      blocks += Math.ceil((promptTokens + maxTokens) / blockSizeTokens) - table.blocks.length;
    }
  }
  const { promptTokens, maxTokens, knownTokens } = waiting[0]!;
  return blocks + Math.ceil((promptTokens + maxTokens) / blockSizeTokens) - Math.ceil(knownTokens / blockSizeTokens);
}
