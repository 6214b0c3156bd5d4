import { DynamoError } from "../../errors/index.ts";
import { promptLengthOf, type PreprocessedRequest, type StepWriter, type TokenLogprob } from "../../protocol/index.ts";
import type { TransferTicket } from "../base.ts";
import type { AnswerSink } from "./answer.ts";
import type { OpenCall } from "./engine-http.ts";

/**
 * One request at a foreign engine: what its answer said since the last step, and where it stands. Keeps the rules of the
 * engine contract whatever the engine's own are: a stop token is not part of the output and ends the answer, no token comes
 * beyond the limit, the end is told once and after the engine's last word (which counts the tokens from its cache).
 */
export interface ForeignStreamOptions {
  readonly id: number;
  readonly request: PreprocessedRequest;
  readonly nowMs: number;
  readonly contextLength: number;
  readonly predictedCachedTokens: number;
  readonly keepsTokens: boolean;
  /** Its tokens are made here from its text: the engine counts its own, and no byte of what it says may be lost to our count. */
  readonly isText: boolean;
  /** Of disaggregated serving. @default the whole request */
  readonly leg?: TransferLeg | undefined;
  /** Something is there to be told. */
  readonly onDirty: (stream: ForeignStream) => void;
}

/** The first part of a request, or the second one, for which another engine has the prompt's blocks. */
export type TransferLeg =
  | { readonly kind: "prefill"; readonly requestId: string }
  | { readonly kind: "decode"; readonly ticket: TransferTicket };

type Finish = "stop" | "length" | "cancelled";

export class ForeignStream implements AnswerSink {
  readonly id: number;
  readonly request: PreprocessedRequest;
  readonly promptTokens: number;
  readonly predictedCachedTokens: number;
  readonly leg: TransferLeg | undefined;
  /** Of a prefill leg: what its engine said for the decode engine. */
  transferred: Readonly<Record<string, unknown>> | undefined = undefined;
  /** Tokens that may still come. */
  readonly maxNewTokens: number;
  /** Of the rest, that must come before a stop token counts. */
  readonly #minNewTokens: number;
  readonly #isText: boolean;
  readonly #onDirty: (stream: ForeignStream) => void;
  readonly #startedMs: number;
  call: OpenCall | undefined = undefined;
  newTokens = 0;
  /** The tokens themselves, where somebody wants to know what was computed. */
  readonly keptTokens: number[] | undefined;
  firstTokenMs = -1;
  /** Where the engine keeps it. */
  slotId: number | undefined = undefined;
  isDirty = false;
  /** Its final entry is written. */
  isEnded = false;
  /** Counts by the engine's word, else by ours. */
  cachedTokens: number;
  #hasFirst = false;
  #pending: number[] = [];
  #logprobs: TokenLogprob[] = [];
  #promptLogprobs: readonly TokenLogprob[] | undefined = undefined;
  #reported: number | undefined = undefined;
  #finish: Finish | undefined = undefined;
  #error: DynamoError | undefined = undefined;
  /** The engine has nothing more to say: the end may be told. */
  #isOver = false;

  constructor(options: ForeignStreamOptions) {
    const { id, request, nowMs, contextLength, predictedCachedTokens, keepsTokens, isText, leg, onDirty } = options;
    this.id = id;
    this.leg = leg;
    this.request = request;
    this.#isText = isText;
    this.#onDirty = onDirty;
    this.#startedMs = nowMs;
    this.predictedCachedTokens = predictedCachedTokens;
    this.cachedTokens = predictedCachedTokens;
    this.keptTokens = keepsTokens ? [] : undefined;
    this.promptTokens = promptLengthOf(request);
    const { stop, resumedTokens = 0, tokenIds } = request;
    this.maxNewTokens = Math.min(stop.maxTokens - resumedTokens, contextLength - tokenIds.length);
    this.#minNewTokens = Math.max(0, stop.minTokens - resumedTokens);
  }

  get minNewTokens(): number {
    return this.#minNewTokens;
  }

  /** The answer is known to be over, whatever else comes. */
  get isSettled(): boolean {
    return this.#finish !== undefined || this.#error !== undefined;
  }

  // ---- From the engine's answer ----

