export { LatencyHistogram, type Percentiles } from "./latency-histogram.ts";
export { generateLoad, type LoadErrorKind, type LoadOptions, type LoadReport } from "./load-generator.ts";
export { generateSessionLoad, type LoadSession, type SessionLoadOptions, type SessionLoadReport, type SessionRequest } from "./session-load.ts"; // prettier-ignore
