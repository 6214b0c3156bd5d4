import type { Usage } from "../../protocol/openai/index.ts";
import type { LogprobEntry } from "../response-writer.ts";
import { answerHead, chatLogprobsJson, usageJson, type AnswerDetails } from "./answer-parts.ts";
import { StreamWriter } from "./stream-writer.ts";
import { WholeWriter } from "./whole-writer.ts";

/** Answers of `POST /v1/chat/completions` (OpenAI API reference, "chat completion object" and "chunk object"). */
const ID_PREFIX = "chatcmpl-";

export class ChatStreamWriter extends StreamWriter {
  /** `data: {...,"choices":[{"index":` */
  readonly #head: string;
  /** What closes an event: `}\n\n` or `,"usage":null}\n\n`. */
  readonly #tail: string;
  readonly #textHeads: string[] = [];
  readonly #textTail: string;

  constructor(details: AnswerDetails) {
    super(details);
    this.#head = `data: {${answerHead(details, ID_PREFIX, "chat.completion.chunk")},"choices":[`;
    this.#tail = details.includeUsage ? `],"usage":null}\n\n` : `]}\n\n`;
    this.#textTail = `},"logprobs":null,"finish_reason":null}${this.#tail}`;
  }

  protected textEvents(choice: number, textJson: string, logprobs: readonly LogprobEntry[] | undefined): string {
    const opening = this.#open(choice);
    const textHead = this.#textHeads[choice]!;
    if (logprobs === undefined) return opening + textHead + textJson + this.#textTail;
    const logprobsJson = chatLogprobsJson(logprobs);
    return `${opening}${textHead}${textJson}},"logprobs":${logprobsJson},"finish_reason":null}${this.#tail}`;
  }

  protected finishEvents(choice: number, reason: "stop" | "length"): string {
    const opening = this.#open(choice);
    return `${opening}${this.#head}{"index":${choice},"delta":{},"logprobs":null,"finish_reason":"${reason}"}${this.#tail}`;
  }

  protected usageEvent(usage: Usage): string {
    return `${this.#head}],"usage":${usageJson(usage)}}\n\n`;
  }

  protected nvextEvent(nvextJson: string): string {
    return `${this.#head}],"nvext":${nvextJson}}\n\n`;
  }

  /** The first event of a choice carries the role; empty for the others. */
  #open(choice: number): string {
    if (this.#textHeads[choice] !== undefined) return "";
    this.#textHeads[choice] = `${this.#head}{"index":${choice},"delta":{"content":`;
    return (
      `${this.#head}{"index":${choice},"delta":{"role":"assistant","content":"","refusal":null},` +
      `"logprobs":null,"finish_reason":null}${this.#tail}`
    );
  }
}

export class ChatWholeWriter extends WholeWriter {
  protected choiceJson(
    choice: number,
    textJson: string,
    logprobs: readonly LogprobEntry[] | undefined,
    reason: "stop" | "length",
  ): string {
    const logprobsJson = logprobs === undefined ? "null" : chatLogprobsJson(logprobs);
    return (
      `{"index":${choice},"message":{"role":"assistant","content":${textJson},"refusal":null,"annotations":[]},` +
      `"logprobs":${logprobsJson},"finish_reason":"${reason}"}`
    );
  }

  protected answerJson(choicesJson: string, usage: Usage): string {
    const head = answerHead(this.details, ID_PREFIX, "chat.completion");
    return `{${head},"choices":[${choicesJson}],"usage":${usageJson(usage)}}`;
  }
}
