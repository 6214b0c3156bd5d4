/**
 * What the request plane accepts, with the reason for each number. Everything a peer sends or makes us keep has a bound
 * here; what happens at the bound is in the README. Byte sizes of texts are fixed by `base.ts`.
 */
export interface RequestPlaneLimits {
  /** One frame, so one request payload. A 128 k-token prompt is 0.5 MiB; the rest is for images. @default 64 MiB */
  readonly maxFrameBytes: number;
  /** Live streams of one connection: ten times what one worker runs. At most 65,536, as a slot has 16 bits. @default 65536 */
  readonly maxStreamsPerConnection: number;
  /** Connections one server takes: one per frontend process. @default 4096 */
  readonly maxConnections: number;
  /** Items one stream keeps while it has no credit: thousands of steps. @default 1 MiB */
  readonly parkedBytesPerStream: number;
  /** The same over all streams of a server, so that 10,000 stalled streams do not take 10 GB. @default 256 MiB */
  readonly parkedBytesTotal: number;
  /** Written but not yet taken by the kernel, per connection; at twice this the connection is dropped. @default 64 MiB */
  readonly queuedBytesPerConnection: number;
}

const MIB = 1024 * 1024;

export const DEFAULT_LIMITS: RequestPlaneLimits = {
  maxFrameBytes: 64 * MIB,
  maxStreamsPerConnection: 65_536,
  maxConnections: 4_096,
  parkedBytesPerStream: MIB,
  parkedBytesTotal: 256 * MIB,
  queuedBytesPerConnection: 64 * MIB,
};

export const MAX_ENDPOINT_BYTES = 256;
export const MAX_REQUEST_ID_BYTES = 128;
export const MAX_TRACEPARENT_BYTES = 128;

export const DEFAULT_WINDOW_BYTES = 256 * 1024;
/** A window above this is cut to it: credit stays a small integer. */
export const MAX_WINDOW_BYTES = 1 << 30;

/** One item; an engine step's share of one stream is under a kilobyte, with log-probabilities some tens. */
export const MAX_ITEM_BYTES = 16 * MIB;

/** A BATCH frame is closed at this size: about what one socket read brings, so that most frames are read in place. */
export const BATCH_CUT_BYTES = 64 * 1024;

/** Before the hello is through: a hello has under 100 bytes, a refusal a sentence. */
export const MAX_HANDSHAKE_FRAME_BYTES = 1_024;

/** What of an error travels; longer texts are cut at a character. */
export const MAX_ERROR_MESSAGE_BYTES = 4_096;
export const MAX_ERROR_DIAGNOSTIC_BYTES = 8_192;
/** Three length fields, a reason, both texts and a time. */
export const MAX_ERROR_BYTES = 16 * 1024;
