export * from "./split-advisor.ts";
