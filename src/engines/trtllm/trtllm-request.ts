import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import type { DialectCall, EngineFacts } from "../foreign/index.ts";

/** What a `trtllm-serve` is besides the facts that all engines have. */
export interface TrtllmFacts extends EngineFacts {
  readonly takesPriority: boolean;
  readonly metricsPath: string;
}

/**
 * A request as `trtllm-serve` takes it: `/v1/completions` with the prompt as token ids and `detokenize` off, which makes it
 * answer in token ids. It refuses every field that it does not know, so nothing goes that its version may not have.
 */
export function trtllmCall(
  request: PreprocessedRequest,
  facts: TrtllmFacts,
  more: Readonly<Record<string, unknown>> = {},
  isStream = true,
): DialectCall {
  const { sampling, stop, output, resumedTokens = 0, tokenIds, answerForm } = request;
  const body = {
    model: facts.servedModel,
    max_tokens: Math.min(stop.maxTokens - resumedTokens, facts.contextLength - tokenIds.length),
    ...(stop.minTokens > resumedTokens ? { min_tokens: stop.minTokens - resumedTokens } : {}),
    temperature: sampling.temperature,
    top_p: sampling.topP,
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
    ...(output.topLogprobs < 0 ? {} : { logprobs: 1 }),
    ...(answerForm === undefined
      ? {}
      : {
          response_format:
            answerForm.kind === "json"
              ? { type: "json_object" }
              : { type: "json_schema", json_schema: answerForm.schema },
        }),
    ...(facts.takesPriority && request.priority !== 0 ? { priority: squashed(request.priority) } : {}),
    detokenize: false,
    add_special_tokens: false,
    ...(isStream ? { stream: true, stream_options: { include_usage: true } } : {}),
    ...more,
  };
  return {
    path: "/v1/completions",
    body: `{"prompt":[${tokenIds.join(",")}],${JSON.stringify(body).slice(1)}`,
    headers: { "x-request-id": request.requestId },
    isStream,
  };
}

/** Any number as one between 0 and 1, in the same order; 0 is the server's own middle. */
function squashed(priority: number): number {
  return 0.5 + priority / (2 * (1 + Math.abs(priority)));
}

/** What it cannot do, and must not seem to. */
export function trtllmRefusal(request: PreprocessedRequest): DynamoError | undefined {
  if (request.cacheNamespace !== "") {
    return refused("its server keeps no namespaces of the KV cache apart (cache_salt)");
  }
  if (request.loraName !== undefined) return refused("adapters cannot be named to its server");
  if (request.output.promptLogprobs) return refused("its server gives no logprobs of prompts");
  if (request.output.topLogprobs > 0) {
    return refused("its server names alternatives by their text, not by their token; ask for logprobs without them");
  }
  return undefined;
}

function refused(why: string): DynamoError {
  return new DynamoError("unsupported-operation", `TensorRT-LLM cannot serve this request: ${why}`);
}
