export {
  formatDynAddress,
  formatEndpoint,
  isAddressName,
  parseDynAddress,
  type EndpointAddress,
} from "./endpoint-address.ts";
export {
  instanceKey,
  newInstanceId,
  parseInstance,
  registerInstance,
  watchInstances,
  type Instance,
  type InstanceChange,
  type InstanceScope,
} from "./instance.ts";
export { openLastingLease } from "./lasting-lease.ts";
export { cardKey, registerCard, watchCards, type CardChange } from "./model-card-record.ts";
export { PlaneHealth } from "./plane-health.ts";
export * from "./planes.ts";
export { discoveryPublisherDirectory } from "./publisher-directory.ts";
export type { InstanceRef } from "./record-key.ts";
export { RoleLifecycle, type RoleState } from "./role-lifecycle.ts";
