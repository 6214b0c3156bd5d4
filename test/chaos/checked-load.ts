import { Agent, request as httpRequest, type IncomingMessage } from "node:http";
import type { Random } from "../../src/std/index.ts";

/**
 * Constant load whose every answer is checked against what it must be, byte by byte. Each loop has one request at a time
 * and ends it in exactly one of the outcomes below, whatever happens on the way; a request that ends in none within its
 * deadline is `hung`, and that is never allowed. Written on node's own client and not on `src/bench`, which counts tokens
 * and does not keep them.
 *
 * A client does what one behind a load balancer does: when a frontend refuses the connection, or says it is draining,
 * or closes before it sent a byte, the request goes to the next frontend.
 */
export interface Expected {
  readonly prompt: string;
  readonly maxTokens: number;
  readonly text: string;
}

export type Outcome =
  /** The expected answer, whole. */
  | "ok"
  /** An error of the catalogue, as a status or as an event in the stream. */
  | "error"
  /** Whole, and not what was learned, where more than one answer is right: `text` is to be judged. */
  | "other"
  /** The frontend's connection broke after its first byte, or no frontend could be reached. */
  | "connection"
  /** Complete, and not what was expected. */
  | "wrong"
  /** Bytes that are no answer: not JSON, no end marker, an error without a reason. */
  | "malformed"
  | "hung";

export interface Ended {
  readonly outcome: Outcome;
  /** Reason of an error, or what was wrong. */
  readonly detail: string;
  readonly prompt: string;
  /** Of `other`. */
  readonly text: string;
  readonly startedMs: number;
  readonly endedMs: number;
}

export interface CheckedLoadOptions {
  readonly ports: readonly number[];
  readonly model: string;
  readonly expected: readonly Expected[];
  /** False for engines of floats, which may go either way at near ties. */
  readonly isAnswerUnique: boolean;
  readonly concurrency: number;
  readonly random: Random;
  readonly timeoutMs: number;
  readonly onEnd: (ended: Ended) => void;
}

export class CheckedLoad {
  readonly #options: CheckedLoadOptions;
  readonly #agent = new Agent({ keepAlive: true, maxSockets: Infinity });
  #isStopped = false;
  #loops: Promise<void>[] = [];
  sentCount = 0;

  constructor(options: CheckedLoadOptions) {
    this.#options = options;
  }

  start(): void {
    this.#loops = Array.from({ length: this.#options.concurrency }, () => this.#loop());
  }

  /** No new requests; resolves when those under way have ended. */
  async stop(): Promise<void> {
    this.#isStopped = true;
    await Promise.all(this.#loops);
  }

  close(): void {
    this.#agent.destroy();
  }

  async #loop(): Promise<void> {
    while (!this.#isStopped) await this.one();
  }

  async one(): Promise<Ended> {
    const { expected, random, onEnd } = this.#options;
    const wanted = expected[Math.floor(random.nextFloat() * expected.length)]!;
    const isStream = random.nextFloat() < 0.7;
    this.sentCount++;
    const startedMs = performance.now();
    const { outcome, detail } = await this.#tryFrontends(wanted, isStream);
    const isOther = outcome === "other";
    const ended: Ended = {
      outcome,
      detail: isOther ? "" : detail,
      prompt: wanted.prompt,
      text: isOther ? detail : "",
      startedMs,
      endedMs: performance.now(),
    };
    onEnd(ended);
    return ended;
  }

  async #tryFrontends(wanted: Expected, isStream: boolean): Promise<Pick<Ended, "outcome" | "detail">> {
    const { ports, random } = this.#options;
    const first = Math.floor(random.nextFloat() * ports.length);
    let last: Attempt | undefined;
    // Twice round, with a pause between: a frontend that is being started again listens within a second.
    for (let i = 0; i < 2 * ports.length; i++) {
      if (i === ports.length) await new Promise((resolve) => setTimeout(resolve, 1_500));
      last = await this.#send(ports[(first + i) % ports.length]!, wanted, isStream);
      if (!last.mayRetry) break;
    }
    return last!;
  }

  #send(port: number, wanted: Expected, isStream: boolean): Promise<Attempt> {
    const { model, timeoutMs, isAnswerUnique } = this.#options;
    const body = JSON.stringify({
      model,
      prompt: wanted.prompt,
      max_tokens: wanted.maxTokens,
      temperature: 0,
      stream: isStream,
      ...(isStream ? { stream_options: { include_usage: true } } : {}),
    });
    const { promise, resolve } = Promise.withResolvers<Attempt>();
    let hasAnswered = false;
    const request = httpRequest(
      {
        host: "127.0.0.1",
        port,
        path: "/v1/completions",
        method: "POST",
        agent: this.#agent,
        headers: { "content-type": "application/json", "content-length": Buffer.byteLength(body) },
      },
      (response) => {
        hasAnswered = true;
        readText(response, (text, isWhole) => {
          clearTimeout(timer);
          const judged = judge(response, text, isWhole, wanted, isStream);
          resolve(
            judged.outcome === "wrong" && judged.text !== undefined && !isAnswerUnique
              ? attempt("other", judged.text)
              : judged,
          );
        });
      },
    );
    const timer = setTimeout(() => {
      resolve({ outcome: "hung", detail: `no end within ${timeoutMs} ms`, mayRetry: false });
      request.destroy();
    }, timeoutMs);
    request.on("error", (error: NodeJS.ErrnoException) => {
      clearTimeout(timer);
      resolve({ outcome: "connection", detail: error.code ?? error.message, mayRetry: !hasAnswered });
    });
    request.end(body);
    return promise;
  }
}

