import { DynamoError } from "../../errors/index.ts";
import type { Usage } from "../../protocol/openai/index.ts";
import { isAsciiText, type SseWriter } from "../http/sse-writer.ts";
import type { LogprobEntry, ResponseWriter } from "../response-writer.ts";
import type { AnswerDetails } from "./answer-parts.ts";
import { errorFrame } from "./errors.ts";

/**
 * A streamed answer of the OpenAI family: one SSE event per delta, batched by `flush` into one socket write. Subclasses
 * give the events; this class keeps the order (headers, events, usage, `[DONE]`) and the end. Text is the only thing
 * serialised per token; it goes out as it is (UTF-8), and pure ASCII, the usual case, as latin1. A stream that failed
 * ends with an error event and without `[DONE]`, which is how the official clients tell.
 */
export abstract class StreamWriter implements ResponseWriter {
  protected readonly details: AnswerDetails;
  /** Whether the fixed parts of every event (id, model) are ASCII. */
  readonly #fixedAscii: boolean;
  readonly #sse: SseWriter;
  readonly #finished: boolean[];
  #ended = false;

  constructor(details: AnswerDetails) {
    this.details = details;
    this.#fixedAscii = isAsciiText(details.id) && isAsciiText(details.model);
    this.#sse = details.exchange.sse();
    this.#finished = Array.from({ length: details.choices }, () => false);
  }

  /** Events that carry `text`, which is JSON already; may put one before it that opens the choice. */
  protected abstract textEvents(
    choice: number,
    textJson: string,
    logprobs: readonly LogprobEntry[] | undefined,
  ): string;
  protected abstract finishEvents(choice: number, reason: "stop" | "length"): string;
  protected abstract usageEvent(usage: Usage): string;
  /** An event without choices that carries `nvext`. */
  protected abstract nvextEvent(nvextJson: string): string;

  delta(choice: number, text: string, logprobs: readonly LogprobEntry[] | undefined): void {
    if (this.#ended || (text.length === 0 && logprobs === undefined)) return;
    const ascii = this.#fixedAscii && logprobs === undefined && isAsciiText(text);
    this.#sse.push(this.textEvents(choice, JSON.stringify(text), logprobs), ascii);
  }

  finish(choice: number, reason: "stop" | "length"): void {
    if (this.#ended || this.#finished[choice] === true) return;
    this.#finished[choice] = true;
    this.#sse.push(this.finishEvents(choice, reason), this.#fixedAscii);
  }

  flush(): void {
    if (!this.#ended) this.#sse.flush();
  }

  complete(usage: Usage): void {
    if (this.#ended) return;
    if (this.#finished.includes(false)) {
      this.fail(new DynamoError("internal", "the answer ended before it was complete"));
      return;
    }
    this.#ended = true;
    if (this.details.nvext !== undefined) this.#sse.push(this.nvextEvent(this.details.nvext()), false);
    if (this.details.includeUsage) this.#sse.push(this.usageEvent(usage), this.#fixedAscii);
    this.#sse.push("data: [DONE]\n\n", true);
    this.#sse.end();
  }

  fail(error: DynamoError): void {
    if (this.#ended) return;
    this.#ended = true;
    if (!this.#sse.started) {
      this.details.exchange.sendError(error);
      return;
    }
    const event = errorFrame(error);
    this.#sse.push(event, isAsciiText(event));
    this.#sse.end();
  }

  get bufferedBytes(): number {
    return this.#sse.bufferedBytes;
  }

  get onDrained(): (() => void) | undefined {
    return this.#sse.onDrained;
  }

  set onDrained(onDrained: (() => void) | undefined) {
    this.#sse.onDrained = onDrained;
  }
}