  tokens(tokenIds: readonly number[], logprobs?: readonly TokenLogprob[]): void {
    if (this.isSettled) return this.#overrun();
    const { stopTokenIds } = this.request.stop;
    for (let i = 0; i < tokenIds.length; i++) {
      const token = tokenIds[i]!;
      if (this.newTokens >= this.#minNewTokens && stopTokenIds.length > 0 && stopTokenIds.includes(token)) {
        this.#settle("stop");
        return;
      }
      this.#pending.push(token);
      this.keptTokens?.push(token);
      if (this.request.output.topLogprobs >= 0) this.#logprobs.push(logprobs?.[i] ?? NO_LOGPROB);
      this.newTokens++;
      if (this.newTokens === this.maxNewTokens && !this.#isText) {
        this.#settle("length");
        return;
      }
    }
    this.#dirty();
  }

  /** It goes on behind an end that it should have seen: it is told. */
  #overrun(): void {
    this.call?.abort();
    this.over();
  }

  promptLogprobs(records: readonly TokenLogprob[]): void {
    this.#promptLogprobs = records;
    this.#dirty();
  }

  cached(tokens: number): void {
    // Blocks of another engine count as cached there; here they were computed for this very request.
    if (this.leg?.kind === "decode") return;
    this.#reported = Math.min(tokens, this.promptTokens);
    this.cachedTokens = this.#reported;
  }

  slot(id: number): void {
    this.slotId = id;
  }

  transfer(parameters: Readonly<Record<string, unknown>>): void {
    this.transferred = parameters;
  }

  finish(reason: "stop" | "length"): void {
    if (!this.isSettled) this.#settle(reason);
  }

  fail(error: DynamoError): void {
    if (this.isEnded || this.#error !== undefined) return;
    this.#error = error;
    this.#isOver = true;
    this.#dirty();
  }

  /** The answer came whole. */
  over(): void {
    if (!this.isSettled) {
      this.fail(new DynamoError("engine-stopped", "the engine ended the answer before its end"));
      return;
    }
    this.#isOver = true;
    this.#dirty();
  }

  cancel(): void {
    if (this.#error !== undefined || this.isEnded) return;
    this.#finish = "cancelled";
    this.#isOver = true;
    this.#dirty();
  }

  // ---- To the step ----

  /** Writes what is new; nothing when there is nothing to say. */
  write(writer: StepWriter, nowMs: number): void {
    this.isDirty = false;
    const isFinal = this.isSettled && this.#isOver;
    if (this.isEnded || (!isFinal && this.#pending.length === 0 && this.#promptLogprobs === undefined)) return;
    writer.beginEntry(this.id);
    if (this.#error === undefined || this.#pending.length > 0) this.#writeBody(writer, nowMs);
    if (isFinal) this.#writeEnd(writer, nowMs);
    writer.endEntry();
  }

  #writeBody(writer: StepWriter, nowMs: number): void {
    if (!this.#hasFirst) {
      this.#hasFirst = true;
      this.firstTokenMs = nowMs;
      writer.first({
        promptTokens: this.promptTokens,
        // An answer of one step says its count before its first entry is written.
        cachedTokens: this.cachedTokens,
        queueMs: 0,
        prefillMs: nowMs - this.#startedMs,
      });
      if (this.#reported !== undefined) this.#reported = undefined;
    }
    if (this.#promptLogprobs !== undefined) {
      writer.promptLogprobs(this.#promptLogprobs);
      this.#promptLogprobs = undefined;
    }
    if (this.#pending.length > 0) {
      if (this.#pending.length === 1) writer.token(this.#pending[0]!);
      else writer.tokens(this.#pending);
      this.#pending = [];
    }
    if (this.#logprobs.length > 0) {
      writer.logprobs(this.#logprobs);
      this.#logprobs = [];
    }
  }

  #writeEnd(writer: StepWriter, nowMs: number): void {
    this.isEnded = true;
    if (this.#error !== undefined) {
      writer.error(this.#error);
      return;
    }
    if (this.#reported !== undefined) writer.cached(this.#reported);
    writer.finish(this.#finish!, nowMs - this.firstTokenMs);
  }

  #settle(finish: Finish): void {
    this.#finish = finish;
    this.#dirty();
  }

  #dirty(): void {
    if (this.isDirty || this.isEnded) return;
    this.isDirty = true;
    this.#onDirty(this);
  }
}

/** For a token whose logprob an engine leaves out. */
const NO_LOGPROB: TokenLogprob = Object.freeze({ logprob: -9_999, topIds: [], topLogprobs: [] });
