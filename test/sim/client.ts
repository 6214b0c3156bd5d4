import { HttpCall } from "./http-client.ts";
import type { Cluster } from "./cluster.ts";
import { HTTP_PORT } from "./cluster.ts";
import { expectedAnswer } from "./oracle.ts";
import type { PlannedCall } from "./workload.ts";

/** How a call ended, as its client saw it. */
export type Outcome =
  /** A whole answer. */
  | "finished"
  /** An error status in place of an answer. */
  | "refused"
  /** An error frame at the end of a stream. */
  | "failed"
  /** The connection ended before the answer was whole. */
  | "cut off"
  /** There was no connection. */
  | "unreachable"
  | "left";

/** A step of the slowest engine, with a full batch to prefill, and the network. */
const CANCEL_MS = 1_000;

/** One planned call under way, and the judgement of what came back. Whatever is wrong is in `problems`. */
export class ClientCall {
  readonly plan: PlannedCall;
  readonly host: string;
  readonly startedMs: number;
  endedMs = -1;
  outcome: Outcome | undefined = undefined;
  /** The error's code, of the status or the frame. */
  code = "";
  readonly problems: string[] = [];
  readonly #cluster: Cluster;
  readonly #call: HttpCall;
  #isPaused = false;

  constructor(cluster: Cluster, plan: PlannedCall, host: string) {
    this.#cluster = cluster;
    this.plan = plan;
    this.host = host;
    this.startedMs = cluster.world.nowMs;
    const { clients, network } = cluster;
    this.#call = new HttpCall(network, clients, { host, port: HTTP_PORT }, requestBytes(plan), {
      onProgress: () => this.#onProgress(),
      onOver: () => this.#onOver(),
    });
    const { behaviour } = plan;
    if (behaviour.kind === "leaves" && behaviour.afterMs < 1e9) {
      clients.clock.setTimer(behaviour.afterMs, () => this.#leave());
    }
    if (behaviour.kind === "garbage") {
      // A connection on which nothing happens would stay for the server's idle limit; this client has had enough by then.
      clients.clock.setTimer(15_000, () => this.#leave());
    }
  }

  get isOver(): boolean {
    return this.outcome !== undefined;
  }

  get status(): number {
    return this.#call.status;
  }

  get broken(): string | undefined {
    return this.#call.broken;
  }

  #onProgress(): void {
    const { behaviour } = this.plan;
    if (behaviour.kind === "leaves" && this.#call.status !== 0 && this.#call.body.length >= behaviour.afterBytes)
      this.#leave();
    else if (behaviour.kind === "reads slowly" && !this.#isPaused) {
      this.#isPaused = true;
      this.#cluster.world.marks.mark("client read slowly");
      this.#call.end.pauseReading();
      this.#cluster.clients.clock.setTimer(behaviour.pauseMs, () => this.#call.end.resumeReading());
    }
  }

  #leave(): void {
    if (this.isOver) return;
    const { marks } = this.#cluster.world;
    if (this.plan.behaviour.kind === "leaves")
      marks.mark(this.#call.body.length > 0 ? "client left mid-stream" : "client left early");
    this.#call.leave();
    this.#end("left");
    const { clock } = this.#cluster.clients;
    clock.setTimer(CANCEL_MS, () => this.#checkCancelled());
  }

  /** Nobody works for a client that left: to the engine, within a step and two ways through the network. */
  #checkCancelled(): void {
    const sinceMs = this.endedMs - CANCEL_MS;
    const { workers, frontends } = this.#cluster;
    // A fault may have eaten the word, or keep it waiting.
    if ([...workers, ...frontends].some(({ troubles }) => troubles.some(({ untilMs }) => untilMs >= sinceMs))) return;
    for (const { host, engine } of workers) {
      for (const id of engine?.live.values() ?? []) {
        // Samples and further prompts have a suffix.
        if (id === this.plan.id || id.startsWith(`${this.plan.id}-`)) {
          this.problems.push(`${host} still works on ${id}, ${CANCEL_MS} ms after its client left`);
        }
      }
    }
  }

  #onOver(): void {
    const { status, isWhole, body } = this.#call;
    if (!isWhole) {
      this.#checkPart(body);
      const isUnreachable = this.broken === "ECONNREFUSED" || this.broken === "ETIMEDOUT";
      this.#end(isUnreachable ? "unreachable" : "cut off");
    } else if (status !== 200) {
      this.#checkError(body);
      this.#end("refused");
    } else if (this.plan.asked.length === 0) {
      this.problems.push(`got 200 for ${this.plan.body.slice(0, 100)}`);
      this.#end("finished");
    } else if (this.plan.isStream) this.#endStream(body);
    else {
      this.#checkWhole(body);
      this.#end("finished");
    }
  }

  #end(outcome: Outcome): void {
    this.outcome = outcome;
    this.endedMs = this.#cluster.world.nowMs;
    const took = (this.endedMs - this.startedMs).toFixed(0);
    this.#cluster.world.record(
      `client ${this.plan.id} at ${this.host}: ${outcome} ${this.#call.status} ${this.code} after ${took} ms, ${this.#call.body.length} bytes`,
    );
  }

  // Judgement.

  #checkError(body: string): void {
    const { behaviour } = this.plan;
    if (behaviour.kind === "garbage") return;
    try {
      this.code = (JSON.parse(body) as { error: { code: string } }).error.code;
    } catch {
      this.problems.push(`status ${this.status} with a body that is no error: ${body.slice(0, 200)}`);
    }
  }

  /** What came of an answer that did not come whole must be a true beginning of it. */
  #checkPart(body: string): void {
    if (this.status !== 200 || !this.plan.isStream) return;
    const events = body.slice(0, body.lastIndexOf("\n\n") + 2);
    this.#checkTexts(this.#readEvents(events).texts, false);
  }

  #endStream(body: string): void {
    const { texts, finishes, usage, error, isDone } = this.#readEvents(body);
    if (error !== undefined) {
      this.code = error;
      if (isDone) this.problems.push("a stream that failed ended with [DONE]");
      this.#checkTexts(texts, false);
      this.#end("failed");
      return;
    }
    if (!isDone) this.problems.push("a stream ended whole, but without [DONE] and without an error");
    this.#checkTexts(texts, true);
    this.#checkFinishes(finishes);
    if (this.plan.includesUsage) this.#checkUsage(usage);
    this.#end("finished");
  }

  #checkWhole(body: string): void {
    let answer: WholeAnswer;
    try {
      answer = JSON.parse(body) as WholeAnswer;
    } catch {
      this.problems.push(`an answer that is no JSON: ${body.slice(0, 200)}`);
      return;
    }
    const texts: string[] = [];
    const finishes: (string | undefined)[] = [];
    for (const choice of answer.choices) {
      texts[choice.index] = choice.text ?? choice.message?.content ?? "";
      finishes[choice.index] = choice.finish_reason ?? undefined;
    }
    this.#checkTexts(texts, true);
    this.#checkFinishes(finishes);
    this.#checkUsage(answer.usage);
  }

  #readEvents(body: string): StreamParts {
    const texts: string[] = this.plan.asked.map(() => "");
    const finishes: (string | undefined)[] = [];
    let usage: Usage | undefined;
    let error: string | undefined;
    let isDone = false;
    for (const event of body.split("\n\n")) {
      if (event === "") continue;
      if (isDone) this.problems.push("an event after [DONE]");
      if (event === "data: [DONE]") {
        isDone = true;
        continue;
      }
      const parsed = JSON.parse(event.slice("data: ".length)) as StreamEvent;
      if (parsed.error !== undefined) error = parsed.error.code;
      if (parsed.usage !== undefined && parsed.usage !== null) usage = parsed.usage;
      for (const choice of parsed.choices ?? []) {
        if (finishes[choice.index] !== undefined) this.problems.push(`choice ${choice.index} went on after its end`);
        texts[choice.index] += choice.text ?? choice.delta?.content ?? "";
        if (choice.finish_reason !== null && choice.finish_reason !== undefined)
          finishes[choice.index] = choice.finish_reason;
      }
    }
    return { texts, finishes, usage, error, isDone };
  }

  #checkTexts(texts: readonly string[], isWhole: boolean): void {
    this.plan.asked.forEach((asked, index) => {
      const { text } = expectedAnswer(asked);
      const got = texts[index] ?? "";
      if (isWhole ? got !== text : !text.startsWith(got)) {
        this.problems.push(
          `choice ${index}: expected ${isWhole ? "" : "a beginning of "}${JSON.stringify(text)}, got ${JSON.stringify(got)}`,
        );
      }
    });
  }

  #checkFinishes(finishes: readonly (string | undefined)[]): void {
    this.plan.asked.forEach((asked, index) => {
      const { finish } = expectedAnswer(asked);
      if (finish === "stop") this.#cluster.world.marks.mark("request stopped by a stop string");
      if (finishes[index] !== finish)
        this.problems.push(`choice ${index}: expected finish ${finish}, got ${finishes[index]}`);
    });
    this.#cluster.world.marks.mark("request finished");
  }

  #checkUsage(usage: Usage | undefined): void {
    if (usage === undefined) {
      this.problems.push("no usage");
      return;
    }
    const tokens = this.plan.asked.reduce((sum, asked) => sum + expectedAnswer(asked).tokens, 0);
    const { prompt_tokens: prompt, completion_tokens: completion, total_tokens: total } = usage;
    if (prompt !== this.plan.promptTokens)
      this.problems.push(`expected ${this.plan.promptTokens} prompt tokens, got ${prompt}`);
    if (completion !== tokens) this.problems.push(`expected ${tokens} completion tokens, got ${completion}`);
    if (total !== prompt + completion) this.problems.push(`expected a total of ${prompt + completion}, got ${total}`);
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    if (cached > 0) this.#cluster.world.marks.mark("prefix reused");
    if (cached < 0 || cached > prompt) this.problems.push(`${cached} of ${prompt} prompt tokens cached`);
  }
}

