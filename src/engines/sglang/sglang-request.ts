import type { PreprocessedRequest } from "../../protocol/index.ts";
import { randomId64 } from "../../std/index.ts";
import type { DialectCall, EngineFacts } from "../foreign/index.ts";

/** What a server of SGLang is besides the facts that all engines have. */
export interface SglangFacts extends EngineFacts {
  /** A piece of an answer has its new tokens only; else all tokens so far. */
  readonly isIncremental: boolean;
  /** 0 = no priorities; 1 higher is sooner, as here; -1 lower is. */
  readonly prioritySign: 0 | 1 | -1;
  readonly hasTokenizer: boolean;
  readonly loadPath: string;
  readonly bootstrapPort: number;
}

/**
 * A request as SGLang's native `POST /generate` takes it. Its `rid` is new for every attempt: a second request under the
 * same one is refused while the first is being taken down, and an abort takes every request whose id begins with the one
 * that it names, so that none may begin another.
 */
export function sglangCall(
  request: PreprocessedRequest,
  facts: SglangFacts,
  more: Readonly<Record<string, unknown>> = {},
): DialectCall {
  const { output, cacheNamespace, requestId, dpRank, priority, loraName } = request;
  const isStream = !output.promptLogprobs;
  const rid = `${requestId}-${randomId64().toString(16).padStart(16, "0")}`;
  const isRanked = dpRank !== undefined && facts.dataParallelSize > 1;
  const body = {
    rid,
    stream: isStream,
    sampling_params: samplingOf(request, facts),
    ...(output.topLogprobs < 0
      ? {}
      : {
          return_logprob: true,
          top_logprobs_num: output.topLogprobs,
          logprob_start_len: output.promptLogprobs ? 0 : -1,
        }),
    ...(facts.prioritySign === 0 || priority === 0 ? {} : { priority: facts.prioritySign * Math.round(priority) }),
    // Servers know the one or both: both keep namespaces apart, and only the second one is told in KV events.
    ...(cacheNamespace === "" ? {} : { extra_key: cacheNamespace, cache_salt: cacheNamespace }),
    ...(loraName === undefined ? {} : { lora_path: loraName }),
    // The field's old name and its new one.
    ...(isRanked ? { routed_dp_rank: dpRank, data_parallel_rank: dpRank } : {}),
    ...more,
  };
  return {
    path: "/generate",
    body: `{"input_ids":[${request.tokenIds.join(",")}],${JSON.stringify(body).slice(1)}`,
    headers: { "x-request-id": requestId },
    isStream,
    // A closed connection is acted on after two seconds.
    abortCall: { path: "/abort_request", body: JSON.stringify({ rid }) },
  };
}

function samplingOf(request: PreprocessedRequest, facts: SglangFacts): Record<string, unknown> {
  const { sampling, stop, resumedTokens = 0, tokenIds, answerForm } = request;
  // `ignore_eos` switches its own stop tokens off, and those of the request with them: then they are watched for here.
  const stopsThere = stop.stopTokenIds.length > 0 && !stop.ignoreEos;
  const minTokens = facts.hasTokenizer ? stop.minTokens - resumedTokens : 0;
  return {
    max_new_tokens: Math.min(stop.maxTokens - resumedTokens, facts.contextLength - tokenIds.length),
    ...(minTokens > 0 ? { min_new_tokens: minTokens } : {}),
    temperature: sampling.temperature,
    top_p: sampling.topP,
    ...(sampling.topK > 0 ? { top_k: sampling.topK } : {}),
    ...(sampling.minP > 0 ? { min_p: sampling.minP } : {}),
    ...(sampling.presencePenalty === 0 ? {} : { presence_penalty: sampling.presencePenalty }),
    ...(sampling.frequencyPenalty === 0 ? {} : { frequency_penalty: sampling.frequencyPenalty }),
    ...(sampling.repetitionPenalty === 1 ? {} : { repetition_penalty: sampling.repetitionPenalty }),
    ...(sampling.seed === undefined ? {} : { sampling_seed: sampling.seed }),
    ...(sampling.logitBias === undefined ? {} : { logit_bias: Object.fromEntries(sampling.logitBias) }),
    ignore_eos: !stopsThere,
    ...(stopsThere ? { stop_token_ids: stop.stopTokenIds } : {}),
    ...(answerForm === undefined
      ? {}
      : { json_schema: JSON.stringify(answerForm.kind === "json" ? { type: "object" } : answerForm.schema) }),
  };
}
