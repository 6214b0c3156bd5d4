import type { Readable } from "node:stream";
import type { Dispatcher } from "undici";

/**
 * GET for model sources: redirects followed by hand (at most five; credentials stay with the origin they were meant for),
 * proxies of the environment and a CA bundle of the caller's honoured, every wait bounded. undici is loaded on first use.
 */
export interface HttpClient {
  get(url: string, options: HttpGetOptions): Promise<HttpResponse>;
  close(): Promise<void>;
}

export interface HttpGetOptions {
  readonly headers?: Readonly<Record<string, string>>;
  readonly signal: AbortSignal;
}

export interface HttpResponse {
  readonly status: number;
  readonly url: string;
  /** Of the last answer. Names in lower case. */
  readonly headers: Readonly<Record<string, string>>;
  /** Of all answers on the way, later ones winning: the hub tells size and checksum on its redirect. */
  readonly allHeaders: Readonly<Record<string, string>>;
  readonly body: Readable;
}

/** Unreachable hosts must be found out in seconds, because another source is waiting. */
const CONNECT_TIMEOUT_MS = 5_000;
const HEADERS_TIMEOUT_MS = 15_000;
/** No byte for this long: the connection is dead, and the download resumes on another. */
const BODY_TIMEOUT_MS = 30_000;
const MAX_REDIRECTS = 5;

export async function openHttpClient(ca?: string): Promise<HttpClient> {
  const { EnvHttpProxyAgent, request } = await import("undici");
  const dispatcher: Dispatcher = new EnvHttpProxyAgent({
    headersTimeout: HEADERS_TIMEOUT_MS,
    bodyTimeout: BODY_TIMEOUT_MS,
    connect: { timeout: CONNECT_TIMEOUT_MS, ...(ca === undefined ? {} : { ca }) },
  });
  return {
    async get(url, { headers = {}, signal }) {
      let target = new URL(url);
      let credentials: Record<string, string> = basicCredentials(target);
      let allHeaders: Record<string, string> = {};
      let sent = { ...headers };
      for (let hop = 0; ; hop++) {
        const response = await request(withoutCredentials(target), {
          dispatcher,
          signal,
          headers: { "user-agent": "dynamo-ts", ...credentials, ...sent },
        });
        const received = flatHeaders(response.headers);
        allHeaders = { ...allHeaders, ...received };
        const location = received.location;
        if (response.statusCode < 300 || response.statusCode >= 400 || location === undefined) {
          return { status: response.statusCode, url: target.href, headers: received, allHeaders, body: response.body };
        }
        await response.body.dump();
        if (hop === MAX_REDIRECTS) throw new Error(`more than ${MAX_REDIRECTS} redirects`);
        const next = new URL(location, target);
        if (next.protocol !== "https:" && next.protocol !== target.protocol) {
          throw new Error(`redirect from ${target.protocol} to ${next.protocol} refused`);
        }
        if (next.origin !== target.origin) {
          credentials = {};
          sent = Object.fromEntries(Object.entries(sent).filter(([name]) => name.toLowerCase() !== "authorization"));
        }
        target = next;
      }
    },
    close: () => dispatcher.destroy(),
  };
}

/** Reads a small body whole. */
export async function readBody(response: HttpResponse, maxBytes: number): Promise<string> {
  const chunks: Buffer[] = [];
  let total = 0;
  for await (const chunk of response.body as AsyncIterable<Buffer>) {
    total += chunk.length;
    if (total > maxBytes) throw new Error(`answer larger than ${maxBytes} bytes`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}

/** Lets go of a body that is not wanted. */
export function dropBody(response: HttpResponse): void {
  response.body.on("error", () => undefined);
  response.body.destroy();
}

function basicCredentials(url: URL): Record<string, string> {
  if (url.username === "") return {};
  const pair = `${decodeURIComponent(url.username)}:${decodeURIComponent(url.password)}`;
  return { authorization: `Basic ${Buffer.from(pair).toString("base64")}` };
}

function withoutCredentials(url: URL): URL {
  const bare = new URL(url);
  bare.username = "";
  bare.password = "";
  bare.hash = "";
  return bare;
}

function flatHeaders(headers: Record<string, string | string[] | undefined>): Record<string, string> {
  const flat: Record<string, string> = {};
  for (const [name, value] of Object.entries(headers)) {
    if (value !== undefined) flat[name.toLowerCase()] = Array.isArray(value) ? value.join(", ") : value;
  }
  return flat;
}
