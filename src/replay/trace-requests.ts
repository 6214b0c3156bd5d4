import { firstPrompt, nextPrompt } from "./prompt-source.ts";
import type { TraceSession } from "./trace.ts";

/**
 * The requests of a session as a server outside is sent them: prompts as token ids that begin alike where the trace says
 * so, the same each time. Lazy: a prompt is made when it is asked for and the one before is kept only for it.
 *
 * Token ids are those of printable ASCII (32 to 126). Every vocabulary has them, bytes as tokens included, none of them
 * ends a text, and an engine that answers with the prompt answers with text. Two different blocks of 16 tokens come out
 * alike once in 95^16.
 *
 * What a server answered is not known as tokens, so a later turn repeats the prompts before it and as many other tokens
 * as the answer had: it hits the blocks of the prompts, not those of the answers.
 */
export interface TraceRequest {
  /** After the end of the request before; for the first after the session's arrival. */
  readonly delayMs: number;
  /** Length = prompt tokens; not kept by us. */
  readonly promptTokenIds: Uint32Array;
  readonly outputTokens: number;
}

const FIRST_ID = 32;
const ID_COUNT = 95;

export function* traceRequests({ start, turns }: TraceSession, session: number): Generator<TraceRequest, void> {
  let prompt: Uint32Array = new Uint32Array(0);
  let answeredTokens = 0;
  for (const [turn, { newTokens, outputTokens, delayMs }] of turns.entries()) {
    prompt =
      turn === 0
        ? firstPrompt(start, session, newTokens)
        : nextPrompt(prompt, [], answeredTokens + newTokens, session, turn);
    yield { delayMs, promptTokenIds: prompt.map((id) => FIRST_ID + (id % ID_COUNT)), outputTokens };
    answeredTokens = outputTokens;
  }
}
