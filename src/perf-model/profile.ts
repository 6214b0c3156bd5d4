import { DynamoError } from "../errors/index.ts";

/**
 * Measured points of an engine on its hardware, as a planner's profiling run writes them. Two forms, told apart by their
 * first character:
 *
 * JSON, with the field names of Dynamo's profile arrays:
 *
 *   { "prefill_isl": [512, 4096],                 tokens, ascending
 *     "prefill_ttft_ms": [30, 180],               one per isl
 *     "decode_active_kv_tokens": [1000, 100000],  ascending
 *     "decode_context_length": [500, 8000],       ascending
 *     "decode_itl": [[6, 7], [11, 14]] }          ms; a row per active_kv_tokens, a column per context_length
 *
 * CSV, one measured point a line, in any order; the decode points must make a full grid:
 *
 *   phase,isl,active_kv_tokens,context_length,ms
 *   prefill,512,,,30
 *   decode,,1000,500,6
 *
 * Bounds: 16 MiB of text, 4,096 points on an axis, values finite and not negative. Everything wrong throws
 * `invalid-config` naming the field or the line.
 */
export interface Profile {
  readonly prefill: { readonly inputTokens: Float64Array; readonly ttftMs: Float64Array };
  readonly decode: {
    readonly activeKvTokens: Float64Array;
    readonly contextTokens: Float64Array;
    /** Row major: activeKvTokens x contextTokens. */
    readonly itlMs: Float64Array;
  };
}

/** A grid of 4,096 x 4,096 would be 134 MB; real profiles have some ten points an axis. */
const MAX_AXIS_POINTS = 4_096;
const MAX_TEXT_CHARACTERS = 16 * 1024 * 1024;
const CSV_HEADER = "phase,isl,active_kv_tokens,context_length,ms";

export function parseProfile(text: string): Profile {
  if (text.length > MAX_TEXT_CHARACTERS) throw invalid(`expected at most ${MAX_TEXT_CHARACTERS} characters`);
  return text.trimStart().startsWith("{") ? parseJsonProfile(text) : parseCsvProfile(text);
}

function parseJsonProfile(text: string): Profile {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw invalid("not valid JSON", cause);
  }
  const fields = value as Record<string, unknown>;
  const inputTokens = ascendingOf(numbersOf(fields.prefill_isl, "prefill_isl"), "prefill_isl");
  const ttftMs = numbersOf(fields.prefill_ttft_ms, "prefill_ttft_ms");
  if (ttftMs.length !== inputTokens.length) {
    throw invalid(`prefill_ttft_ms: expected ${inputTokens.length} values, one per prefill_isl, got ${ttftMs.length}`);
  }
  const active = numbersOf(fields.decode_active_kv_tokens, "decode_active_kv_tokens");
  const context = numbersOf(fields.decode_context_length, "decode_context_length");
  const rows = fields.decode_itl;
  if (!Array.isArray(rows) || rows.length !== active.length) {
    throw invalid(`decode_itl: expected ${active.length} rows, one per decode_active_kv_tokens`);
  }
  const itlMs = new Float64Array(active.length * context.length);
  rows.forEach((row, index) => {
    const values = numbersOf(row, `decode_itl[${index}]`);
    if (values.length !== context.length) {
      throw invalid(`decode_itl[${index}]: expected ${context.length} values, got ${values.length}`);
    }
    itlMs.set(values, index * context.length);
  });
  return {
    prefill: { inputTokens, ttftMs },
    decode: {
      activeKvTokens: ascendingOf(active, "decode_active_kv_tokens"),
      contextTokens: ascendingOf(context, "decode_context_length"),
      itlMs,
    },
  };
}

