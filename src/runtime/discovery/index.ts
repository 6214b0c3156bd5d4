export * from "./base.ts";
export { FileDiscovery, type FileDiscoveryOptions } from "./file.ts";
export { MemoryDiscovery, MemoryStore, type MemoryDiscoveryOptions } from "./memory.ts";
export { DEFAULT_TTL_MS } from "./store-key.ts";
