import { TokenSource } from "../../src/engines/mocker/token-source.ts";
import { BYTE_TOKENS } from "../../src/model/byte-artifact.ts";

/**
 * What the mock model must answer, computed from the prompt and the settings alone: no scheduler, no stream, no
 * detokenizer. Tokens are bytes; answers are lower-case letters and spaces.
 */
export interface Asked {
  readonly prompt: Uint32Array;
  readonly maxTokens: number;
  /** undefined = greedy. */
  readonly seed: number | undefined;
  readonly stops: readonly string[];
  readonly vocabularySize: number;
}

export interface Expected {
  /** What the client sees. */
  readonly text: string;
  readonly finish: "stop" | "length";
  /** Tokens up to the one that ended it. */
  readonly tokens: number;
}

export function expectedAnswer({ prompt, maxTokens, seed, stops, vocabularySize }: Asked): Expected {
  const source = new TokenSource(prompt, { vocabularySize, seed, maxTokens });
  let text = "";
  for (let count = 1; count <= maxTokens; count++) {
    const token = source.peek();
    source.absorb(token);
    text += String.fromCharCode(token);
    let at = Infinity;
    for (const stop of stops) {
      const found = text.indexOf(stop);
      if (found >= 0) at = Math.min(at, found);
    }
    if (at !== Infinity) return { text: text.slice(0, at), finish: "stop", tokens: count };
  }
  return { text, finish: "length", tokens: maxTokens };
}

export function bytesOf(text: string): number[] {
  return [...Buffer.from(text, "utf8")];
}

/** The chat template of the byte tokenizer, done by hand. */
export function chatPrompt(messages: readonly { readonly role: string; readonly content: string }[]): Uint32Array {
  const tokens: number[] = [];
  for (const { role, content } of messages) {
    tokens.push(BYTE_TOKENS.imStart, ...bytesOf(`${role}\n${content}`), BYTE_TOKENS.imEnd, ...bytesOf("\n"));
  }
  tokens.push(BYTE_TOKENS.imStart, ...bytesOf("assistant\n"));
  return Uint32Array.from(tokens);
}
