import { DynamoError } from "../errors/index.ts";
import type { HashPair } from "../tokens/index.ts";
import { MsgpackCursor } from "./msgpack-cursor.ts";

/**
 * KV events as vLLM and SGLang publish them (their `--kv-events-config`): three frames, topic, sequence number (u64
 * big-endian, -1 ends a replay), and a msgpack batch `[ts, events, rank]`. An event is a tagged array (vLLM up to 0.22,
 * SGLang) or a map with `type` (later); hashes are integers, signed or not, or raw digests; fields that a newer engine
 * added are left out. Nothing is interpreted here but the form: `vllm-event-mapper.ts` turns events into ours.
 */
export interface VllmStored {
  readonly type: "stored";
  /** The engine's hashes, lo and hi of the 64 bits by turns: of an integer, or the last ones of a raw digest. */
  readonly hashes: readonly number[];
  readonly parent: HashPair | undefined;
  /** length = blocks x block size, and one more when the engine hashes pairs. */
  readonly tokenIds: Uint32Array;
  /** Token ids came as pairs [t, next t], as with Eagle. */
  readonly isPaired: boolean;
  readonly blockSize: number;
  readonly loraName: string | undefined;
  readonly cacheSalt: string | undefined;
  /** What entered a block's hash besides its tokens, by block: texts, and the first element of tuples. */
  readonly extraKeys: readonly (readonly ExtraKey[] | undefined)[];
  readonly medium: string | undefined;
  readonly group: KvGroup;
}

export interface VllmRemoved {
  readonly type: "removed";
  readonly hashes: readonly number[];
  readonly medium: string | undefined;
  readonly group: KvGroup;
}

export type VllmEvent =
  | VllmStored
  | VllmRemoved
  | { readonly type: "cleared" }
  /** A tag we do not know. */
  | { readonly type: "unknown" };

export interface ExtraKey {
  readonly text: string;
  /** It was the first element of a tuple `(id, offset)`. */
  readonly isTuple: boolean;
}

/** Which of the KV-cache groups of a hybrid model, and where. */
export interface KvGroup {
  readonly index: number | undefined;
  /** `full_attention`, `sliding_window`, `mamba`, ... */
  readonly kind: string | undefined;
  /** `LOCAL` or `REMOTE`. */
  readonly locality: string | undefined;
}

export interface VllmBatch {
  readonly dpRank: number;
  readonly events: readonly VllmEvent[];
}

export interface VllmMessage extends VllmBatch {
  readonly topic: string;
  /** From 0; -1 is the end marker of a replay, which has no events. */
  readonly sequence: number;
}

const MAX_PAYLOAD_BYTES = 64 * 1024 * 1024;
const MAX_EVENTS = 65_536;
/** A million tokens in blocks of 16; blocks of one token make as many blocks as tokens. */
const MAX_TOKENS = 1 << 20;
const MAX_BLOCKS = MAX_TOKENS;
const MAX_TEXT_BYTES = 4_096;
/** SHA-512 is the longest digest that makes sense. */
const MAX_HASH_BYTES = 64;
const MAX_RANK = 65_535;
const NO_EXTRA_KEYS: VllmStored["extraKeys"] = Object.freeze([]);

/** Throws `malformed-frame`. */
export function decodeVllmMessage(frames: readonly Uint8Array[]): VllmMessage {
  const [topicFrame, sequenceFrame, payload] = frames;
  if (frames.length !== 3 || topicFrame === undefined || sequenceFrame?.length !== 8 || payload === undefined) {
    throw malformed(
      `expected topic, 8 bytes of sequence and payload, got frames of ${frames.map((frame) => frame.length).join(", ")} bytes`,
    );
  }
  const view = new DataView(sequenceFrame.buffer, sequenceFrame.byteOffset, 8);
  const sequence = view.getBigInt64(0);
  const topic = Buffer.from(topicFrame.subarray(0, MAX_TEXT_BYTES)).toString("utf8");
  if (sequence === -1n) return { topic, sequence: -1, dpRank: 0, events: [] };
  if (sequence < 0n || sequence > BigInt(Number.MAX_SAFE_INTEGER))
    throw malformed(`sequence ${sequence} is out of range`);
  return { topic, sequence: Number(sequence), ...decodeVllmBatch(payload) };
}

/** Throws `malformed-frame`. */
export function decodeVllmBatch(payload: Uint8Array): VllmBatch {
  try {
    if (payload.length > MAX_PAYLOAD_BYTES)
      throw new Error(`${payload.length} bytes are over the limit of ${MAX_PAYLOAD_BYTES}`);
    const cursor = new MsgpackCursor(payload);
    const batch = cursor.kind() === "map" ? batchFromMap(cursor) : batchFromArray(cursor);
    if (cursor.remaining !== 0) throw new Error(`${cursor.remaining} bytes follow the batch`);
    return batch;
  } catch (cause) {
    throw malformed(String(cause), cause);
  }
}

