import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import {
  TextTokens,
  errorMessageOf,
  retryAfterMsOf,
  type AnswerHeaders,
  type AnswerReader,
  type AnswerSink,
  type TokenBytes,
} from "../foreign/index.ts";
import type { OpenAiFacts } from "./openai-probe.ts";

/** Answers of `/v1/completions`. Usage, cached tokens, the end marker: all of it may be there or not. */
interface Answer {
  readonly choices?: readonly {
    readonly text?: string | null;
    readonly token_ids?: readonly number[] | null;
    readonly finish_reason?: string | null;
  }[];
  readonly usage?: { readonly prompt_tokens_details?: { readonly cached_tokens?: number | null } | null } | null;
  readonly error?: unknown;
}

/** Servers' words for the same two ends. */
const FINISHES: Readonly<Record<string, "stop" | "length">> = {
  stop: "stop",
  eos: "stop",
  eos_token: "stop",
  end_turn: "stop",
  stop_sequence: "stop",
  stop_str: "stop",
  complete: "stop",
  repetition: "stop",
  length: "length",
  max_tokens: "length",
  max_length: "length",
  model_length: "length",
};

export class OpenAiAnswerReader implements AnswerReader {
  readonly #isTokens: boolean;
  readonly #text: TextTokens;
  readonly #sink: AnswerSink;
  #isFinished = false;

  constructor(request: PreprocessedRequest, facts: OpenAiFacts, vocabulary: TokenBytes, sink: AnswerSink) {
    this.#isTokens = facts.form === "tokens";
    this.#text = new TextTokens(vocabulary, (request.resumedTokens ?? 0) > 0);
    this.#sink = sink;
  }

  event(data: string): void {
    this.#read(JSON.parse(data) as Answer);
  }

  whole(text: string): void {
    this.#read(JSON.parse(text) as Answer);
    this.done();
  }

  /** Some servers end without saying why. */
  done(): void {
    if (!this.#isFinished) this.#finish("stop");
  }

  #read(answer: Answer): void {
    if (answer.error !== undefined && answer.error !== null) {
      const { code, status } = answer.error as { code?: unknown; status?: unknown };
      const told = [code, status].find((value) => typeof value === "number");
      return this.#sink.fail(openAiErrorOf(typeof told === "number" ? told : 500, JSON.stringify(answer), {}, 0));
    }
    const cached = answer.usage?.prompt_tokens_details?.cached_tokens;
    if (typeof cached === "number") this.#sink.cached(cached);
    const choice = answer.choices?.[0];
    if (choice === undefined || this.#isFinished) return;
    const { text, token_ids: ids, finish_reason: reason } = choice;
    const tokens = this.#isTokens ? (ids ?? []) : this.#text.push(text ?? "");
    if (tokens.length > 0) this.#sink.tokens(tokens);
    if (reason !== undefined && reason !== null && reason !== "") this.#end(reason);
  }

  #end(reason: string): void {
    const finish = FINISHES[reason];
    if (finish !== undefined) return this.#finish(finish);
    if (reason === "abort" || reason === "cancelled") {
      return this.#sink.fail(new DynamoError("engine-stopped", "the server aborted the request"));
    }
    this.#sink.fail(new DynamoError("engine-failed", `the server ended the request with ${reason.slice(0, 40)}`));
  }

  #finish(finish: "stop" | "length"): void {
    this.#isFinished = true;
    const rest = this.#text.flush();
    if (rest.length > 0) this.#sink.tokens(rest);
    this.#sink.finish(finish);
  }
}

/** The body of an answer with another status than 200. */
export function openAiErrorOf(status: number, text: string, headers: AnswerHeaders, nowMs: number): DynamoError {
  const message = errorMessageOf(text);
  const diagnostic = `the server answered ${status}: ${message.slice(0, 2_000)}`;
  const shown = message.split("\n", 1)[0]!.slice(0, 300);
  if (status === 429 || status === 503) {
    const retryAfterMs = retryAfterMsOf(headers, nowMs);
    return new DynamoError("worker-full", "the server takes no more requests now", {
      diagnostic,
      ...(retryAfterMs === undefined ? {} : { retryAfterMs }),
    });
  }
  if (status === 502 || status === 504) {
    return new DynamoError("engine-stopped", "the server behind the upstream is gone", { diagnostic });
  }
  if ((status === 400 || status === 413 || status === 422) && isTooLong(text)) {
    return new DynamoError("context-length", shown, { diagnostic });
  }
  if (status === 400 || status === 422) {
    return new DynamoError("invalid-field", `the server refused the request: ${shown}`, { diagnostic });
  }
  if (status === 401 || status === 403) {
    return new DynamoError("engine-failed", `the server refuses the key (status ${status}); set DYN_ENGINE_API_KEY`, {
      diagnostic,
    });
  }
  return new DynamoError("engine-failed", `the server failed the request (status ${status})`, { diagnostic });
}

function isTooLong(text: string): boolean {
  return /context[_ ](?:length|size|window)|maximum (?:model |context )?length|max_model_len|too many tokens|prompt is too long/i.test(text);
} // prettier-ignore
