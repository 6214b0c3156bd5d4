/**
 * Every reason a request or a command can fail for, each in one class. `docs/errors.md` lists the same entries; a test
 * compares both. A class decides the HTTP status (frontend/openai/errors.ts); a reason is stable and is what crosses
 * the wire between processes. To add one: add it here and to the page.
 */
export type ErrorClass =
  | "invalid-request"
  | "unauthenticated"
  | "permission-denied"
  | "not-found"
  | "conflict"
  | "payload-too-large"
  | "unsupported-media"
  | "rate-limited"
  | "capacity-exhausted"
  | "cancelled"
  | "unavailable"
  | "backend-protocol"
  | "deadline-exceeded"
  | "not-implemented"
  | "internal";

interface ReasonEntry {
  readonly class: ErrorClass;
  /** When it happens, one sentence; the text of docs/errors.md. */
  readonly when: string;
}

export const REASONS = {
  // What a client sent.
  "malformed-json": { class: "invalid-request", when: "The request body is not valid JSON." },
  "malformed-http": {
    class: "invalid-request",
    when: "The bytes on the connection are not an HTTP request we accept.",
  },
  "invalid-field": {
    class: "invalid-request",
    when: "A field of the request has a wrong type or a value out of range.",
  },
  "unknown-field": { class: "invalid-request", when: "The request has a field that we do not know." },
  "unsupported-field": { class: "not-implemented", when: "A known OpenAI field has a value that we do not serve." },
  "context-length": { class: "invalid-request", when: "Prompt plus requested tokens exceed the model's context." },
  "template-failed": {
    class: "invalid-request",
    when: "The model's chat template refused the messages or ran over its time or size box.",
  },
  "model-not-found": { class: "not-found", when: "No model of that name is being served." },
  "route-not-found": { class: "not-found", when: "There is no such HTTP path, or the method does not fit it." },
  "body-too-large": { class: "payload-too-large", when: "The request body is larger than the limit." },
  "body-timeout": { class: "invalid-request", when: "The request's headers or body did not arrive in time." },
  "unsupported-media-type": { class: "unsupported-media", when: "The body's content type or encoding is not JSON." },
  "client-gone": { class: "cancelled", when: "The client closed the connection before its answer was complete." },
  "slow-reader": { class: "cancelled", when: "A reader did not take its bytes, and its bounded buffer was full." },
  // Capacity and availability.
  "too-many-requests": {
    class: "capacity-exhausted",
    when: "The frontend's bounded queue of concurrent requests is full.",
  },
  "queue-timeout": {
    class: "capacity-exhausted",
    when: "The request waited longer for its turn than the limit for a queue.",
  },
  "worker-full": { class: "capacity-exhausted", when: "The worker's or engine's bounded queue is full." },
  "no-workers": { class: "unavailable", when: "The model is known, but no worker that serves it is there." },
  draining: { class: "unavailable", when: "The process is shutting down and takes no new work." },
  "worker-lost": { class: "unavailable", when: "The connection to the worker that ran the request broke." },
  "worker-unreachable": { class: "unavailable", when: "No connection to the chosen worker could be made." },
  "worker-stalled": { class: "unavailable", when: "The worker gave no token for any of its requests for too long." },
  "engine-failed": { class: "internal", when: "The engine reported a failure of its own." },
  "engine-stopped": { class: "unavailable", when: "The engine stopped or crashed while the request ran." },
  // Time.
  "request-deadline": { class: "deadline-exceeded", when: "The request did not finish before its deadline." },
  "first-token-timeout": { class: "deadline-exceeded", when: "The worker gave no first token within its limit." },
  "stream-idle-timeout": { class: "deadline-exceeded", when: "The worker gave no further token within its limit." },
  "connect-timeout": { class: "deadline-exceeded", when: "A connection or handshake took longer than its limit." },
  cancelled: { class: "cancelled", when: "The caller cancelled the request." },
  // Between our own processes.
  "protocol-version": {
    class: "backend-protocol",
    when: "The peer's hello has another protocol or version, or its cluster secret differs.",
  },
  "malformed-frame": {
    class: "backend-protocol",
    when: "A frame from another process breaks the wire format or its limits.",
  },
  "endpoint-not-found": { class: "not-found", when: "The process that was asked does not serve this endpoint." },
  "stream-limit": { class: "capacity-exhausted", when: "A connection carries as many streams as its limit allows." },
  // Transfers of memory.
  "transfer-peer-lost": { class: "unavailable", when: "The peer of a transfer is gone or its connection broke." },
  "transfer-stale": {
    class: "conflict",
    when: "Memory that a transfer names was deregistered, or its agent restarted, after its metadata was taken.",
  },
  "transfer-out-of-bounds": {
    class: "invalid-request",
    when: "A transfer names memory that is not registered, or uses it in a way its registration does not allow.",
  },
  "transfer-no-path": {
    class: "unavailable",
    when: "No back end both sides have moves that memory, or only a slow one and slow paths are refused.",
  },
  "transfer-full": {
    class: "capacity-exhausted",
    when: "A bounded table or queue of the transfer library is full, or the memory for handed-off blocks.",
  },
  "handoff-gone": {
    class: "conflict",
    when: "KV blocks that a prefill worker handed over were claimed before, or their lease is over.",
  },
  "handoff-mismatch": {
    class: "conflict",
    when: "KV blocks that were handed over are not of this worker's model, engine or layout.",
  },
  "storage-failed": { class: "unavailable", when: "A file or object store could not be read or written." },
  "object-not-found": { class: "not-found", when: "An object that a transfer reads is not in the store." },
  // Files, models, configuration.
  "invalid-config": { class: "invalid-request", when: "Flags, environment or configuration file hold invalid values." },
  "model-file-invalid": {
    class: "invalid-request",
    when: "A model, tokenizer or template file is missing, damaged or of an unknown kind.",
  },
  "model-unavailable": { class: "unavailable", when: "A model file could not be had from any source." },
  "library-unavailable": {
    class: "unavailable",
    when: "A native library is missing on this platform or its layout is not the expected one.",
  },
  "address-in-use": { class: "conflict", when: "The address to listen on is taken." },
  "discovery-unavailable": { class: "unavailable", when: "The discovery store cannot be read or written." },
  "lease-lost": { class: "unavailable", when: "The lease expired or was revoked before it was renewed." },
  "event-plane-unavailable": { class: "unavailable", when: "The event plane cannot publish or subscribe." },
  "unsupported-operation": { class: "not-implemented", when: "This engine or back end does not offer the operation." },
  internal: { class: "internal", when: "A defect of ours: an invariant did not hold." },
} as const satisfies Record<string, ReasonEntry>;

export type Reason = keyof typeof REASONS;

export function isReason(value: string): value is Reason {
  return Object.hasOwn(REASONS, value);
}
