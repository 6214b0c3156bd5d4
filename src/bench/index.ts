export { LatencyHistogram, type Percentiles } from "./latency-histogram.ts";
export { generateLoad, type LoadErrorKind, type LoadOptions, type LoadReport } from "./load-generator.ts";
