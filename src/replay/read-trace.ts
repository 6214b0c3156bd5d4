import { readFile, stat } from "node:fs/promises";
import { basename } from "node:path";
import { DynamoError } from "../errors/index.ts";
import { parseAzureTrace } from "./azure-trace.ts";
import { parseMooncakeTrace } from "./mooncake-trace.ts";
import { MAX_TRACE_CHARACTERS, MAX_TRACE_SESSIONS, invalidTrace, type Trace } from "./trace.ts";

/** Reads a trace file; unless told its format, `{` as its first character means Mooncake rows. Throws `invalid-config`. */
export async function readTrace(path: string, options: TraceOptions = {}): Promise<Trace> {
  const name = basename(path);
  try {
    const { size } = await stat(path);
    if (size > MAX_TRACE_CHARACTERS) {
      throw new DynamoError(
        "invalid-config",
        `trace ${name}: expected at most ${MAX_TRACE_CHARACTERS} bytes, got ${size}`,
      );
    }
    return parseTrace(await readFile(path, "utf8"), { name, ...options });
  } catch (cause) {
    if (cause instanceof DynamoError) throw cause;
    throw new DynamoError("invalid-config", `the trace ${path} cannot be read`, { diagnostic: String(cause), cause });
  }
}

export type TraceFormat = "mooncake" | "azure";

export interface TraceOptions {
  /** For messages and the report. @default "trace" */
  readonly name?: string;
  /** @default as the first line looks */
  readonly format?: TraceFormat;
  /** Only the first rows. @default all */
  readonly maxRows?: number;
  /** Tokens that a hash id of a Mooncake row stands for. @default 512 */
  readonly traceBlockSizeTokens?: number;
}

export function parseTrace(text: string, options: TraceOptions = {}): Trace {
  const { name = "trace", maxRows = MAX_TRACE_SESSIONS, traceBlockSizeTokens = 512 } = options;
  const lines = linesOf(text);
  const first = lines.next();
  if (first.done === true) throw invalidTrace(name, 1, "the file is empty");
  const limits = { name, maxRows: Math.min(maxRows, MAX_TRACE_SESSIONS) };
  const { format = first.value.text.trimStart().startsWith("{") ? "mooncake" : "azure" } = options;
  return format === "mooncake"
    ? parseMooncakeTrace([first.value, ...lines], { ...limits, blockSizeTokens: traceBlockSizeTokens })
    : parseAzureTrace([first.value, ...lines], limits);
}

export interface TraceLine {
  readonly text: string;
  /** From 1. */
  readonly number: number;
}

/** Lines that are not empty. */
function* linesOf(text: string): Generator<TraceLine, void> {
  let number = 0;
  let start = 0;
  while (start < text.length) {
    let end = text.indexOf("\n", start);
    if (end < 0) end = text.length;
    number++;
    const line = text.slice(start, text[end - 1] === "\r" ? end - 1 : end);
    start = end + 1;
    if (line.trim() !== "") yield { text: line, number };
  }
}
