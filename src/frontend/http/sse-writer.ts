import type { ServerResponse } from "node:http";
import type { Socket } from "node:net";

/**
 * Server-sent events straight to the socket: what was pushed since the last flush becomes one HTTP chunk and one socket
 * write; the headers go out in the first one, the end mark in the last. node:http keeps its books because headers and
 * end still pass through the response (`flushHeaders` and `end` under the socket's cork, one writev); only the chunks
 * between go round it, which halves their cost.
 *
 * Bounded: when earlier bytes are still unread and the next batch would take them over `limitBytes`, the connection is
 * destroyed and `onOverflow` is called. One flush may itself be larger, so at most `limitBytes` plus one flush is held.
 * Owned by one exchange; all calls after the end or after the client left do nothing.
 */
export interface SseWriterOptions {
  readonly response: ServerResponse;
  /** Flat list name, value, name, value. */
  readonly headers: readonly string[];
  readonly limitBytes: number;
  /** False for HTTP/1.0: the end of the connection ends the body. */
  readonly chunked: boolean;
  readonly onOverflow: () => void;
  /** The answer is complete as far as its producer is concerned; bytes may still be on the way. */
  readonly onEnd: () => void;
  /** `onDrained` threw; nobody above it could catch that. */
  readonly onDefect: (thrown: unknown) => void;
}

const NON_ASCII = /[\u0080-\uffff]/;

/** Whether a text can be written as latin1 (one byte per character, no length to compute). */
export function isAsciiText(text: string): boolean {
  return !NON_ASCII.test(text);
}

export class SseWriter {
  /** Called when `bufferedBytes` fell to 0 after it had been above 0. */
  onDrained: (() => void) | undefined = undefined;
  readonly #response: ServerResponse;
  readonly #headers: readonly string[];
  readonly #limitBytes: number;
  readonly #chunked: boolean;
  readonly #onOverflow: () => void;
  readonly #onEnd: () => void;
  readonly #onDefect: (thrown: unknown) => void;
  readonly #onWritten: () => void;
  #socket: Socket | undefined = undefined;
  #pending = "";
  #pendingAscii = true;
  #started = false;
  #ended = false;
  #watching = false;

  constructor(options: SseWriterOptions) {
    this.#response = options.response;
    this.#headers = options.headers;
    this.#limitBytes = options.limitBytes;
    this.#chunked = options.chunked;
    this.#onOverflow = options.onOverflow;
    this.#onEnd = options.onEnd;
    this.#onDefect = options.onDefect;
    this.#onWritten = () => this.#written();
  }

  /** Whether the status line left; until then the exchange can still answer with an error status. */
  get started(): boolean {
    return this.#started;
  }

  /** Pushed but not flushed, plus handed to the socket but not taken by the kernel. */
  get bufferedBytes(): number {
    const socket = this.#socket;
    return this.#pending.length + (socket === undefined || socket.destroyed ? 0 : socket.writableLength);
  }

  /** Adds whole events (`data: ...\n\n`). `ascii`: no character above U+007F; saves the length computation. */
  push(events: string, ascii: boolean): void {
    if (this.#ended) return;
    this.#pending += events;
    if (!ascii) this.#pendingAscii = false;
  }

  flush(): void {
    if (this.#ended || (this.#started && this.#pending.length === 0)) return;
    const socket = this.#writableSocket();
    if (socket === undefined) return;
    if (this.#started) {
      this.#writeChunk(socket);
    } else {
      socket.cork();
      this.#start(socket);
      this.#writeChunk(socket);
      socket.uncork();
    }
    this.#watch(socket);
  }

  /** Sends what is pending and the end of the body in one write. */
  end(): void {
    if (this.#ended) return;
    const socket = this.#writableSocket();
    this.#ended = true;
    if (socket === undefined) return;
    socket.cork();
    if (!this.#started) this.#start(socket);
    this.#writeChunk(socket);
    this.#onEnd();
    this.#response.end();
    socket.uncork();
  }

  /** The client is gone or another answer was given: drops what is pending. */
  abandon(): void {
    this.#ended = true;
    this.#pending = "";
  }

  #start(socket: Socket): void {
    this.#started = true;
    this.#socket = socket;
    this.#response.writeHead(200, this.#headers as string[]);
    this.#response.flushHeaders();
  }

  /** The socket, if what is pending may be written to it; otherwise drops it. */
  #writableSocket(): Socket | undefined {
    const socket = this.#response.socket;
    if (socket === null || !socket.writable) {
      this.#pending = "";
      return undefined;
    }
    const unread = socket.writableLength;
    if (unread > 0 && unread + this.#pending.length > this.#limitBytes) {
      this.abandon();
      this.#onOverflow();
      return undefined;
    }
    return socket;
  }

  #writeChunk(socket: Socket): void {
    const batch = this.#pending;
    if (batch.length === 0) return;
    const ascii = this.#pendingAscii;
    this.#pending = "";
    this.#pendingAscii = true;
    const byteLength = ascii ? batch.length : Buffer.byteLength(batch);
    const framed = this.#chunked ? `${byteLength.toString(16)}\r\n${batch}\r\n` : batch;
    socket.write(framed, ascii ? "latin1" : "utf8");
  }

  /**
   * Bytes stayed behind: an empty write queued after them tells when they are gone. (The stream's own `drain` event
   * only comes above its high-water mark, and a callback on every write costs 0.5 us for nothing.)
   */
  #watch(socket: Socket): void {
    if (this.#watching || socket.writableLength === 0 || !socket.writable) return;
    this.#watching = true;
    socket.write("", "latin1", this.#onWritten);
  }

  #written(): void {
    this.#watching = false;
    const socket = this.#socket;
    if (socket === undefined || socket.destroyed || this.#ended) return;
    if (socket.writableLength > 0) {
      this.#watch(socket);
      return;
    }
    try {
      this.onDrained?.();
    } catch (thrown) {
      this.#onDefect(thrown);
    }
  }
}
