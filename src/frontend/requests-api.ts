import { DynamoError } from "../errors/index.ts";
import type { Exchange, Route } from "./http/index.ts";
import type { LiveRequestView, LiveRequests } from "./live-requests.ts";
import { invalidField } from "./openai/index.ts";
import type { Operators } from "./operator.ts";
import type { ThreadLink } from "./threads/thread-link.ts";

/**
 * The operators' view of what is being served: the oldest requests with the stage and the owner of each, and a way to end
 * one. Off the hot path: a view is made when asked for. With several threads, all of them are asked.
 */
export function requestsApi(live: LiveRequests, operators: Operators, thread?: ThreadLink): Route[] {
  return [
    {
      method: "GET",
      path: REQUESTS_PATH,
      family: "openai",
      handle: (exchange) => {
        operators.check(exchange);
        return sendRequests(exchange, live, thread);
      },
    },
    {
      method: "DELETE",
      path: `${REQUESTS_PATH}/*`,
      family: "openai",
      handle: (exchange) => {
        operators.check(exchange);
        return cancelRequest(exchange, live, thread);
      },
    },
  ];
}

const REQUESTS_PATH = "/v1/admin/requests";
const DEFAULT_LIMIT = 100;
const MAX_LIMIT = 1_000;

async function sendRequests(exchange: Exchange, live: LiveRequests, thread: ThreadLink | undefined): Promise<void> {
  const limit = readLimit(exchange.query.get("limit"));
  const answers = (await thread?.ask({ type: "live-requests", limit })) ?? [];
  let total = live.size;
  const all: LiveRequestView[] = live.view(limit);
  for (const answer of answers) {
    if (answer.type !== "live-requests") continue;
    total += answer.total;
    all.push(...answer.requests);
  }
  const data = all.toSorted((a, b) => b.age_ms - a.age_ms).slice(0, limit);
  exchange.json(200, { object: "list", total, data });
}

function readLimit(text: string | null): number {
  if (text === null) return DEFAULT_LIMIT;
  const limit = /^\d{1,4}$/.test(text) ? Number(text) : 0;
  if (limit < 1 || limit > MAX_LIMIT) throw invalidField("limit", `an integer from 1 to ${MAX_LIMIT}`, text);
  return limit;
}

async function cancelRequest(exchange: Exchange, live: LiveRequests, thread: ThreadLink | undefined): Promise<void> {
  const id = decoded(exchange.path.slice(REQUESTS_PATH.length + 1));
  let count = cancelLive(live, id);
  for (const answer of (await thread?.ask({ type: "cancel-request", id })) ?? []) {
    if (answer.type === "cancel-request") count += answer.count;
  }
  if (count === 0) throw new DynamoError("route-not-found", "no request of that id is being served");
  exchange.json(200, { object: "request.cancelled", id, cancelled: count });
}

/** How many there were: the id is the client's, and need not be unique. */
export function cancelLive(live: LiveRequests, id: string): number {
  return live.cancel(id, new DynamoError("cancelled", "an operator ended the request"));
}

/** A path that is not well formed names no request. */
function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