function parseCsvProfile(text: string): Profile {
  const lines = text.split(/\r?\n/);
  if (lines[0]?.trim() !== CSV_HEADER) throw invalid(`line 1: expected ${CSV_HEADER}`);
  const prefill = new Map<number, number>();
  const decode = new Map<number, Map<number, number>>();
  for (let index = 1; index < lines.length; index++) {
    const line = lines[index]!.trim();
    if (line === "") continue;
    const at = `line ${index + 1}`;
    const cells = line.split(",");
    if (cells.length !== 5) throw invalid(`${at}: expected 5 cells, got ${cells.length}`);
    const [phase, isl, active, context, ms] = cells as [string, string, string, string, string];
    if (phase === "prefill") {
      putOnce(prefill, cellOf(isl, `${at}: isl`), cellOf(ms, `${at}: ms`), at);
    } else if (phase === "decode") {
      const kvTokens = cellOf(active, `${at}: active_kv_tokens`);
      let row = decode.get(kvTokens);
      if (row === undefined) decode.set(kvTokens, (row = new Map<number, number>()));
      putOnce(row, cellOf(context, `${at}: context_length`), cellOf(ms, `${at}: ms`), at);
    } else {
      throw invalid(`${at}: phase: expected prefill or decode, got ${JSON.stringify(phase.slice(0, 40))}`);
    }
  }
  const inputTokens = axisOf(prefill, "prefill points");
  return {
    prefill: { inputTokens, ttftMs: inputTokens.map((isl) => prefill.get(isl)!) },
    decode: gridOf(decode),
  };
}

function gridOf(points: ReadonlyMap<number, ReadonlyMap<number, number>>): Profile["decode"] {
  const activeKvTokens = axisOf(points, "decode points");
  const contextTokens = axisOf(points.get(activeKvTokens[0]!)!, "decode points");
  const itlMs = new Float64Array(activeKvTokens.length * contextTokens.length);
  activeKvTokens.forEach((active, row) => {
    const values = points.get(active)!;
    contextTokens.forEach((context, column) => {
      const ms = values.get(context);
      if (ms === undefined || values.size !== contextTokens.length) {
        throw invalid(`the decode points are no full grid: active_kv_tokens ${active} has other context lengths`);
      }
      itlMs[row * contextTokens.length + column] = ms;
    });
  });
  return { activeKvTokens, contextTokens, itlMs };
}

function axisOf(points: ReadonlyMap<number, unknown>, what: string): Float64Array {
  if (points.size === 0) throw invalid(`there are no ${what}`);
  if (points.size > MAX_AXIS_POINTS) throw invalid(`${what}: expected at most ${MAX_AXIS_POINTS} on an axis`);
  return Float64Array.from(points.keys()).sort();
}

function putOnce(points: Map<number, number>, key: number, value: number, at: string): void {
  if (points.has(key)) throw invalid(`${at}: this point was given before`);
  points.set(key, value);
}

function cellOf(cell: string, name: string): number {
  const value = cell.trim() === "" ? Number.NaN : Number(cell);
  if (!Number.isFinite(value) || value < 0) {
    throw invalid(`${name}: expected a number of at least 0, got ${JSON.stringify(cell.slice(0, 40))}`);
  }
  return value;
}

function numbersOf(value: unknown, name: string): Float64Array {
  if (!Array.isArray(value) || value.length === 0 || value.length > MAX_AXIS_POINTS) {
    throw invalid(`${name}: expected a list of 1 to ${MAX_AXIS_POINTS} numbers`);
  }
  if (!value.every((item) => typeof item === "number" && Number.isFinite(item) && item >= 0)) {
    throw invalid(`${name}: expected finite numbers of at least 0`);
  }
  return Float64Array.from(value as number[]);
}

function ascendingOf(values: Float64Array, name: string): Float64Array {
  for (let i = 1; i < values.length; i++) {
    if (values[i]! <= values[i - 1]!) throw invalid(`${name}: expected ascending values, got ${values[i]} at [${i}]`);
  }
  return values;
}

function invalid(problem: string, cause?: unknown): DynamoError {
  return new DynamoError("invalid-config", `performance profile: ${problem}`, cause === undefined ? {} : { cause });
}
