export * from "./base.ts";
export {
  openEngineLink,
  type EngineLink,
  type EngineLinkHandler,
  type EngineLinkOptions,
  type ReplayHandler,
} from "./engine-link.ts";
export { MapDirectory } from "./map-directory.ts";
export {
  MemoryEventBus,
  MemoryEventPlane,
  type MemoryEventBusOptions,
  type MemoryEventPlaneOptions,
} from "./memory.ts";
export type { EventPlaneStatistics } from "./statistics.ts";
export { ZmqEventPlane, type ZmqEventPlaneOptions } from "./zmq.ts";
