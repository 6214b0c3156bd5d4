import { createHash, createHmac, type Hash, type Hmac } from "node:crypto";
import { Readable } from "node:stream";
import { SignatureV4 } from "@smithy/signature-v4";
import { Pool, type Dispatcher } from "undici";
import { DynamoError } from "../../errors/index.ts";
import type { Clock, Random } from "../../std/index.ts";

/**
 * An S3-compatible store over HTTP: the few calls the transfer library and the remote tier need. Path-style addresses, AWS
 * signature version 4, payloads unsigned (their checksums are the block manager's). Throttling, server errors and broken
 * connections are tried again with full jitter (Brooker, "Exponential Backoff and Jitter") until the deadline; answers that
 * will not change are not.
 */
export interface S3Options {
  /** `https://s3.eu-central-1.amazonaws.com`, `http://127.0.0.1:9000`. */
  readonly endpoint: string;
  /** @default us-east-1 */
  readonly region?: string;
  readonly accessKeyId: string;
  readonly secretAccessKey: string;
  readonly sessionToken?: string | undefined;
  /** Requests at a time. @default 16 */
  readonly concurrency?: number;
  /** Objects above this go up in parts of this size; at least 5 MiB, which is S3's rule. @default 16777216 */
  readonly partBytes?: number;
  /** Tries per request. @default 4 */
  readonly attempts?: number;
}

/** What the AWS tools read: `AWS_ENDPOINT_URL_S3`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, ... Throws `invalid-config`. */
export function s3OptionsFromEnvironment(env: NodeJS.ProcessEnv): S3Options {
  const region = env["AWS_REGION"] ?? env["AWS_DEFAULT_REGION"] ?? "us-east-1";
  const endpoint = env["AWS_ENDPOINT_URL_S3"] ?? env["AWS_ENDPOINT_URL"] ?? `https://s3.${region}.amazonaws.com`;
  const accessKeyId = env["AWS_ACCESS_KEY_ID"] ?? "";
  const secretAccessKey = env["AWS_SECRET_ACCESS_KEY"] ?? "";
  if (accessKeyId === "" || secretAccessKey === "") {
    throw new DynamoError("invalid-config", "object store: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set");
  }
  return { endpoint, region, accessKeyId, secretAccessKey, sessionToken: env["AWS_SESSION_TOKEN"] };
}

export interface ObjectAddress {
  readonly bucket: string;
  readonly key: string;
}

export interface CallOptions {
  readonly signal: AbortSignal;
  /** On the clock's monotonic time. */
  readonly deadlineMs: number;
}

interface Call extends CallOptions {
  readonly method: "GET" | "PUT" | "POST" | "DELETE" | "HEAD";
  readonly bucket: string;
  readonly key?: string;
  readonly query?: Readonly<Record<string, string>>;
  readonly headers?: Readonly<Record<string, string>>;
  /** Sent one after the other, from where they are. */
  readonly body?: readonly Buffer[];
  /** Answers besides 2xx that the caller understands. */
  readonly accept?: readonly number[];
}

interface Answer {
  readonly status: number;
  readonly headers: Readonly<Record<string, string | string[] | undefined>>;
  readonly text: string;
}

const RETRIED = new Set([408, 429, 500, 502, 503, 504]);
const BACK_OFF_MS = 50;
const MAX_BACK_OFF_MS = 2_000;
/** An error document or a page of a listing. */
const MAX_TEXT_BYTES = 8 * 1024 * 1024;
const MIN_PART_BYTES = 5 * 1024 * 1024;

export class S3Client {
  readonly partBytes: number;
  readonly #pool: Pool;
  readonly #endpoint: URL;
  readonly #signer: SignatureV4;
  readonly #attempts: number;
  readonly #clock: Clock;
  readonly #random: Random;

