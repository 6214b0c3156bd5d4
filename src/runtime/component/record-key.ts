import { checkEndpointAddress, isAddressName, type EndpointAddress } from "./endpoint-address.ts";

/**
 * The keys under which instances and model cards stand in discovery: `v1/{kind}/{namespace}/{component}/{endpoint}/{instanceId}`.
 * `v1` is the version of all records below it: processes of another version do not see each other.
 */
export type RecordKind = "instances" | "mdc";

/** An endpoint of one instance. */
export interface InstanceRef extends EndpointAddress {
  /** 16 hex digits. */
  readonly instanceId: string;
}

const INSTANCE_ID = /^[0-9a-f]{16}$/;

export function isInstanceId(id: string): boolean {
  return INSTANCE_ID.test(id);
}

export function recordPrefix(
  kind: RecordKind,
  scope: { readonly namespace: string; readonly component?: string },
): string {
  const component = scope.component === undefined ? "" : `${scope.component}/`;
  return `v1/${kind}/${scope.namespace}/${component}`;
}

export function recordKey(kind: RecordKind, ref: InstanceRef): string {
  checkEndpointAddress(ref);
  return `v1/${kind}/${ref.namespace}/${ref.component}/${ref.endpoint}/${ref.instanceId}`;
}

/** Who a key is about; undefined when it is not one of ours (a newer peer, a stray tool). */
export function parseRecordKey(kind: RecordKind, key: string): InstanceRef | undefined {
  const [version, keyKind, namespace, component, endpoint, instanceId, ...rest] = key.split("/");
  if (version !== "v1" || keyKind !== kind || rest.length > 0) return undefined;
  if (namespace === undefined || component === undefined || endpoint === undefined || instanceId === undefined) {
    return undefined;
  }
  if (!isAddressName(namespace) || !isAddressName(component) || !isAddressName(endpoint)) return undefined;
  return isInstanceId(instanceId) ? { namespace, component, endpoint, instanceId } : undefined;
}
