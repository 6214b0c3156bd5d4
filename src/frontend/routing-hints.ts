import { DynamoError } from "../errors/index.ts";
import type { RouteRequest } from "../router/index.ts";
import type { Exchange } from "./http/index.ts";
import {
  invalidField,
  readPriority,
  readStrictPriority,
  readTimeout,
  unsupportedField,
  type ExtraField,
  type Nvext,
} from "./openai/index.ts";
import type { Operators } from "./operator.ts";

/**
 * What a request tells the router, from `nvext` and from headers; a header wins over the field of the same meaning.
 * Fields that name or show workers are for operators: others get `unsupported-field`, and no hint of what they would do.
 */
export interface RoutingHints {
  readonly route: Pick<
    RouteRequest,
    "pinned" | "sessionId" | "strictPriority" | "priorityJump" | "expectedOutputTokens" | "explain"
  >;
  /** Isolates KV reuse. Empty = shared. */
  readonly cacheNamespace: string;
  readonly extraFields: readonly ExtraField[];
}

const NO_HINTS: RoutingHints = Object.freeze({
  route: Object.freeze({}),
  cacheNamespace: "",
  extraFields: Object.freeze([]),
});
const SESSION_ID = /^[\x21-\x7e]{1,128}$/;
const INTEGER = /^-?\d{1,10}$/;

export function readRoutingHints(exchange: Exchange, nvext: Nvext | undefined, operators: Operators): RoutingHints {
  const sessionId = exchange.header("x-dynamo-session-id");
  const priorityText = exchange.header("x-dynamo-request-priority");
  const strictText = exchange.header("x-dynamo-request-strict-priority");
  if (nvext === undefined && sessionId === undefined && priorityText === undefined && strictText === undefined)
    return NO_HINTS;
  if (sessionId !== undefined && !SESSION_ID.test(sessionId)) {
    throw new DynamoError("invalid-field", "x-dynamo-session-id: expected 1 to 128 visible ASCII characters", {
      param: "x-dynamo-session-id",
    });
  }
  const pin = nvext?.backendInstanceId;
  const extraFields = nvext?.extraFields ?? [];
  if ((pin !== undefined || extraFields.length > 0) && !operators.includes(exchange)) {
    throw unsupportedField(
      `nvext.${pin === undefined ? "extra_fields" : "backend_instance_id"}`,
      "only operators may use it",
    );
  }
  const priority =
    priorityText === undefined
      ? nvext?.priority
      : readPriority(integer(priorityText, "x-dynamo-request-priority"), "x-dynamo-request-priority");
  const strict =
    strictText === undefined
      ? nvext?.strictPriority
      : readStrictPriority(integer(strictText, "x-dynamo-request-strict-priority"), "x-dynamo-request-strict-priority");
  const osl = nvext?.expectedOutputTokens;
  return {
    route: {
      ...(pin === undefined ? {} : { pinned: { instanceId: pin } }),
      ...(sessionId === undefined ? {} : { sessionId }),
      ...(priority === undefined ? {} : { priorityJump: priority }),
      ...(strict === undefined ? {} : { strictPriority: strict }),
      ...(osl === undefined ? {} : { expectedOutputTokens: osl }),
      ...(extraFields.length === 0 ? {} : { explain: true }),
    },
    cacheNamespace: nvext?.cacheSalt ?? "",
    extraFields,
  };
}

function integer(text: string, name: string): number {
  if (!INTEGER.test(text)) throw invalidField(name, "an integer", text);
  return Number(text);
}

/** How long the client is willing to wait, from arrival on; Infinity when it does not say. */
export function readRequestTimeout(exchange: Exchange, nvext: Nvext | undefined): number {
  const text = exchange.header("x-request-timeout-ms");
  if (text === undefined) return nvext?.requestTimeoutMs ?? Infinity;
  if (!INTEGER.test(text)) throw invalidField("x-request-timeout-ms", "an integer", text);
  return readTimeout(Number(text), "x-request-timeout-ms");
}
