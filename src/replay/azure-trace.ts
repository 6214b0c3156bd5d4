import type { TraceLine } from "./read-trace.ts";
import { MAX_REQUEST_TOKENS, invalidTrace, type Trace, type TraceSession } from "./trace.ts";

/**
 * Azure's LLM inference traces (Splitwise, ISCA 2024, Patel et al.), CSV:
 *
 *   TIMESTAMP,ContextTokens,GeneratedTokens
 *   2023-11-16 18:17:03.9799600,4808,10
 *
 * Times have a resolution of 100 ns and no zone; the first row is the start. The rows say nothing of shared prefixes: each
 * prompt is on its own.
 */
const HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens";
const TIMESTAMP = /^(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d)(\.\d{1,9})?$/;

export interface AzureOptions {
  readonly name: string;
  readonly maxRows: number;
}

export function parseAzureTrace(lines: Iterable<TraceLine>, { name, maxRows }: AzureOptions): Trace {
  const sessions: TraceSession[] = [];
  let startMs: number | undefined;
  let hasHeader = false;
  for (const { text, number } of lines) {
    if (!hasHeader) {
      if (text.trim() !== HEADER) throw invalidTrace(name, number, `expected a Mooncake row or the header ${HEADER}`);
      hasHeader = true;
      continue;
    }
    if (sessions.length >= maxRows) break;
    const cells = text.split(",");
    if (cells.length !== 3) throw invalidTrace(name, number, `expected 3 cells, got ${cells.length}`);
    const [timestamp, context, generated] = cells as [string, string, string];
    const timeMs = parseTimestamp(timestamp);
    if (timeMs === undefined) {
      throw invalidTrace(name, number, `TIMESTAMP: expected YYYY-MM-DD HH:MM:SS.fffffff, got ${JSON.stringify(timestamp.slice(0, 40))}`); // prettier-ignore
    }
    startMs ??= timeMs;
    if (timeMs < startMs) throw invalidTrace(name, number, "TIMESTAMP: before that of the first row");
    const tokens = (cell: string, column: string, min: number): number => {
      if (!/^\d{1,8}$/.test(cell) || Number(cell) < min || Number(cell) > MAX_REQUEST_TOKENS) {
        throw invalidTrace(name, number, `${column}: expected a whole number from ${min} to ${MAX_REQUEST_TOKENS}, got ${JSON.stringify(cell.slice(0, 40))}`); // prettier-ignore
      }
      return Number(cell);
    };
    const newTokens = tokens(context, "ContextTokens", 1);
    const outputTokens = Math.max(1, tokens(generated, "GeneratedTokens", 0));
    sessions.push({
      arrivalMs: timeMs - startMs,
      start: { kind: "unique" },
      turns: [{ newTokens, outputTokens, delayMs: 0 }],
    });
  }
  return { name, sessions };
}

function parseTimestamp(text: string): number | undefined {
  const match = TIMESTAMP.exec(text);
  if (match === null) return undefined;
  const wholeMs = Date.parse(`${match[1]}T${match[2]}Z`);
  if (Number.isNaN(wholeMs)) return undefined;
  return wholeMs + Number(match[3] ?? 0) * 1_000;
}
