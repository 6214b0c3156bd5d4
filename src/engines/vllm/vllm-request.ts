import type { PreprocessedRequest } from "../../protocol/index.ts";
import type { DialectCall, EngineFacts } from "../foreign/index.ts";

/**
 * A request as vLLM takes it. Two routes mean the same: `/inference/v1/generate`, tokens only, where the server streams it,
 * else `/v1/completions` with the prompt as token ids. The fields' names and places differ, which is all of this file.
 */
export type VllmRoute = "generate" | "completions";

export interface VllmRequestOptions {
  readonly route: VllmRoute;
  /** The server's scheduler takes priorities; any but 0 is an error otherwise. */
  readonly takesPriority: boolean;
  /** Of disaggregated serving. @default the whole request */
  readonly leg?: VllmLeg;
}

/** What the engine is told besides the request when it does a part of it. */
export interface VllmLeg {
  readonly requestId: string;
  readonly parameters: Readonly<Record<string, unknown>> | undefined;
  /** Of a prefill leg: tokens to compute, of which one is used; the answer is not streamed, a stream has no parameters. */
  readonly prefillTokens?: number;
  /** Of a prefill leg: its token goes out, so it is sampled, and ends the answer, as the request says. */
  readonly isTokenUsed?: boolean;
}

/** Tells KV event readers which part of a salt is a namespace of ours (engine-events/vllm-event-mapper.ts). */
export const SALT_PREFIX = "dynamo-cache-salt:";
/** vLLM's own limit (`--max-logprobs`). */
const MAX_LOGPROBS = 20;

export function vllmCall(
  request: PreprocessedRequest,
  facts: EngineFacts,
  { route, takesPriority, leg }: VllmRequestOptions,
): DialectCall {
  // A stream has no place for the prompt's logprobs.
  const isStream = !request.output.promptLogprobs && leg?.prefillTokens === undefined;
  const requestId = leg?.requestId ?? request.requestId;
  const transfer = leg?.parameters === undefined ? {} : { kv_transfer_params: leg.parameters };
  const sampling = {
    ...samplingOf(request, facts),
    ...(leg?.prefillTokens === undefined ? {} : prefillSampling(request, leg)),
    // Servers differ in which of the two places they read.
    ...(route === "generate" && leg?.parameters !== undefined ? { extra_args: transfer } : {}),
  };
  const common = {
    request_id: requestId,
    ...transfer,
    // Adapters are models of their own to it.
    model: request.loraName ?? facts.servedModel,
    ...(request.cacheNamespace === "" ? {} : { cache_salt: SALT_PREFIX + request.cacheNamespace }),
    // Ours: higher is sooner; vLLM's: lower.
    ...(takesPriority && request.priority !== 0 ? { priority: -Math.round(request.priority) } : {}),
    ...(isStream ? { stream: true, stream_options: { include_usage: true } } : {}),
  };
  const body =
    route === "generate"
      ? { ...common, sampling_params: sampling }
      : { ...common, ...sampling, return_token_ids: true, return_tokens_as_token_ids: true };
  const tokens = `"${route === "generate" ? "token_ids" : "prompt"}":[${request.tokenIds.join(",")}]`;
  return {
    path: route === "generate" ? "/inference/v1/generate" : "/v1/completions",
    body: `{${tokens},${JSON.stringify(body).slice(1)}`,
    headers: {
      "x-request-id": requestId,
      ...(request.dpRank === undefined || facts.dataParallelSize === 1
        ? {}
        : { "x-data-parallel-rank": String(request.dpRank) }),
    },
    isStream,
  };
}

/** In place of what `samplingOf` says. `undefined` leaves a field out. */
function prefillSampling({ stop }: PreprocessedRequest, { prefillTokens = 1, isTokenUsed }: VllmLeg): Record<string, unknown> {
  const minTokens = Math.min(stop.minTokens, prefillTokens);
  return {
    max_tokens: prefillTokens,
    min_tokens: minTokens > 0 && isTokenUsed === true ? minTokens : undefined,
    // Nobody sees it: the blocks must be kept whatever it is, and a grammar is not worth compiling.
    ...(isTokenUsed === true ? {} : { stop_token_ids: undefined, structured_outputs: undefined, logprobs: undefined }),
  };
} // prettier-ignore

function samplingOf(request: PreprocessedRequest, facts: EngineFacts): Record<string, unknown> {
  const { sampling, stop, output, resumedTokens = 0, tokenIds } = request;
  // One more than asked for: the sampled token takes a place whether it is among the best or not.
  const logprobs =
    output.topLogprobs < 0 ? undefined : Math.min(MAX_LOGPROBS, output.topLogprobs + (output.topLogprobs > 0 ? 1 : 0));
  return {
    max_tokens: Math.min(stop.maxTokens - resumedTokens, facts.contextLength - tokenIds.length),
    ...(stop.minTokens > resumedTokens ? { min_tokens: stop.minTokens - resumedTokens } : {}),
    temperature: sampling.temperature,
    top_p: sampling.topP,
    // 0 is off in both; -1 in older versions.
    ...(sampling.topK > 0 ? { top_k: sampling.topK } : {}),
    ...(sampling.minP > 0 ? { min_p: sampling.minP } : {}),
    ...(sampling.presencePenalty === 0 ? {} : { presence_penalty: sampling.presencePenalty }),
    ...(sampling.frequencyPenalty === 0 ? {} : { frequency_penalty: sampling.frequencyPenalty }),
    ...(sampling.repetitionPenalty === 1 ? {} : { repetition_penalty: sampling.repetitionPenalty }),
    ...(sampling.seed === undefined ? {} : { seed: sampling.seed }),
    ...(sampling.logitBias === undefined ? {} : { logit_bias: Object.fromEntries(sampling.logitBias) }),
    // The list is complete, the model's own end tokens included.
    ignore_eos: true,
    ...(stop.stopTokenIds.length === 0 ? {} : { stop_token_ids: stop.stopTokenIds }),
    ...(logprobs === undefined ? {} : { logprobs }),
    ...(request.answerForm === undefined
      ? {}
      : {
          structured_outputs:
            request.answerForm.kind === "json" ? { json_object: true } : { json: request.answerForm.schema },
        }),
    ...(output.promptLogprobs ? { prompt_logprobs: Math.max(0, output.topLogprobs) } : {}),
  }; // prettier-ignore
}
