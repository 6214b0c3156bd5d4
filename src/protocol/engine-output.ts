import { DynamoError, errorFromWire } from "../errors/index.ts";
import { ByteReader, ByteWriter } from "../std/index.ts";
import { MAX_HANDOFF_BYTES, type PullResult } from "./handoff.ts";

/**
 * What an engine step says about its streams, as bytes, from the engine's thread to the frontend's stream without being
 * decoded on the way. A step is a row of entries `[u32 stream id][u32 payload bytes, top bit: final][payload]`; the worker
 * cuts them, passes each payload on as one request-plane item, and ends the stream after a final one. A payload is a row
 * of tagged sections:
 *
 *   TOKENS    u16 count, count x u32 token id
 *   FIRST     u32 prompt tokens, u32 of them from the cache, f32 ms in the engine's queue, f32 ms of prefill
 *   LOGPROBS  u16 count, per generated token of this payload: one logprob record
 *   PROMPT    u32 count, per prompt token from the second on: one logprob record
 *   FINISH    u8 reason, f32 ms of decode
 *   ERROR     reason, message, diagnostic as texts
 *   RETRY     u32 ms, before an ERROR that may be over by then
 *   HANDOFF   u8 whether a draft, u32 blocks, u32 block bytes, u32 bytes, the handoff (handoff.ts), of a worker that prefills
 *             for others
 *   CACHED    u32 prompt tokens from the cache, from engines that tell only at the end: replaces the guess in FIRST
 *   RESTORED  u32 blocks from host memory, u32 from disk, u32 from the object store, f32 ms until they were in the cache
 *   PULL      outcome and back end as texts, u32 blocks held, u32 pulled, u32 of them early, f64 bytes, f32 ms, of one that was
 *             handed blocks
 *
 *   logprob record: f32 logprob of the token, u8 n, n x (u32 token id, f32 logprob), best first
 *
 * A stop token is not among the tokens. The final payload of a stream has FINISH or ERROR, exactly once.
 */
export type FinishReason = "stop" | "length" | "cancelled" | "error";

const TOKENS = 1;
const FIRST = 2;
const LOGPROBS = 3;
const PROMPT = 4;
const FINISH = 5;
const ERROR = 6;
const HANDOFF = 7;
const PULL = 8;
const CACHED = 9;
const RESTORED = 10;
const RETRY = 11;
const FINISH_REASONS: readonly FinishReason[] = ["stop", "length", "cancelled"];
const FINAL_BIT = 0x80000000;
const MAX_TEXT_BYTES = 64 * 1024;
/** OpenAI allows 20 alternatives. */
export const MAX_TOP_LOGPROBS = 20;

/** One token's logprob with its alternatives, best first. */
export interface TokenLogprob {
  readonly logprob: number;
  readonly topIds: readonly number[];
  readonly topLogprobs: readonly number[];
}

/** KV blocks of the prompt that came back into the engine's cache from a tier below it. */
export interface RestoredBlocks {
  readonly hostBlocks: number;
  readonly diskBlocks: number;
  readonly objectBlocks: number;
  /** Reading them and copying them into the engine; the request waited for that. */
  readonly milliseconds: number;
}

/** Builds a step. Reused for every step: `reset`, entries, `view`. */
export class StepWriter {
  readonly #writer = new ByteWriter(64 * 1024);
  #entryStart = -1;
  #final = 0;
  entryCount = 0;

  reset(): void {
    this.#writer.reset();
    this.#entryStart = -1;
    this.entryCount = 0;
  }

  beginEntry(streamId: number): void {
    this.#writer.u32(streamId);
    this.#entryStart = this.#writer.length;
    this.#final = 0;
    this.#writer.u32(0);
    this.entryCount++;
  }

  endEntry(): void {
    this.#writer.patchU32(this.#entryStart, (this.#writer.length - this.#entryStart - 4) | this.#final);
    this.#entryStart = -1;
  }

  /** At most 65,535 tokens. */
  tokens(tokenIds: ArrayLike<number>, count = tokenIds.length): void {
    this.#writer.u8(TOKENS);
    this.#writer.u16(count);
    this.#writer.u32s(tokenIds, count);
  }

  /** The usual case, one token, without an array. */
  token(tokenId: number): void {
    this.#writer.u8(TOKENS);
    this.#writer.u16(1);
    this.#writer.u32(tokenId);
  }

  first(info: { promptTokens: number; cachedTokens: number; queueMs: number; prefillMs: number }): void {
    this.#writer.u8(FIRST);
    this.#writer.u32(info.promptTokens);
    this.#writer.u32(info.cachedTokens);
    this.#writer.f32(info.queueMs);
    this.#writer.f32(info.prefillMs);
  }

  logprobs(records: readonly TokenLogprob[]): void {
    this.#writer.u8(LOGPROBS);
    this.#writer.u16(records.length);
    for (const record of records) this.#logprob(record);
  }

  promptLogprobs(records: readonly TokenLogprob[]): void {
    this.#writer.u8(PROMPT);
    this.#writer.u32(records.length);
    for (const record of records) this.#logprob(record);
  }

