import { DynamoError } from "../errors/index.ts";
import { ByteReader, ByteWriter } from "../std/index.ts";
import { decodeKvEvents, encodeKvEvents, type KvEvent } from "./kv-event.ts";

/**
 * How KV events travel and how a router gets those it missed. A worker numbers the events of each data-parallel rank from
 * 1 and publishes them in batches; whoever sees a hole, or starts late, asks the rank's query endpoint on the request
 * plane: for events by number while the worker's ring still has them, for a dump of everything otherwise.
 *
 * `epoch` names one life of a worker (48 random bits): numbers of different epochs have nothing to do with each other.
 * All decoders throw `malformed-frame` on anything but a whole, well-formed message.
 */
export interface KvEventBatch {
  readonly dpRank: number;
  readonly epoch: number;
  /** Number of `events[0]`; the others follow it without a hole. */
  readonly firstEventId: number;
  readonly events: readonly KvEvent[];
}

/** Either a range of event numbers, both ends included, or one page of a dump that an earlier answer began. */
export type KvQuery =
  | { readonly type: "range"; readonly start: number | undefined; readonly end: number | undefined }
  | { readonly type: "page"; readonly dumpId: number; readonly page: number };

interface KvAnswerHead {
  readonly epoch: number;
  /** The newest event of the rank. */
  readonly lastEventId: number;
}

export type KvAnswer =
  /** The events from `firstEventId` on, as many as fit: ask again from the next while there are more. */
  | (KvAnswerHead & { readonly type: "events"; readonly firstEventId: number; readonly events: readonly KvEvent[] })
  /**
   * Events that lead from nothing to every block of the rank, parents before children, over `pageCount` pages from 0. A
   * block that is gone while others behind it are not is stored, and removed at the end. The dump holds what was before
   * and with event `atEventId`, the same on every page; what came after it is to be asked for.
   */
  | (KvAnswerHead & {
      readonly type: "tree-dump";
      readonly dumpId: number;
      readonly atEventId: number;
      readonly page: number;
      readonly pageCount: number;
      readonly events: readonly KvEvent[];
    })
  /** `start` is after the newest event. */
  | (KvAnswerHead & { readonly type: "too-new" })
  /** `start` is after `end`, or a number below 1. */
  | (KvAnswerHead & { readonly type: "invalid-range" })
  /** The dump of that id is no longer kept: ask for a new one. */
  | (KvAnswerHead & { readonly type: "dump-gone" });

/** Bytes of events in one answer: two of them fit the credit window of a stream, so that nothing is ever parked. */
export const KV_ANSWER_EVENT_BYTES = 96 * 1024;
/** Blocks of one event in a dump or a published batch at most; larger ones are split by whoever sends. */
export const KV_EVENT_MAX_BLOCKS = 2_048;
/** Pages of one dump: over 6 million blocks. */
export const KV_DUMP_MAX_PAGES = 1_024;

/** The endpoint that answers `KvQuery` for one rank. */
export function kvQueryEndpoint(dpRank: number): string {
  return `worker_kv_indexer_query_dp${dpRank}`;
}

const VERSION = 1;
const RANGE = 1;
const PAGE = 2;
const ANSWERS = ["events", "tree-dump", "too-new", "invalid-range", "dump-gone"] as const;
const MAX_MESSAGE_BYTES = 8 * 1024 * 1024;
const writer = new ByteWriter(16 * 1024);

/** Encodes into a shared slab: valid until the next call. */
export function encodeKvEventBatch(batch: KvEventBatch): Buffer {
  writer.reset();
  writer.u8(VERSION);
  writer.u32(batch.dpRank);
  writeNumber(batch.epoch);
  writeNumber(batch.firstEventId);
  writer.bytes(encodeKvEvents(batch.events));
  return writer.view();
}

export function decodeKvEventBatch(bytes: Uint8Array): KvEventBatch {
  return decode("KV event batch", bytes, (reader) => {
    const dpRank = reader.u32();
    const epoch = readNumber(reader);
    const firstEventId = readNumber(reader);
    const events = decodeKvEvents(reader.bytes(reader.remaining));
    if (epoch === 0 || firstEventId === 0) throw new Error("epoch and event numbers begin at 1");
    if (events.some((event) => event.dpRank !== dpRank)) throw new Error(`an event is not of rank ${dpRank}`);
    return { dpRank, epoch, firstEventId, events };
  });
}

/** Encodes into a shared slab: valid until the next call. */
export function encodeKvQuery(query: KvQuery): Buffer {
  writer.reset();
  writer.u8(VERSION);
  if (query.type === "range") {
    writer.u8(RANGE);
    // Numbers begin at 1: one more than the number, so that 0 is free for "none" and an invalid 0 can be told apart.
    writeNumber(query.start === undefined ? 0 : query.start + 1);
    writeNumber(query.end === undefined ? 0 : query.end + 1);
  } else {
    writer.u8(PAGE);
    writeNumber(query.dumpId);
    writeNumber(query.page);
  }
  return writer.view();
}

