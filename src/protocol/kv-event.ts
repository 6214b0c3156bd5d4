import { DynamoError } from "../errors/index.ts";
import { ByteReader, ByteWriter } from "../std/index.ts";

/**
 * What an engine tells about its KV cache. Hashes are (lo, hi) u32 pairs in one Uint32Array: block i is at 2i and 2i+1.
 * `sequenceHashes` name a block with its whole prefix (the engine's id of it), `localHashes` its own tokens only; both
 * by the public recipe in tokens/. Blocks of one stored event form a chain in order.
 */
export type StorageTier = "device" | "host" | "disk" | "external";
const TIERS: readonly StorageTier[] = ["device", "host", "disk", "external"];

export interface KvStored {
  readonly type: "stored";
  readonly dpRank: number;
  readonly tier: StorageTier;
  /** Sequence hash of the block before the first, or undefined at the root: [lo, hi]. */
  readonly parentHash: readonly [number, number] | undefined;
  /** Index of the first block in its sequence. */
  readonly startBlock: number;
  readonly sequenceHashes: Uint32Array;
  readonly localHashes: Uint32Array;
}

export interface KvRemoved {
  readonly type: "removed";
  readonly dpRank: number;
  readonly tier: StorageTier;
  /** In any order. */
  readonly sequenceHashes: Uint32Array;
}

/** Everything of this data-parallel rank is gone. */
export interface KvCleared {
  readonly type: "cleared";
  readonly dpRank: number;
}

export type KvEvent = KvStored | KvRemoved | KvCleared;

const STORED = 1;
const REMOVED = 2;
const CLEARED = 3;
/** 65,536 blocks of 16 tokens are a million tokens of context. */
const MAX_BLOCKS_PER_EVENT = 65_536;
const MAX_EVENTS_PER_BATCH = 4_096;
const writer = new ByteWriter(16 * 1024);

/** Encodes a batch into a shared slab: valid until the next call. */
export function encodeKvEvents(events: readonly KvEvent[]): Buffer {
  writer.reset();
  writer.u32(events.length);
  for (const event of events) {
    if (event.type === "stored") {
      writer.u8(STORED);
      writer.u32(event.dpRank);
      writer.u8(TIERS.indexOf(event.tier));
      writer.u8(event.parentHash === undefined ? 0 : 1);
      writer.u32(event.parentHash?.[0] ?? 0);
      writer.u32(event.parentHash?.[1] ?? 0);
      writer.u32(event.startBlock);
      writer.u32(event.sequenceHashes.length / 2);
      writer.u32s(event.sequenceHashes);
      writer.u32s(event.localHashes);
    } else if (event.type === "removed") {
      writer.u8(REMOVED);
      writer.u32(event.dpRank);
      writer.u8(TIERS.indexOf(event.tier));
      writer.u32(event.sequenceHashes.length / 2);
      writer.u32s(event.sequenceHashes);
    } else {
      writer.u8(CLEARED);
      writer.u32(event.dpRank);
    }
  }
  return writer.view();
}

/** Throws `malformed-frame` on anything but a whole, well-formed batch within the limits above. */
export function decodeKvEvents(bytes: Uint8Array): KvEvent[] {
  try {
    const reader = new ByteReader(bytes);
    const count = reader.u32();
    if (count > MAX_EVENTS_PER_BATCH) throw new Error(`${count} events are over the limit of ${MAX_EVENTS_PER_BATCH}`);
    const events: KvEvent[] = [];
    for (let i = 0; i < count; i++) events.push(decodeKvEvent(reader));
    if (reader.remaining !== 0) throw new Error(`${reader.remaining} bytes follow the last event`);
    return events;
  } catch (cause) {
    throw new DynamoError("malformed-frame", "KV events could not be decoded", { diagnostic: String(cause), cause });
  }
}

function decodeKvEvent(reader: ByteReader): KvEvent {
  const type = reader.u8();
  const dpRank = reader.u32();
  if (type === CLEARED) return { type: "cleared", dpRank };
  if (type !== STORED && type !== REMOVED) throw new Error(`unknown event type ${type}`);
  const tier = TIERS[reader.u8()];
  if (tier === undefined) throw new Error("unknown storage tier");
  if (type === REMOVED) return { type: "removed", dpRank, tier, sequenceHashes: reader.u32s(2 * blockCount(reader)) };
  const hasParent = reader.u8() === 1;
  const lo = reader.u32();
  const hi = reader.u32();
  const startBlock = reader.u32();
  const blocks = blockCount(reader);
  return {
    type: "stored",
    dpRank,
    tier,
    parentHash: hasParent ? [lo, hi] : undefined,
    startBlock,
    sequenceHashes: reader.u32s(2 * blocks),
    localHashes: reader.u32s(2 * blocks),
  };
}

function blockCount(reader: ByteReader): number {
  const count = reader.u32();
  if (count > MAX_BLOCKS_PER_EVENT) throw new Error(`${count} blocks are over the limit of ${MAX_BLOCKS_PER_EVENT}`);
  return count;
}