function malformed(diagnostic: string, cause?: unknown): DynamoError {
  return new DynamoError("malformed-frame", "engine KV events could not be decoded", { diagnostic, cause });
}

function batchFromArray(cursor: MsgpackCursor): VllmBatch {
  const length = cursor.array();
  if (length < 2) throw new Error(`a batch has a time and events, got ${length} elements`);
  cursor.skip();
  const events = readEvents(cursor);
  const dpRank = length > 2 ? readRank(cursor) : 0;
  for (let i = 3; i < length; i++) cursor.skip();
  return { dpRank, events };
}

function batchFromMap(cursor: MsgpackCursor): VllmBatch {
  let events: VllmEvent[] | undefined;
  let dpRank = 0;
  for (let left = cursor.map(); left > 0; left--) {
    const key = cursor.text(MAX_TEXT_BYTES);
    if (key === "events") events = readEvents(cursor);
    else if (key === "data_parallel_rank" || key === "attn_dp_rank") dpRank = readRank(cursor);
    else cursor.skip();
  }
  if (events === undefined) throw new Error("a batch without events");
  return { dpRank, events };
}

function readRank(cursor: MsgpackCursor): number {
  if (cursor.takeNil()) return 0;
  const rank = cursor.u32();
  if (rank > MAX_RANK) throw new Error(`rank ${rank} is over ${MAX_RANK}`);
  return rank;
}

function readEvents(cursor: MsgpackCursor): VllmEvent[] {
  const count = cursor.array();
  if (count > MAX_EVENTS) throw new Error(`${count} events are over the limit of ${MAX_EVENTS}`);
  const events: VllmEvent[] = [];
  for (let i = 0; i < count; i++) {
    const fields = cursor.kind() === "map" ? fieldsFromMap(cursor) : fieldsFromArray(cursor);
    events.push(toEvent(fields));
  }
  return events;
}

/** All that any event can say; what is absent has its default. */
interface Fields {
  tag: string;
  hashes: number[];
  parent: HashPair | undefined;
  tokenIds: Uint32Array;
  isPaired: boolean;
  blockSize: number;
  medium: string | undefined;
  loraName: string | undefined;
  cacheSalt: string | undefined;
  extraKeys: VllmStored["extraKeys"];
  groupIndex: number | undefined;
  kind: string | undefined;
  locality: string | undefined;
}

const NO_TOKENS = new Uint32Array(0);

function noFields(): Fields {
  return {
    tag: "",
    hashes: [],
    parent: undefined,
    tokenIds: NO_TOKENS,
    isPaired: false,
    blockSize: 0,
    medium: undefined,
    loraName: undefined,
    cacheSalt: undefined,
    extraKeys: NO_EXTRA_KEYS,
    groupIndex: undefined,
    kind: undefined,
    locality: undefined,
  };
}

function toEvent(fields: Fields): VllmEvent {
  const { hashes, medium } = fields;
  const group = { index: fields.groupIndex, kind: fields.kind, locality: fields.locality };
  if (fields.tag === "AllBlocksCleared") return { type: "cleared" };
  if (fields.tag === "BlockRemoved") return { type: "removed", hashes, medium, group };
  if (fields.tag !== "BlockStored") return { type: "unknown" };
  const { parent, tokenIds, isPaired, blockSize, loraName, cacheSalt, extraKeys } = fields;
  return {
    type: "stored",
    hashes,
    parent,
    tokenIds,
    isPaired,
    blockSize,
    loraName,
    cacheSalt,
    extraKeys,
    medium,
    group,
  };
}

function fieldsFromMap(cursor: MsgpackCursor): Fields {
  const fields = noFields();
  for (let left = cursor.map(); left > 0; left--) readField(cursor, cursor.word(MAX_TEXT_BYTES), fields);
  return fields;
}

const STORED_ORDER = [
  "block_hashes",
  "parent_block_hash",
  "token_ids",
  "block_size",
  "lora_id",
  "medium",
  "lora_name",
  "extra_keys",
];
const REMOVED_ORDER = ["block_hashes", "medium"];

function fieldsFromArray(cursor: MsgpackCursor): Fields {
  const fields = noFields();
  const length = cursor.array();
  if (length === 0) throw new Error("an event without a tag");
  fields.tag = cursor.word(MAX_TEXT_BYTES);
  const order = fields.tag === "BlockStored" ? STORED_ORDER : fields.tag === "BlockRemoved" ? REMOVED_ORDER : undefined;
  for (let i = 1; i < length; i++) {
    if (order === undefined) cursor.skip();
    else if (i <= order.length) readField(cursor, order[i - 1]!, fields);
    else readTail(cursor, fields);
  }
  return fields;
}

/** Past the fields that all versions have in one order, the type tells: group and window are numbers, the rest texts. */
function readTail(cursor: MsgpackCursor, fields: Fields): void {
  const kind = cursor.kind();
  if (kind === "integer" && fields.groupIndex === undefined) fields.groupIndex = cursor.integer();
  else if (kind === "text") {
    const text = cursor.text(MAX_TEXT_BYTES);
    if (text === "LOCAL" || text === "REMOTE") fields.locality = text;
    else fields.kind ??= text;
  } else cursor.skip();
}

