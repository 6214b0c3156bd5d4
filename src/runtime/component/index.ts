export * from "./planes.ts";
