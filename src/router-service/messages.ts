import { DynamoError } from "../errors/index.ts";
import type { RestoredBlocks } from "../protocol/index.ts";
import type { DecisionExplanation, PoolOutlook } from "../router/index.ts";
import { readFields, type Fields } from "./route-query.ts";

/**
 * What a router service serves, and its messages: JSON, one per item. `route` answers with `queued` (when the request has to
 * wait) and then with a decision, and its stream stays open: it is the lease of the booking. When it ends, for whatever
 * reason, the booking is freed; `free` ends it in good order and tells how the request went.
 *
 * | endpoint | asked | answers |
 * | --- | --- | --- |
 * | `route` | route query | `queued`?, decision; stays open |
 * | `prefill_done` | booking, cached tokens, what was restored | `known` |
 * | `add_output` | booking, tokens | `known` |
 * | `free` | booking, outcome | `known` |
 * | `outlook` | route query | how either pool would take it; nothing is booked |
 * | `preview` | route query | explanation; nothing is booked |
 * | `explain` | request id | explanations |
 * | `state` | - | models, workers, load |
 */
export const ROUTER_COMPONENT = "router";
export const ROUTE_ENDPOINT = "route";
export const PREFILL_DONE_ENDPOINT = "prefill_done";
export const ADD_OUTPUT_ENDPOINT = "add_output";
export const FREE_ENDPOINT = "free";
export const OUTLOOK_ENDPOINT = "outlook";
export const PREVIEW_ENDPOINT = "preview";
export const EXPLAIN_ENDPOINT = "explain";
export const STATE_ENDPOINT = "state";

export interface DecisionMessage {
  readonly type: "decision";
  /** Names the booking in later messages. */
  readonly booking: string;
  readonly instanceId: string;
  readonly address: string;
  readonly dpRank: number;
  readonly policy: string;
  readonly reason: string;
  readonly candidateCount: number;
  readonly overlapBlocks: number;
  readonly queuedMs: number;
  /** How many generated tokens make one `add_output`; 0 = the router does not count them. */
  readonly outputStepTokens: number;
  /** When the query asked for it. */
  readonly explanation?: DecisionExplanation;
}

/** How each pool would take a request; null = it has nobody who could. */
export interface Outlooks {
  readonly decode: PoolOutlook | null;
  readonly prefill: PoolOutlook | null;
}

export type RouteAnswer = { readonly type: "queued" } | DecisionMessage;

/** The update of a booking; which of the numbers it has depends on the endpoint. */
export interface BookingUpdate {
  readonly booking: string;
  readonly cachedTokens: number;
  readonly tokens: number;
  readonly outcome: string;
  readonly restored: RestoredBlocks | undefined;
}

/** A whole answer, of any endpoint: half of what a stream may keep without credit. */
export const MAX_ANSWER_BYTES = 512 * 1024;
/** What one update or request id takes is far below. */
const MAX_UPDATE_BYTES = 16 * 1024;
const MAX_COUNT = 2 ** 32;

export function encodeJson(value: unknown): Buffer {
  return Buffer.from(JSON.stringify(value), "utf8");
}

/** Throws `malformed-frame`. `bytes` is copied. */
export function decodeRouteAnswer(bytes: Uint8Array): RouteAnswer {
  return decode(bytes, MAX_ANSWER_BYTES, (fields, value) => {
    if (fields.choice("type", ["queued", "decision"]) === "queued") return { type: "queued" };
    const explanation = (value as { explanation?: DecisionExplanation }).explanation;
    const address = fields.text("address");
    const instanceId = fields.text("instanceId");
    if (!/^[0-9a-f]{16}$/.test(instanceId)) throw new Error("instanceId: expected 16 hex digits");
    if (!/^[a-z][a-z0-9+.-]{0,31}:\/\/[\x21-\x7e]+$/.test(address)) throw new Error("address: expected scheme://...");
    return {
      type: "decision",
      booking: fields.text("booking"),
      instanceId,
      address,
      dpRank: fields.integer("dpRank", 0, 65_535),
      policy: fields.text("policy"),
      reason: fields.text("reason"),
      candidateCount: fields.integer("candidateCount", 0, MAX_COUNT),
      overlapBlocks: fields.integer("overlapBlocks", 0, MAX_COUNT),
      queuedMs: fields.number("queuedMs"),
      outputStepTokens: fields.integer("outputStepTokens", 0, MAX_COUNT),
      ...(fields.optionalFields("explanation") === undefined ? {} : { explanation: explanation! }),
    };
  });
}

/** Throws `malformed-frame`. */
export function decodeOutlooks(bytes: Uint8Array): Outlooks {
  return decode(bytes, MAX_UPDATE_BYTES, (fields, value) => {
    const { decode: decodePool, prefill } = value as Record<string, unknown>;
    return {
      decode: decodePool === null ? null : outlook(fields.optionalFields("decode")),
      prefill: prefill === null ? null : outlook(fields.optionalFields("prefill")),
    };
  });
}

function outlook(fields: Fields | undefined): PoolOutlook {
  if (fields === undefined) throw new Error("an outlook is missing");
  return {
    cachedTokens: fields.integer("cachedTokens", 0, MAX_COUNT),
    queuedTokens: fields.number("queuedTokens"),
    activeRequests: fields.integer("activeRequests", 0, MAX_COUNT),
    rankCount: fields.integer("rankCount", 1, MAX_COUNT),
    hasRoom: fields.optionalBoolean("hasRoom") ?? true,
  };
}

function restoredBlocks(fields: Fields | undefined): RestoredBlocks | undefined {
  if (fields === undefined) return undefined;
  const blocks = (name: string): number => fields.integer(name, 0, MAX_COUNT);
  return {
    hostBlocks: blocks("hostBlocks"),
    diskBlocks: blocks("diskBlocks"),
    objectBlocks: blocks("objectBlocks"),
    milliseconds: fields.number("milliseconds"),
  };
}

/** Throws `malformed-frame`. */
export function decodeBookingUpdate(bytes: Uint8Array): BookingUpdate {
  return decode(bytes, MAX_UPDATE_BYTES, (fields) => ({
    booking: fields.text("booking"),
    cachedTokens: count(fields, "cachedTokens"),
    tokens: count(fields, "tokens"),
    outcome: fields.optionalText("outcome") ?? "finished",
    restored: restoredBlocks(fields.optionalFields("restored")),
  }));
}

/** Throws `malformed-frame`. */
export function decodeRequestId(bytes: Uint8Array): string {
  return decode(bytes, MAX_UPDATE_BYTES, (fields) => fields.text("requestId"));
}

/** Throws `malformed-frame`. The explanations are passed on as they are: they go to operators. */
export function decodeExplanations(bytes: Uint8Array): DecisionExplanation[] {
  return decode(bytes, MAX_ANSWER_BYTES, (fields) => [
    ...((fields.optionalList("decisions") ?? []) as readonly DecisionExplanation[]),
  ]);
}

function count(fields: Fields, name: string): number {
  return fields.optionalNumber(name) === undefined ? 0 : fields.integer(name, 0, MAX_COUNT);
}

function decode<Value>(bytes: Uint8Array, maxBytes: number, read: (fields: Fields, value: unknown) => Value): Value {
  try {
    if (bytes.length > maxBytes) throw new Error(`${bytes.length} bytes, over the limit of ${maxBytes}`);
    const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("utf8");
    const value = JSON.parse(text) as unknown;
    return read(readFields(value), value);
  } catch (cause) {
    throw new DynamoError("malformed-frame", "a message of the router service could not be decoded", {
      diagnostic: String(cause),
      cause,
    });
  }
}
