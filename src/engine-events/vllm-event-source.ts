import { toDynamoError, type DynamoError } from "../errors/index.ts";
import type { Logger } from "../observability/index.ts";
import type { KvEvent } from "../protocol/index.ts";
import type { EngineLink, EngineLinkHandler } from "../runtime/event-plane/index.ts";
import { VllmEventMapper, type LeftOut } from "./vllm-event-mapper.ts";
import { decodeVllmBatch } from "./vllm-events.ts";
import type { VllmHashCheck } from "./vllm-hash-check.ts";

/**
 * The KV events of one rank of a stock engine, as ours, in order and without holes. The engine numbers its batches from
 * 0 in each of its lives and keeps the newest for replay:
 *
 *     connected ──► replay from 0 ──► live, one by one ──► hole: replay from there ──► what waited meanwhile ──► live
 *                                        └► number goes back, connection lost, hole that the replay cannot fill,
 *                                           unreadable batch: forget the rank (`cleared`), begin again with what is known
 *
 * So an index that is fed from here may know less than the engine has, never more: whoever misses a removal would route
 * to blocks that are gone. Full: 8,192 batches wait during a replay, then the oldest go, which is a hole.
 *
 * One object per engine rank; open its link with it as the handler, then call `attach`.
 */
export interface VllmEventSourceOptions {
  /** Of the model. */
  readonly blockSizeTokens: number;
  /** Of the engine; batches that say another one are taken as this one's: each rank has sockets of its own. */
  readonly dpRank: number;
  readonly logger: Logger;
  /** Looks at the engine's own hashes. */
  readonly hashCheck?: VllmHashCheck | undefined;
  /** In order; valid until the call returns. */
  readonly onEvents: (events: readonly KvEvent[]) => void;
}

export type ResetReason = "restarted" | "reconnected" | "lost" | "replay-failed" | "malformed";

interface Batch {
  readonly sequence: number;
  readonly payload: Uint8Array;
}

/** What happened, and what to do where somebody can. */
const RESET_WORDS: Readonly<Record<ResetReason, string>> = {
  restarted: "the engine numbers them from 0 again, so it was restarted; beginning again",
  reconnected: "the connection was lost; beginning again with what the engine kept",
  lost: "some were lost and the engine does not keep them any more; its blocks are forgotten and learnt anew (more buffer_steps in --kv-events-config keep more)",
  "replay-failed": "lost ones could not be fetched; its blocks are forgotten and learnt anew (is replay_endpoint in --kv-events-config right, and does it answer?)",
  malformed: "one could not be read; its blocks are forgotten and learnt anew",
}; // prettier-ignore
const MAX_WAITING = 8_192;
const END_MARKER = -1;

export class VllmEventSource implements EngineLinkHandler {
  readonly #options: VllmEventSourceOptions;
  #mapper: VllmEventMapper;
  #link: EngineLink | undefined;
  /** The number that comes next; undefined before the first batch of a life. */
  #next: number | undefined;
  /** Highest number that came live over this connection, where numbers only grow. */
  #lastLive = -1;
  #waiting: Batch[] = [];
  #cancelReplay: (() => void) | undefined;
  #whenReplayed: (() => void)[] = [];
  #hasConnected = false;
  #isFailed = false;
  #hasLoggedMalformed = false;
  /** What happened, for metrics. */
  readonly counts = { batches: 0, replayed: 0, gaps: 0, malformed: 0 };
  readonly resets = new Map<ResetReason, number>();
  readonly #leftOut = new Map<LeftOut, number>();

  constructor(options: VllmEventSourceOptions) {
    this.#options = options;
    this.#mapper = new VllmEventMapper(options);
  }

