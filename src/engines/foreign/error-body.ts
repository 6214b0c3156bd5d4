/**
 * What went wrong, out of the body of an answer with another status than 200, in whatever shape servers have it:
 * `{"error":{"message"}}`, `{"error":"text"}`, `{"message"}`, `{"detail":"text"}`, `{"detail":[{"msg"}]}`, `{"errors":[...]}`,
 * or the plain text or page of a proxy.
 */
export function errorMessageOf(text: string): string {
  try {
    return messageIn(JSON.parse(text) as unknown, 0) ?? text.slice(0, MAX_PLAIN);
  } catch {
    return plainText(text);
  }
}

const MAX_PLAIN = 500;
const MAX_DEPTH = 4;

function messageIn(value: unknown, depth: number): string | undefined {
  if (typeof value === "string") return value === "" ? undefined : value;
  if (typeof value !== "object" || value === null || depth > MAX_DEPTH) return undefined;
  if (Array.isArray(value)) return messageIn(value[0], depth + 1);
  const body = value as Record<string, unknown>;
  for (const name of ["message", "msg", "error", "detail", "errors", "title"]) {
    const found = messageIn(body[name], depth + 1);
    if (found !== undefined) return found;
  }
  return undefined;
}

/** A proxy's page without its tags. */
function plainText(text: string): string {
  const isPage = /^\s*<(?:!doctype|html|head|body)/i.test(text);
  const plain = isPage ? text.replace(/<(style|script)\b[\s\S]*?<\/\1>|<[^>]*>/gi, " ") : text;
  return plain.replace(/\s+/g, " ").trim().slice(0, MAX_PLAIN);
}

/** Milliseconds of `Retry-After`, which is seconds or a date; undefined where there is none. At most an hour. */
export function retryAfterMsOf(
  headers: Readonly<Record<string, string | readonly string[] | undefined>>,
  nowMs: number,
): number | undefined {
  const { "retry-after-ms": milliseconds, "retry-after": after } = headers;
  if (typeof milliseconds === "string" && Number(milliseconds) >= 0) return bounded(Number(milliseconds));
  if (typeof after !== "string" || after.trim() === "") return undefined;
  const seconds = Number(after);
  if (Number.isFinite(seconds)) return seconds < 0 ? undefined : bounded(seconds * 1_000);
  const date = Date.parse(after);
  return Number.isNaN(date) ? undefined : bounded(Math.max(0, date - nowMs));
}

function bounded(ms: number): number {
  return Math.min(3_600_000, Math.ceil(ms));
}
