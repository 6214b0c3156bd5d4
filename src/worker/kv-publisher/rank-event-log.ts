import {
  KV_ANSWER_EVENT_BYTES,
  KV_DUMP_MAX_PAGES,
  KV_EVENT_MAX_BLOCKS,
  encodeKvAnswer,
  encodeKvEvents,
  type KvAnswer,
  type KvEvent,
  type KvQuery,
  type KvStored,
} from "../../protocol/index.ts";
import type { Clock, TimerHandle } from "../../std/index.ts";
import { coalesceKvEvents } from "./event-coalescer.ts";
import { LocalBlockIndex } from "./local-block-index.ts";

/**
 * The worker's own record of one rank's KV events, and what it answers to routers that missed some: the last events by
 * number (from 1), and the set of blocks they led to.
 *
 *   engine events -> dedup (block index) -> coalesce -> number -> ring of 1,024 -> whoever publishes
 *
 * A dump is made once and served to all who ask within a short time, page by page: a later router fetches what came
 * after it from the ring. It is kept as encoded bytes until nobody asked for `DUMP_KEPT_MS`.
 *
 * Owned by the publisher, on the worker's loop. Cost: see `LocalBlockIndex`; the ring holds at most 1,024 x 128 blocks.
 */
export const RING_EVENTS = 1_024;
/** Dynamo's cap: large enough to save events, small enough that a router never works long on one. */
export const EVENT_BLOCKS = 128;
const DUMP_KEPT_MS = 10_000;
/** A dump this old is not given to a new asker: it would have to fetch too much besides. */
const DUMP_SHARED_MS = 1_000;

interface Dump {
  readonly id: number;
  /** The newest event that it contains. */
  readonly atEventId: number;
  readonly madeMs: number;
  readonly pages: readonly Buffer[];
}

export interface RankEventLogOptions {
  readonly dpRank: number;
  readonly epoch: number;
  /** Blocks kept track of; further ones are not told to routers. */
  readonly maxBlocks: number;
  readonly clock: Clock;
  /** @default 1024 */
  readonly ringEvents?: number;
}

export class RankEventLog {
  readonly #options: RankEventLogOptions;
  readonly #index: LocalBlockIndex;
  readonly #ring: (KvEvent | undefined)[];
  #lastEventId = 0;
  #dump: Dump | undefined;
  #dumpCount = 0;
  #dumpTimer: TimerHandle | undefined;
  /** Stored blocks left out: no room, or their parent is not known. */
  droppedBlockCount = 0;

  constructor(options: RankEventLogOptions) {
    this.#options = options;
    this.#index = new LocalBlockIndex({ maxBlocks: options.maxBlocks });
    this.#ring = Array.from({ length: options.ringEvents ?? RING_EVENTS }, () => undefined);
  }

  /** Number of the newest event, 0 before the first. */
  get lastEventId(): number {
    return this.#lastEventId;
  }

  get blockCount(): number {
    return this.#index.size;
  }

  /** Dumps made so far. */
  get dumpCount(): number {
    return this.#dumpCount;
  }

  /** Takes one step's events of this rank, keeps them, and returns those to publish: the last of them is `lastEventId`. */
  append(events: readonly KvEvent[]): readonly KvEvent[] {
    const told: KvEvent[] = [];
    for (const event of events) this.#deduplicate(event, told);
    const out = coalesceKvEvents(told, EVENT_BLOCKS);
    for (const event of out) this.#ring[++this.#lastEventId % this.#ring.length] = event;
    return out;
  }

  /** Events that lead from nothing to what the rank holds. */
  blocks(): KvEvent[] {
    return this.#index.dump(this.#options.dpRank, KV_EVENT_MAX_BLOCKS);
  }

