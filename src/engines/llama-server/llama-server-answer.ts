import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest, TokenLogprob } from "../../protocol/index.ts";
import {
  TextTokens,
  firstLine,
  messageOf,
  type AnswerReader,
  type AnswerSink,
  type TokenBytes,
} from "../foreign/index.ts";

/** Events of `POST /completion`. Unknown fields are left alone. */
interface Event {
  readonly content?: string;
  readonly tokens?: readonly number[];
  readonly stop?: boolean;
  readonly stop_type?: string;
  readonly id_slot?: number;
  /** So far, this event's included. */
  readonly tokens_predicted?: number;
  readonly completion_probabilities?: readonly Probability[];
  readonly prompt_progress?: unknown;
  readonly timings?: { readonly cache_n?: number };
  readonly tokens_evaluated?: number;
  readonly error?: unknown;
}

interface Probability {
  readonly id: number;
  readonly logprob: number;
  readonly top_logprobs?: readonly { readonly id: number; readonly logprob: number }[];
}

/**
 * Reads an answer of llama.cpp's server. It tells the id of one token per event, but waits with the event until the text is
 * whole characters: of a character in three tokens only the last id comes. The ids that are missing (`tokens_predicted`
 * says how many) are found again from the text, so that the tokens say it to the byte.
 */
export class LlamaServerAnswerReader implements AnswerReader {
  readonly #request: PreprocessedRequest;
  readonly #vocabulary: TokenBytes;
  readonly #sink: AnswerSink;
  #count = 0;

  constructor(request: PreprocessedRequest, vocabulary: TokenBytes, sink: AnswerSink) {
    this.#request = request;
    this.#vocabulary = vocabulary;
    this.#sink = sink;
  }

  event(data: string): void {
    this.#read(JSON.parse(data) as Event);
  }

  whole(text: string): void {
    this.#read(JSON.parse(text) as Event);
  }

  #read(event: Event): void {
    if (event.error !== undefined) {
      const { code } = event.error as { code?: number };
      return this.#sink.fail(llamaServerErrorOf(code ?? 500, JSON.stringify(event)));
    }
    // Its `tokens` are made up.
    if (event.prompt_progress !== undefined) return;
    const { content = "", tokens, tokens_predicted: predicted } = event;
    if (tokens === undefined) throw new Error("an answer without token ids: the server does not know return_tokens");
    const before = this.#count;
    this.#count = Math.max(predicted ?? 0, before + tokens.length);
    const lost = this.#count - before - tokens.length;
    if (tokens.length > 0) {
      const ids = lost > 0 ? this.#restored(content, tokens, lost) : tokens;
      this.#sink.tokens(ids, this.#records(event.completion_probabilities, ids.length));
    }
    if (event.stop === true) this.#end(event);
  }

  /** `lost` tokens and then `tokens` say `content`. */
  #restored(content: string, tokens: readonly number[], lost: number): readonly number[] {
    const bytes = Buffer.from(content, "utf8");
    const tail = Buffer.concat(tokens.map((id) => this.#vocabulary.tokenBytes(id)));
    const head = bytes.subarray(0, Math.max(0, bytes.length - tail.length));
    if (bytes.subarray(head.length).equals(tail)) {
      const found = this.#vocabulary.split(head, lost);
      if (found !== undefined) return [...found, ...tokens];
    }
    // Bytes that are no text were shown as U+FFFD: that is what the client gets.
    return new TextTokens(this.#vocabulary, this.#count > tokens.length + lost).push(content);
  }

  #end(event: Event): void {
    const { timings, id_slot: slot, stop_type: type } = event;
    if (timings?.cache_n !== undefined) this.#sink.cached(timings.cache_n);
    if (slot !== undefined && slot >= 0) this.#sink.slot(slot);
    if (type === "limit") this.#sink.finish("length");
    else if (type === "eos" || type === "word") this.#sink.finish("stop");
    else this.#sink.fail(new DynamoError("engine-stopped", "the llama.cpp server ended the answer before its end", { diagnostic: `stop_type ${type ?? "none"}` }));
  } // prettier-ignore

  /** Those of tokens that were not told are missing: they stand in front. */
  #records(probabilities: readonly Probability[] | undefined, count: number): TokenLogprob[] | undefined {
    const top = this.#request.output.topLogprobs;
    if (top < 0 || probabilities === undefined) return undefined;
    const records = probabilities.map(({ logprob, top_logprobs: alternatives = [] }) => {
      const best = alternatives.slice(0, top);
      return { logprob, topIds: best.map(({ id }) => id), topLogprobs: best.map((one) => one.logprob) };
    });
    const lost = Array.from({ length: Math.max(0, count - records.length) }, () => UNKNOWN);
    return [...lost, ...records];
  }
}

const UNKNOWN: TokenLogprob = Object.freeze({ logprob: -9_999, topIds: [], topLogprobs: [] });

/** The body of an answer with another status than 200. */
export function llamaServerErrorOf(status: number, text: string): DynamoError {
  const message = messageOf(text);
  const diagnostic = `llama-server answered ${status}: ${message.slice(0, 2_000)}`;
  if (/exceed_context_size_error/.test(text)) return new DynamoError("context-length", firstLine(message), { diagnostic });
  if (status === 503 && /loading model/i.test(message)) return new DynamoError("engine-stopped", "the llama.cpp server is loading its model", { diagnostic });
  if (status === 429 || status === 503) return new DynamoError("worker-full", "the llama.cpp server takes no more requests now", { diagnostic });
  if (status === 400 || status === 422) return new DynamoError("invalid-field", `llama.cpp's server refused the request: ${firstLine(message)}`, { diagnostic });
  return new DynamoError("engine-failed", `the llama.cpp server failed the request (status ${status})`, { diagnostic });
} // prettier-ignore
