import { DynamoError } from "../../errors/index.ts";
import { randomHexId, type Random } from "../../std/index.ts";
import type { PublisherRecord } from "./base.ts";

/**
 * What an event, a topic and a publisher may look like, and how much either back end keeps. Callers' mistakes are
 * `internal` errors (a defect of ours); what comes from other processes is tested with the `is...` functions and dropped.
 */

/** One event. Large enough for the KV events of a 128 k prompt, small enough that one frame never stalls a link. */
export const MAX_PAYLOAD_BYTES = 8 * 1024 * 1024;
/** Events of one subscription (memory) or of one link (zmq) that wait for their reader; Dynamo's number. */
export const DEFAULT_QUEUE_EVENTS = 100_000;
/** Events a publisher keeps for replay. */
export const DEFAULT_RING_EVENTS = 1024;
/** Bytes a publisher keeps for replay, whatever `ringSize` says; the newest event is always kept. */
export const RING_BYTES = 64 * 1024 * 1024;
/** Events and bytes of one publisher that a subscriber holds back while it waits for a replay. */
export const HELD_EVENTS = 8192;
export const HELD_BYTES = 32 * 1024 * 1024;
/** Events and bytes of one replay answer; the subscriber asks for the rest. */
export const REPLAY_EVENTS = 256;
export const REPLAY_BYTES = 4 * 1024 * 1024;
/** A replay that is not answered by then is given up, and the gap reported. */
export const REPLAY_DEADLINE_MS = 2_000;
/**
 * How long after its last event a publisher repeats its newest sequence number, so that a subscriber that lost the very
 * last event learns of it without another one. Nothing is sent when nothing was published.
 */
export const BEACON_DELAYS_MS = [250, 1_000, 4_000] as const;

const TOPIC = /^[A-Za-z0-9._-]{1,128}$/;
const PUBLISHER_ID = /^[0-9a-f]{16}$/;
const ADDRESS = /^tcp:\/\/(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Za-z:.%]{2,60}\]):(\d{1,5})$/;

export function checkTopic(topic: string): void {
  if (!TOPIC.test(topic)) {
    throw new DynamoError("internal", "expected a topic of 1 to 128 characters of [A-Za-z0-9._-]", {
      diagnostic: `got ${JSON.stringify(topic)}`,
    });
  }
}

export function checkPayload(payload: Uint8Array): void {
  if (payload.length > MAX_PAYLOAD_BYTES) {
    throw new DynamoError("internal", `expected an event of at most ${MAX_PAYLOAD_BYTES} bytes, got ${payload.length}`);
  }
}

/** The given id, checked, or a new random one. */
export function publisherIdOf(given: string | undefined, random?: Random): string {
  if (given === undefined) return randomHexId(random);
  if (!PUBLISHER_ID.test(given)) {
    throw new DynamoError("internal", "expected a publisher id of 16 lower-case hex digits", {
      diagnostic: `got ${JSON.stringify(given)}`,
    });
  }
  return given;
}

/** Records come from other processes through discovery. */
export function isPublisherRecord(record: PublisherRecord): boolean {
  return PUBLISHER_ID.test(record.publisherId) && isAddress(record.address) && isAddress(record.replayAddress);
}

function isAddress(address: string): boolean {
  const port = Number(ADDRESS.exec(address)?.[1] ?? 0);
  return port >= 1 && port <= 65_535;
}

export function planeClosed(): DynamoError {
  return new DynamoError("event-plane-unavailable", "the event plane is closed");
}
