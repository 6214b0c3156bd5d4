import type { PromptStart } from "./trace.ts";

/**
 * Tokens for a trace: content with the same id is the same, other content differs. 1 to 2 ns a token. Ids of blocks, groups
 * and sessions are told apart by their kind.
 */
const KIND_BLOCK = 0x1000_0001;
const KIND_GROUP = 0x2000_0003;
const KIND_SESSION = 0x3000_0005;

/** The first prompt of session number `session`; length = `tokens`. */
export function firstPrompt(start: PromptStart, session: number, tokens: number): Uint32Array {
  const prompt = new Uint32Array(tokens);
  let at = 0;
  if (start.kind === "blocks") {
    for (const id of start.hashIds) {
      const end = Math.min(tokens, at + start.blockSizeTokens);
      fillContent(prompt, at, end, KIND_BLOCK, id, 0);
      at = end;
    }
  } else if (start.kind === "group") {
    at = Math.min(tokens, start.tokens);
    fillContent(prompt, 0, at, KIND_GROUP, start.group, 0);
  }
  fillContent(prompt, at, tokens, KIND_SESSION, session, 0);
  return prompt;
}

/** The prompt of a later turn: what was said so far and `newTokens` more. */
export function nextPrompt(
  history: Uint32Array,
  answer: readonly number[],
  newTokens: number,
  session: number,
  turn: number,
): Uint32Array {
  const prompt = new Uint32Array(history.length + answer.length + newTokens);
  prompt.set(history);
  prompt.set(answer, history.length);
  fillContent(prompt, history.length + answer.length, prompt.length, KIND_SESSION, session, turn);
  return prompt;
}

/** A linear congruential run (constants of Numerical Recipes) from a mixed start; the high bits, 17 of them. */
function fillContent(prompt: Uint32Array, from: number, to: number, kind: number, id: number, part: number): void {
  let state = mix(mix(kind ^ id) + part);
  for (let i = from; i < to; i++) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) | 0;
    prompt[i] = state >>> 15;
  }
}

function mix(value: number): number {
  let z = value | 0;
  z = Math.imul(z ^ (z >>> 16), 0x85eb_ca6b);
  z = Math.imul(z ^ (z >>> 13), 0xc2b2_ae35);
  return z ^ (z >>> 16);
}
