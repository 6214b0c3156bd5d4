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

/**
 * The same greedy text, but for near ties: where the two part, the other's token must have been nearly as likely, and what
 * follows is another text. Returns false then.
 */
export function assertSameGreedy(actual: readonly GreedyToken[], expected: readonly GreedyToken[]): boolean {
  const length = Math.max(actual.length, expected.length);
  for (let i = 0; i < length; i++) {
    if (actual[i]?.token === expected[i]?.token) continue;
    for (const [one, other] of [
      [actual[i], expected[i]],
      [expected[i], actual[i]],
    ]) {
      // Only a stop token is not among the tokens: an answer that ends early is told by the alternatives of the other.
      if (one === undefined) continue;
      const rival = other === undefined ? one.top[1] : one.top.find(({ token }) => token === other.token);
      const gap = rival === undefined ? Infinity : one.top[0]!.logprob - rival.logprob;
      assert.ok(gap < NEAR_TIE, `the texts part at token ${i} with a gap of ${gap}, not at a near tie`);
    }
    return false;
  }
  return true;
}
