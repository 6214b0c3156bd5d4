/**
 * Counts what an OpenAI event stream carries without parsing it: events with text, errors, the end marker. Fed with
 * whatever pieces of the body come; a line split between pieces is completed in a carry buffer. No object per event.
 *
 * An event counts as a token when `content`, `reasoning_content` or `text` of it is a non-empty string. Looking for the
 * key as bytes is exact: inside a JSON string its quotes would be escaped. All events of a stream have the same layout,
 * so the key is looked for first where it was in the event before.
 */
const LINE_FEED = 10;
const CARRIAGE_RETURN = 13;
const SPACE = 32;
const QUOTE = 34;
const COLON = 58;
/** A line of a stream; a longer one is not an answer of a model. */
const MAX_LINE_BYTES = 16 * 1024 * 1024;

const KEYS = ['"content"', '"text"', '"reasoning_content"'].map((key) => Buffer.from(key));
const DATA = Buffer.from("data:");
const DONE = Buffer.from("[DONE]");
const ERROR = Buffer.from('{"error"');

export class SseCounter {
  /** Events with text since `reset`. */
  tokenCount = 0;
  errorCount = 0;
  isDone = false;
  /** A line over the limit was seen; the rest is ignored. */
  isOverlong = false;
  #carry: Buffer = Buffer.allocUnsafe(1024);
  #carried = 0;
  /** Where the last event had its text: offset from the start of its line. */
  #keyIndex = 0;
  #keyAt = 0;

  reset(): void {
    this.tokenCount = 0;
    this.errorCount = 0;
    this.isDone = false;
    this.isOverlong = false;
    this.#carried = 0;
  }

  /** Takes `piece[start..end)`; the buffer may be reused afterwards. */
  write(piece: Buffer, start: number, end: number): void {
    let at = start;
    while (at < end) {
      let lineEnd = piece.indexOf(LINE_FEED, at);
      if (lineEnd === -1 || lineEnd >= end) lineEnd = -1;
      if (this.#carried > 0 || lineEnd === -1) {
        const to = lineEnd === -1 ? end : lineEnd;
        this.#keep(piece, at, to);
        if (lineEnd === -1) return;
        this.#line(this.#carry, 0, this.#carried);
        this.#carried = 0;
      } else {
        this.#line(piece, at, lineEnd);
      }
      at = lineEnd + 1;
    }
  }

  #keep(piece: Buffer, start: number, end: number): void {
    const needed = this.#carried + end - start;
    if (needed > MAX_LINE_BYTES) {
      this.isOverlong = true;
      this.#carried = 1;
      return;
    }
    if (needed > this.#carry.length) {
      const grown = Buffer.allocUnsafe(needed * 2);
      this.#carry.copy(grown, 0, 0, this.#carried);
      this.#carry = grown;
    }
    piece.copy(this.#carry, this.#carried, start, end);
    this.#carried = needed;
  }

  #line(bytes: Buffer, start: number, lineEnd: number): void {
    const end = lineEnd > start && bytes[lineEnd - 1] === CARRIAGE_RETURN ? lineEnd - 1 : lineEnd;
    if (!hasAt(bytes, start, end, DATA)) return;
    const at = bytes[start + DATA.length] === SPACE ? start + DATA.length + 1 : start + DATA.length;
    if (hasAt(bytes, at, end, DONE)) this.isDone = true;
    else if (hasAt(bytes, at, end, ERROR)) this.errorCount++;
    else if (this.#hasText(bytes, start, end)) this.tokenCount++;
  }

  #hasText(bytes: Buffer, start: number, end: number): boolean {
    if (textAt(bytes, start + this.#keyAt, end, KEYS[this.#keyIndex]!)) return true;
    for (let at = start; at < end; at++) {
      if (bytes[at] !== QUOTE) continue;
      for (let i = 0; i < KEYS.length; i++) {
        if (!textAt(bytes, at, end, KEYS[i]!)) continue;
        this.#keyIndex = i;
        this.#keyAt = at - start;
        return true;
      }
    }
    return false;
  }
}

function hasAt(bytes: Buffer, at: number, end: number, wanted: Buffer): boolean {
  if (at + wanted.length > end) return false;
  for (let i = 0; i < wanted.length; i++) if (bytes[at + i] !== wanted[i]) return false;
  return true;
}

/** True when `key : "x` stands at `at`: the key with a string that is not empty. */
function textAt(bytes: Buffer, at: number, end: number, key: Buffer): boolean {
  if (!hasAt(bytes, at, end, key)) return false;
  let next = at + key.length;
  while (next < end && bytes[next] === SPACE) next++;
  if (bytes[next] !== COLON) return false;
  next++;
  while (next < end && bytes[next] === SPACE) next++;
  return next + 1 < end && bytes[next] === QUOTE && bytes[next + 1] !== QUOTE;
}
