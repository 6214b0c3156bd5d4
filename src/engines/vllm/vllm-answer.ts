import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest, TokenLogprob } from "../../protocol/index.ts";
import type { AnswerReader, AnswerSink } from "../foreign/index.ts";
import type { VllmRoute } from "./vllm-request.ts";

/** vLLM's answers, of either route, streamed or whole. Unknown fields are left alone; a missing one that counts throws. */
interface Usage {
  readonly prompt_tokens_details?: { readonly cached_tokens?: number | null } | null;
}

/** `generate`: tokens as `token_id:123`; with the alternatives of a token, the sampled one first. */
interface ChatLogprobs {
  readonly content: readonly {
    readonly logprob: number;
    readonly top_logprobs: readonly { readonly token: string; readonly logprob: number }[];
  }[];
}

/** `completions`: the alternatives of a token as an object. */
interface CompletionLogprobs {
  readonly token_logprobs: readonly (number | null)[];
  readonly top_logprobs: readonly (Readonly<Record<string, number>> | null)[];
}

type PromptLogprobs = readonly (Readonly<
  Record<string, { readonly logprob: number; readonly rank?: number }>
> | null)[];

interface Choice {
  readonly token_ids?: readonly number[] | null;
  readonly logprobs?: ChatLogprobs | CompletionLogprobs | null;
  readonly finish_reason?: string | null;
  readonly prompt_logprobs?: PromptLogprobs | null;
}

interface Answer {
  readonly choices?: readonly Choice[];
  readonly usage?: Usage | null;
  readonly prompt_logprobs?: PromptLogprobs | null;
  readonly kv_transfer_params?: Readonly<Record<string, unknown>> | null;
  readonly error?: VllmError | null;
}

interface VllmError {
  readonly message?: string;
  readonly type?: string;
  readonly code?: number;
}

export class VllmAnswerReader implements AnswerReader {
  readonly #request: PreprocessedRequest;
  readonly #route: VllmRoute;
  readonly #sink: AnswerSink;

  constructor(request: PreprocessedRequest, route: VllmRoute, sink: AnswerSink) {
    this.#request = request;
    this.#route = route;
    this.#sink = sink;
  }

  event(data: string): void {
    this.#read(JSON.parse(data) as Answer);
  }

  whole(text: string): void {
    this.#read(JSON.parse(text) as Answer);
  }

  #read(answer: Answer): void {
    const sink = this.#sink;
    if (answer.error !== undefined && answer.error !== null) {
      sink.fail(vllmError(answer.error.code ?? 500, answer.error.message ?? "no reason given"));
      return;
    }
    const cached = answer.usage?.prompt_tokens_details?.cached_tokens;
    if (typeof cached === "number") sink.cached(cached);
    const { kv_transfer_params: transfer } = answer;
    if (transfer !== undefined && transfer !== null) sink.transfer(transfer);
    const choice = answer.choices?.[0];
    if (choice === undefined) return;
    const promptLogprobs = answer.prompt_logprobs ?? choice.prompt_logprobs;
    if (promptLogprobs !== undefined && promptLogprobs !== null && this.#request.output.promptLogprobs) {
      sink.promptLogprobs(this.#promptRecords(promptLogprobs));
    }
    const { token_ids: tokenIds, finish_reason: finish } = choice;
    if (tokenIds === undefined || tokenIds === null) {
      throw new Error("an answer without token ids: the server does not know return_token_ids");
    }
    if (tokenIds.length > 0) sink.tokens(tokenIds, this.#records(choice, tokenIds));
    if (finish !== undefined && finish !== null) this.#finish(finish);
  }

  #finish(reason: string): void {
    switch (reason) {
      case "length":
        return this.#sink.finish("length");
      case "stop":
      // It went round in circles and was stopped for it.
      case "repetition":
        return this.#sink.finish("stop");
      case "abort":
        return this.#sink.fail(new DynamoError("engine-stopped", "vLLM aborted the request: it was paused, put to sleep or told to"));
      default:
        return this.#sink.fail(new DynamoError("engine-failed", `vLLM ended the request with ${reason}`));
    }
  } // prettier-ignore

  #records(choice: Choice, tokenIds: readonly number[]): TokenLogprob[] | undefined {
    const top = this.#request.output.topLogprobs;
    if (top < 0 || choice.logprobs === undefined || choice.logprobs === null) return undefined;
    if (this.#route === "generate") {
      const { content } = choice.logprobs as ChatLogprobs;
      return content.map(({ logprob, top_logprobs: alternatives }) =>
        recordOf(logprob, alternatives.map(({ token, logprob: one }) => [tokenIdOf(token), one]), top)); // prettier-ignore
    }
    const { token_logprobs: own, top_logprobs: alternatives } = choice.logprobs as CompletionLogprobs;
    return tokenIds.map((_, i) =>
      recordOf(own[i] ?? -9_999, Object.entries(alternatives[i] ?? {}).map(([token, one]) => [tokenIdOf(token), one]), top)); // prettier-ignore
  }

  /** One for each token but the first. */
  #promptRecords(records: PromptLogprobs): TokenLogprob[] {
    const top = Math.max(0, this.#request.output.topLogprobs);
    const { tokenIds } = this.#request;
    return records.slice(1).map((record, i) => {
      const alternatives = Object.entries(record ?? {}).map(([id, { logprob }]) => [Number(id), logprob] as const);
      return recordOf(record?.[String(tokenIds[i + 1])]?.logprob ?? -9_999, alternatives, top);
    });
  }
}

/** The best `top` of the alternatives; vLLM puts the token itself among them, whether it is one of the best or not. */
function recordOf(logprob: number, alternatives: readonly (readonly [number, number])[], top: number): TokenLogprob {
  const best = alternatives.toSorted((a, b) => b[1] - a[1]).slice(0, top);
  return { logprob, topIds: best.map(([id]) => id), topLogprobs: best.map(([, one]) => one) };
}

function tokenIdOf(token: string): number {
  const id = token.startsWith("token_id:") ? Number(token.slice(9)) : NaN;
  if (!Number.isInteger(id)) throw new Error("a logprob without a token id");
  return id;
}

/** The body of an answer with another status than 200: `{"error":{...}}`, `{"detail":...}`, or whatever a proxy says. */
export function vllmErrorOf(status: number, text: string): DynamoError {
  let message = text.slice(0, 500);
  try {
    const body = JSON.parse(text) as { error?: VllmError | null; detail?: unknown; message?: unknown };
    const told = body.error?.message ?? body.detail ?? body.message;
    if (typeof told === "string") message = told;
  } catch {
    // Plain text.
  }
  return vllmError(status, message);
}

function vllmError(code: number, message: string): DynamoError {
  const diagnostic = `vLLM answered ${code}: ${message.slice(0, 2_000)}`;
  if (code === 400 && /maximum (?:model|context) length|max_model_len/i.test(message)) {
    return new DynamoError("context-length", firstLine(message), { diagnostic });
  }
  if (code === 400 || code === 422) {
    return new DynamoError("invalid-field", `vLLM refused the request: ${firstLine(message)}`, { diagnostic });
  }
  if (code === 429 || code === 503) return new DynamoError("worker-full", "vLLM takes no more requests now", { diagnostic });
  if (code >= 500 && /EngineCore|EngineDead/.test(message)) {
    return new DynamoError("engine-stopped", "vLLM's engine process died", { diagnostic });
  }
  return new DynamoError("engine-failed", `vLLM failed the request (status ${code})`, { diagnostic });
} // prettier-ignore

function firstLine(text: string): string {
  return text.split("\n", 1)[0]!.slice(0, 300);
}
