import { DynamoError } from "../../errors/index.ts";
import type { PreprocessedRequest, TokenLogprob } from "../../protocol/index.ts";
import { errorMessageOf, firstLine, type AnswerReader, type AnswerSink } from "../foreign/index.ts";

/** SGLang's answers on `/generate`. Unknown fields are left alone; a missing one that counts throws. */
interface Answer {
  readonly output_ids?: readonly number[];
  readonly meta_info?: MetaInfo;
  readonly error?: { readonly message?: string } | null;
}

/** `[logprob, token id, text or null]`; the first token of a prompt has no logprob. */
type Entry = readonly [logprob: number | null, tokenId: number, text?: string | null];

interface MetaInfo {
  readonly finish_reason?: FinishReason | null;
  readonly cached_tokens?: number;
  readonly output_token_logprobs?: readonly Entry[];
  readonly output_top_logprobs?: readonly (readonly Entry[] | null)[];
  readonly input_token_logprobs?: readonly Entry[];
  readonly input_top_logprobs?: readonly (readonly Entry[] | null)[];
}

interface FinishReason {
  readonly type: string;
  readonly message?: string | null;
  readonly status_code?: number | null;
}

export class SglangAnswerReader implements AnswerReader {
  readonly #request: PreprocessedRequest;
  readonly #isIncremental: boolean;
  readonly #sink: AnswerSink;
  /** Tokens of the answer that were passed on. */
  #seen = 0;
  #hasPromptLogprobs = false;

  constructor(request: PreprocessedRequest, isIncremental: boolean, sink: AnswerSink) {
    this.#request = request;
    this.#isIncremental = isIncremental;
    this.#sink = sink;
  }

  event(data: string): void {
    this.#read(JSON.parse(data) as Answer, this.#isIncremental);
  }

  whole(text: string): void {
    this.#read(JSON.parse(text) as Answer, false);
  }

  #read({ output_ids: outputIds, meta_info: info, error }: Answer, isIncremental: boolean): void {
    const sink = this.#sink;
    if (error !== undefined && error !== null) {
      return sink.fail(sglangError(400, error.message ?? "no reason given"));
    }
    if (info === undefined) throw new Error("an answer without meta_info");
    if (typeof info.cached_tokens === "number") sink.cached(info.cached_tokens);
    const { finish_reason: finish } = info;
    if (finish?.type === "abort") return sink.fail(abortError(finish));
    if (outputIds === undefined) throw new Error("an answer without output_ids");
    if (this.#request.output.promptLogprobs && !this.#hasPromptLogprobs && info.input_token_logprobs !== undefined) {
      this.#hasPromptLogprobs = true;
      sink.promptLogprobs(this.#promptRecords(info));
    }
    const from = isIncremental ? 0 : this.#seen;
    if (outputIds.length > from) {
      sink.tokens(outputIds.slice(from), this.#records(info, from, outputIds.length));
      this.#seen += outputIds.length - from;
    }
    if (finish !== undefined && finish !== null) this.#finish(finish);
  }

  #finish({ type }: FinishReason): void {
    if (type === "length") this.#sink.finish("length");
    else if (type === "stop") this.#sink.finish("stop");
    else this.#sink.fail(new DynamoError("engine-failed", `SGLang ended the request with ${type}`));
  }

  #records(info: MetaInfo, from: number, to: number): TokenLogprob[] | undefined {
    const { output_token_logprobs: own, output_top_logprobs: top } = info;
    if (this.#request.output.topLogprobs < 0 || own === undefined) return undefined;
    const records: TokenLogprob[] = [];
    for (let i = from; i < to; i++) records.push(this.#record(own[i], top?.[i]));
    return records;
  }

  /** One for each token but the first. */
  #promptRecords({ input_token_logprobs: own = [], input_top_logprobs: top }: MetaInfo): TokenLogprob[] {
    return own.slice(1).map((entry, i) => this.#record(entry, top?.[i + 1]));
  }

  #record(own: Entry | undefined, top: readonly Entry[] | null | undefined): TokenLogprob {
    const wanted = Math.max(0, this.#request.output.topLogprobs);
    const best = (top ?? []).toSorted((a, b) => (b[0] ?? LEAST) - (a[0] ?? LEAST)).slice(0, wanted);
    return {
      logprob: own?.[0] ?? LEAST,
      topIds: best.map(([, id]) => id),
      topLogprobs: best.map(([logprob]) => logprob ?? LEAST),
    };
  }
}

const LEAST = -9_999;

/** The end of a request that the scheduler took down: with a status where it is the request's fault or the server's. */
function abortError({ message, status_code: status }: FinishReason): DynamoError {
  const text = message ?? "no reason given";
  if (typeof status === "number") return sglangError(status, text);
  return new DynamoError("engine-stopped", `SGLang aborted the request: ${firstLine(text)}`);
}

/** The body of an answer with another status than 200. */
export function sglangErrorOf(status: number, text: string): DynamoError {
  return sglangError(status, errorMessageOf(text));
}

function sglangError(code: number, message: string): DynamoError {
  const diagnostic = `SGLang answered ${code}: ${message.slice(0, 2_000)}`;
  if (code === 400 && /context length|exceeds the maximum allowed length|longer than the model/i.test(message)) {
    return new DynamoError("context-length", firstLine(message), { diagnostic });
  }
  if (code === 400 || code === 422) {
    return new DynamoError("invalid-field", `SGLang refused the request: ${firstLine(message)}`, { diagnostic });
  }
  if (code === 503 && /queue is full/i.test(message)) {
    return new DynamoError("worker-full", "SGLang's queue is full", { diagnostic });
  }
  return new DynamoError("engine-failed", `SGLang failed the request (status ${code})`, { diagnostic });
}
