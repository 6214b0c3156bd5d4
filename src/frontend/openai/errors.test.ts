import assert from "node:assert/strict";
import { test } from "node:test";
import { DynamoError, REASONS, toDynamoError, type Reason } from "../../errors/index.ts";
import { errorBody, errorFrame, errorHeaders, errorMetricType, errorStatus } from "./errors.ts";

test("openai errors: each class has its status, and each reason a code of OpenAI's kind", () => {
  const expected: Partial<Record<Reason, readonly [number, string, string]>> = {
    "invalid-field": [400, "invalid_request_error", "invalid_value"],
    "unknown-field": [400, "invalid_request_error", "unknown_parameter"],
    "context-length": [400, "invalid_request_error", "context_length_exceeded"],
    "model-not-found": [404, "invalid_request_error", "model_not_found"],
    "body-too-large": [413, "invalid_request_error", "body_too_large"],
    "body-timeout": [408, "invalid_request_error", "body_timeout"],
    "unsupported-media-type": [415, "invalid_request_error", "unsupported_media_type"],
    "client-gone": [499, "cancelled_error", "client_gone"],
    "unsupported-field": [501, "not_implemented_error", "unsupported_parameter"],
    "malformed-frame": [502, "server_error", "malformed_frame"],
    "no-workers": [503, "service_unavailable_error", "no_workers"],
    "request-deadline": [504, "timeout_error", "request_deadline"],
    "too-many-requests": [529, "overloaded_error", "too_many_requests"],
    internal: [500, "server_error", "internal_error"],
  };
  for (const [reason, [status, type, code]] of Object.entries(expected)) {
    const error = new DynamoError(reason as Reason, "text", { param: "field" });
    assert.equal(errorStatus(error), status);
    assert.deepEqual(JSON.parse(errorBody(error)), { error: { message: "text", type, param: "field", code } });
  }
  for (const reason of Object.keys(REASONS) as Reason[]) {
    const error = new DynamoError(reason, "text");
    assert.ok(errorStatus(error) >= 400 && errorStatus(error) < 600);
    assert.match((JSON.parse(errorBody(error)) as { error: { code: string } }).error.code, /^[a-z_]+$/);
    assert.notEqual(errorMetricType(error), undefined);
  }
});

test("openai errors: diagnostics and causes never reach the client", () => {
  const error = toDynamoError(new Error("password at /srv/state"));
  assert.equal(
    errorBody(error),
    '{"error":{"message":"internal error","type":"server_error","param":null,"code":"internal_error"}}',
  );
  assert.equal(errorFrame(error), `data: ${errorBody(error)}\n\n`);
});

test("openai errors: retry-after where waiting helps, x-should-retry false where a retry cannot", () => {
  const headers = (reason: Reason, retryAfterMs?: number): Record<string, string> =>
    errorHeaders(new DynamoError(reason, "text", retryAfterMs === undefined ? {} : { retryAfterMs }));
  assert.deepEqual(headers("too-many-requests"), { "retry-after": "1" });
  assert.deepEqual(headers("too-many-requests", 2_500), { "retry-after": "3", "retry-after-ms": "2500" });
  assert.deepEqual(headers("no-workers", 1), { "retry-after": "1", "retry-after-ms": "1" });
  assert.deepEqual(headers("unsupported-field"), { "x-should-retry": "false" });
  assert.deepEqual(headers("request-deadline"), { "x-should-retry": "false" });
  assert.deepEqual(headers("invalid-field"), {});
});
