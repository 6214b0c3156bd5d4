import { DynamoError } from "../errors/index.ts";
import { ByteReader, ByteWriter } from "../std/index.ts";

/**
 * What routers of one cluster tell each other of the requests they have on the workers (replica sync). One message is of
 * one model and one router; the router is the publisher's id on the event plane. `snapshot` begins anew: what the router
 * told before of this model no longer counts. `please` asks a router, or all, for such a snapshot: at start, after a loss.
 */
export type ActiveSequenceEvent =
  | {
      readonly type: "add";
      readonly requestId: string;
      /** 16 hex digits. */
      readonly instanceId: string;
      readonly dpRank: number;
      /** (lo, hi) pairs of the prompt's blocks; undefined when they are not shared. */
      readonly sequenceHashes: Uint32Array | undefined;
      readonly blockCount: number;
      readonly prefillTokens: number;
      readonly expectedOutputTokens: number;
      /** While session affinity is on: the session that this worker has from the end of the prefill on. */
      readonly sessionId?: string;
    }
  | { readonly type: "prefill-completed"; readonly requestId: string }
  | { readonly type: "free"; readonly requestId: string };

export type ActiveSequenceMessage =
  | { readonly type: "events" | "snapshot"; readonly model: string; readonly events: readonly ActiveSequenceEvent[] }
  /** `routerId` empty: all. */
  | { readonly type: "please"; readonly routerId: string };

export const ACTIVE_SEQUENCES_TOPIC = "active_sequences_events";
/** Dynamo's number. */
export const ACTIVE_SEQUENCES_MAX_EVENTS = 256;
/** A sender ends a message at this size: a prompt of a million tokens is half of it. */
export const ACTIVE_SEQUENCES_CUT_BYTES = 1024 * 1024;

const VERSION = 2;
const MESSAGES = ["events", "snapshot", "please"] as const;
const EVENTS = ["add", "prefill-completed", "free"] as const;
const MAX_MODEL_BYTES = 1_024;
const MAX_REQUEST_ID_BYTES = 512;
const MAX_SESSION_ID_BYTES = 512;
/** As in a KV event: a million tokens in blocks of 16. */
const MAX_BLOCKS = 65_536;
const INSTANCE_ID = /^[0-9a-f]{16}$/;
const ROUTER_ID = /^(?:[0-9a-f]{16})?$/;
const writer = new ByteWriter(16 * 1024);

/** Not less than the bytes that the event takes in a message. */
export function activeSequenceBytes(event: ActiveSequenceEvent): number {
  const hashes = event.type === "add" ? (event.sequenceHashes?.length ?? 0) : 0;
  const session = event.type === "add" ? (event.sessionId?.length ?? 0) : 0;
  return 68 + 4 * hashes + 3 * (event.requestId.length + session);
}

/** Encodes into a shared slab: valid until the next call. */
export function encodeActiveSequences(message: ActiveSequenceMessage): Buffer {
  writer.reset();
  writer.u8(VERSION);
  writer.u8(MESSAGES.indexOf(message.type));
  if (message.type === "please") {
    writer.text(message.routerId);
    return writer.view();
  }
  writer.text(message.model);
  writer.u32(message.events.length);
  for (const event of message.events) {
    writer.u8(EVENTS.indexOf(event.type));
    writer.text(event.requestId);
    if (event.type !== "add") continue;
    writer.text(event.instanceId);
    writer.u32(event.dpRank);
    writer.u32(event.blockCount);
    writer.u32(event.prefillTokens);
    writer.u32(event.expectedOutputTokens);
    writer.text(event.sessionId ?? "");
    writer.u8(event.sequenceHashes === undefined ? 0 : 1);
    if (event.sequenceHashes === undefined) continue;
    writer.u32(event.sequenceHashes.length / 2);
    writer.u32s(event.sequenceHashes);
  }
  return writer.view();
}

/** Throws `malformed-frame` on anything but a whole, well-formed message within the limits above. */
export function decodeActiveSequences(bytes: Uint8Array): ActiveSequenceMessage {
  try {
    const reader = new ByteReader(bytes);
    const version = reader.u8();
    if (version !== VERSION) throw new Error(`expected version ${VERSION}, got ${version}`);
    const type = MESSAGES[reader.u8()];
    if (type === undefined) throw new Error("unknown message type");
    const message = type === "please" ? { type, routerId: routerIdOf(reader) } : { type, ...eventsOf(reader) };
    if (reader.remaining !== 0) throw new Error(`${reader.remaining} bytes follow the message`);
    return message;
  } catch (cause) {
    const options = { diagnostic: String(cause), cause };
    throw new DynamoError("malformed-frame", "active sequences of another router could not be decoded", options);
  }
}

function routerIdOf(reader: ByteReader): string {
  const routerId = reader.text(16);
  if (!ROUTER_ID.test(routerId)) throw new Error("a router id has 16 hex digits");
  return routerId;
}

function eventsOf(reader: ByteReader): { model: string; events: ActiveSequenceEvent[] } {
  const model = reader.text(MAX_MODEL_BYTES);
  const count = reader.u32();
  if (count > ACTIVE_SEQUENCES_MAX_EVENTS) {
    throw new Error(`${count} events are over the limit of ${ACTIVE_SEQUENCES_MAX_EVENTS}`);
  }
  const events: ActiveSequenceEvent[] = [];
  for (let i = 0; i < count; i++) events.push(eventOf(reader));
  return { model, events };
}

function eventOf(reader: ByteReader): ActiveSequenceEvent {
  const type = EVENTS[reader.u8()];
  if (type === undefined) throw new Error("unknown event type");
  const requestId = reader.text(MAX_REQUEST_ID_BYTES);
  if (type !== "add") return { type, requestId };
  const instanceId = reader.text(16);
  if (!INSTANCE_ID.test(instanceId)) throw new Error("an instance id has 16 hex digits");
  const dpRank = reader.u32();
  const blockCount = reader.u32();
  const prefillTokens = reader.u32();
  const expectedOutputTokens = reader.u32();
  const sessionId = reader.text(MAX_SESSION_ID_BYTES);
  const hashed = reader.u8() === 1 ? reader.u32() : undefined;
  if (blockCount > MAX_BLOCKS || (hashed ?? 0) > MAX_BLOCKS)
    throw new Error(`blocks are over the limit of ${MAX_BLOCKS}`);
  if (hashed !== undefined && hashed < blockCount) throw new Error(`${hashed} hashes for ${blockCount} blocks`);
  const sequenceHashes = hashed === undefined ? undefined : reader.u32s(2 * hashed);
  return {
    type,
    requestId,
    instanceId,
    dpRank,
    sequenceHashes,
    blockCount,
    prefillTokens,
    expectedOutputTokens,
    ...(sessionId === "" ? {} : { sessionId }),
  };
}