  #logprob(record: TokenLogprob): void {
    this.#writer.f32(record.logprob);
    this.#writer.u8(record.topIds.length);
    for (let i = 0; i < record.topIds.length; i++) {
      this.#writer.u32(record.topIds[i]!);
      this.#writer.f32(record.topLogprobs[i]!);
    }
  }

  /** With or before the finish, of a stream whose `first` was a guess. */
  cached(cachedTokens: number): void {
    this.#writer.u8(CACHED);
    this.#writer.u32(cachedTokens);
  }

  /** Before the first token, by what keeps tiers below the engine's cache. */
  restored(blocks: RestoredBlocks): void {
    this.#writer.u8(RESTORED);
    this.#writer.u32(blocks.hostBlocks);
    this.#writer.u32(blocks.diskBlocks);
    this.#writer.u32(blocks.objectBlocks);
    this.#writer.f32(blocks.milliseconds);
  }

  finish(reason: Exclude<FinishReason, "error">, decodeMs: number): void {
    this.#final = FINAL_BIT;
    this.#writer.u8(FINISH);
    this.#writer.u8(FINISH_REASONS.indexOf(reason));
    this.#writer.f32(decodeMs);
  }

  error(error: DynamoError): void {
    this.#final = FINAL_BIT;
    if (error.retryAfterMs !== undefined) {
      this.#writer.u8(RETRY);
      this.#writer.u32(Math.min(0xffff_ffff, Math.max(0, Math.ceil(error.retryAfterMs))));
    }
    this.#writer.u8(ERROR);
    this.#writer.text(error.reason);
    this.#writer.text(error.publicMessage.slice(0, 2000));
    this.#writer.text((error.diagnostic ?? "").slice(0, 8000));
  }

  /** A whole entry that only ends a stream with an error. */
  errorEntry(streamId: number, error: DynamoError): void {
    this.beginEntry(streamId);
    this.error(error);
    this.endEntry();
  }

  /** The step so far, valid until the next call on this writer. */
  view(): Buffer {
    return this.#writer.view();
  }
}

/** Calls `visit` for each entry of a step; the payload is `step[start, end)`. Trusts the engine in the same process. */
export function forEachStepEntry(
  step: Uint8Array,
  visit: (streamId: number, start: number, end: number, final: boolean) => void,
): void {
  const view = new DataView(step.buffer, step.byteOffset, step.byteLength);
  let at = 0;
  while (at < step.length) {
    const start = at + 8;
    const length = view.getUint32(at + 4, true);
    const end = start + (length & ~FINAL_BIT);
    visit(view.getUint32(at, true), start, end, length >= FINAL_BIT);
    at = end;
  }
}

/**
 * One decoded payload; a flyweight that the reader reuses (`decodeEngineOutput` overwrites all of it). The token array
 * is longer than `tokenCount`: only its head counts.
 */
export class EngineOutput {
  tokenIds: Uint32Array = new Uint32Array(64);
  tokenCount = 0;
  /** Set with the first generated token (or the end, when there was none). */
  hasFirst = false;
  promptTokens = 0;
  cachedTokens = 0;
  /** The engine's own count, told at the end by engines that know no sooner; `cachedTokens` was a guess then. */
  reportedCachedTokens: number | undefined = undefined;
  queueMs = 0;
  prefillMs = 0;
  logprobs: TokenLogprob[] | undefined = undefined;
  promptLogprobs: TokenLogprob[] | undefined = undefined;
  finish: FinishReason | undefined = undefined;
  decodeMs = 0;
  error: DynamoError | undefined = undefined;
  /** Of the error; 0 = none. */
  retryAfterMs = 0;
  handoff: OfferedHandoff | undefined = undefined;
  pull: PullResult | undefined = undefined;
  restored: RestoredBlocks | undefined = undefined;
}

/** A handoff as the frontend sees it. */
export interface OfferedHandoff {
  /** The prompt is still being computed; the handoff follows. */
  readonly isDraft: boolean;
  /** Of the prompt, with those that were offered as parts of the draft. */
  readonly blockCount: number;
  readonly blockBytes: number;
  readonly bytes: Buffer;
}

/** An item that only carries a handoff. */
export function encodeHandoffItem({ isDraft, blockCount, blockBytes, bytes }: OfferedHandoff): Buffer {
  const out = new ByteWriter(bytes.length + 16);
  out.u8(HANDOFF);
  out.u8(isDraft ? 1 : 0);
  out.u32(blockCount);
  out.u32(blockBytes);
  out.u32(bytes.length);
  out.bytes(bytes);
  return out.copy();
}

/** An item that only tells how a handoff was taken. */
export function encodePullItem(pull: PullResult): Buffer {
  const out = new ByteWriter(128);
  out.u8(PULL);
  out.text(pull.outcome);
  out.text(pull.backend);
  out.u32(pull.heldBlocks);
  out.u32(pull.pulledBlocks);
  out.u32(pull.earlyBlocks);
  out.f64(pull.byteCount);
  out.f32(pull.milliseconds);
  return out.copy();
}

