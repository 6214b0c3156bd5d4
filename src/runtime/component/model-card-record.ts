import type { Discovery, JsonValue, Lease, Watch } from "../discovery/index.ts";
import { checkName, type EndpointAddress } from "./endpoint-address.ts";
import { parseRecordKey, recordKey, recordPrefix, type InstanceRef } from "./record-key.ts";

/**
 * Model cards in discovery: what an instance serves, as JSON that this folder carries and does not read. Whoever knows
 * models validates it.
 */
export type CardChange =
  | { readonly type: "put"; readonly instanceId: string; readonly endpoint: EndpointAddress; readonly card: JsonValue }
  | {
      readonly type: "delete";
      readonly instanceId: string;
      readonly endpoint: EndpointAddress;
      /** See `DiscoveryChange`. */
      readonly expired?: true;
    };

/** `v1/mdc/{namespace}/{component}/{endpoint}/{instanceId}` */
export function cardKey(ref: InstanceRef): string {
  return recordKey("mdc", ref);
}

/** Announces what the instance serves; gone again with the lease. */
export function registerCard(lease: Lease, ref: InstanceRef, card: JsonValue): Promise<void> {
  return lease.put(cardKey(ref), card);
}

/** Follows all cards of a namespace: first those that are there (before it resolves), then each change. */
export async function watchCards(
  discovery: Discovery,
  scope: { readonly namespace: string },
  listener: (change: CardChange) => void,
): Promise<Watch> {
  checkName("namespace", scope.namespace);
  return discovery.watch(recordPrefix("mdc", scope), (change) => {
    const ref = parseRecordKey("mdc", change.type === "put" ? change.entry.key : change.key);
    if (ref === undefined) return;
    const { instanceId, namespace, component, endpoint: name } = ref;
    const endpoint = { namespace, component, endpoint: name };
    if (change.type === "put") listener({ type: "put", instanceId, endpoint, card: change.entry.value });
    else listener({ type: "delete", instanceId, endpoint, ...(change.expired === true ? { expired: true } : {}) });
  });
}