  attach(link: EngineLink): void {
    this.#link = link;
    if (this.#hasConnected && link.canReplay) this.#replay(0);
  }

  /** Whether what was told is all that can be known of the engine's blocks right now. */
  get isWhole(): boolean {
    return this.#hasConnected && this.#cancelReplay === undefined && !this.#isFailed;
  }

  /** Events of the engine that mean nothing here, by the reason. */
  get leftOut(): ReadonlyMap<LeftOut, number> {
    const all = new Map(this.#leftOut);
    for (const [reason, count] of this.#mapper.leftOut) all.set(reason, (all.get(reason) ?? 0) + count);
    return all;
  }

  /**
   * The engine emptied its cache because we asked it to, and says so only with its next batch. What it published before is
   * fetched, so that none of it comes later; then the rank is forgotten. Resolves then, or when the fetch failed.
   */
  async cleared(): Promise<void> {
    const next = this.#next;
    if (next !== undefined && this.#link?.canReplay === true && !this.#isFailed) {
      await new Promise<void>((resolve) => {
        this.#whenReplayed.push(resolve);
        this.#replay(next);
      });
    }
    const seen = this.#next;
    this.#forget();
    this.#next = seen;
  }

  close(): void {
    for (const resolve of this.#whenReplayed.splice(0)) resolve();
    this.#cancelReplay?.();
    this.#cancelReplay = undefined;
    this.#link?.close();
  }

  // ---- From the link ----

  onConnected(): void {
    if (this.#hasConnected) this.#reset("reconnected");
    this.#hasConnected = true;
    this.#lastLive = -1;
    this.#waiting = [];
    if (this.#link?.canReplay === true) this.#replay(0);
  }

  onFrames(frames: readonly Buffer[]): void {
    const batch = liveBatch(frames);
    if (batch === undefined)
      return this.#malformed(`frames of ${frames.map((frame) => frame.length).join(", ")} bytes`);
    const isBack = batch.sequence <= this.#lastLive;
    this.#lastLive = batch.sequence;
    if (isBack) return this.#restarted(batch);
    if (this.#cancelReplay === undefined) return this.#take(batch);
    if (this.#waiting.length >= MAX_WAITING) this.#waiting.shift();
    this.#waiting.push(batch);
  }

  onFailed(error: DynamoError): void {
    this.#isFailed = true;
    this.#options.logger.error({ err: error }, "engine KV events: the socket failed; its blocks are forgotten");
    this.#forget();
  }

  // ---- Inside ----

  #take(batch: Batch): void {
    const next = this.#next;
    if (next === undefined || batch.sequence === next) this.#apply(batch);
    else if (batch.sequence > next) this.#hole(batch, next);
    // Else it was replayed before it came live: the two sockets do not wait for each other.
  }

  #restarted(batch: Batch): void {
    this.#reset("restarted");
    if (this.#link?.canReplay !== true) return this.#apply(batch);
    this.#waiting = [batch];
    this.#replay(0);
  }

  #hole(batch: Batch, next: number): void {
    this.counts.gaps++;
    if (this.#link?.canReplay === true) {
      this.#waiting = [batch];
      this.#replay(next);
      return;
    }
    this.#reset("lost");
    this.#apply(batch);
  }

  #replay(from: number): void {
    this.#cancelReplay?.();
    this.#cancelReplay = this.#link!.replay(from, {
      onFrames: (frames) => {
        const batch = replayedBatch(frames);
        if (batch === undefined) {
          this.#malformed("a reply of a replay has another form");
          return false;
        }
        if (batch.sequence === END_MARKER) return true;
        if (this.#next !== undefined && batch.sequence < this.#next) return false;
        // The engine keeps the newest only. At the start what is older was never known here, so nothing can be wrong.
        if (this.#next !== undefined && batch.sequence > this.#next) this.#reset("lost");
        this.counts.replayed++;
        this.#apply(batch);
        return false;
      },
      onEnd: (error) => {
        this.#cancelReplay = undefined;
        if (error !== undefined) {
          this.#options.logger.warn({ err: error }, "engine KV events: a replay failed");
          if (this.#next !== undefined) this.#reset("replay-failed");
        }
        this.#drain();
        // Nothing was published yet: the first batch that comes is the first one, or there is a hole.
        if (error === undefined) this.#next ??= 0;
        for (const resolve of this.#whenReplayed.splice(0)) resolve();
      },
    });
  }

  /** What came live during the replay. A hole in front of it now is one that nobody can fill. */
  #drain(): void {
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const batch of waiting) {
      if (this.#next !== undefined && batch.sequence < this.#next) continue;
      if (this.#next !== undefined && batch.sequence > this.#next) this.#reset("lost");
      this.#apply(batch);
    }
  }

  #apply({ sequence, payload }: Batch): void {
    this.#next = sequence + 1;
    this.counts.batches++;
    let events: KvEvent[];
    try {
      const batch = decodeVllmBatch(payload);
      this.#options.hashCheck?.observe(batch.events);
      events = this.#mapper.map({ events: batch.events, dpRank: this.#options.dpRank });
    } catch (thrown) {
      this.#malformed(toDynamoError(thrown).diagnostic ?? "");
      return;
    }
    if (events.length > 0) this.#options.onEvents(events);
  }

  /** It may have told of removals. */
  #malformed(diagnostic: string): void {
    this.counts.malformed++;
    if (!this.#hasLoggedMalformed) {
      this.#hasLoggedMalformed = true;
      this.#options.logger.warn(
        { diagnostic },
        "engine KV events: malformed ones dropped; further ones are only counted",
      );
    }
    const next = this.#next;
    this.#reset("malformed");
    this.#next = next;
  }

  #reset(reason: ResetReason): void {
    const count = (this.resets.get(reason) ?? 0) + 1;
    this.resets.set(reason, count);
    if (reason !== "malformed") {
      this.#options.logger.warn(
        { reason, rank: this.#options.dpRank, count },
        `engine KV events: ${RESET_WORDS[reason]}`,
      );
    }
    this.#forget();
  }

  #forget(): void {
    for (const [reason, count] of this.leftOut) this.#leftOut.set(reason, count);
    this.#mapper = new VllmEventMapper(this.#options);
    this.#next = undefined;
    this.#options.onEvents([{ type: "cleared", dpRank: this.#options.dpRank }]);
  }
}

/** Topic, sequence, payload. */
function liveBatch(frames: readonly Buffer[]): Batch | undefined {
  const batch = frames.length === 3 ? batchOf(frames[1]!, frames[2]!) : undefined;
  return batch?.sequence === END_MARKER ? undefined : batch;
}

/** Sequence and payload, from the summer of 2026 on with the topic in front; the end has the number -1. */
function replayedBatch(frames: readonly Buffer[]): Batch | undefined {
  if (frames.length !== 2 && frames.length !== 3) return undefined;
  return batchOf(frames.at(-2)!, frames.at(-1)!);
}

function batchOf(sequence: Buffer, payload: Buffer): Batch | undefined {
  if (sequence.length !== 8) return undefined;
  const number = sequence.readBigInt64BE();
  if (number < -1n || number > BigInt(Number.MAX_SAFE_INTEGER)) return undefined;
  return { sequence: Number(number), payload };
}
