import { DynamoError } from "../errors/index.ts";
import type { BusyThresholds, Router } from "../router/index.ts";
import type { Exchange, Route } from "./http/index.ts";
import type { ModelRegistry } from "./model-registry.ts";
import { invalidField, isObject, readNumber, readString, refuseUnknown, type ExtraField } from "./openai/index.ts";
import type { Operators } from "./operator.ts";
import { explainRequest } from "./threads/answer-question.ts";
import type { ExplainedRequest } from "./threads/messages.ts";
import type { ThreadLink } from "./threads/thread-link.ts";

/**
 * The operators' view of the router: why a request went where it went, and when workers count as busy. Off the hot path:
 * explanations are made when asked for. With several threads, all of them are asked and told.
 */
export function routeApi(models: ModelRegistry, operators: Operators, thread?: ThreadLink): Route[] {
  const guarded =
    (handle: (exchange: Exchange) => void | Promise<void>) =>
    (exchange: Exchange): void | Promise<void> => {
      operators.check(exchange);
      return handle(exchange);
    };
  return [
    {
      method: "GET",
      path: "/v1/route/explain/*",
      family: "openai",
      handle: guarded((exchange) => sendExplanation(exchange, models, thread)),
    },
    {
      method: "GET",
      path: "/busy_threshold",
      family: "openai",
      handle: guarded((exchange) => {
        const known = models.list();
        known.forEach(checkRoutesHere);
        exchange.json(200, { thresholds: known.map(thresholdsOf) });
      }),
    },
    {
      method: "POST",
      path: "/busy_threshold",
      family: "openai",
      handle: guarded((exchange) => setThresholds(exchange, models, thread)),
    },
  ];
}

const EXPLAIN_PREFIX = "/v1/route/explain/";

async function sendExplanation(exchange: Exchange, models: ModelRegistry, thread?: ThreadLink): Promise<void> {
  const requestId = decoded(exchange.path.slice(EXPLAIN_PREFIX.length));
  const explained = (await explainRequest(models, requestId)) ?? (await explainedElsewhere(thread, requestId));
  if (explained !== undefined) {
    exchange.json(200, { object: "route.explanation", request_id: requestId, ...explained });
    return;
  }
  throw new DynamoError("route-not-found", "no decision is kept for that request; the last 4,096 of each model are");
}

async function explainedElsewhere(
  thread: ThreadLink | undefined,
  requestId: string,
): Promise<ExplainedRequest | undefined> {
  const answers = (await thread?.ask({ type: "explain", requestId })) ?? [];
  for (const answer of answers)
    if (answer.type === "explain" && answer.explained !== undefined) return answer.explained;
  return undefined;
}

/** A path that is not well formed names no request. */
function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** `nvext` of an answer. */
export function nvextJson(router: Pick<Router, "explain">, requestId: string, fields: readonly ExtraField[]): string {
  const decisions = router.explain(requestId);
  const last = decisions.findLast(({ stage }) => stage !== "prefill");
  const prefill = decisions.findLast(({ stage }) => stage === "prefill");
  return JSON.stringify({
    ...(fields.includes("worker_id") && last !== undefined
      ? {
          worker_id: {
            ...(prefill === undefined
              ? {}
              : { prefill_worker_id: prefill.worker.instance_id, prefill_dp_rank: prefill.worker.dp_rank }),
            decode_worker_id: last.worker.instance_id,
            decode_dp_rank: last.worker.dp_rank,
          },
        }
      : {}),
    ...(fields.includes("routing") ? { routing: { decisions } } : {}),
  });
}

// Busy thresholds.

type NamedModel = ReturnType<ModelRegistry["list"]>[number];

/** Thresholds set here would change nothing while a router service chooses. */
function checkRoutesHere({ name, remote }: NamedModel): void {
  if (remote === undefined) return;
  throw new DynamoError("unsupported-operation", `a router service chooses the workers of ${name}: set its thresholds`);
}

function thresholdsOf({ name, router }: NamedModel): Record<string, unknown> {
  const { activeDecodeBlocks, activePrefillTokens, activePrefillTokensFrac } = router.busyThresholds;
  return {
    model: name,
    active_decode_blocks_threshold: activeDecodeBlocks ?? null,
    active_prefill_tokens_threshold: activePrefillTokens ?? null,
    active_prefill_tokens_threshold_frac: activePrefillTokensFrac ?? null,
  };
}

const THRESHOLD_FIELDS = new Set([
  "model",
  "active_decode_blocks_threshold",
  "active_prefill_tokens_threshold",
  "active_prefill_tokens_threshold_frac",
]);
const MAX_TOKENS = 2 ** 40;
const MAX_FRACTION = 1_000;

/** Sets the thresholds that the body names, null = off; answers with all of the model's. */
async function setThresholds(exchange: Exchange, models: ModelRegistry, thread?: ThreadLink): Promise<void> {
  const { body } = exchange;
  if (!isObject(body)) throw invalidField("body", "a JSON object", body);
  refuseUnknown(body, THRESHOLD_FIELDS, "");
  const name = readString(body["model"], "model", 1, 512);
  const model = models.find(name);
  if (model === undefined)
    throw new DynamoError("model-not-found", `The model \`${name}\` does not exist`, { param: "model" });
  checkRoutesHere(model);
  const old = model.router.busyThresholds;
  const read = (field: string, max: number, before: number | undefined): number | undefined => {
    const value = body[field];
    if (value === undefined) return before;
    return value === null ? undefined : readNumber(value, field, 0, max);
  };
  const blocks = read("active_decode_blocks_threshold", 1, old.activeDecodeBlocks);
  const tokens = read("active_prefill_tokens_threshold", MAX_TOKENS, old.activePrefillTokens);
  const fraction = read("active_prefill_tokens_threshold_frac", MAX_FRACTION, old.activePrefillTokensFrac);
  const thresholds: BusyThresholds = {
    ...(blocks === undefined ? {} : { activeDecodeBlocks: blocks }),
    ...(tokens === undefined ? {} : { activePrefillTokens: tokens }),
    ...(fraction === undefined ? {} : { activePrefillTokensFrac: fraction }),
  };
  model.router.busyThresholds = thresholds;
  await thread?.ask({ type: "busy-thresholds", model: name, thresholds });
  exchange.json(200, thresholdsOf(model));
}
