export * from "./interpolation.ts";
export * from "./polynomial-timing.ts";
export * from "./profile.ts";
export * from "./profile-timing.ts";
export * from "./speedup.ts";
export * from "./timing.ts";
export { SharedLinks, type SharedLink } from "./shared-links.ts";
