import type { IncomingMessage, ServerResponse } from "node:http";
import type { DynamoError } from "../../errors/index.ts";
import { errorBody, errorHeaders, errorStatus } from "../openai/errors.ts";
import { SseWriter, isAsciiText } from "./sse-writer.ts";

/** How errors of a route look: OpenAI's JSON, or one line of text for people and probes. */
export type ApiFamily = "openai" | "plain";

/** Why nobody waits for the answer any more. */
export type GoneReason = "client-gone" | "slow-reader";

/** What an exchange needs from the server that made it. */
export interface ExchangeOwner {
  readonly responseBufferBytes: number;
  /** Set while the server drains: answers ask the client to close the connection. */
  readonly closing: boolean;
  /** A callback of the handler threw, outside of the handler. */
  onCallbackFailed(exchange: Exchange, thrown: unknown): void;
}

/**
 * One request and its one answer, as handlers see them. Exactly one of `json`, `jsonText`, `text`, `sendError` and
 * `sse()...end()` answers it; a second answer is a defect and throws. When the client leaves before that, `onGone` is
 * called once and every later answer is dropped silently, so handlers need not check. Owned by the event loop of its
 * server; made and ended by `HttpServer`.
 */
export class Exchange {
  /** The client's `x-request-id` if it is 1 to 128 visible ASCII characters, else generated; sent back in the answer. */
  readonly requestId: string;
  readonly method: string;
  /** Without the query. */
  readonly path: string;
  readonly arrivalMs: number;
  /** The parsed JSON body of routes that take one. */
  body: unknown = undefined;
  /** Called once when the client disconnects, or is cut off as a slow reader, before the answer ended. */
  onGone: ((reason: GoneReason) => void) | undefined = undefined;
  readonly #owner: ExchangeOwner;
  readonly #request: IncomingMessage;
  readonly #response: ServerResponse;
  readonly #queryText: string;
  readonly #family: ApiFamily;
  readonly #closeAfter: boolean;
  #query: URLSearchParams | undefined = undefined;
  #sse: SseWriter | undefined = undefined;
  #state: "open" | "answered" | "gone" = "open";

  constructor(
    owner: ExchangeOwner,
    request: IncomingMessage,
    response: ServerResponse,
    details: {
      readonly requestId: string;
      readonly path: string;
      readonly queryText: string;
      readonly family: ApiFamily;
      readonly arrivalMs: number;
      /** The request carries a body that nobody will read: the connection cannot be used again. */
      readonly closeAfter: boolean;
    },
  ) {
    this.#owner = owner;
    this.#request = request;
    this.#response = response;
    this.#queryText = details.queryText;
    this.#family = details.family;
    this.#closeAfter = details.closeAfter;
    this.requestId = details.requestId;
    this.method = request.method ?? "";
    this.path = details.path;
    this.arrivalMs = details.arrivalMs;
  }

  get query(): URLSearchParams {
    return (this.#query ??= new URLSearchParams(this.#queryText));
  }

  /** A request header; `name` in lower case. Lists are joined with a comma, as node:http does. */
  header(name: string): string | undefined {
    const value = this.#request.headers[name];
    return Array.isArray(value) ? value.join(", ") : value;
  }

  /** IP address of the other end of the connection; empty once it is closed. */
  get remoteAddress(): string {
    return this.#request.socket.remoteAddress ?? "";
  }

  /** The client left, or was cut off, before the answer was complete. */
  get gone(): boolean {
    return this.#state === "gone";
  }

  /** A complete answer was given (its bytes may still be on the way). */
  get answered(): boolean {
    return this.#state === "answered";
  }

  /** The status line left or was handed over: an error can no longer become a status. */
  get headersSent(): boolean {
    return this.#state === "answered" || this.#sse?.started === true;
  }

  json(status: number, value: unknown, headers?: Readonly<Record<string, string>>): void {
    this.jsonText(status, JSON.stringify(value), headers);
  }

  /** `json` for a text that is JSON already. */
  jsonText(status: number, json: string, headers?: Readonly<Record<string, string>>): void {
    this.#answer(status, "application/json", json, headers);
  }

  text(status: number, text: string, headers?: Readonly<Record<string, string>>): void {
    this.#answer(status, headers?.["content-type"] ?? "text/plain; charset=utf-8", text, headers);
  }

  /** Before the headers: the error's status (or a nearer one) and a body in the family's shape. */
  sendError(error: DynamoError, nearer: { status?: number; headers?: Readonly<Record<string, string>> } = {}): void {
    const plain = this.#family === "plain";
    const type = plain ? "text/plain; charset=utf-8" : "application/json";
    const body = plain ? plainError(error) : errorBody(error);
    this.#answer(nearer.status ?? errorStatus(error), type, body, { ...errorHeaders(error), ...nearer.headers });
  }

  /** The stream of this answer; nothing is sent before its first `flush` or `end`. */
  sse(): SseWriter {
    return (this.#sse ??= new SseWriter({
      response: this.#response,
      headers: this.#headers("text/event-stream; charset=utf-8", [
        "cache-control",
        "no-cache",
        "x-accel-buffering",
        "no",
      ]),
      limitBytes: this.#owner.responseBufferBytes,
      chunked: this.#request.httpVersionMinor >= 1,
      onOverflow: () => this.#cutOff(),
      onEnd: () => (this.#state = "answered"),
      onDefect: (thrown) => this.#owner.onCallbackFailed(this, thrown),
    }));
  }

  /** Closes the connection at once without an answer; a handler failed in the middle of a stream. */
  destroy(): void {
    this.#response.socket?.destroy();
  }

  /** For the server: the connection closed. Reports it if the answer was not complete. */
  connectionClosed(): void {
    this.#leave("client-gone");
  }

  /** For the server: it answered on the raw socket, in place of a handler. */
  markAnswered(): void {
    this.#state = "answered";
  }

  #cutOff(): void {
    const socket = this.#response.socket;
    this.#leave("slow-reader");
    socket?.destroy();
  }

  #leave(reason: GoneReason): void {
    if (this.#state !== "open") return;
    this.#state = "gone";
    this.#sse?.abandon();
    const onGone = this.onGone;
    this.onGone = undefined;
    try {
      onGone?.(reason);
    } catch (thrown) {
      this.#owner.onCallbackFailed(this, thrown);
    }
  }

  #headers(contentType: string, more: readonly string[]): string[] {
    const headers = ["content-type", contentType, "x-request-id", this.requestId, ...more];
    if (this.#closeAfter || this.#owner.closing) headers.push("connection", "close");
    return headers;
  }

  #answer(status: number, contentType: string, text: string, extra?: Readonly<Record<string, string>>): void {
    if (this.#state === "gone") return;
    if (this.headersSent) throw new Error(`${this.method} ${this.path} was answered twice`);
    this.#state = "answered";
    this.#sse?.abandon();
    const ascii = isAsciiText(text);
    const headers = this.#headers(contentType, [
      "content-length",
      String(ascii ? text.length : Buffer.byteLength(text)),
    ]);
    if (extra !== undefined) {
      for (const name in extra) if (name !== "content-type") headers.push(name, extra[name]!);
    }
    const response = this.#response;
    response.writeHead(status, STATUS_TEXT[status], headers);
    response.end(text, ascii ? "latin1" : "utf8");
  }
}

/** Statuses that node:http has no words for. */
export const STATUS_TEXT: Readonly<Record<number, string>> = {
  499: "Client Closed Request",
  529: "Overloaded",
};

export function plainError(error: DynamoError): string {
  return `${error.reason}: ${error.publicMessage}\n`;
}
