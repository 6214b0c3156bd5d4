export { ON_SCHEDULE, type Arrivals, type ReplayOptions } from "./replay-options.ts";
export { distributionOf, renderReports, type Balance, type Distribution, type ReplayReport, type WorkerShare } from "./replay-report.ts"; // prettier-ignore
export { parseTrace, readTrace, type TraceOptions } from "./read-trace.ts";
export { runReplay } from "./run-replay.ts";
export { syntheticTrace, type SyntheticOptions } from "./synthetic-trace.ts";
export * from "./trace.ts";
export { VirtualClock } from "./virtual-clock.ts";