  /** The encoded answer, in a shared slab: valid until the next call. At most `KV_ANSWER_EVENT_BYTES` and one event. */
  answer(query: KvQuery): Buffer {
    const head = { epoch: this.#options.epoch, lastEventId: this.#lastEventId };
    if (query.type === "page") {
      const dump = this.#dump?.id === query.dumpId ? this.#dump : undefined;
      if (dump === undefined || query.page >= dump.pages.length) return encodeKvAnswer({ ...head, type: "dump-gone" });
      return this.#page(dump, query.page);
    }
    const { start, end } = query;
    if (start === 0 || end === 0 || (start !== undefined && end !== undefined && start > end)) {
      return encodeKvAnswer({ ...head, type: "invalid-range" });
    }
    if (start !== undefined && start > this.#lastEventId) return encodeKvAnswer({ ...head, type: "too-new" });
    if (start === undefined || start <= this.#lastEventId - this.#ring.length) return this.#page(this.#freshDump(), 0);
    return encodeKvAnswer(this.#range(head, start, Math.min(end ?? Infinity, this.#lastEventId)));
  }

  close(): void {
    this.#dumpTimer?.cancel();
    this.#dump = undefined;
  }

  #deduplicate(event: KvEvent, told: KvEvent[]): void {
    if (event.type === "cleared") {
      this.#index.clear();
      told.push(event);
    } else if (event.type === "stored") {
      const blockCount = event.sequenceHashes.length / 2;
      const kept = this.#index.store(event);
      this.droppedBlockCount += blockCount - kept;
      told.push(kept === blockCount ? event : leading(event, kept));
    } else {
      const { sequenceHashes, tier } = event;
      const last = new Uint32Array(sequenceHashes.length);
      let length = 0;
      for (let at = 0; at < sequenceHashes.length; at += 2) {
        if (!this.#index.remove(sequenceHashes[at]!, sequenceHashes[at + 1]!, tier)) continue;
        last[length++] = sequenceHashes[at]!;
        last[length++] = sequenceHashes[at + 1]!;
      }
      told.push(length === last.length ? event : { ...event, sequenceHashes: last.slice(0, length) });
    }
  }

  #range(head: { epoch: number; lastEventId: number }, start: number, end: number): KvAnswer {
    const events: KvEvent[] = [];
    for (let id = start, bytes = 0; id <= end && bytes < KV_ANSWER_EVENT_BYTES; id++) {
      const event = this.#ring[id % this.#ring.length]!;
      events.push(event);
      bytes += encodedBytes(event);
    }
    return { ...head, type: "events", firstEventId: start, events };
  }

  /** The dump that others are fetching, when the ring still has everything after it; a new one otherwise. */
  #freshDump(): Dump {
    const nowMs = this.#options.clock.monotonicMs();
    const known = this.#dump;
    if (
      known !== undefined &&
      (known.atEventId === this.#lastEventId ||
        (nowMs - known.madeMs < DUMP_SHARED_MS && known.atEventId > this.#lastEventId - this.#ring.length / 2))
    ) {
      return known;
    }
    const id = ++this.#dumpCount;
    this.#dump = { id, atEventId: this.#lastEventId, madeMs: nowMs, pages: paged(this.blocks()) };
    return this.#dump;
  }

  #page(dump: Dump, page: number): Buffer {
    this.#dumpTimer?.cancel();
    this.#dumpTimer = this.#options.clock.setTimer(DUMP_KEPT_MS, () => (this.#dump = undefined));
    const { id: dumpId, atEventId, pages } = dump;
    const head = { epoch: this.#options.epoch, lastEventId: this.#lastEventId };
    const answer = {
      ...head,
      type: "tree-dump",
      dumpId,
      atEventId,
      page,
      pageCount: pages.length,
      events: [],
    } as const;
    return encodeKvAnswer(answer, pages[page]!);
  }
}

/** Encoded events cut into pages; what is over the limit of pages is left out, so that routers under-report. */
function paged(events: readonly KvEvent[]): Buffer[] {
  const pages: Buffer[] = [];
  let from = 0;
  let bytes = 0;
  for (const [index, event] of events.entries()) {
    const size = encodedBytes(event);
    if (bytes > 0 && bytes + size > KV_ANSWER_EVENT_BYTES) {
      pages.push(Buffer.from(encodeKvEvents(events.slice(from, index))));
      from = index;
      bytes = 0;
    }
    bytes += size;
  }
  pages.push(Buffer.from(encodeKvEvents(events.slice(from))));
  return pages.slice(0, KV_DUMP_MAX_PAGES);
}

/** Not less than what `encodeKvEvents` takes for it. */
function encodedBytes(event: KvEvent): number {
  if (event.type === "cleared") return 8;
  return 32 + 4 * event.sequenceHashes.length + (event.type === "stored" ? 4 * event.localHashes.length : 0);
}

function leading(event: KvStored, blockCount: number): KvStored {
  return {
    ...event,
    sequenceHashes: event.sequenceHashes.slice(0, 2 * blockCount),
    localHashes: event.localHashes.slice(0, 2 * blockCount),
  };
}
