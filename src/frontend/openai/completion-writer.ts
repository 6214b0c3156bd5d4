import type { Usage } from "../../protocol/openai/index.ts";
import type { LogprobEntry } from "../response-writer.ts";
import { answerHead, characterCount, completionLogprobsJson, usageJson, type AnswerDetails } from "./answer-parts.ts";
import { StreamWriter } from "./stream-writer.ts";
import { WholeWriter } from "./whole-writer.ts";

/** Answers of `POST /v1/completions` (OpenAI API reference, "completion object"; chunks have the same shape). */
const ID_PREFIX = "cmpl-";
const OBJECT = "text_completion";

export class CompletionStreamWriter extends StreamWriter {
  readonly #head: string;
  readonly #tail: string;
  /** Where each choice's next token starts in its text; only kept when logprobs are written. */
  readonly #offsets: number[];

  constructor(details: AnswerDetails) {
    super(details);
    this.#head = `data: {${answerHead(details, ID_PREFIX, OBJECT)},"choices":[`;
    this.#tail = details.includeUsage ? `],"usage":null}\n\n` : `]}\n\n`;
    this.#offsets = Array.from({ length: details.choices }, () => 0);
  }

  protected textEvents(choice: number, textJson: string, logprobs: readonly LogprobEntry[] | undefined): string {
    const logprobsJson = logprobs === undefined ? "null" : this.#logprobsJson(choice, logprobs);
    return `${this.#head}{"text":${textJson},"index":${choice},"logprobs":${logprobsJson},"finish_reason":null}${this.#tail}`;
  }

  protected finishEvents(choice: number, reason: "stop" | "length"): string {
    return `${this.#head}{"text":"","index":${choice},"logprobs":null,"finish_reason":"${reason}"}${this.#tail}`;
  }

  protected usageEvent(usage: Usage): string {
    return `${this.#head}],"usage":${usageJson(usage)}}\n\n`;
  }

  protected nvextEvent(nvextJson: string): string {
    return `${this.#head}],"nvext":${nvextJson}}\n\n`;
  }

  #logprobsJson(choice: number, logprobs: readonly LogprobEntry[]): string {
    const offset = this.#offsets[choice]!;
    let length = 0;
    for (const entry of logprobs) length += characterCount(entry.token);
    this.#offsets[choice] = offset + length;
    return completionLogprobsJson(logprobs, offset);
  }
}

export class CompletionWholeWriter extends WholeWriter {
  protected choiceJson(
    choice: number,
    textJson: string,
    logprobs: readonly LogprobEntry[] | undefined,
    reason: "stop" | "length",
  ): string {
    const logprobsJson = logprobs === undefined ? "null" : completionLogprobsJson(logprobs, 0);
    return `{"text":${textJson},"index":${choice},"logprobs":${logprobsJson},"finish_reason":"${reason}"}`;
  }

  protected answerJson(choicesJson: string, usage: Usage): string {
    const head = answerHead(this.details, ID_PREFIX, OBJECT);
    return `{${head},"choices":[${choicesJson}],"usage":${usageJson(usage)}}`;
  }
}
