import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import type { HttpCall } from "../foreign/index.ts";
import type { LlamaServerFacts } from "./llama-server-probe.ts";

/**
 * A request as llama.cpp's server takes it at `POST /completion`: the prompt as token ids, token ids asked for, and every
 * sampling value said, because the server's own defaults (temperature 0.8, top_k 40, min_p 0.05) are not a client's.
 */
export function llamaServerCall(
  request: PreprocessedRequest,
  facts: LlamaServerFacts,
): HttpCall & { readonly isStream: boolean } {
  const { sampling, stop, output, resumedTokens = 0, tokenIds, answerForm } = request;
  const penalises = sampling.repetitionPenalty !== 1 || sampling.presencePenalty !== 0 || sampling.frequencyPenalty !== 0;
  const body = {
    stream: true,
    return_tokens: true,
    cache_prompt: true,
    n_predict: Math.min(stop.maxTokens - resumedTokens, facts.contextLength - tokenIds.length),
    temperature: sampling.temperature,
    top_k: sampling.topK,
    top_p: sampling.topP,
    min_p: sampling.minP,
    // As in other engines: its own order has the temperature last.
    samplers: ["penalties", "temperature", "top_k", "top_p", "min_p"],
    ...(sampling.seed === undefined ? {} : { seed: sampling.seed }),
    // -1: over the whole context. Its own 64 tokens would be a surprise.
    ...(penalises
      ? {
          repeat_last_n: -1,
          repeat_penalty: sampling.repetitionPenalty,
          presence_penalty: sampling.presencePenalty,
          frequency_penalty: sampling.frequencyPenalty,
        }
      : {}),
    ...(sampling.logitBias === undefined ? {} : { logit_bias: sampling.logitBias }),
    ...(stop.ignoreEos ? { ignore_eos: true } : {}),
    ...(output.topLogprobs < 0 ? {} : { n_probs: Math.max(1, output.topLogprobs) }),
    ...(answerForm === undefined
      ? {}
      : { json_schema: answerForm.kind === "json" ? { type: "object" } : answerForm.schema }),
    // A list leaves out whatever adapters others have switched on.
    ...(request.loraName === undefined ? {} : { lora: [{ id: facts.loraIds.get(request.loraName), scale: 1 }] }),
  };
  return {
    path: "/completion",
    body: `{"prompt":[${tokenIds.join(",")}],${JSON.stringify(body).slice(1)}`,
    isStream: true,
  };
} // prettier-ignore

/** What the server could only do wrong. */
export function llamaServerRefusal(request: PreprocessedRequest, facts: LlamaServerFacts): DynamoError | undefined {
  const refuse = (what: string): DynamoError => new DynamoError("unsupported-operation", `llama.cpp's server ${what}`);
  if (request.output.promptLogprobs) return refuse("tells no logprobs of prompts");
  if (request.cacheNamespace !== "") return refuse("cannot keep the caches of namespaces apart (cache_salt)");
  const { stop, resumedTokens = 0, loraName } = request;
  if (stop.minTokens > resumedTokens && stop.stopTokenIds.length > 0) return refuse("knows no min_tokens");
  if (loraName !== undefined && !facts.loraIds.has(loraName)) {
    return new DynamoError("model-not-found", `the engine has no adapter ${loraName}`);
  }
  return undefined;
}
