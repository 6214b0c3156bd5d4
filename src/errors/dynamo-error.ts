import { REASONS, isReason, type ErrorClass, type Reason } from "./catalogue.ts";

export interface DynamoErrorOptions {
  /** For operators: logs and traces. May name addresses and internal state; never prompts, outputs or keys. */
  readonly diagnostic?: string;
  /** The request field at fault, as the client wrote it (`messages[0].role`). */
  readonly param?: string;
  readonly cause?: unknown;
  /** For capacity errors: when a retry may succeed. */
  readonly retryAfterMs?: number;
}

/**
 * The one error of this project. It says what failed, with a reason of the catalogue and a text that a client may read;
 * whoever holds the budget decides about retry and status. Classified once, where the cause is known, and passed on
 * unchanged, across processes too (reason, message, diagnostic and time to retry travel; the cause stays).
 */
export class DynamoError extends Error {
  override readonly name = "DynamoError";
  readonly reason: Reason;
  readonly class: ErrorClass;
  /** Safe for clients; equals `message`. */
  readonly publicMessage: string;
  readonly diagnostic: string | undefined;
  readonly param: string | undefined;
  readonly retryAfterMs: number | undefined;

  constructor(reason: Reason, publicMessage: string, options: DynamoErrorOptions = {}) {
    super(publicMessage, options.cause === undefined ? undefined : { cause: options.cause });
    this.reason = reason;
    this.class = REASONS[reason].class;
    this.publicMessage = publicMessage;
    this.diagnostic = options.diagnostic;
    this.param = options.param;
    this.retryAfterMs = options.retryAfterMs;
  }
}

/** Any thrown value as a `DynamoError`: ours unchanged, anything else as `internal` with the text as diagnostic only. */
export function toDynamoError(thrown: unknown, reason: Reason = "internal"): DynamoError {
  if (thrown instanceof DynamoError) return thrown;
  const diagnostic = thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown);
  const text = reason === "internal" ? "internal error" : REASONS[reason].when;
  return new DynamoError(reason, text, { diagnostic, cause: thrown });
}

/**
 * Rebuilds an error that came over the wire; an unknown reason (a newer peer) becomes `backend-protocol`. `retryAfterMs` 0
 * is none.
 */
export function errorFromWire(
  reason: string,
  publicMessage: string,
  diagnostic: string,
  retryAfterMs = 0,
): DynamoError {
  if (isReason(reason)) {
    return new DynamoError(reason, publicMessage, {
      ...(diagnostic === "" ? {} : { diagnostic }),
      ...(retryAfterMs === 0 ? {} : { retryAfterMs }),
    });
  }
  return new DynamoError("malformed-frame", publicMessage, {
    diagnostic: `unknown reason ${JSON.stringify(reason)}: ${diagnostic}`,
  });
}
