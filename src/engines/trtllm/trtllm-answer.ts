import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest, TokenLogprob } from "../../protocol/index.ts";
import { errorMessageOf, firstLine, type AnswerReader, type AnswerSink } from "../foreign/index.ts";

import { rawObject } from "./trtllm-transfer.ts";

/** Answers of `trtllm-serve` on `/v1/completions` with `detokenize` off. A missing field that counts throws. */
interface Choice {
  readonly token_ids?: readonly number[] | null;
  readonly logprobs?: { readonly token_logprobs?: readonly (number | null)[] } | null;
  readonly finish_reason?: string | null;
}

interface Answer {
  readonly choices?: readonly Choice[];
  readonly usage?: { readonly prompt_tokens_details?: { readonly cached_tokens?: number } | null } | null;
  readonly error?: unknown;
  readonly object?: string;
}

const LEAST = -9_999;

export class TrtllmAnswerReader implements AnswerReader {
  readonly #request: PreprocessedRequest;
  readonly #sink: AnswerSink;

  /** Of a context server: what the generation server has to be told is in it. */
  readonly #isPrefill: boolean;

  constructor(request: PreprocessedRequest, sink: AnswerSink, isPrefill = false) {
    this.#isPrefill = isPrefill;
    this.#request = request;
    this.#sink = sink;
  }

  event(data: string): void {
    this.#read(data);
  }

  whole(text: string): void {
    this.#read(text);
  }

  #read(text: string): void {
    const sink = this.#sink;
    const { choices = [], usage, error, object } = JSON.parse(text) as Answer;
    if ((error !== undefined && error !== null) || object === "error") return sink.fail(trtllmErrorOf(400, text));
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    if (typeof cached === "number") sink.cached(cached);
    const choice = choices[0];
    if (choice === undefined) return;
    const { token_ids: tokenIds, finish_reason: finish } = choice;
    if (tokenIds === undefined || tokenIds === null) {
      throw new Error("an answer without token ids: the server does not know detokenize");
    }
    if (this.#isPrefill) {
      const json = rawObject(text, "disaggregated_params");
      if (json !== undefined) sink.transfer({ json });
    }
    if (tokenIds.length > 0) sink.tokens(tokenIds, this.#records(choice, tokenIds));
    if (finish !== undefined && finish !== null) this.#finish(finish);
  }

  #finish(reason: string): void {
    // A context server stops where the other one is to go on.
    if (reason === "length" || (this.#isPrefill && reason === "not_finished")) this.#sink.finish("length");
    else if (reason === "stop") this.#sink.finish("stop");
    else if (reason === "cancelled") {
      this.#sink.fail(new DynamoError("engine-stopped", "TensorRT-LLM cancelled the request"));
    } else this.#sink.fail(new DynamoError("engine-failed", `TensorRT-LLM ended the request with ${reason}`));
  }

  #records({ logprobs }: Choice, tokenIds: readonly number[]): TokenLogprob[] | undefined {
    if (this.#request.output.topLogprobs < 0) return undefined;
    const own = logprobs?.token_logprobs ?? [];
    return tokenIds.map((_, i) => ({ logprob: own[i] ?? LEAST, topIds: [], topLogprobs: [] }));
  }
}

/** `{"object":"error","message":...,"type":...,"param":null,"code":400}`, or whatever a proxy says. */
export function trtllmErrorOf(status: number, text: string): DynamoError {
  const message = errorMessageOf(text);
  const diagnostic = `TensorRT-LLM answered ${status}: ${message.slice(0, 2_000)}`;
  if (status === 400 && /max_seq_len|max_num_tokens|max_input_len|context length|prompt length/i.test(message)) {
    return new DynamoError("context-length", firstLine(message), { diagnostic });
  }
  if (status === 400 || status === 422) {
    return new DynamoError("invalid-field", `TensorRT-LLM refused the request: ${firstLine(message)}`, { diagnostic });
  }
  return new DynamoError("engine-failed", `TensorRT-LLM failed the request (status ${status})`, { diagnostic });
}
