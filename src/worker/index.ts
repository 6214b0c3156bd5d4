export * from "./config.ts";
export { loadServedTokenizer, type ServedTokenizer } from "./served-tokenizer.ts";
export * from "./worker.ts";
