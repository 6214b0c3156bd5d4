export * from "./byte-reader.ts";
export * from "./byte-writer.ts";
export * from "./clock.ts";
export * from "./random.ts";
export * from "./timer-wheel.ts";
export * from "./wasm-assembler.ts";
export * from "./version.ts";
export * from "./hash-index.ts";
