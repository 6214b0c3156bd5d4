import { DynamoError } from "../../errors/index.ts";
import type { Discovery, JsonValue, Lease } from "../discovery/index.ts";
import type { PublisherDirectory, PublisherRecord } from "../event-plane/index.ts";
import { checkName } from "./endpoint-address.ts";
import { isInstanceId } from "./record-key.ts";

const TOPIC = /^[A-Za-z0-9._-]{1,128}$/;
const MAX_ADDRESS_LENGTH = 512;

/**
 * Where event publishers announce themselves, on top of discovery: `v1/events/{namespace}/{topic}/{publisherId}`. A
 * publisher is gone with its lease; `lease` gives the one to announce under, opened when first asked for.
 */
export function discoveryPublisherDirectory(
  discovery: Discovery,
  lease: () => Promise<Lease>,
  namespace: string,
): PublisherDirectory {
  checkName("namespace", namespace);
  const prefix = (topic: string): string => {
    if (TOPIC.test(topic)) return `v1/events/${namespace}/${topic}/`;
    throw new DynamoError(
      "invalid-config",
      `topic: expected 1 to 128 of [A-Za-z0-9._-], got ${JSON.stringify(topic.slice(0, 200))}`,
    );
  };
  return {
    async announce(topic, record) {
      const key = prefix(topic) + record.publisherId;
      const holder = await lease();
      const { publisherId, address, replayAddress } = record;
      await holder.put(key, { publisherId, address, replayAddress });
      return { withdraw: () => holder.delete(key) };
    },

    async watch(topic, listener) {
      const start = prefix(topic);
      const known = new Set<string>();
      return discovery.watch(start, (change) => {
        const key = change.type === "put" ? change.entry.key : change.key;
        const publisherId = key.slice(start.length);
        const record = change.type === "put" ? parseRecord(publisherId, change.entry.value) : undefined;
        if (record !== undefined) {
          known.add(publisherId);
          listener({ type: "put", record });
        } else if (known.delete(publisherId)) {
          listener({ type: "delete", publisherId });
        }
      });
    },
  };
}

/** A record that another process wrote; undefined when it is damaged or names another publisher than its key. */
function parseRecord(publisherId: string, value: JsonValue): PublisherRecord | undefined {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return undefined;
  const { publisherId: id, address, replayAddress } = value as { readonly [key: string]: JsonValue | undefined };
  if (id !== publisherId || !isInstanceId(publisherId)) return undefined;
  if (typeof address !== "string" || address === "" || address.length > MAX_ADDRESS_LENGTH) return undefined;
  if (typeof replayAddress !== "string" || replayAddress.length > MAX_ADDRESS_LENGTH) return undefined;
  return { publisherId, address, replayAddress };
}
