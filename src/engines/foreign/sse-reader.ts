/**
 * Server-sent events out of the bytes of a response: calls back with the data of each event, joined by newlines when there
 * are several lines. Bytes may be cut anywhere. Comments, event names and ids are skipped: no engine's stream needs them.
 *
 * An event longer than the limit is a server gone wrong, and throws.
 */
const MAX_EVENT_BYTES = 16 * 1024 * 1024;
const NEWLINE = 10;
const RETURN = 13;

export class SseReader {
  readonly #onData: (data: string) => void;
  /** An unfinished line. */
  #rest: Buffer | undefined;
  #data: string[] = [];

  constructor(onData: (data: string) => void) {
    this.#onData = onData;
  }

  push(chunk: Buffer): void {
    const bytes = this.#rest === undefined ? chunk : Buffer.concat([this.#rest, chunk]);
    this.#rest = undefined;
    let start = 0;
    for (;;) {
      const end = bytes.indexOf(NEWLINE, start);
      if (end === -1) break;
      this.#line(bytes, start, end > start && bytes[end - 1] === RETURN ? end - 1 : end);
      start = end + 1;
    }
    if (start === bytes.length) return;
    if (bytes.length - start > MAX_EVENT_BYTES) throw new Error(`an event of more than ${MAX_EVENT_BYTES} bytes`);
    this.#rest = bytes.subarray(start);
  }

  /** The response is over: an event without its empty line counts too. */
  end(): void {
    if (this.#rest !== undefined) this.#line(this.#rest, 0, this.#rest.length);
    this.#rest = undefined;
    this.#dispatch();
  }

  #line(bytes: Buffer, start: number, end: number): void {
    if (start === end) return this.#dispatch();
    // `data:` and no other field.
    if (bytes[start] !== 0x64 || bytes.toString("latin1", start, start + 5) !== "data:") return;
    const from = bytes[start + 5] === 0x20 ? start + 6 : start + 5;
    this.#data.push(bytes.toString("utf8", from, end));
  }

  #dispatch(): void {
    if (this.#data.length === 0) return;
    const data = this.#data.length === 1 ? this.#data[0]! : this.#data.join("\n");
    this.#data = [];
    this.#onData(data);
  }
}
