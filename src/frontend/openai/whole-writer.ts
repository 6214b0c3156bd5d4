import { DynamoError } from "../../errors/index.ts";
import type { Usage } from "../../protocol/openai/index.ts";
import type { LogprobEntry, ResponseWriter } from "../response-writer.ts";
import type { AnswerDetails } from "./answer-parts.ts";

/**
 * An answer sent in one piece: texts and logprobs are collected per choice until `complete`. Bounded by what the
 * request may generate; nothing is on the way to the client before the end, so there is nothing to wait for.
 */
export abstract class WholeWriter implements ResponseWriter {
  protected readonly details: AnswerDetails;
  /** Always 0 here: see above. */
  readonly bufferedBytes = 0;
  onDrained: (() => void) | undefined = undefined;
  readonly #texts: string[];
  readonly #logprobs: (LogprobEntry[] | undefined)[];
  readonly #reasons: ("stop" | "length" | undefined)[];
  #ended = false;

  constructor(details: AnswerDetails) {
    this.details = details;
    const { choices } = details;
    this.#texts = Array.from({ length: choices }, () => "");
    this.#logprobs = Array.from({ length: choices });
    this.#reasons = Array.from({ length: choices });
  }

  protected abstract choiceJson(
    choice: number,
    textJson: string,
    logprobs: readonly LogprobEntry[] | undefined,
    reason: "stop" | "length",
  ): string;
  protected abstract answerJson(choicesJson: string, usage: Usage): string;

  delta(choice: number, text: string, logprobs: readonly LogprobEntry[] | undefined): void {
    if (this.#ended) return;
    this.#texts[choice] += text;
    if (logprobs === undefined) return;
    const list = (this.#logprobs[choice] ??= []);
    for (const entry of logprobs) list.push(entry);
  }

  finish(choice: number, reason: "stop" | "length"): void {
    this.#reasons[choice] ??= reason;
  }

  flush(): void {
    // Nothing leaves before the end.
  }

  complete(usage: Usage): void {
    if (this.#ended) return;
    const choices: string[] = [];
    for (let choice = 0; choice < this.#texts.length; choice++) {
      const reason = this.#reasons[choice];
      if (reason === undefined) {
        this.fail(new DynamoError("internal", "the answer ended before it was complete"));
        return;
      }
      choices.push(this.choiceJson(choice, JSON.stringify(this.#texts[choice]), this.#logprobs[choice], reason));
    }
    this.#ended = true;
    const answer = this.answerJson(choices.join(","), usage);
    const { nvext, exchange } = this.details;
    exchange.jsonText(200, nvext === undefined ? answer : `${answer.slice(0, -1)},"nvext":${nvext()}}`);
  }

  fail(error: DynamoError): void {
    if (this.#ended) return;
    this.#ended = true;
    this.details.exchange.sendError(error);
  }
}
