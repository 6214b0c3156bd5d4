/**
 * Finds a wheel in a Python package index: the "simple" page of a project, as JSON (PEP 691) or HTML (PEP 503). Pure
 * text work; fetching is the caller's.
 */
export const SIMPLE_INDEX_ACCEPT =
  "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.01";

/** Pages of projects with thousands of files reach a few MB. */
export const SIMPLE_INDEX_MAX_BYTES = 16 * 1024 * 1024;

export interface IndexFile {
  readonly filename: string;
  readonly url: string;
  /** Hex. */
  readonly sha256?: string;
}

/** PEP 503: lower case, runs of `-`, `_` and `.` become one `-`. */
export function normalizedProject(name: string): string {
  return name.toLowerCase().replaceAll(/[-_.]+/g, "-");
}

export function parseSimplePage(body: string, contentType: string, pageUrl: string): IndexFile[] {
  return /[+/]json/.test(contentType) ? fromJson(body, pageUrl) : fromHtml(body, pageUrl);
}

/** The first wheel of exactly this project and version. */
export function findWheel(files: readonly IndexFile[], project: string, version: string): IndexFile | undefined {
  return files.find(({ filename }) => {
    const [name, itsVersion] = filename.split("-");
    if (!filename.endsWith(".whl") || name === undefined) return false;
    return normalizedProject(name) === normalizedProject(project) && itsVersion === version;
  });
}

function fromJson(body: string, pageUrl: string): IndexFile[] {
  const { files } = JSON.parse(body) as { files?: unknown };
  if (!Array.isArray(files)) throw new Error("index page has no list of files");
  const found: IndexFile[] = [];
  for (const file of files as { filename?: unknown; url?: unknown; hashes?: { sha256?: unknown } }[]) {
    if (typeof file.filename !== "string" || typeof file.url !== "string") continue;
    const sha256 = file.hashes?.sha256;
    const url = new URL(file.url, pageUrl).href;
    found.push({ filename: file.filename, url, ...(isSha256(sha256) ? { sha256 } : {}) });
  }
  return found;
}

function fromHtml(body: string, pageUrl: string): IndexFile[] {
  const found: IndexFile[] = [];
  for (const [, quoted, single] of body.matchAll(/<a\b[^>]*?\bhref\s*=\s*(?:"([^"]*)"|'([^']*)')/gi)) {
    const href = (quoted ?? single ?? "").replaceAll("&amp;", "&");
    if (!URL.canParse(href, pageUrl)) continue;
    const url = new URL(href, pageUrl);
    const sha256 = new URLSearchParams(url.hash.slice(1)).get("sha256");
    url.hash = "";
    const filename = decodeURIComponent(url.pathname.split("/").at(-1) ?? "");
    found.push({ filename, url: url.href, ...(isSha256(sha256) ? { sha256 } : {}) });
  }
  return found;
}

function isSha256(value: unknown): value is string {
  return typeof value === "string" && /^[0-9a-f]{64}$/i.test(value);
}
