import type { Random } from "../../src/std/index.ts";
import { bytesOf, chatPrompt, type Asked } from "./oracle.ts";

/** What the clients of one run do: drawn from the seed before the run begins, so that faults do not move it. */
export interface PlannedCall {
  readonly id: string;
  readonly atMs: number;
  readonly path: "/v1/chat/completions" | "/v1/completions";
  readonly body: string;
  readonly isStream: boolean;
  readonly includesUsage: boolean;
  /** One per choice; empty for requests that are no requests. */
  readonly asked: readonly Asked[];
  readonly promptTokens: number;
  readonly behaviour: Behaviour;
}

export type Behaviour =
  | { readonly kind: "reads" }
  /** Goes away after that many bytes of the answer's body, or after that time. */
  | { readonly kind: "leaves"; readonly afterBytes: number; readonly afterMs: number }
  /** Reads nothing for a while, from its first bytes on. */
  | { readonly kind: "reads slowly"; readonly pauseMs: number }
  /** A body that must be refused with this status. */
  | { readonly kind: "hostile"; readonly statuses: readonly number[] }
  /** Bytes that are no HTTP, or half a request. */
  | { readonly kind: "garbage"; readonly bytes: string };

export interface WorkloadShape {
  readonly calls: number;
  readonly spanMs: number;
  readonly model: string;
  readonly vocabularySize: number;
  readonly contextLength: number;
  readonly maxTokens: number;
  readonly oddShare: number;
  /** That prompts begin with, so many letters long. @default 3 of 32 to 200 */
  readonly prefixes?: { readonly count: number; readonly least: number; readonly most: number };
}

export function planWorkload(shape: WorkloadShape, random: Random): PlannedCall[] {
  const draw = new Draw(random);
  const { count, least, most } = shape.prefixes ?? { count: 3, least: 32, most: 200 };
  const prefixes = Array.from({ length: count }, () => draw.text(least, most));
  const calls: PlannedCall[] = [];
  // Some arrive in bursts, the others evenly.
  const burstAt = draw.real(0, shape.spanMs);
  for (let i = 0; i < shape.calls; i++) {
    const atMs = draw.chance(0.3) ? burstAt + draw.real(0, 50) : draw.real(0, shape.spanMs);
    const id = `r${i}`;
    calls.push(
      draw.chance(shape.oddShare) ? oddCall(id, atMs, shape, draw) : properCall(id, atMs, prefixes, shape, draw),
    );
  }
  return calls.toSorted((a, b) => a.atMs - b.atMs);
}

/** A plain request, as one sends to see whether all is well. */
export function probeCall(id: string, atMs: number, shape: WorkloadShape, random: Random): PlannedCall {
  return properCall(id, atMs, ["is all well? "], shape, new Draw(random), { kind: "reads" });
}

function properCall(
  id: string,
  atMs: number,
  prefixes: readonly string[],
  shape: WorkloadShape,
  draw: Draw,
  fixed?: Behaviour,
): PlannedCall {
  const isChat = draw.chance(0.5);
  const isStream = draw.chance(0.6);
  const includesUsage = isStream && draw.chance(0.7);
  const isProbe = fixed !== undefined;
  const n = !isProbe && draw.chance(0.15) ? draw.int(2, 3) : 1;
  const maxTokens = draw.int(1, shape.maxTokens);
  const isSampled = draw.chance(0.5);
  const seed = isSampled ? draw.int(0, 0xffff_fff0) : undefined;
  const stops = draw.chance(0.3) ? Array.from({ length: draw.int(1, 3) }, () => draw.letters(1, 2)) : [];
  const text = draw.pick(prefixes) + draw.text(0, 60);
  const common = {
    model: shape.model,
    max_tokens: maxTokens,
    temperature: isSampled ? 0.8 : 0,
    ...(seed === undefined ? {} : { seed }),
    ...(stops.length === 0 ? {} : { stop: stops }),
    ...(n === 1 ? {} : { n }),
    ...(isStream ? { stream: true } : {}),
    ...(includesUsage ? { stream_options: { include_usage: true } } : {}),
  };
  let body: unknown;
  const prompts: Uint32Array[] = [];
  if (isChat) {
    const messages = [{ role: "user", content: text }];
    prompts.push(chatPrompt(messages));
    body = { ...common, messages };
  } else {
    const count = !isProbe && draw.chance(0.1) ? 2 : 1;
    const texts = Array.from({ length: count }, (_, i) => (i === 0 ? text : draw.text(1, 80)));
    for (const one of texts) prompts.push(Uint32Array.from(bytesOf(one)));
    const given: readonly (string | number[])[] = draw.chance(0.2) ? prompts.map((tokens) => [...tokens]) : texts;
    body = { ...common, prompt: count === 1 ? given[0] : given };
  }
  const asked = prompts.flatMap((prompt) =>
    Array.from({ length: n }, (_, copy) => ({
      prompt,
      maxTokens,
      seed: seed === undefined ? undefined : (seed + copy) >>> 0,
      stops,
      vocabularySize: shape.vocabularySize,
    })),
  );
  let behaviour: Behaviour = { kind: "reads" };
  const manner = draw.real(0, 1);
  if (manner < 0.1) {
    behaviour = { kind: "leaves", afterBytes: draw.int(0, 3_000), afterMs: draw.chance(0.5) ? draw.int(1, 400) : 1e9 };
  } else if (isStream && manner < 0.2) {
    behaviour = { kind: "reads slowly", pauseMs: draw.int(200, 20_000) };
  }
  return {
    id,
    atMs,
    path: isChat ? "/v1/chat/completions" : "/v1/completions",
    body: JSON.stringify(body),
    isStream,
    includesUsage,
    asked,
    promptTokens: prompts.reduce((sum, prompt) => sum + prompt.length, 0),
    behaviour: fixed ?? behaviour,
  };
}

