import type { TokenLogprob } from "../protocol/index.ts";
import type { Tokenizer } from "./preprocess/index.ts";
import type { LogprobEntry } from "./response-writer.ts";

/**
 * Pairs logprob records with text: a token's record goes out with the chunk that completes its text, and the records of
 * a stop string's tokens do not go out at all. One per choice, for all of its attempts: a record comes with its token, so
 * a stream that goes on elsewhere brings none twice.
 */
export class LogprobCollector {
  readonly #tokenizer: Tokenizer;
  readonly #records: TokenLogprob[] = [];
  readonly #waiting: { entry: LogprobEntry; startAt: number; endAt: number }[] = [];
  #prompt: LogprobEntry[] = [];
  /** The prompt's came: a further attempt need not compute them. */
  hasSeenPrompt = false;
  /** Characters decoded, and characters shown, since the start. */
  #decoded = 0;
  #shown = 0;

  constructor(tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer;
  }

  get hasPrompt(): boolean {
    return this.#prompt.length > 0;
  }

  add(records: readonly TokenLogprob[]): void {
    this.#records.push(...records);
  }

  /** The prompt's first token has nothing to be predicted from: its logprob is NaN, rendered as null. */
  addPrompt(records: readonly TokenLogprob[], tokenIds: Uint32Array): void {
    this.hasSeenPrompt = true;
    this.#prompt.push(this.#entry(tokenIds[0]!, { logprob: Number.NaN, topIds: [], topLogprobs: [] }));
    records.forEach((record, i) => this.#prompt.push(this.#entry(tokenIds[i + 1]!, record)));
  }

  /** One token was decoded to `decoded` more characters, of which (or of earlier ones) `shown` more went out. */
  advance(tokenId: number, decoded: number, shown: number): void {
    const record = this.#records.shift();
    const startAt = this.#decoded;
    this.#decoded += decoded;
    this.#shown += shown;
    if (record !== undefined)
      this.#waiting.push({ entry: this.#entry(tokenId, record), startAt, endAt: this.#decoded });
  }

  /** What may go out now. At the end everything does, but after a stop match only tokens that have shown text. */
  take(atEnd: boolean, stopped: boolean): LogprobEntry[] {
    const ready = this.#prompt;
    this.#prompt = [];
    let count = 0;
    for (const { startAt, endAt } of this.#waiting) {
      const out = stopped ? startAt < this.#shown : atEnd || endAt <= this.#shown;
      if (!out) break;
      count++;
    }
    for (const { entry } of this.#waiting.splice(0, count)) ready.push(entry);
    return ready;
  }

  #entry(tokenId: number, record: TokenLogprob): LogprobEntry {
    const top = record.topIds.map((id, i) => ({ ...this.#text(id), logprob: record.topLogprobs[i]! }));
    return { ...this.#text(tokenId), logprob: record.logprob, top };
  }

  #text(tokenId: number): { token: string; bytes: number[] } {
    const bytes = this.#tokenizer.tokenBytes(tokenId);
    return { token: Buffer.from(bytes).toString("utf8"), bytes: [...bytes] };
  }
}
