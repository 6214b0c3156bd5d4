/**
 * The newest lines that an engine wrote, for the tail in an error and for searching without a file. Bounded by lines and by
 * characters, oldest first out; a line is cut at 4,096 characters.
 */
export interface LogRingLimits {
  /** @default 4,000 */
  readonly maxLines?: number;
  /** @default 1 Mi */
  readonly maxChars?: number;
}

const MAX_LINE_CHARS = 4_096;
/** ESC [ ... m: engines colour their lines for terminals that are not there. */
// oxlint-disable-next-line no-control-regex
const COLOUR = /\u001b\[[0-9;]*m/g;

export class LogRing {
  readonly #maxLines: number;
  readonly #maxChars: number;
  /** From `#head` on; what is before is gone. */
  #lines: string[] = [];
  #head = 0;
  #chars = 0;
  /** Lines that came in all. */
  lineCount = 0;

  constructor({ maxLines = 4_000, maxChars = 1 << 20 }: LogRingLimits = {}) {
    this.#maxLines = maxLines;
    this.#maxChars = maxChars;
  }

  /** Returns the line as it is kept. */
  push(line: string): string {
    const plain = line.replace(COLOUR, "");
    const kept = plain.length > MAX_LINE_CHARS ? `${plain.slice(0, MAX_LINE_CHARS)}…` : plain;
    this.#lines.push(kept);
    this.#chars += kept.length;
    this.lineCount++;
    while (this.#lines.length - this.#head > this.#maxLines || this.#chars > this.#maxChars) {
      this.#chars -= this.#lines[this.#head]!.length;
      this.#head++;
    }
    if (this.#head > this.#maxLines) {
      this.#lines = this.#lines.slice(this.#head);
      this.#head = 0;
    }
    return kept;
  }

  /** The newest lines, oldest of them first. */
  tail(count: number): string[] {
    return this.#lines.slice(Math.max(this.#head, this.#lines.length - count));
  }

  /** The newest lines that have the text in them, in whatever case, oldest first. */
  search(text: string, limit: number): string[] {
    const wanted = text.toLowerCase();
    const found: string[] = [];
    for (let i = this.#lines.length - 1; i >= this.#head && found.length < limit; i--) {
      if (this.#lines[i]!.toLowerCase().includes(wanted)) found.push(this.#lines[i]!);
    }
    return found.toReversed();
  }
}