export function decodeKvQuery(bytes: Uint8Array): KvQuery {
  return decode("KV query", bytes, (reader): KvQuery => {
    const type = reader.u8();
    const first = readNumber(reader);
    const second = readNumber(reader);
    if (reader.remaining !== 0) throw new Error(`${reader.remaining} bytes follow the query`);
    if (type === PAGE) return { type: "page", dumpId: first, page: second };
    if (type !== RANGE) throw new Error(`unknown query type ${type}`);
    return { type: "range", start: first === 0 ? undefined : first - 1, end: second === 0 ? undefined : second - 1 };
  });
}

/** Encodes into a shared slab: valid until the next call. `encoded` takes the place of `answer.events`, already encoded. */
export function encodeKvAnswer(answer: KvAnswer, encoded?: Uint8Array): Buffer {
  writer.reset();
  writer.u8(VERSION);
  writer.u8(ANSWERS.indexOf(answer.type));
  writeNumber(answer.epoch);
  writeNumber(answer.lastEventId);
  if (answer.type === "events") {
    writeNumber(answer.firstEventId);
    writer.bytes(encoded ?? encodeKvEvents(answer.events));
  } else if (answer.type === "tree-dump") {
    writeNumber(answer.dumpId);
    writeNumber(answer.atEventId);
    writer.u32(answer.page);
    writer.u32(answer.pageCount);
    writer.bytes(encoded ?? encodeKvEvents(answer.events));
  }
  return writer.view();
}

/** `dpRank`: the rank that was asked; an answer with events of another one is malformed. */
export function decodeKvAnswer(bytes: Uint8Array, dpRank: number): KvAnswer {
  return decode("KV query answer", bytes, (reader): KvAnswer => {
    const type = ANSWERS[reader.u8()];
    const epoch = readNumber(reader);
    const lastEventId = readNumber(reader);
    if (type === undefined) throw new Error("unknown answer type");
    if (epoch === 0) throw new Error("an epoch is not 0");
    if (type === "events") {
      const firstEventId = readNumber(reader);
      if (firstEventId === 0) throw new Error("event numbers begin at 1");
      return { type, epoch, lastEventId, firstEventId, events: eventsOf(reader, dpRank) };
    }
    if (type === "tree-dump") {
      const dumpId = readNumber(reader);
      const atEventId = readNumber(reader);
      const page = reader.u32();
      const pageCount = reader.u32();
      if (pageCount < 1 || pageCount > KV_DUMP_MAX_PAGES || page >= pageCount) {
        throw new Error(`page ${page} of ${pageCount}, expected 1 to ${KV_DUMP_MAX_PAGES} pages`);
      }
      const events = eventsOf(reader, dpRank);
      if (events.some((event) => event.type === "cleared")) throw new Error("a dump does not clear");
      return { type, epoch, lastEventId, dumpId, atEventId, page, pageCount, events };
    }
    if (reader.remaining !== 0) throw new Error(`${reader.remaining} bytes follow the answer`);
    return { type, epoch, lastEventId };
  });
}

function eventsOf(reader: ByteReader, dpRank: number): KvEvent[] {
  const events = decodeKvEvents(reader.bytes(reader.remaining));
  if (events.some((event) => event.dpRank !== dpRank)) throw new Error(`an event is not of rank ${dpRank}`);
  return events;
}

function decode<T>(what: string, bytes: Uint8Array, read: (reader: ByteReader) => T): T {
  try {
    if (bytes.length > MAX_MESSAGE_BYTES)
      throw new Error(`${bytes.length} bytes are over the limit of ${MAX_MESSAGE_BYTES}`);
    const reader = new ByteReader(bytes);
    const version = reader.u8();
    if (version !== VERSION) throw new Error(`expected version ${VERSION}, got ${version}`);
    return read(reader);
  } catch (cause) {
    throw new DynamoError("malformed-frame", `${what}: could not be decoded`, { diagnostic: String(cause), cause });
  }
}

/** A whole number up to 2^53 - 1 as u64 little-endian. */
function writeNumber(value: number): void {
  writer.u32(value);
  writer.u32(Math.floor(value / 0x1_0000_0000));
}

function readNumber(reader: ByteReader): number {
  const low = reader.u32();
  const value = reader.u32() * 0x1_0000_0000 + low;
  if (!Number.isSafeInteger(value)) throw new Error(`${value} is over 2^53 - 1`);
  return value;
}
