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
