export * from "./byte-range.ts";
export * from "./endpoints.ts";
export * from "./engine-output.ts";
export * from "./kv-event.ts";
export * from "./kv-recovery.ts";
export * from "./load.ts";
export * from "./model-card.ts";
export * from "./request.ts";