interface Usage {
  readonly prompt_tokens: number;
  readonly completion_tokens: number;
  readonly total_tokens: number;
  readonly prompt_tokens_details?: { readonly cached_tokens: number };
}

interface StreamEvent {
  readonly error?: { readonly code: string };
  readonly usage?: Usage | null;
  readonly choices?: readonly {
    readonly index: number;
    readonly text?: string;
    readonly delta?: { readonly content?: string };
    readonly finish_reason?: string | null;
  }[];
}

interface WholeAnswer {
  readonly choices: readonly {
    readonly index: number;
    readonly text?: string;
    readonly message?: { readonly content: string };
    readonly finish_reason?: string | null;
  }[];
  readonly usage: Usage;
}

interface StreamParts {
  readonly texts: string[];
  readonly finishes: (string | undefined)[];
  readonly usage: Usage | undefined;
  readonly error: string | undefined;
  readonly isDone: boolean;
}

function requestBytes(plan: PlannedCall): Uint8Array[] {
  const { behaviour } = plan;
  if (behaviour.kind === "garbage") return [Buffer.from(behaviour.bytes, "latin1")];
  const body = Buffer.from(plan.body);
  const head =
    `POST ${plan.path} HTTP/1.1\r\nhost: sim\r\ncontent-type: application/json\r\nx-request-id: ${plan.id}\r\n` +
    `content-length: ${body.length}\r\n\r\n`;
  return [Buffer.concat([Buffer.from(head), body])];
}
