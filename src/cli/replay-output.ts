import { summarizeTrace, type Trace } from "../replay/index.ts";

/** What both kinds of replay have to say, and where. */
export interface ReplayOutput {
  readonly out: (text: string) => void;
  readonly err: (text: string) => void;
  readonly signal: AbortSignal;
}

/** `conversation_trace.jsonl: 200 requests over 3.2 min`. */
export function describeTrace(trace: Trace): string {
  const { requests, spanMs } = summarizeTrace(trace);
  const span = spanMs < 120_000 ? `${(spanMs / 1_000).toFixed(1)} s` : `${(spanMs / 60_000).toFixed(1)} min`;
  return `${trace.name}: ${requests} requests over ${span}`;
}