  constructor(options: S3Options, { clock, random }: { readonly clock: Clock; readonly random: Random }) {
    this.#endpoint = parseEndpoint(options.endpoint);
    this.partBytes = options.partBytes ?? 16 * 1024 * 1024;
    if (this.partBytes < MIN_PART_BYTES) {
      throw new DynamoError(
        "invalid-config",
        `object store partBytes: expected at least ${MIN_PART_BYTES}, got ${this.partBytes}`,
      );
    }
    this.#attempts = options.attempts ?? 4;
    this.#clock = clock;
    this.#random = random;
    // Deadlines are the caller's, through its signal.
    this.#pool = new Pool(this.#endpoint.origin, {
      connections: options.concurrency ?? 16,
      headersTimeout: 0,
      bodyTimeout: 0,
    });
    const { accessKeyId, secretAccessKey, sessionToken } = options;
    this.#signer = new SignatureV4({
      service: "s3",
      region: options.region ?? "us-east-1",
      credentials: { accessKeyId, secretAccessKey, ...(sessionToken === undefined ? {} : { sessionToken }) },
      sha256: Sha256,
      uriEscapePath: false,
      applyChecksum: false,
    });
  }

  /**
   * Stores an object, in parts when it is large. With `ifAbsent` one that is there stays as it is; resolves to whether this
   * call stored it.
   */
  async put(
    at: ObjectAddress,
    body: readonly Buffer[],
    options: CallOptions & { readonly ifAbsent: boolean },
  ): Promise<boolean> {
    const byteCount = byteLength(body);
    if (byteCount > this.partBytes) return this.#putParts(at, body, options);
    const headers = options.ifAbsent ? IF_ABSENT : {};
    const { status } = await this.#call({ ...options, ...at, method: "PUT", body, headers, accept: [409, 412] });
    return this.#stored(status);
  }

  #stored(status: number): boolean {
    // 409: somebody else stores it at this moment.
    return status !== 412 && status !== 409;
  }

  async #putParts(
    at: ObjectAddress,
    body: readonly Buffer[],
    options: CallOptions & { readonly ifAbsent: boolean },
  ): Promise<boolean> {
    if (options.ifAbsent && (await this.head(at, options)) !== undefined) return false;
    const created = await this.#call({ ...options, ...at, method: "POST", query: { uploads: "" } });
    const uploadId = unescapeXml(/<UploadId>([^<]+)<\/UploadId>/.exec(created.text)?.[1] ?? "");
    if (uploadId === "") throw failed("it gave no id for an upload in parts");
    try {
      const etags: string[] = [];
      for (const part of cut(body, this.partBytes)) {
        const query = { partNumber: String(etags.length + 1), uploadId };
        const { headers } = await this.#call({ ...options, ...at, method: "PUT", query, body: part });
        const etag = headers["etag"];
        if (typeof etag !== "string") throw failed("it gave no ETag for a part");
        etags.push(etag);
      }
      const parts = etags.map(
        (etag, i) => `<Part><PartNumber>${i + 1}</PartNumber><ETag>${escapeXml(etag)}</ETag></Part>`,
      );
      const document = Buffer.from(`<CompleteMultipartUpload>${parts.join("")}</CompleteMultipartUpload>`);
      const headers = { ...(options.ifAbsent ? IF_ABSENT : {}), "content-type": "application/xml" };
      const call = {
        ...options,
        ...at,
        method: "POST" as const,
        query: { uploadId },
        body: [document],
        headers,
        accept: [409, 412],
      };
      const { status, text } = await this.#call(call);
      // A completion can fail after its 200 was sent.
      if (status === 200 && text.includes("<Error>")) throw failed(codeOf(text));
      if (!this.#stored(status)) await this.#abortUpload(at, uploadId);
      return this.#stored(status);
    } catch (thrown) {
      await this.#abortUpload(at, uploadId);
      throw thrown;
    }
  }

  /** Parts that stay behind cost money: removed with a deadline of its own, as the caller's may be over. */
  async #abortUpload(at: ObjectAddress, uploadId: string): Promise<void> {
    const options = { signal: AbortSignal.timeout(5_000), deadlineMs: this.#clock.monotonicMs() + 5_000 };
    await this.#call({ ...options, ...at, method: "DELETE", query: { uploadId }, accept: [404] }).catch(
      () => undefined,
    );
  }

  /**
   * Reads `[start, start + n)` of an object into the pieces, n being their bytes in all. Throws `object-not-found`, and
   * `storage-failed` when there is less. Nothing is written to the pieces any more once it has settled.
   */
  async get(at: ObjectAddress, start: number, into: readonly Buffer[], options: CallOptions): Promise<void> {
    const byteCount = byteLength(into);
    const headers = { range: `bytes=${start}-${start + byteCount - 1}` };
    await this.#retrying(options, async () => {
      const response = await this.#send({ ...options, ...at, method: "GET", headers });
      if (response.statusCode !== 206 && response.statusCode !== 200) {
        throw errorOf(response.statusCode, await readText(response));
      }
      // A server that does not know ranges sends the object from its start.
      await fill(response, response.statusCode === 200 ? start : 0, into, byteCount);
    });
  }

  /** Bytes of an object, or undefined when there is none. */
  async head(at: ObjectAddress, options: CallOptions): Promise<number | undefined> {
    const { status, headers } = await this.#call({ ...options, ...at, method: "HEAD", accept: [404] });
    return status === 404 ? undefined : Number(headers["content-length"] ?? 0);
  }

  /** No error when there is none. */
  async remove(at: ObjectAddress, options: CallOptions): Promise<void> {
    await this.#call({ ...options, ...at, method: "DELETE", accept: [404] });
  }

  /** One page (at most 1,000) of the keys with a prefix, in order, behind `after`. */
  async list(
    bucket: string,
    prefix: string,
    after: string,
    options: CallOptions,
  ): Promise<{ key: string; byteCount: number }[]> {
    const query = { "list-type": "2", prefix, ...(after === "" ? {} : { "start-after": after }) };
    const { text } = await this.#call({ ...options, bucket, method: "GET", query });
    return [...text.matchAll(/<Contents>(.*?)<\/Contents>/gs)].map(([, entry]) => ({
      key: unescapeXml(/<Key>([^<]*)<\/Key>/.exec(entry!)?.[1] ?? ""),
      byteCount: Number(/<Size>(\d+)<\/Size>/.exec(entry!)?.[1] ?? 0),
    }));
  }

  get endpoint(): string {
    return this.#endpoint.origin;
  }

  /** No error when it is there already. */
  async createBucket(bucket: string, options: CallOptions): Promise<void> {
    await this.#call({ ...options, bucket, method: "PUT", accept: [409] });
  }

  async close(): Promise<void> {
    await this.#pool.destroy();
  }

  async #call(call: Call): Promise<Answer> {
    return this.#retrying(call, async () => {
      const response = await this.#send(call);
      const text = await readText(response);
      const { statusCode: status } = response;
      if (status >= 300 && call.accept?.includes(status) !== true) throw errorOf(status, text);
      return { status, headers: response.headers, text };
    });
  }

  async #retrying<T>(options: CallOptions, run: () => Promise<T>): Promise<T> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await run();
      } catch (thrown) {
        if (options.signal.aborted) throw new DynamoError("cancelled", "the call to the object store was cancelled");
        const error = thrown instanceof DynamoError ? thrown : failed((thrown as Error).message, thrown, true);
        const delayMs = this.#random.nextFloat() * Math.min(MAX_BACK_OFF_MS, BACK_OFF_MS * 2 ** attempt);
        const isInTime = this.#clock.monotonicMs() + delayMs < options.deadlineMs;
        if (!(error instanceof RetryableError) || attempt >= this.#attempts || !isInTime) throw error;
        await this.#sleep(delayMs, options.signal);
      }
    }
  }

  #sleep(delayMs: number, signal: AbortSignal): Promise<void> {
    return new Promise((resolve) => {
      const wake = (): void => {
        timer.cancel();
        signal.removeEventListener("abort", wake);
        resolve();
      };
      const timer = this.#clock.setTimer(delayMs, wake);
      signal.addEventListener("abort", wake);
    });
  }

  async #send(call: Call): Promise<Dispatcher.ResponseData> {
    const path = `/${[call.bucket, ...(call.key ?? "").split("/")].map(escapeUri).join("/")}`.replace(/\/$/, "");
    const query = { ...call.query };
    const headers: Record<string, string> = {
      host: this.#endpoint.host,
      "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
      ...call.headers,
    };
    if (call.body !== undefined) headers["content-length"] = String(byteLength(call.body));
    const request = {
      method: call.method,
      protocol: this.#endpoint.protocol,
      hostname: this.#endpoint.hostname,
      path,
      query,
      headers,
    };
    const signed = await this.#signer.sign(request, { signingDate: new Date(this.#clock.wallMs()) });
    const search = Object.entries(query).map(([name, value]) => `${escapeUri(name)}=${escapeUri(value)}`);
    return this.#pool.request({
      method: call.method,
      path: search.length === 0 ? path : `${path}?${search.join("&")}`,
      headers: signed.headers,
      signal: call.signal,
      body: call.body === undefined ? null : bodyOf(call.body),
    });
  }
}

