/**
 * What a replay found. Plain data, the same for the same trace, options and seed; the time it took this machine is not in
 * it. `renderReports` puts several side by side.
 */
export interface Distribution {
  readonly mean: number;
  readonly p50: number;
  readonly p90: number;
  readonly p99: number;
  readonly max: number;
}

export interface ReplayReport {
  readonly policy: string;
  readonly workers: number;
  readonly requests: number;
  readonly finished: number;
  /** By reason. */
  readonly refused: Readonly<Record<string, number>>;
  /** From the first arrival's origin to the last token, simulated. */
  readonly simulatedMs: number;
  readonly promptTokens: number;
  readonly outputTokens: number;
  /** Prompt tokens that came from an engine's cache. */
  readonly cachedTokens: number;
  /** cachedTokens / promptTokens, of requests that got a token. */
  readonly hitRate: number;
  /**
   * Share of the requests for which the router expected what the engine then reused, block for block. undefined for
   * policies that do not look at overlap.
   */
  readonly overlapAgreement: number | undefined;
  /** KV events that the index could not apply; 0 unless something is wrong. */
  readonly eventsNotApplied: number;
  /** Arrival to first token, router's and engine's queues included. */
  readonly ttftMs: Distribution;
  /** Between two tokens of a request. */
  readonly itlMs: Distribution;
  /** Arrival to last token. */
  readonly e2eMs: Distribution;
  /** In the engine's queue. */
  readonly engineQueueMs: Distribution;
  /** In the router's queue. */
  readonly routerQueueMs: Distribution;
  readonly requestsPerSecond: number;
  readonly outputTokensPerSecond: number;
  readonly preemptions: number;
  readonly balance: Balance;
  readonly perWorker: readonly WorkerShare[];
}

/** 1 = all workers alike; the busiest over the mean. */
export interface Balance {
  readonly requests: number;
  /** Prompt tokens that had to be computed. */
  readonly computedTokens: number;
  readonly busyMs: number;
}

export interface WorkerShare {
  readonly instanceId: string;
  readonly requests: number;
  readonly computedTokens: number;
  /** Share of the simulated time. */
  readonly busy: number;
  readonly preemptions: number;
}

export function distributionOf(values: ArrayLike<number>): Distribution {
  const sorted = Float64Array.from(values).sort();
  if (sorted.length === 0) return { mean: 0, p50: 0, p90: 0, p99: 0, max: 0 };
  const at = (share: number): number =>
    sorted[Math.min(sorted.length - 1, Math.max(0, Math.ceil(share * sorted.length) - 1))]!;
  let sum = 0;
  for (const value of sorted) sum += value;
  return { mean: sum / sorted.length, p50: at(0.5), p90: at(0.9), p99: at(0.99), max: sorted.at(-1)! };
}

type Row = readonly [label: string, value: (report: ReplayReport) => string];

const ROWS: readonly Row[] = [
  ["requests finished", (r) => `${r.finished} of ${r.requests}`],
  ["refused", (r) => Object.entries(r.refused).map(([reason, count]) => `${count} ${reason}`).join(", ") || "0"], // prettier-ignore
  ["simulated time", (r) => duration(r.simulatedMs)],
  ["prompt tokens from cache", (r) => percent(r.hitRate)],
  ["router's guess was right", (r) => (r.overlapAgreement === undefined ? "-" : percent(r.overlapAgreement))],
  ["TTFT mean", (r) => duration(r.ttftMs.mean)],
  ["TTFT p50", (r) => duration(r.ttftMs.p50)],
  ["TTFT p90", (r) => duration(r.ttftMs.p90)],
  ["TTFT p99", (r) => duration(r.ttftMs.p99)],
  ["ITL mean", (r) => duration(r.itlMs.mean)],
  ["ITL p50", (r) => duration(r.itlMs.p50)],
  ["ITL p99", (r) => duration(r.itlMs.p99)],
  ["request mean", (r) => duration(r.e2eMs.mean)],
  ["request p99", (r) => duration(r.e2eMs.p99)],
  ["engine queue mean", (r) => duration(r.engineQueueMs.mean)],
  ["router queue mean", (r) => duration(r.routerQueueMs.mean)],
  ["requests per second", (r) => r.requestsPerSecond.toFixed(2)],
  ["output tokens per second", (r) => r.outputTokensPerSecond.toFixed(0)],
  ["preemptions", (r) => String(r.preemptions)],
  ["busiest / mean: requests", (r) => r.balance.requests.toFixed(2)],
  ["busiest / mean: prefill", (r) => r.balance.computedTokens.toFixed(2)],
  ["busiest / mean: busy time", (r) => r.balance.busyMs.toFixed(2)],
  ["busy share", (r) => percent(mean(r.perWorker.map(({ busy }) => busy)))],
];

/** A table with a column per report. */
export function renderReports(reports: readonly ReplayReport[]): string {
  const table = [["", ...reports.map(({ policy }) => policy)]];
  for (const [label, value] of ROWS) table.push([label, ...reports.map(value)]);
  const widths = table[0]!.map((_, column) => Math.max(...table.map((row) => row[column]!.length)));
  const lines = table.map((row) =>
    row.map((cell, column) => (column === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[column]!))).join("  "),
  );
  return `${lines.map((line) => line.trimEnd()).join("\n")}\n`;
}

function duration(ms: number): string {
  if (ms < 100) return `${ms.toFixed(1)} ms`;
  if (ms < 1_000) return `${ms.toFixed(0)} ms`;
  return ms < 600_000 ? `${(ms / 1_000).toFixed(2)} s` : `${(ms / 60_000).toFixed(1)} min`;
}

function percent(share: number): string {
  return `${(100 * share).toFixed(1)} %`;
}

function mean(values: readonly number[]): number {
  return values.length === 0 ? 0 : values.reduce((sum, value) => sum + value, 0) / values.length;
}