interface Attempt {
  readonly outcome: Outcome;
  readonly detail: string;
  readonly mayRetry: boolean;
  /** Of an answer that is whole and whose finish reason and count of tokens are right. */
  readonly text?: string;
}

function readText(response: IncomingMessage, done: (text: string, isWhole: boolean) => void): void {
  const pieces: Buffer[] = [];
  response.on("data", (bytes: Buffer) => pieces.push(bytes));
  response.on("error", () => undefined);
  response.once("close", () => done(Buffer.concat(pieces).toString("utf8"), response.complete));
}

function judge(
  response: IncomingMessage,
  text: string,
  isWhole: boolean,
  wanted: Expected,
  isStream: boolean,
): Attempt {
  const status = response.statusCode ?? 0;
  if (!isWhole) return attempt("connection", "broken off");
  if (status !== 200) {
    const reason = reasonOf(text);
    if (reason === undefined) return attempt("malformed", `status ${status}: ${text.slice(0, 200)}`);
    return { outcome: "error", detail: `${status} ${reason}`, mayRetry: reason === "draining" };
  }
  return isStream ? judgeStream(text, wanted) : judgeWhole(text, wanted);
}

function judgeWhole(text: string, wanted: Expected): Attempt {
  const answer = parse(text) as
    { choices?: { text?: string; finish_reason?: string }[]; usage?: { completion_tokens?: number } } | undefined;
  const choice = answer?.choices?.[0];
  if (choice?.text === undefined) return attempt("malformed", text.slice(0, 200));
  return compare(choice.text, choice.finish_reason, answer?.usage?.completion_tokens, wanted);
}

function judgeStream(text: string, wanted: Expected): Attempt {
  const events = text.split("\n\n").filter((event) => event !== "" && !event.startsWith(":"));
  let answer = "";
  let finish: string | undefined;
  let tokens: number | undefined;
  for (const [index, event] of events.entries()) {
    if (!event.startsWith("data: ")) return attempt("malformed", event.slice(0, 200));
    const data = event.slice("data: ".length);
    if (data === "[DONE]") {
      if (index !== events.length - 1) return attempt("malformed", "events after the end marker");
      return compare(answer, finish, tokens, wanted);
    }
    const chunk = parse(data) as
      | {
          error?: unknown;
          choices?: { text?: string; finish_reason?: string | null }[];
          usage?: { completion_tokens?: number } | null;
        }
      | undefined;
    if (chunk === undefined) return attempt("malformed", data.slice(0, 200));
    if (chunk.error !== undefined) {
      const reason = reasonOf(data);
      if (reason === undefined) return attempt("malformed", data.slice(0, 200));
      // What came before the error must still be a true beginning.
      if (!wanted.text.startsWith(answer)) return attempt("wrong", difference(answer, wanted.text));
      return attempt("error", `stream ${reason}`);
    }
    const choice = chunk.choices?.[0];
    answer += choice?.text ?? "";
    finish = choice?.finish_reason ?? finish;
    tokens = chunk.usage?.completion_tokens ?? tokens;
  }
  return attempt("malformed", `a stream without an end after ${answer.length} characters`);
}

function compare(text: string, finish: string | undefined, tokens: number | undefined, wanted: Expected): Attempt {
  if (finish !== "length" && finish !== "stop") return attempt("wrong", `finish reason ${finish}`);
  if (finish === "length" && tokens !== wanted.maxTokens) {
    return attempt("wrong", `usage says ${tokens} tokens, asked for ${wanted.maxTokens}`);
  }
  if (text !== wanted.text) return { ...attempt("wrong", difference(text, wanted.text)), text };
  return attempt("ok", "");
}

function difference(got: string, wanted: string): string {
  let at = 0;
  while (at < got.length && got[at] === wanted[at]) at++;
  const around = (text: string): string => JSON.stringify(text.slice(Math.max(0, at - 10), at + 30));
  return `at character ${at} of ${wanted.length}: got ${around(got)}, expected ${around(wanted)} (${got.length} came)`;
}

function attempt(outcome: Outcome, detail: string): Attempt {
  return { outcome, detail, mayRetry: false };
}

function reasonOf(text: string): string | undefined {
  const error = (parse(text) as { error?: { code?: unknown; message?: unknown } } | undefined)?.error;
  if (typeof error?.message !== "string") return undefined;
  return typeof error.code === "string" ? error.code : undefined;
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