function readField(cursor: MsgpackCursor, name: string, fields: Fields): void {
  switch (name) {
    case "type":
      fields.tag = cursor.word(MAX_TEXT_BYTES);
      return;
    case "block_hashes":
      fields.hashes = readHashes(cursor);
      return;
    case "parent_block_hash":
      fields.parent = cursor.takeNil() ? undefined : readHash(cursor);
      return;
    case "token_ids":
      readTokens(cursor, fields);
      return;
    case "block_size":
      fields.blockSize = cursor.takeNil() ? 0 : cursor.u32();
      return;
    case "medium":
      fields.medium = readText(cursor);
      return;
    case "lora_name":
      // SGLang had a map at this place for a while.
      if (cursor.kind() === "map") readMetadata(cursor, fields);
      else fields.loraName = readText(cursor);
      return;
    case "metadata":
      readMetadata(cursor, fields);
      return;
    case "cache_salt":
      fields.cacheSalt = readText(cursor);
      return;
    case "extra_keys":
      fields.extraKeys = readExtraKeys(cursor);
      return;
    case "group_idx":
      fields.groupIndex = cursor.takeNil() ? undefined : cursor.integer();
      return;
    case "kv_cache_spec_kind":
      fields.kind = readText(cursor);
      return;
    case "locality":
      fields.locality = readText(cursor);
      return;
    default:
      cursor.skip();
  }
}

function readMetadata(cursor: MsgpackCursor, fields: Fields): void {
  if (cursor.kind() !== "map") return cursor.skip();
  for (let left = cursor.map(); left > 0; left--) {
    if (cursor.text(MAX_TEXT_BYTES) === "cache_salt") fields.cacheSalt = readText(cursor);
    else cursor.skip();
  }
}

function readText(cursor: MsgpackCursor): string | undefined {
  if (cursor.takeNil()) return undefined;
  if (cursor.kind() === "text") return cursor.word(MAX_TEXT_BYTES);
  cursor.skip();
  return undefined;
}

function readHashes(cursor: MsgpackCursor): number[] {
  const count = cursor.array();
  if (count > MAX_BLOCKS) throw new Error(`${count} blocks are over the limit of ${MAX_BLOCKS}`);
  const hashes: number[] = [];
  for (let i = 0; i < count; i++) cursor.pushHash(hashes, MAX_HASH_BYTES);
  return hashes;
}

function readHash(cursor: MsgpackCursor): HashPair {
  const pair: number[] = [];
  cursor.pushHash(pair, MAX_HASH_BYTES);
  return [pair[0]!, pair[1]!];
}

function readTokens(cursor: MsgpackCursor, fields: Fields): void {
  if (cursor.takeNil()) return;
  const count = cursor.array();
  if (count > MAX_TOKENS) throw new Error(`${count} tokens are over the limit of ${MAX_TOKENS}`);
  if (count === 0) return;
  fields.isPaired = cursor.kind() === "array";
  const tokenIds = new Uint32Array(count + (fields.isPaired ? 1 : 0));
  if (!fields.isPaired) cursor.u32s(tokenIds, 0);
  for (let i = 0; fields.isPaired && i < count; i++) {
    if (cursor.array() !== 2) throw new Error("expected pairs of token ids");
    tokenIds[i] = cursor.u32();
    tokenIds[i + 1] = cursor.u32();
  }
  fields.tokenIds = tokenIds;
}

function readExtraKeys(cursor: MsgpackCursor): VllmStored["extraKeys"] {
  if (cursor.kind() !== "array") {
    cursor.skip();
    return NO_EXTRA_KEYS;
  }
  const blocks: (readonly ExtraKey[] | undefined)[] = [];
  let left = cursor.array();
  const count = left;
  while (left > 0 && cursor.takeNil()) left--;
  // The usual case: nothing but the tokens.
  if (left === 0) return NO_EXTRA_KEYS;
  for (let i = left; i < count; i++) blocks.push(undefined);
  for (; left > 0; left--) {
    if (cursor.kind() === "array") blocks.push(readBlockKeys(cursor));
    else {
      cursor.skip();
      blocks.push(undefined);
    }
  }
  return blocks;
}

function readBlockKeys(cursor: MsgpackCursor): ExtraKey[] {
  const keys: ExtraKey[] = [];
  for (let left = cursor.array(); left > 0; left--) {
    if (cursor.kind() === "text") keys.push({ text: cursor.text(MAX_TEXT_BYTES), isTuple: false });
    else if (cursor.kind() === "array") {
      for (let i = 0, length = cursor.array(); i < length; i++) {
        if (i === 0 && cursor.kind() === "text") keys.push({ text: cursor.text(MAX_TEXT_BYTES), isTuple: true });
        else cursor.skip();
      }
    } else cursor.skip();
  }
  return keys;
}
