/**
 * An incremental HTTP/1.1 response reader for the load generator: status, and the body by content-length, in chunks or
 * up to the end of the connection, given on in pieces as they came. One response at a time; `isComplete` says when the
 * next may begin. Strict where it costs nothing: what is not HTTP/1.x is a `MalformedResponse`.
 */
export class MalformedResponse extends Error {
  override readonly name = "MalformedResponse";
}

const LINE_FEED = 10;
/** Status line and headers, or one chunk-size line or trailer section. */
const MAX_HEAD_BYTES = 64 * 1024;

type State = "head" | "length" | "close" | "chunk-size" | "chunk-data" | "chunk-end" | "trailers" | "complete";

export class ResponseReader {
  status = 0;
  isEventStream = false;
  /** The server keeps the connection after this response. */
  isKeptAlive = true;
  #state: State = "head";
  #head = "";
  #remaining = 0;
  readonly #onBody: (bytes: Buffer, start: number, end: number) => void;

  constructor(onBody: (bytes: Buffer, start: number, end: number) => void) {
    this.#onBody = onBody;
  }

  get isComplete(): boolean {
    return this.#state === "complete";
  }

  /** Nothing of the response has come yet. */
  get isUntouched(): boolean {
    return this.#state === "head" && this.#head === "";
  }

  reset(): void {
    this.status = 0;
    this.isEventStream = false;
    this.isKeptAlive = true;
    this.#state = "head";
    this.#head = "";
    this.#remaining = 0;
  }

  /** The connection ended: completes a body that has no other end. */
  end(): void {
    if (this.#state === "close") this.#state = "complete";
  }

  /** Takes all of `bytes`; throws `MalformedResponse`, also for bytes after the end of the response. */
  write(bytes: Buffer): void {
    let at = 0;
    while (at < bytes.length) {
      switch (this.#state) {
        case "head":
          at = this.#readHead(bytes, at);
          break;
        case "length":
        case "chunk-data":
          at = this.#readCounted(bytes, at);
          break;
        case "close":
          this.#onBody(bytes, at, bytes.length);
          return;
        case "chunk-size":
        case "chunk-end":
        case "trailers":
          at = this.#readChunkLine(bytes, at);
          break;
        case "complete":
          throw new MalformedResponse("bytes after the end of the response");
      }
    }
  }

  /** Collects up to and with a line feed; returns the position after it, or -1 when the line is not complete yet. */
  #collectLine(bytes: Buffer, at: number): number {
    const lineEnd = bytes.indexOf(LINE_FEED, at);
    const to = lineEnd === -1 ? bytes.length : lineEnd + 1;
    this.#head += bytes.toString("latin1", at, to);
    if (this.#head.length > MAX_HEAD_BYTES) throw new MalformedResponse("head over 64 KiB");
    return lineEnd === -1 ? -1 : to;
  }

  #readHead(bytes: Buffer, at: number): number {
    const next = this.#collectLine(bytes, at);
    if (next === -1) return bytes.length;
    if (this.#head.endsWith("\r\n\r\n") || this.#head.endsWith("\n\n")) this.#parseHead();
    return next;
  }

  #parseHead(): void {
    const [statusLine, ...lines] = this.#head.split(/\r?\n/);
    this.#head = "";
    const status = /^HTTP\/1\.([01]) ([1-5]\d\d)/.exec(statusLine!);
    if (status === null) throw new MalformedResponse("no HTTP/1.x status line");
    this.status = Number(status[2]);
    if (this.status < 200) return;
    let isChunked = false;
    let length = -1;
    this.isKeptAlive = status[1] === "1";
    for (const line of lines) {
      const colon = line.indexOf(":");
      const value = line.slice(colon + 1).trim();
      switch (line.slice(0, colon).toLowerCase()) {
        case "content-length":
          if (!/^\d{1,15}$/.test(value)) throw new MalformedResponse("bad content-length");
          length = Number(value);
          break;
        case "transfer-encoding":
          isChunked = /\bchunked$/i.test(value);
          break;
        case "content-type":
          this.isEventStream = /^text\/event-stream\b/i.test(value);
          break;
        case "connection":
          if (/\bclose\b/i.test(value)) this.isKeptAlive = false;
          break;
      }
    }
    if (this.status === 204 || this.status === 304) this.#state = "complete";
    else if (isChunked) this.#state = "chunk-size";
    else if (length >= 0) {
      this.#remaining = length;
      this.#state = length === 0 ? "complete" : "length";
    } else {
      this.isKeptAlive = false;
      this.#state = "close";
    }
  }

  #readCounted(bytes: Buffer, at: number): number {
    const to = Math.min(bytes.length, at + this.#remaining);
    this.#onBody(bytes, at, to);
    this.#remaining -= to - at;
    if (this.#remaining === 0) this.#state = this.#state === "length" ? "complete" : "chunk-end";
    return to;
  }

  #readChunkLine(bytes: Buffer, at: number): number {
    const next = this.#collectLine(bytes, at);
    if (next === -1) return bytes.length;
    const line = this.#head.trimEnd();
    this.#head = "";
    if (this.#state === "chunk-size") {
      if (!/^[0-9a-fA-F]{1,8}(?:\s*;.*)?$/.test(line)) throw new MalformedResponse("bad chunk size");
      this.#remaining = Number.parseInt(line, 16);
      this.#state = this.#remaining === 0 ? "trailers" : "chunk-data";
    } else if (this.#state === "chunk-end") {
      if (line !== "") throw new MalformedResponse("chunk longer than its size");
      this.#state = "chunk-size";
    } else if (line === "") {
      this.#state = "complete";
    }
    return next;
  }
}
