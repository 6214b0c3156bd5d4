import { createReadStream, createWriteStream, statSync, truncateSync, rmSync } from "node:fs";
import { createHash } from "node:crypto";
import { pipeline } from "node:stream/promises";
import { Transform } from "node:stream";
import { dropBody, type HttpClient } from "./http-get.ts";

/**
 * One file over HTTP into `path`, resumed where an earlier try (or an earlier process) stopped. A part is only trusted as
 * far as the checksum at the end goes: `sha256` is of the whole file, read back from disk, and a mismatch deletes the part.
 * The caller owns `path` while this runs.
 */
export interface DownloadOptions {
  readonly client: HttpClient;
  readonly url: string;
  readonly headers?: Readonly<Record<string, string>>;
  readonly path: string;
  /** The most that will be written. */
  readonly maxBytes: number;
  /** Hex; undefined = take the server's `x-linked-etag` if it is one. */
  readonly sha256: string | undefined;
  readonly signal: AbortSignal;
  readonly onProgress: (receivedBytes: number, totalBytes: number | undefined) => void;
}

/** Tries in a row that brought no new byte. */
const FRUITLESS_TRIES = 3;

/** Throws a plain `Error` whose text says what went wrong: the caller names the source and may try another. */
export async function download(options: DownloadOptions): Promise<void> {
  const { path, signal } = options;
  let expected = options.sha256;
  for (let fruitless = 0; ;) {
    const before = sizeOf(path);
    try {
      const outcome = await attempt(options, before);
      expected ??= outcome.sha256;
      if (outcome.complete) break;
    } catch (error) {
      if (signal.aborted || isFinal(error)) throw error;
      fruitless = sizeOf(path) > before ? 0 : fruitless + 1;
      if (fruitless >= FRUITLESS_TRIES) throw error;
    }
  }
  if (expected === undefined) return;
  const actual = await sha256OfFile(path, signal);
  if (actual !== expected.toLowerCase()) {
    rmSync(path, { force: true });
    throw new Error(`checksum: expected sha256 ${expected}, got ${actual}; the partial file was deleted`);
  }
}

class FinalError extends Error {}

function isFinal(error: unknown): boolean {
  const code = (error as { code?: unknown }).code;
  const refused = ["ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "UND_ERR_CONNECT_TIMEOUT"];
  const disk = ["ENOSPC", "EDQUOT", "EACCES", "EROFS", "EIO"];
  return (
    error instanceof FinalError || [...refused, ...disk].includes(String(code)) || /certificate/i.test(String(error))
  );
}

async function attempt(options: DownloadOptions, offset: number): Promise<{ complete: boolean; sha256?: string }> {
  const { client, url, path, signal, maxBytes } = options;
  const response = await client.get(url, {
    headers: {
      ...options.headers,
      "accept-encoding": "identity",
      ...(offset > 0 ? { range: `bytes=${offset}-` } : {}),
    },
    signal,
  });
  const checksum = linkedChecksum(response.allHeaders["x-linked-etag"]);
  const linked = checksum === undefined ? {} : { sha256: checksum };
  if (response.status === 416 && offset > 0) {
    dropBody(response);
    const total = /\/(\d+)$/.exec(response.headers["content-range"] ?? "")?.[1];
    if (total !== undefined && Number(total) === offset) return { complete: true, ...linked };
    // The part is longer than the file: it belongs to something else.
    truncateSync(path, 0);
    return { complete: false, ...linked };
  }
  if (response.status !== 200 && response.status !== 206) {
    dropBody(response);
    const error = `HTTP status ${response.status}`;
    throw response.status >= 500 || response.status === 429 ? new Error(error) : new FinalError(error);
  }
  let start = offset;
  if (response.status === 200) start = 0;
  else if (!(response.headers["content-range"] ?? "").startsWith(`bytes ${offset}-`)) {
    dropBody(response);
    throw new FinalError(`unexpected range ${response.headers["content-range"] ?? "(none)"}`);
  }
  const length = response.headers["content-length"];
  const total = length === undefined ? undefined : start + Number(length);
  if (total !== undefined && total > maxBytes) {
    dropBody(response);
    throw new FinalError(`the file has ${total} bytes, at most ${maxBytes} were expected`);
  }
  let received = start;
  const counter = new Transform({
    transform(chunk: Buffer, _encoding, done) {
      received += chunk.length;
      if (received > maxBytes) return done(new FinalError(`more than the expected ${maxBytes} bytes came`));
      options.onProgress(received, total);
      done(null, chunk);
    },
  });
  options.onProgress(received, total);
  await pipeline(response.body, counter, createWriteStream(path, { flags: start === 0 ? "w" : "a" }), { signal });
  if (total !== undefined && received < total)
    throw new Error(`the connection ended after ${received} of ${total} bytes`);
  return { complete: true, ...linked };
}

/** The hub's tag of a large file is its SHA-256. */
function linkedChecksum(tag: string | undefined): string | undefined {
  return /^"?([0-9a-f]{64})"?$/i.exec(tag ?? "")?.[1]?.toLowerCase();
}

function sizeOf(path: string): number {
  return statSync(path, { throwIfNoEntry: false })?.size ?? 0;
}

/** Hex. About 0.1 s per 100 MB. */
export async function sha256OfFile(path: string, signal?: AbortSignal): Promise<string> {
  const hash = createHash("sha256");
  const options = { highWaterMark: 1024 * 1024, ...(signal === undefined ? {} : { signal }) };
  for await (const chunk of createReadStream(path, options) as AsyncIterable<Buffer>) hash.update(chunk);
  return hash.digest("hex");
}
