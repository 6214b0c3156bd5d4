import assert from "node:assert/strict";
import type OpenAI from "openai";

/** A greedy answer, token by token, with what was nearly as likely. */
export interface GreedyToken {
  readonly token: string;
  readonly logprob: number;
  readonly top: readonly { readonly token: string; readonly logprob: number }[];
}

/**
 * What two batch shapes may differ by: libllama's kernels add in another order, and near the top logits then differ by up
 * to 0.5 (src/engines/llama/README.md).
 */
const NEAR_TIE = 0.5;

/** Streams a greedy chat answer with the four best alternatives per token. Rejects when it is not whole. */
export async function greedyAnswer(
  client: OpenAI,
  body: { model: string; messages: OpenAI.ChatCompletionMessageParam[]; max_tokens: number },
  onToken: () => void = () => undefined,
): Promise<GreedyToken[]> {
  const tokens: GreedyToken[] = [];
  let finish: string | null = null;
  const options = { ...body, temperature: 0, logprobs: true, top_logprobs: 4, stream: true as const };
  for await (const chunk of await client.chat.completions.create(options)) {
    const choice = chunk.choices[0];
    finish = choice?.finish_reason ?? finish;
    for (const { token, logprob, top_logprobs } of choice?.logprobs?.content ?? []) {
      tokens.push({ token, logprob, top: top_logprobs });
      onToken();
    }
  }
  assert.ok(finish === "stop" || finish === "length", `ended with ${finish}`);
  return tokens;
}

/** Streams a greedy completion of a prompt of token ids, of exactly `max_tokens` tokens. Rejects when it is not whole. */
export async function greedyCompletion(
  client: OpenAI,
  body: { model: string; prompt: number[]; max_tokens: number; nvext?: object },
  onToken: () => void = () => undefined,
): Promise<GreedyToken[]> {
  const tokens: GreedyToken[] = [];
  const options = { ...body, temperature: 0, logprobs: 4, ignore_eos: true, stream: true as const };
  for await (const chunk of await client.completions.create(options)) {
    const logprobs = chunk.choices[0]?.logprobs;
    for (const [i, token] of (logprobs?.tokens ?? []).entries()) {
      const top = Object.entries(logprobs?.top_logprobs?.[i] ?? {}).map(([text, logprob]) => ({
        token: text,
        logprob,
      }));
      tokens.push({
        token,
        logprob: logprobs?.token_logprobs?.[i] ?? -Infinity,
        top: top.toSorted((a, b) => b.logprob - a.logprob),
      });
      onToken();
    }
  }
  assert.equal(tokens.length, body.max_tokens, "the answer is whole");
  return tokens;
}

/** Where two greedy texts part: the token's index, and how much less likely the other's token was there, in logits. */
export function partingOf(
  actual: readonly GreedyToken[],
  expected: readonly GreedyToken[],
): { readonly index: number; readonly gap: number } | undefined {
  const length = Math.max(actual.length, expected.length);
  for (let index = 0; index < length; index++) {
    if (actual[index]?.token === expected[index]?.token) continue;
    const gaps = [
      [actual[index], expected[index]],
      [expected[index], actual[index]],
    ].map(([one, other]) => {
      // Only a stop token is not among the tokens: an answer that ends early is told by the alternatives of the other.
      if (one === undefined) return 0;
      const rival = other === undefined ? one.top[1] : one.top.find(({ token }) => token === other.token);
      return rival === undefined ? Infinity : one.top[0]!.logprob - rival.logprob;
    });
    return { index, gap: Math.max(...gaps) };
  }
  return undefined;
}

/**
 * The same greedy text, but for near ties: where the two part, the other's token must have been nearly as likely, and what
 * follows is another text. Returns false then.
 */
export function assertSameGreedy(actual: readonly GreedyToken[], expected: readonly GreedyToken[]): boolean {
  const parting = partingOf(actual, expected);
  if (parting === undefined) return true;
  const { index, gap } = parting;
  assert.ok(gap < NEAR_TIE, `the texts part at token ${index} with a gap of ${gap}, not at a near tie`);
  return false;
}

/** How a path's texts compare with the reference, and the list of those that part. */
export class PartingList {
  readonly #path: string;
  readonly #lines: string[] = [];
  #count = 0;
  #largestGap = 0;
  #largestDifference = 0;

  constructor(path: string) {
    this.#path = path;
  }

  add(promptTokens: number, actual: readonly GreedyToken[], expected: readonly GreedyToken[]): void {
    this.#count++;
    const parting = partingOf(actual, expected);
    const end = parting?.index ?? expected.length;
    for (let i = 0; i < end; i++) {
      this.#largestDifference = Math.max(this.#largestDifference, Math.abs(actual[i]!.logprob - expected[i]!.logprob));
    }
    if (parting === undefined) return;
    this.#largestGap = Math.max(this.#largestGap, parting.gap);
    this.#lines.push(`prompt of ${promptTokens} tokens: token ${parting.index}, ${parting.gap.toFixed(3)} apart`);
  }

  /** Fails unless at most `allowed` texts part, all at near ties. */
  check(allowed: number, print: (line: string) => void): void {
    const count = `${this.#count - this.#lines.length} of ${this.#count} texts are the same`;
    print(`${this.#path}: ${count}, logprobs differ by at most ${this.#largestDifference.toFixed(6)}`);
    for (const line of this.#lines) print(`${this.#path}: parted: ${line}`);
    assert.ok(this.#largestGap < NEAR_TIE, `${this.#path}: texts part at no near tie:\n${this.#lines.join("\n")}`);
    assert.ok(this.#lines.length <= allowed, `${this.#path}: more than ${allowed} part:\n${this.#lines.join("\n")}`);
  }
}
