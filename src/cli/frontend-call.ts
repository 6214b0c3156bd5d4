import { DynamoError } from "../errors/index.ts";

/** Calls of commands to a running frontend: one answer, with a deadline, as an operator when a key is given. */
export interface FrontendAnswer {
  readonly status: number;
  readonly text: string;
}

const ANSWER_MS = 5_000;

/** Throws `worker-unreachable` when nobody answers there. */
export async function callFrontend(
  url: URL,
  call: {
    readonly method?: string;
    /** JSON. */
    readonly body?: string;
    readonly adminKey?: string | undefined;
    readonly timeoutMs?: number;
  },
): Promise<FrontendAnswer> {
  const { method = "GET", body, adminKey, timeoutMs = ANSWER_MS } = call;
  try {
    const response = await fetch(url, {
      method,
      headers: {
        ...(body === undefined ? {} : { "content-type": "application/json" }),
        ...(adminKey === undefined ? {} : { "x-dynamo-admin-key": adminKey }),
      },
      ...(body === undefined ? {} : { body }),
      redirect: "error",
      signal: AbortSignal.timeout(timeoutMs),
    });
    return { status: response.status, text: await response.text() };
  } catch (cause) {
    throw new DynamoError("worker-unreachable", `no frontend answers at ${url.origin}; name it with --frontend`, {
      cause,
    });
  }
}

/** Throws `invalid-config`. */
export function frontendUrl(text: string): URL {
  const url = URL.canParse(text) ? new URL(text) : undefined;
  if (url === undefined || !["http:", "https:"].includes(url.protocol) || url.username !== "") {
    throw new DynamoError("invalid-config", `--frontend: expected http://HOST:PORT, got ${JSON.stringify(text)}`);
  }
  return url;
}
