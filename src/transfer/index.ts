export * from "./base.ts";
export type { TcpOptions } from "./tcp/tcp-backend.ts";
export type { AgentContext, Peer } from "./backend.ts";
export { TransferAgent, type TransferAgentOptions } from "./agent.ts";
export { DescriptorList } from "./descriptor-list.ts";
export { MemoryNetwork, type MemoryCrossing, type MemoryLink } from "./memory-backend.ts";
export { PreparedTable } from "./prepared-table.ts";
