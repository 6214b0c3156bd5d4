import { isAscii, isUtf8 } from "node:buffer";
import { DynamoError } from "../../errors/index.ts";

/**
 * A request body from bytes to a value. `JSON.parse` does the work (it is iterative, so depth alone cannot crash it);
 * around it stand what it does not do: UTF-8 is checked instead of repaired, nesting is bounded before anything is
 * allocated, and an error names the position without repeating the text, which may be a prompt.
 * Cost over `JSON.parse`: about 0.1 ns per byte of text inside strings, 1 ns per byte outside.
 */
export const MAX_JSON_DEPTH = 64;

/** Throws `malformed-json`. Own keys named `__proto__` stay plain own keys, for the validators to refuse. */
export function parseJsonBody(bytes: Buffer): unknown {
  if (bytes.length === 0) {
    throw new DynamoError("malformed-json", "the request body is empty; expected a JSON object");
  }
  const ascii = isAscii(bytes);
  if (!ascii && !isUtf8(bytes)) throw new DynamoError("malformed-json", "the request body is not valid UTF-8");
  const tooDeepAt = findTooDeep(bytes, MAX_JSON_DEPTH);
  if (tooDeepAt >= 0) {
    throw new DynamoError(
      "malformed-json",
      `the request body is nested too deeply: expected at most ${MAX_JSON_DEPTH} levels, got more at byte ${tooDeepAt}`,
    );
  }
  const text = bytes.toString(ascii ? "latin1" : "utf8");
  try {
    return JSON.parse(text) as unknown;
  } catch {
    throw new DynamoError("malformed-json", `the request body is not valid JSON: ${describeJsonError(text)}`);
  }
}

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
/** Strings up to this length are stepped through; longer ones are crossed with the native byte search. */
const STEPPED_STRING_BYTES = 32;

/** Byte offset of the first bracket that opens level `maxDepth + 1`, or -1. Right for valid JSON, harmless otherwise. */
export function findTooDeep(bytes: Buffer, maxDepth: number): number {
  const end = bytes.length;
  let depth = 0;
  for (let i = 0; i < end; i++) {
    const byte = bytes[i]!;
    if (byte === QUOTE) {
      i = endOfString(bytes, i + 1);
    } else if (byte === 0x5b || byte === 0x7b) {
      if (++depth > maxDepth) return i;
    } else if (byte === 0x5d || byte === 0x7d) {
      depth--;
    }
  }
  return -1;
}

/** Offset of the quote that closes the string whose content starts at `start`; the length when none does. */
function endOfString(bytes: Buffer, start: number): number {
  const stepEnd = Math.min(start + STEPPED_STRING_BYTES, bytes.length);
  let i = start;
  for (; i < stepEnd; i++) {
    const byte = bytes[i]!;
    if (byte === QUOTE) return i;
    if (byte === BACKSLASH) i++;
  }
  for (;;) {
    const quote = bytes.indexOf(QUOTE, i);
    if (quote < 0) return bytes.length;
    let backslashes = 0;
    for (let back = quote - 1; back >= i && bytes[back] === BACKSLASH; back--) backslashes++;
    if (backslashes % 2 === 0) return quote;
    i = quote + 1;
  }
}

function describeJsonError(text: string): string {
  const index = findJsonError(text);
  if (index < 0) return "it could not be parsed";
  if (index >= text.length) return `unexpected end at position ${text.length}`;
  const before = text.slice(0, index);
  const line = before.split("\n", MAX_LINES_COUNTED).length;
  const where = line < MAX_LINES_COUNTED ? ` (line ${line}, column ${index - before.lastIndexOf("\n")})` : "";
  return `unexpected ${JSON.stringify(String.fromCodePoint(text.codePointAt(index)!))} at position ${index}${where}`;
}

const MAX_LINES_COUNTED = 100_000;

