export * from "./block-hash.ts";
export * from "./hash-pair.ts";
export { xxh3_64, type HashPair } from "./xxh3.ts";