const IF_ABSENT = { "if-none-match": "*" };

/** One buffer goes as it is; several from where they are, one after the other. */
function bodyOf(pieces: readonly Buffer[]): Buffer | Readable {
  return pieces.length === 1 ? pieces[0]! : Readable.from(pieces, { objectMode: false });
}

async function fill(
  response: Dispatcher.ResponseData,
  skip: number,
  into: readonly Buffer[],
  byteCount: number,
): Promise<void> {
  let skipLeft = skip;
  let piece = 0;
  let inside = 0;
  let left = byteCount;
  for await (const chunk of response.body as AsyncIterable<Buffer>) {
    let at = Math.min(skipLeft, chunk.length);
    skipLeft -= at;
    while (at < chunk.length && left > 0) {
      const copied = chunk.copy(into[piece]!, inside, at);
      at += copied;
      inside += copied;
      left -= copied;
      if (inside === into[piece]!.length) {
        piece++;
        inside = 0;
      }
    }
    if (left === 0 && response.statusCode === 200) break;
  }
  if (left > 0) throw failed(`an object ends ${left} bytes before what was asked for`);
}

async function readText(response: Dispatcher.ResponseData): Promise<string> {
  const chunks: Buffer[] = [];
  let byteCount = 0;
  for await (const chunk of response.body as AsyncIterable<Buffer>) {
    byteCount += chunk.length;
    if (byteCount > MAX_TEXT_BYTES) throw failed(`an answer of more than ${MAX_TEXT_BYTES} bytes`);
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}

/** Like every `storage-failed`, and worth another try. */
class RetryableError extends DynamoError {}

function failed(what: string, cause?: unknown, isRetryable = false): DynamoError {
  const make = isRetryable ? RetryableError : DynamoError;
  return new make("storage-failed", "the object store did not do what it was asked for", { diagnostic: what, cause });
}

function errorOf(status: number, text: string): DynamoError {
  const code = codeOf(text);
  if (status === 404 && code !== "NoSuchBucket") {
    return new DynamoError("object-not-found", "the object is not in the store", { diagnostic: code });
  }
  return failed(`status ${status}, ${code}`, undefined, RETRIED.has(status));
}

function codeOf(text: string): string {
  return /<Code>([^<]{1,100})<\/Code>/.exec(text)?.[1] ?? "no error code";
}

function byteLength(pieces: readonly Buffer[]): number {
  let sum = 0;
  for (const piece of pieces) sum += piece.length;
  return sum;
}

/** The pieces in groups of `partBytes`, without copying. */
function cut(pieces: readonly Buffer[], partBytes: number): Buffer[][] {
  const parts: Buffer[][] = [[]];
  let room = partBytes;
  for (const piece of pieces) {
    for (let at = 0; at < piece.length;) {
      if (room === 0) {
        parts.push([]);
        room = partBytes;
      }
      const byteCount = Math.min(room, piece.length - at);
      parts.at(-1)!.push(piece.subarray(at, at + byteCount));
      at += byteCount;
      room -= byteCount;
    }
  }
  return parts;
}

/** RFC 3986, as signature version 4 wants it. */
function escapeUri(text: string): string {
  return encodeURIComponent(text).replace(/[!'()*]/g, (sign) => `%${sign.charCodeAt(0).toString(16).toUpperCase()}`);
}

function unescapeXml(text: string): string {
  const named: Record<string, string> = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'" };
  return text.replace(/&(amp|lt|gt|quot|apos|#\d+);/g, (_all, name: string) =>
    name.startsWith("#") ? String.fromCodePoint(Number(name.slice(1))) : named[name]!,
  );
}

function escapeXml(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
}

function parseEndpoint(endpoint: string): URL {
  const url = URL.parse(endpoint);
  if (url === null || !/^https?:$/.test(url.protocol) || url.pathname !== "/" || url.search !== "") {
    throw new DynamoError(
      "invalid-config",
      `object store endpoint: expected http(s)://host[:port], got ${JSON.stringify(endpoint)}`,
    );
  }
  return url;
}

/** node:crypto in the shape the signer takes. */
class Sha256 {
  readonly #hash: Hash | Hmac;
  constructor(secret?: string | ArrayBuffer | ArrayBufferView) {
    if (secret === undefined) this.#hash = createHash("sha256");
    else this.#hash = createHmac("sha256", typeof secret === "string" ? secret : bytesOf(secret));
  }
  update(chunk: string | ArrayBuffer | ArrayBufferView): void {
    this.#hash.update(typeof chunk === "string" ? chunk : bytesOf(chunk));
  }
  digest(): Promise<Uint8Array> {
    return Promise.resolve(this.#hash.digest());
  }
}

function bytesOf(source: ArrayBuffer | ArrayBufferView): Uint8Array {
  if (ArrayBuffer.isView(source)) return new Uint8Array(source.buffer, source.byteOffset, source.byteLength);
  return new Uint8Array(source);
}