/**
 * UTF-16 index of the first character that cannot be part of a JSON text, its length when it ends too early, -1 when
 * it is valid. Only for the error message: V8 gives a position for some mistakes and a piece of the text for others.
 */
export function findJsonError(text: string): number {
  const closers: string[] = [];
  let i = 0;
  let state: "value" | "value-or-close" | "key" | "key-or-close" | "after-value" = "value";
  for (;;) {
    i = skipSpace(text, i);
    if (i >= text.length) return state === "after-value" && closers.length === 0 ? -1 : text.length;
    const char = text[i]!;
    if (state === "after-value") {
      const closer = closers.at(-1);
      if (closer === undefined) return i;
      if (char === closer) closers.pop();
      else if (char === ",") state = closer === "}" ? "key" : "value";
      else return i;
      i++;
    } else if (state === "key" || state === "key-or-close") {
      if (char === "}" && state === "key-or-close") {
        closers.pop();
        state = "after-value";
        i++;
        continue;
      }
      if (char !== '"') return i;
      const key = scanString(text, i);
      if (key < 0) return -key - 1;
      i = skipSpace(text, key);
      if (text[i] !== ":") return Math.min(i, text.length);
      i++;
      state = "value";
    } else if (char === "]" && state === "value-or-close") {
      closers.pop();
      state = "after-value";
      i++;
    } else if (char === "{") {
      closers.push("}");
      state = "key-or-close";
      i++;
    } else if (char === "[") {
      closers.push("]");
      state = "value-or-close";
      i++;
    } else {
      const next = char === '"' ? scanString(text, i) : scanScalar(text, i);
      if (next < 0) return -next - 1;
      i = next;
      state = "after-value";
    }
  }
}

function skipSpace(text: string, start: number): number {
  let i = start;
  while (i < text.length) {
    const code = text.charCodeAt(i);
    if (code !== 0x20 && code !== 0x0a && code !== 0x0d && code !== 0x09) break;
    i++;
  }
  return i;
}

/** These scanners return the index after the token, or -1 - index of the character at fault. */
function scanString(text: string, start: number): number {
  for (let i = start + 1; i < text.length; i++) {
    const code = text.charCodeAt(i);
    if (code === QUOTE) return i + 1;
    if (code < 0x20) return -1 - i;
    if (code !== BACKSLASH) continue;
    i++;
    if (i >= text.length) break;
    if (text[i] === "u") {
      for (let digit = 0; digit < 4; digit++) {
        i++;
        if (i >= text.length) return -1 - text.length;
        if (!/[0-9a-fA-F]/.test(text[i]!)) return -1 - i;
      }
    } else if (!'"\\/bfnrt'.includes(text[i]!)) {
      return -1 - i;
    }
  }
  return -1 - text.length;
}

function scanScalar(text: string, start: number): number {
  for (const word of ["true", "false", "null"]) {
    if (text[start] !== word[0]) continue;
    for (let i = 1; i < word.length; i++) if (text[start + i] !== word[i]) return -1 - Math.min(start + i, text.length);
    return start + word.length;
  }
  return scanNumber(text, start);
}

function scanNumber(text: string, start: number): number {
  let i = start;
  if (text[i] === "-") i++;
  if (text[i] === "0") i++;
  else {
    const next = scanDigits(text, i);
    if (next < 0) return next;
    i = next;
  }
  if (text[i] === ".") {
    const next = scanDigits(text, i + 1);
    if (next < 0) return next;
    i = next;
  }
  if (text[i] === "e" || text[i] === "E") {
    i++;
    if (text[i] === "+" || text[i] === "-") i++;
    return scanDigits(text, i);
  }
  return i;
}

/** At least one digit. */
function scanDigits(text: string, start: number): number {
  let i = start;
  while (i < text.length && text.charCodeAt(i) >= 0x30 && text.charCodeAt(i) <= 0x39) i++;
  return i === start ? -1 - Math.min(start, text.length) : i;
}
