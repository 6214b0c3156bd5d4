import { DynamoError } from "../../errors/index.ts";
import type { EngineHttp, HttpAnswer } from "./engine-http.ts";
import type { TokenizerSample } from "./foreign-config.ts";

/** What a start asks an engine's server, with failures that say which server it is and what is to be done. */
export class EngineQuestions {
  /** `SGLang`, for messages. */
  readonly name: string;
  readonly #http: EngineHttp;
  readonly #signal: AbortSignal;

  constructor(name: string, http: EngineHttp, signal: AbortSignal) {
    this.name = name;
    this.#http = http;
    this.#signal = signal;
  }

  get(path: string): Promise<HttpAnswer> {
    return this.#http.ask("GET", path, { timeoutMs: ASK_MS, signal: this.#signal });
  }

  post(path: string, body: object, timeoutMs = ASK_MS): Promise<HttpAnswer> {
    return this.#http.ask("POST", path, { timeoutMs, signal: this.#signal, body: JSON.stringify(body) });
  }

  /** The JSON at the first of these paths that the server has: they were renamed. Throws `invalid-config`. */
  async json<T>(...paths: readonly string[]): Promise<T> {
    let last: HttpAnswer | undefined;
    for (const path of paths) {
      const { status, text } = (last = await this.get(path));
      if (status === 401 || status === 403) {
        throw this.refused(`wants a key (status ${status} for ${path}); set DYN_ENGINE_API_KEY`);
      }
      if (status === 200) return this.parse<T>(path, text);
      if (status !== 404) break;
    }
    throw this.broken(paths[0]!, `status ${last?.status}`);
  }

  parse<T>(what: string, text: string): T {
    try {
      return JSON.parse(text) as T;
    } catch {
      throw this.broken(what, "no JSON");
    }
  }

  /** `the SGLang server at http://... ` and why it will not do, with the fix. */
  refused(why: string): DynamoError {
    return new DynamoError("invalid-config", `the ${this.name} server at ${this.#http.url} ${why}`);
  }

  broken(what: string, how: string): DynamoError {
    return new DynamoError(
      "invalid-config",
      `what answers at ${this.#http.url} is no ${this.name} server that can be used: ${what}: ${how}`,
    );
  }

  /**
   * Every prompt is tokenized on this side: one other token, and answers are quietly worse and nothing is found in the cache.
   * `tokensOf` gives undefined when the server cannot tell.
   */
  async checkTokenizer(
    samples: readonly TokenizerSample[],
    servedModel: string,
    tokensOf: (text: string) => Promise<readonly number[] | undefined>,
  ): Promise<"same" | "untold"> {
    for (const { text, tokenIds } of samples) {
      const tokens = await tokensOf(text);
      if (tokens === undefined) return "untold";
      if (tokens.length === tokenIds.length && tokens.every((id, i) => id === tokenIds[i])) continue;
      throw new DynamoError(
        "invalid-config",
        `the tokenizer of --model is another than that of the ${this.name} server at ${this.#http.url}: ${JSON.stringify(text)} is ${shown(tokenIds)} here and ${shown(tokens)} there; give the folder of the model that the server runs (${servedModel}) as --model`,
      );
    }
    return "same";
  }
}

const ASK_MS = 10_000;
/** The first request of a server may compile kernels. */
export const FIRST_ANSWER_MS = 300_000;

function shown(ids: readonly number[]): string {
  return `[${ids.slice(0, 12).join(", ")}${ids.length > 12 ? ", ..." : ""}]`;
}

/** `0.5.23.post1`, `1.3.0rc27`: its numbers; undefined for a build without any, which is taken for a new one. */
export function versionNumbers(text: string): readonly number[] | undefined {
  const match = /^v?(\d+)\.(\d+)(?:\.(\d+))?/.exec(text);
  return match === null ? undefined : match.slice(1).map((part) => Number(part ?? 0));
}

export function isBeforeVersion(text: string, limit: readonly number[]): boolean {
  const version = versionNumbers(text);
  if (version === undefined) return false;
  for (const [i, part] of limit.entries()) {
    if (version[i] !== part) return (version[i] ?? 0) < part;
  }
  return false;
}

/** What a body says about a failure: `{"error":{"message"}}`, `{"message"}`, `{"detail"}`, or plain text of a proxy. */
export function messageOf(text: string): string {
  try {
    const body = JSON.parse(text) as { error?: { message?: unknown } | string | null; detail?: unknown; message?: unknown };
    const error = typeof body.error === "string" ? body.error : body.error?.message;
    const told = error ?? body.message ?? body.detail;
    if (typeof told === "string") return told;
  } catch {
    // Plain text.
  }
  return text.slice(0, 500);
} // prettier-ignore

export function firstLine(text: string): string {
  return text.split("\n", 1)[0]!.slice(0, 300);
}
