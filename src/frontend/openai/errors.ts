import type { DynamoError, ErrorClass, Reason } from "../../errors/index.ts";

/**
 * Errors as the OpenAI API shows them: `{"error":{"message","type","param","code"}}` with a status, before the first
 * byte of an answer, or one `data:` frame after it (the stream then ends without `[DONE]`; the official clients raise
 * on it). The only place where a class becomes a status. The public message goes out, the diagnostic never does.
 */
const STATUS_OF_CLASS: Readonly<Record<ErrorClass, number>> = {
  "invalid-request": 400,
  unauthenticated: 401,
  "permission-denied": 403,
  "not-found": 404,
  conflict: 409,
  "payload-too-large": 413,
  "unsupported-media": 415,
  "rate-limited": 429,
  "capacity-exhausted": 529,
  cancelled: 499,
  unavailable: 503,
  "backend-protocol": 502,
  "deadline-exceeded": 504,
  "not-implemented": 501,
  internal: 500,
};

const STATUS_OF_REASON: Partial<Readonly<Record<Reason, number>>> = { "body-timeout": 408 };

const TYPE_OF_CLASS: Readonly<Record<ErrorClass, string>> = {
  "invalid-request": "invalid_request_error",
  unauthenticated: "authentication_error",
  "permission-denied": "permission_error",
  "not-found": "invalid_request_error",
  conflict: "invalid_request_error",
  "payload-too-large": "invalid_request_error",
  "unsupported-media": "invalid_request_error",
  "rate-limited": "rate_limit_error",
  "capacity-exhausted": "overloaded_error",
  cancelled: "cancelled_error",
  unavailable: "service_unavailable_error",
  "backend-protocol": "server_error",
  "deadline-exceeded": "timeout_error",
  "not-implemented": "not_implemented_error",
  internal: "server_error",
};

/** Where OpenAI has a code of its own; every other code is the reason with underscores. */
const CODE_OF_REASON: Partial<Readonly<Record<Reason, string>>> = {
  "context-length": "context_length_exceeded",
  "unknown-field": "unknown_parameter",
  "unsupported-field": "unsupported_parameter",
  "invalid-field": "invalid_value",
  internal: "internal_error",
};

/** Values of the metrics' `error_type` label, as Dynamo names them. */
const METRIC_TYPE_OF_CLASS: Readonly<Record<ErrorClass, string>> = {
  "invalid-request": "validation",
  unauthenticated: "validation",
  "permission-denied": "validation",
  "not-found": "not_found",
  conflict: "validation",
  "payload-too-large": "validation",
  "unsupported-media": "validation",
  "rate-limited": "overload",
  "capacity-exhausted": "overload",
  cancelled: "cancelled",
  unavailable: "internal",
  "backend-protocol": "internal",
  "deadline-exceeded": "internal",
  "not-implemented": "not_implemented",
  internal: "internal",
};

/** When nobody knows better: long enough for a slot to come free, short enough not to idle the client. */
const DEFAULT_RETRY_AFTER_MS = 1_000;

export function errorStatus(error: DynamoError): number {
  return STATUS_OF_REASON[error.reason] ?? STATUS_OF_CLASS[error.class];
}

export function errorMetricType(error: DynamoError): string {
  return METRIC_TYPE_OF_CLASS[error.class];
}

export function errorBody(error: DynamoError): string {
  return JSON.stringify({
    error: {
      message: error.publicMessage,
      type: TYPE_OF_CLASS[error.class],
      param: error.param ?? null,
      code: CODE_OF_REASON[error.reason] ?? error.reason.replaceAll("-", "_"),
    },
  });
}

/**
 * `retry-after` where waiting helps, in whole seconds, and exactly in `retry-after-ms` where it is known, which the clients prefer;
 * `x-should-retry: false` (which they obey) where a retry cannot help.
 */
export function errorHeaders(error: DynamoError): Record<string, string> {
  const headers: Record<string, string> = {};
  const capacity =
    error.class === "capacity-exhausted" || error.class === "unavailable" || error.class === "rate-limited";
  const retryAfterMs = error.retryAfterMs ?? (capacity ? DEFAULT_RETRY_AFTER_MS : undefined);
  if (retryAfterMs !== undefined) headers["retry-after"] = String(Math.max(1, Math.ceil(retryAfterMs / 1000)));
  if (error.retryAfterMs !== undefined) headers["retry-after-ms"] = String(Math.ceil(error.retryAfterMs));
  if (error.class === "not-implemented" || error.reason === "request-deadline") headers["x-should-retry"] = "false";
  return headers;
}

/** The last frame of a stream that failed after its headers were sent. */
export function errorFrame(error: DynamoError): string {
  return `data: ${errorBody(error)}\n\n`;
}
