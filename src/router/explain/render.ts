import { costTerms, type CandidateColumns } from "../scheduling/cost.ts";
import type { DecisionRecord } from "./decision-log.ts";

/** A decision as JSON for operators: `GET /v1/route/explain/...`, `POST /v1/route`, `nvext.routing`. */
export interface DecisionExplanation {
  readonly request_id: string;
  /** ISO 8601. */
  readonly at: string;
  readonly policy: string;
  readonly reason: string;
  readonly worker: { readonly instance_id: string; readonly dp_rank: number };
  readonly prompt: { readonly tokens: number; readonly blocks: number; readonly block_size: number };
  readonly queued_ms: number;
  readonly candidates: readonly CandidateExplanation[];
  /** Ranks that could not be chosen, by the reason. */
  readonly left_out: {
    readonly already_tried: number;
    readonly not_allowed: number;
    readonly inhibited: number;
    readonly busy: number;
  };
  readonly degradations: readonly string[];
  /** What the router expects the engine to reuse. An engine computes at least the last token of a prompt. */
  readonly predicted: { readonly cached_blocks: number; readonly cached_tokens: number };
  /** What the engine said; null until its first token. */
  readonly actual: {
    readonly cached_blocks: number;
    readonly cached_tokens: number;
    readonly first_token_ms: number;
    readonly output_tokens: number;
    /** null while the request runs. */
    readonly duration_ms: number | null;
    readonly outcome: string | null;
  } | null;
}

export interface CandidateExplanation {
  readonly instance_id: string;
  readonly dp_rank: number;
  readonly chosen: boolean;
  readonly overlap_blocks: { readonly device: number; readonly host: number; readonly disk: number };
  readonly load: { readonly active_requests: number; readonly prefill_tokens: number; readonly decode_blocks: number };
  readonly cost: {
    readonly raw_prefill: number;
    readonly credit_decay: number;
    readonly credit: number;
    readonly prefill: number;
    readonly decode: number;
    readonly active_requests: number;
    readonly multiplier: number;
    readonly total: number;
  };
}

/** `columns` is undefined when the numbers had to make room for newer ones. */
export function renderDecision(record: DecisionRecord, columns: CandidateColumns | undefined): DecisionExplanation {
  const { prompt, leftOut } = record;
  const worker = record.candidates[record.chosen]!;
  const reusable = Math.min(record.overlapBlocks, Math.floor(Math.max(0, prompt.tokens - 1) / prompt.blockSizeTokens));
  return {
    request_id: record.requestId,
    at: new Date(record.atMs).toISOString(),
    policy: record.policy,
    reason: record.reason,
    worker: { instance_id: worker.instanceId, dp_rank: worker.dpRank },
    prompt: { tokens: prompt.tokens, blocks: prompt.blocks, block_size: prompt.blockSizeTokens },
    queued_ms: round(record.queuedMs),
    candidates: columns === undefined ? [] : record.candidates.map((_, i) => candidate(record, columns, i)),
    left_out: {
      already_tried: leftOut.tried,
      not_allowed: leftOut.notAllowed,
      inhibited: leftOut.inhibited,
      busy: leftOut.busy,
    },
    degradations: columns === undefined ? [...record.degradations, NUMBERS_GONE] : record.degradations,
    predicted: { cached_blocks: reusable, cached_tokens: reusable * prompt.blockSizeTokens },
    actual:
      record.cachedTokens < 0
        ? null
        : {
            cached_blocks: Math.floor(record.cachedTokens / prompt.blockSizeTokens),
            cached_tokens: record.cachedTokens,
            first_token_ms: round(record.firstTokenMs),
            output_tokens: record.outputTokens,
            duration_ms: record.durationMs < 0 ? null : round(record.durationMs),
            outcome: record.outcome === "" ? null : record.outcome,
          },
  };
}

const NUMBERS_GONE = "explain: the numbers of the candidates made room for newer decisions";

function candidate(record: DecisionRecord, columns: CandidateColumns, index: number): CandidateExplanation {
  const { instanceId, dpRank } = record.candidates[index]!;
  const terms = costTerms(columns, index, record.prompt, record.weights);
  return {
    instance_id: instanceId,
    dp_rank: dpRank,
    chosen: index === record.chosen,
    overlap_blocks: { device: columns.device[index]!, host: columns.host[index]!, disk: columns.disk[index]! },
    load: {
      active_requests: columns.activeRequests[index]!,
      prefill_tokens: columns.prefillTokens[index]!,
      decode_blocks: round(columns.decodeBlocks[index]!),
    },
    cost: {
      raw_prefill: round(terms.rawPrefillBlocks),
      credit_decay: round(terms.creditDecay),
      credit: round(terms.creditBlocks),
      prefill: round(terms.prefill),
      decode: round(terms.decode),
      active_requests: round(terms.activeRequests),
      multiplier: round(terms.multiplier),
      total: round(terms.total),
    },
  };
}

function round(value: number): number {
  return Math.round(value * 1_000) / 1_000;
}