/** Throws `malformed-frame`. Cost: about 50 ns for a one-token payload. */
export function decodeEngineOutput(bytes: Uint8Array, start: number, end: number, target: EngineOutput): void {
  target.tokenCount = 0;
  target.hasFirst = false;
  target.reportedCachedTokens = undefined;
  target.logprobs = undefined;
  target.promptLogprobs = undefined;
  target.finish = undefined;
  target.decodeMs = 0;
  target.error = undefined;
  target.retryAfterMs = 0;
  target.handoff = undefined;
  target.pull = undefined;
  target.restored = undefined;
  // The usual payload, one token and nothing else, needs no reader object.
  if (end - start === 7 && bytes[start] === TOKENS && bytes[start + 1] === 1 && bytes[start + 2] === 0) {
    target.tokenIds[0] =
      (bytes[start + 3]! | (bytes[start + 4]! << 8) | (bytes[start + 5]! << 16) | (bytes[start + 6]! << 24)) >>> 0;
    target.tokenCount = 1;
    return;
  }
  try {
    const reader = new ByteReader(bytes, start, end);
    while (reader.remaining > 0) decodeSection(reader, target);
  } catch (cause) {
    if (cause instanceof DynamoError) throw cause;
    throw new DynamoError("malformed-frame", "engine output could not be decoded", {
      diagnostic: String(cause),
      cause,
    });
  }
}

function decodeSection(reader: ByteReader, target: EngineOutput): void {
  const tag = reader.u8();
  switch (tag) {
    case TOKENS: {
      const count = reader.u16();
      const needed = target.tokenCount + count;
      if (needed > target.tokenIds.length) {
        const grown = new Uint32Array(Math.max(needed, target.tokenIds.length * 2));
        grown.set(target.tokenIds);
        target.tokenIds = grown;
      }
      for (let i = 0; i < count; i++) target.tokenIds[target.tokenCount++] = reader.u32();
      return;
    }
    case FIRST:
      target.hasFirst = true;
      target.promptTokens = reader.u32();
      target.cachedTokens = reader.u32();
      target.queueMs = reader.f32();
      target.prefillMs = reader.f32();
      return;
    case CACHED:
      target.reportedCachedTokens = reader.u32();
      return;
    case LOGPROBS:
      target.logprobs = decodeLogprobs(reader, reader.u16());
      return;
    case PROMPT:
      target.promptLogprobs = decodeLogprobs(reader, reader.u32());
      return;
    case FINISH:
      target.finish = FINISH_REASONS[reader.u8()];
      if (target.finish === undefined) throw new Error("unknown finish reason");
      target.decodeMs = reader.f32();
      return;
    case ERROR: {
      target.finish = "error";
      const reason = reader.text(MAX_TEXT_BYTES);
      const message = reader.text(MAX_TEXT_BYTES);
      target.error = errorFromWire(reason, message, reader.text(MAX_TEXT_BYTES), target.retryAfterMs);
      return;
    }
    case RETRY:
      target.retryAfterMs = reader.u32();
      return;
    case HANDOFF: {
      const isDraft = reader.u8() === 1;
      const blockCount = reader.u32();
      const blockBytes = reader.u32();
      const byteCount = reader.u32();
      if (byteCount > MAX_HANDOFF_BYTES) throw new Error(`a handoff of ${byteCount} bytes`);
      target.handoff = { isDraft, blockCount, blockBytes, bytes: Buffer.from(reader.bytes(byteCount)) };
      return;
    }
    case RESTORED: {
      const hostBlocks = reader.u32();
      const diskBlocks = reader.u32();
      const objectBlocks = reader.u32();
      target.restored = { hostBlocks, diskBlocks, objectBlocks, milliseconds: reader.f32() };
      return;
    }
    case PULL: {
      const outcome = reader.text(MAX_TEXT_BYTES);
      const backend = reader.text(MAX_TEXT_BYTES);
      const heldBlocks = reader.u32();
      const pulledBlocks = reader.u32();
      const earlyBlocks = reader.u32();
      const byteCount = reader.f64();
      const milliseconds = reader.f32();
      target.pull = { outcome, backend, heldBlocks, pulledBlocks, earlyBlocks, byteCount, milliseconds };
      return;
    }
    default:
      throw new Error(`unknown section tag ${tag}`);
  }
}

function decodeLogprobs(reader: ByteReader, count: number): TokenLogprob[] {
  if (count * 5 > reader.remaining)
    throw new Error(`${count} logprob records do not fit into ${reader.remaining} bytes`);
  const records: TokenLogprob[] = [];
  for (let i = 0; i < count; i++) {
    const logprob = reader.f32();
    const alternatives = reader.u8();
    const topIds: number[] = [];
    const topLogprobs: number[] = [];
    for (let k = 0; k < alternatives; k++) {
      topIds.push(reader.u32());
      topLogprobs.push(reader.f32());
    }
    records.push({ logprob, topIds, topLogprobs });
  }
  return records;
}
