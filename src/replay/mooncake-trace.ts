import type { TraceLine } from "./read-trace.ts";
import { MAX_REQUEST_TOKENS, invalidTrace, type Trace, type TraceSession } from "./trace.ts";

/**
 * Mooncake rows, one JSON object a line (FAST'25, Qin et al.):
 *
 *   {"timestamp": 3052, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, ... one per 512 tokens]}
 *
 * Times are ms from the start of the trace. There are ceil(input_length / 512) ids, so the last one may stand for fewer
 * tokens; an id always follows the same ids, so that it names its content with everything before it. Other fields are
 * passed over: the format is not ours.
 */
export interface MooncakeOptions {
  readonly name: string;
  readonly maxRows: number;
  readonly blockSizeTokens: number;
}

export function parseMooncakeTrace(lines: Iterable<TraceLine>, options: MooncakeOptions): Trace {
  const sessions: TraceSession[] = [];
  for (const line of lines) {
    if (sessions.length >= options.maxRows) break;
    sessions.push(parseRow(line, options));
  }
  return { name: options.name, sessions };
}

function parseRow({ text, number }: TraceLine, { name, blockSizeTokens }: MooncakeOptions): TraceSession {
  let row: Record<string, unknown>;
  try {
    row = JSON.parse(text) as Record<string, unknown>;
  } catch {
    throw invalidTrace(name, number, "not a JSON object");
  }
  const field = (key: string, min: number, max: number): number => {
    const value = row[key];
    if (typeof value !== "number" || !Number.isFinite(value) || value < min || value > max) {
      throw invalidTrace(name, number, `${key}: expected a number from ${min} to ${max}, got ${shown(value)}`);
    }
    return value;
  };
  const arrivalMs = field("timestamp", 0, Number.MAX_SAFE_INTEGER);
  const inputTokens = Math.floor(field("input_length", 1, MAX_REQUEST_TOKENS));
  // A row without output still cost its prefill; an engine answers with one token at least.
  const outputTokens = Math.max(1, Math.floor(field("output_length", 0, MAX_REQUEST_TOKENS)));
  const ids = row.hash_ids;
  const expected = Math.ceil(inputTokens / blockSizeTokens);
  if (!Array.isArray(ids) || ids.length !== expected) {
    const got = Array.isArray(ids) ? `${ids.length}` : shown(ids);
    throw invalidTrace(
      name,
      number,
      `hash_ids: expected ${expected} ids, one per ${blockSizeTokens} tokens, got ${got}`,
    );
  }
  for (const id of ids as unknown[]) {
    if (typeof id !== "number" || !Number.isInteger(id) || id < 0 || id > 0xffff_ffff) {
      throw invalidTrace(name, number, `hash_ids: expected whole numbers from 0 to 2^32-1, got ${shown(id)}`);
    }
  }
  return {
    arrivalMs,
    start: { kind: "blocks", hashIds: Uint32Array.from(ids as number[]), blockSizeTokens },
    turns: [{ newTokens: inputTokens, outputTokens, delayMs: 0 }],
  };
}

function shown(value: unknown): string {
  return (JSON.stringify(value) ?? "nothing").slice(0, 40);
}
