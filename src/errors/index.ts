export * from "./catalogue.ts";
export * from "./dynamo-error.ts";
