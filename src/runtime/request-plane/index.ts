export * from "./base.ts";
export { DEFAULT_LIMITS, type RequestPlaneLimits } from "./limits.ts";
export {
  MemoryNetwork,
  MemoryRequestPlane,
  type MemoryNetworkOptions,
  type MemoryRequestPlaneOptions,
} from "./memory.ts";
export { FIRST_BACK_OFF_MS } from "./tcp-client.ts";
export { TcpRequestPlane, type TcpRequestPlaneOptions } from "./tcp.ts";
export type { PlaneListener, PlaneSocket, TcpNetwork } from "./tcp-network.ts";
export { ask } from "./ask.ts";
