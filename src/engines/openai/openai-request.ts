import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import type { EngineTokenizer, HttpCall } from "../foreign/index.ts";
import type { OpenAiFacts } from "./openai-probe.ts";

/**
 * A request as `POST /v1/completions`. Fields that are not OpenAI's (`top_k`, `min_p`, `repetition_penalty`, `ignore_eos`,
 * which vLLM, SGLang and llama.cpp know) are sent only when the client asked for them.
 */
export function openAiCall(
  request: PreprocessedRequest,
  facts: OpenAiFacts,
  tokenizer: EngineTokenizer,
): HttpCall & { readonly isStream: boolean } {
  const { sampling, stop, resumedTokens = 0, tokenIds } = request;
  const body = {
    model: request.loraName ?? facts.servedModel,
    stream: true,
    ...(facts.tellsUsage ? { stream_options: { include_usage: true } } : {}),
    max_tokens: Math.max(1, Math.min(stop.maxTokens - resumedTokens, facts.contextLength - tokenIds.length)),
    temperature: sampling.temperature,
    top_p: sampling.topP,
    ...(sampling.presencePenalty === 0 ? {} : { presence_penalty: sampling.presencePenalty }),
    ...(sampling.frequencyPenalty === 0 ? {} : { frequency_penalty: sampling.frequencyPenalty }),
    ...(sampling.seed === undefined ? {} : { seed: sampling.seed }),
    ...(sampling.topK > 0 ? { top_k: sampling.topK } : {}),
    ...(sampling.minP > 0 ? { min_p: sampling.minP } : {}),
    ...(sampling.repetitionPenalty === 1 ? {} : { repetition_penalty: sampling.repetitionPenalty }),
    ...(sampling.logitBias === undefined ? {} : { logit_bias: Object.fromEntries(sampling.logitBias) }),
    ...(stop.ignoreEos ? { ignore_eos: true } : {}),
    ...(facts.form === "tokens" ? { return_token_ids: true } : {}),
  };
  const prompt = facts.form === "text" ? JSON.stringify(textOf(tokenIds, tokenizer)) : `[${tokenIds.join(",")}]`;
  return {
    path: `${facts.basePath}/completions`,
    body: `{"prompt":${prompt},${JSON.stringify(body).slice(1)}`,
    headers: { "x-request-id": request.requestId, accept: "text/event-stream" },
    isStream: true,
  };
}

/** With its special tokens, which a template put there: the server makes those tokens of them again. */
function textOf(tokenIds: Uint32Array, tokenizer: EngineTokenizer): string {
  return Buffer.concat(Array.from(tokenIds, (id) => tokenizer.tokenBytes(id))).toString("utf8");
}

/** What the server could only do wrong, or nobody knows whether it does. */
export function openAiRefusal(request: PreprocessedRequest, facts: OpenAiFacts): DynamoError | undefined {
  const refuse = (what: string): DynamoError => new DynamoError("unsupported-operation", `an OpenAI server ${what}`);
  const { output, sampling, cacheNamespace, stop, resumedTokens = 0 } = request;
  if (output.topLogprobs >= 0 || output.promptLogprobs) return refuse("tells no logprobs by token id");
  if (cacheNamespace !== "") return refuse("is not known to keep the caches of namespaces apart (cache_salt)");
  if (stop.minTokens > resumedTokens && stop.stopTokenIds.length > 0) return refuse("is not known to heed min_tokens");
  if (sampling.logitBias !== undefined && facts.form === "text") {
    return refuse("with another tokenizer knows other token ids (logit_bias)");
  }
  return undefined;
}
