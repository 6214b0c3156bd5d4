export { ON_SCHEDULE, type Arrivals, type ReplayOptions } from "./replay-options.ts";
export { distributionOf, renderReports, type Balance, type Distribution, type ReplayReport, type WorkerShare } from "./replay-report.ts"; // prettier-ignore
export { parseTrace, readTrace, type TraceFormat, type TraceOptions } from "./read-trace.ts";
export { arrivalTimes, runReplay } from "./run-replay.ts";
export { syntheticTrace, type SyntheticOptions } from "./synthetic-trace.ts";
export * from "./trace.ts";
export { traceRequests, type TraceRequest } from "./trace-requests.ts";
