import { postJson } from "./chaos-cluster.ts";

/**
 * Whether a text is a greedy answer of a real model. An engine of floats adds in another order when other requests are in
 * its batch, so at a near tie of two tokens either is right, and what follows differs. So a text that differs from the one
 * learned is asked for as a prompt, in one piece and of the healthy cluster: of a right answer each token is the likeliest
 * there or nearly so, while one token lost, doubled or from another answer stands where the model does not expect it.
 */
const NEAR_TIE_NATS = 0.5;
const TIMEOUT_MS = 60_000;

interface Scored {
  readonly choices: readonly {
    readonly logprobs: {
      readonly tokens: readonly string[];
      readonly token_logprobs: readonly (number | null)[];
      readonly top_logprobs: readonly (Readonly<Record<string, number>> | null)[];
      readonly text_offset: readonly number[];
    };
  }[];
}

export class GreedyJudge {
  readonly #port: number;
  readonly #model: string;
  readonly #known = new Map<string, string | undefined>();

  constructor(port: number, model: string) {
    this.#port = port;
    this.#model = model;
  }

  /** What is wrong with it. */
  async problemOf(prompt: string, text: string): Promise<string | undefined> {
    const key = `${prompt}\n${text}`;
    if (!this.#known.has(key)) this.#known.set(key, await this.#score(prompt, text));
    return this.#known.get(key);
  }

  async #score(prompt: string, text: string): Promise<string | undefined> {
    const body = { model: this.#model, prompt: prompt + text, echo: true, logprobs: 1, max_tokens: 1, temperature: 0 };
    const { choices } = (await postJson(this.#port, "/v1/completions", body, TIMEOUT_MS)) as Scored;
    const { tokens, token_logprobs: given, top_logprobs: top, text_offset: offsets } = choices[0]!.logprobs;
    for (const [index, token] of tokens.entries()) {
      if (offsets[index]! < prompt.length || offsets[index]! >= prompt.length + text.length) continue;
      const best = Math.max(...Object.values(top[index] ?? {}));
      const gap = best - (given[index] ?? -Infinity);
      if (gap > NEAR_TIE_NATS) {
        const at = offsets[index]! - prompt.length;
        return `at character ${at}: ${JSON.stringify(token)} is ${gap.toFixed(2)} nats below the likeliest, in ${JSON.stringify(text)}`;
      }
    }
    return undefined;
  }
}