const GARBAGE = [
  "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
  "GET / HTTP/9.9\r\n\r\n",
  "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
  'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"model":',
  "\r\n\r\n\r\n",
];

function oddCall(id: string, atMs: number, shape: WorkloadShape, draw: Draw): PlannedCall {
  const none = {
    id,
    atMs,
    path: "/v1/completions",
    isStream: false,
    includesUsage: false,
    asked: [],
    promptTokens: 0,
  } as const;
  if (draw.chance(0.3)) return { ...none, body: "", behaviour: { kind: "garbage", bytes: draw.pick(GARBAGE) } };
  const { model } = shape;
  const bodies: readonly (readonly [unknown, ...number[]])[] = [
    ["{", 400],
    ["[]", 400],
    ["[".repeat(5_000), 400],
    [{}, 400],
    [{ model }, 400],
    [{ model, prompt: "" }, 400],
    [{ model, prompt: [] }, 400],
    [{ model, prompt: [-1] }, 400],
    [{ model, prompt: [100_000] }, 400],
    [{ model, prompt: "x".repeat(shape.contextLength * 2) }, 400],
    [{ model, prompt: "hi", max_tokens: shape.contextLength * 2 }, 400],
    [{ model, prompt: "hi", n: -1 }, 400],
    [{ model, prompt: "hi", n: 1e9 }, 400],
    [{ model, prompt: "hi", temperature: "hot" }, 400],
    [{ model, prompt: "hi", surprise: true }, 400],
    [{ model, prompt: "hi", stop: [""] }, 400],
    [{ model: "nobody", prompt: "hi" }, 404],
    [{ model, prompt: "hi", kv_transfer_params: { remote_host: "evil" } }, 400],
    [{ model, messages: [{ role: "user", content: "hi" }] }, 400],
  ];
  const [body, ...statuses] = draw.pick(bodies);
  return {
    ...none,
    body: typeof body === "string" ? body : JSON.stringify(body),
    behaviour: { kind: "hostile", statuses },
  };
}

/** Everyday draws. */
export class Draw {
  readonly #random: Random;

  constructor(random: Random) {
    this.#random = random;
  }

  chance(share: number): boolean {
    return this.#random.nextFloat() < share;
  }

  /** Both ends included. */
  int(from: number, to: number): number {
    return from + Math.floor(this.#random.nextFloat() * (to - from + 1));
  }

  real(from: number, to: number): number {
    return from + this.#random.nextFloat() * (to - from);
  }

  pick<T>(items: readonly T[]): T {
    return items[this.int(0, items.length - 1)]!;
  }

  letters(least: number, most: number): string {
    let text = "";
    for (let i = this.int(least, most); i > 0; i--) text += String.fromCharCode(this.int(97, 122));
    return text;
  }

  /** Words, with now and then a character of more than one byte. */
  text(least: number, most: number): string {
    const length = this.int(least, most);
    let text = "";
    while (text.length < length)
      text += this.chance(0.03) ? this.pick(["é", "…", "猫"]) : this.chance(0.2) ? " " : this.letters(1, 4);
    return text.slice(0, length);
  }
}
