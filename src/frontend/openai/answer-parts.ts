import type { Usage } from "../../protocol/openai/index.ts";
import type { LogprobEntry } from "../response-writer.ts";
import type { Exchange } from "../http/exchange.ts";

/** What the chat and completion writers share: who is answered, and the JSON of usage and logprobs. */
export interface AnswerDetails {
  readonly exchange: Exchange;
  /** Unique; the writer puts `chatcmpl-` or `cmpl-` before it. */
  readonly id: string;
  readonly model: string;
  /** Unix seconds. */
  readonly created: number;
  /** Prompts x n. */
  readonly choices: number;
  /** Streams only: a last chunk with the usage, and `usage: null` on the others. */
  readonly includeUsage: boolean;
  /** JSON of the answer's `nvext`, asked for when the answer is complete. @default none */
  readonly nvext?: () => string;
}

/** OpenAI clients compare it to notice a changed back end; ours changes with the version. */
export const SYSTEM_FINGERPRINT = "fp_dynamo_ts_1";

/** The members that every object of an answer begins with, without the opening brace. */
export function answerHead(details: AnswerDetails, idPrefix: string, object: string): string {
  const id = JSON.stringify(idPrefix + details.id);
  const model = JSON.stringify(details.model);
  return `"id":${id},"object":"${object}","created":${details.created},"model":${model},"system_fingerprint":"${SYSTEM_FINGERPRINT}"`;
}

export function usageJson({ promptTokens, completionTokens, cachedTokens, isEstimated }: Usage): string {
  return (
    `{"prompt_tokens":${promptTokens},"completion_tokens":${completionTokens},` +
    `"total_tokens":${promptTokens + completionTokens},"prompt_tokens_details":{"cached_tokens":${cachedTokens}},` +
    `"completion_tokens_details":{"reasoning_tokens":0}${isEstimated === true ? `,"estimated":true` : ""}}`
  );
}

/** OpenAI's stand-in for a probability of zero, which JSON has no number for. */
const LOWEST_LOGPROB = -9999;

/** `logprobs` of chat: one entry per token with its bytes and alternatives. */
export function chatLogprobsJson(entries: readonly LogprobEntry[]): string {
  const content = entries.map((entry) => ({
    token: entry.token,
    logprob: finite(entry.logprob),
    bytes: entry.bytes,
    top_logprobs: entry.top.map((other) => ({
      token: other.token,
      logprob: finite(other.logprob),
      bytes: other.bytes,
    })),
  }));
  return `{"content":${JSON.stringify(content)},"refusal":null}`;
}

function finite(logprob: number): number {
  return Number.isFinite(logprob) ? logprob : LOWEST_LOGPROB;
}

/**
 * `logprobs` of completions: parallel arrays. `offset` is where the first token starts in the choice's text, in
 * characters (code points). A token without a logprob (NaN: an echoed prompt's first) has null in both lists.
 */
export function completionLogprobsJson(entries: readonly LogprobEntry[], offset: number): string {
  let at = offset;
  const textOffset = entries.map((entry) => {
    const start = at;
    at += characterCount(entry.token);
    return start;
  });
  return JSON.stringify({
    tokens: entries.map((entry) => entry.token),
    token_logprobs: entries.map((entry) => (Number.isNaN(entry.logprob) ? null : finite(entry.logprob))),
    top_logprobs: entries.map((entry) => (Number.isNaN(entry.logprob) ? null : topMap(entry))),
    text_offset: textOffset,
  });
}

/** Built from a Map, so that a token spelled `__proto__` is a key like any other. */
function topMap(entry: LogprobEntry): Record<string, number> {
  return Object.fromEntries(new Map(entry.top.map((other) => [other.token, finite(other.logprob)])));
}

export function characterCount(text: string): number {
  let count = text.length;
  for (let i = 0; i + 1 < text.length; i++) {
    if ((text.charCodeAt(i) & 0xfc00) === 0xd800 && (text.charCodeAt(i + 1) & 0xfc00) === 0xdc00) count--;
  }
  return count;
}
