import type { Discovery, JsonValue, Lease, Watch } from "../discovery/index.ts";
import { randomHexId, type Random } from "../../std/index.ts";
import { checkName, type EndpointAddress } from "./endpoint-address.ts";
import { isInstanceId, parseRecordKey, recordKey, recordPrefix, type InstanceRef } from "./record-key.ts";

/** One process that serves an endpoint, and where to reach it. Stands in discovery as long as its lease lives. */
export interface Instance extends InstanceRef {
  /** On the request plane, e.g. `tcp://127.0.0.1:39123`. */
  readonly address: string;
  readonly pid: number;
  readonly host: string;
  /** Wall clock, for people. */
  readonly startedMs: number;
}

export type InstanceChange =
  | { readonly type: "put"; readonly instance: Instance }
  | {
      readonly type: "delete";
      readonly instanceId: string;
      readonly address: EndpointAddress;
      /** See `DiscoveryChange`. */
      readonly expired?: true;
    };

/** Which instances to follow. */
export interface InstanceScope {
  readonly namespace: string;
  readonly component?: string;
  readonly endpoint?: string;
}

const MAX_ADDRESS_LENGTH = 512;
const ADDRESS = /^[a-z][a-z0-9+.-]{0,31}:\/\/[\x21-\x7e]+$/;

/** A random 64-bit id as 16 hex digits. */
export function newInstanceId(random?: Random): string {
  return randomHexId(random);
}

/** `v1/instances/{namespace}/{component}/{endpoint}/{instanceId}` */
export function instanceKey(ref: InstanceRef): string {
  return recordKey("instances", ref);
}

/** Announces the instance; it is gone again with the lease. */
export function registerInstance(lease: Lease, instance: Instance): Promise<void> {
  const { namespace, component, endpoint, instanceId, address, pid, host, startedMs } = instance;
  return lease.put(instanceKey(instance), {
    namespace,
    component,
    endpoint,
    instanceId,
    address,
    pid,
    host,
    startedMs,
  });
}

/** An instance from what another process wrote; undefined when it is not one. Fields we do not know are dropped. */
export function parseInstance(value: JsonValue): Instance | undefined {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return undefined;
  const fields = value as { readonly [key: string]: JsonValue | undefined };
  const { namespace, component, endpoint, instanceId, address, pid, host, startedMs } = fields;
  if (typeof namespace !== "string" || typeof component !== "string" || typeof endpoint !== "string") return undefined;
  if (typeof instanceId !== "string" || !isInstanceId(instanceId)) return undefined;
  if (typeof address !== "string" || address.length > MAX_ADDRESS_LENGTH || !ADDRESS.test(address)) return undefined;
  if (typeof pid !== "number" || !Number.isSafeInteger(pid) || pid < 0) return undefined;
  if (typeof host !== "string" || host.length > 255) return undefined;
  if (typeof startedMs !== "number" || !Number.isFinite(startedMs)) return undefined;
  const instance = { namespace, component, endpoint, instanceId, address, pid, host, startedMs };
  // The names must be such that they can stand in a key.
  return parseRecordKey("instances", uncheckedKey(instance)) === undefined ? undefined : instance;
}

/**
 * Follows the instances of a scope: first those that are there (before it resolves), then each change. A record that is
 * damaged, or says something else than its key, is left out: as if it were not there.
 */
export async function watchInstances(
  discovery: Discovery,
  scope: InstanceScope,
  listener: (change: InstanceChange) => void,
): Promise<Watch> {
  checkName("namespace", scope.namespace);
  if (scope.component !== undefined) checkName("component", scope.component);
  const known = new Set<string>();
  return discovery.watch(recordPrefix("instances", scope), (change) => {
    const key = change.type === "put" ? change.entry.key : change.key;
    const ref = parseRecordKey("instances", key);
    if (ref === undefined || (scope.endpoint !== undefined && ref.endpoint !== scope.endpoint)) return;
    const instance = change.type === "put" ? parseInstance(change.entry.value) : undefined;
    if (instance !== undefined && uncheckedKey(instance) === key) {
      known.add(key);
      listener({ type: "put", instance });
    } else if (known.delete(key)) {
      const { namespace, component, endpoint, instanceId } = ref;
      const isExpired = change.type === "delete" && change.expired === true;
      listener({
        type: "delete",
        instanceId,
        address: { namespace, component, endpoint },
        ...(isExpired ? { expired: true } : {}),
      });
    }
  });
}

function uncheckedKey(ref: InstanceRef): string {
  return `v1/instances/${ref.namespace}/${ref.component}/${ref.endpoint}/${ref.instanceId}`;
}
