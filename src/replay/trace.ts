import { DynamoError } from "../errors/index.ts";

/**
 * What is replayed: sessions that arrive at a time and run their turns one after the other. A row of a public trace is a
 * session of one turn. Texts are not in traces; what a trace knows is which prompts begin alike, and `PromptSource` makes
 * tokens that do.
 */
export interface TraceSession {
  readonly arrivalMs: number;
  readonly start: PromptStart;
  readonly turns: readonly TraceTurn[];
}

/** How the first prompt of a session begins; what comes after it is in no other prompt. */
export type PromptStart =
  /** Each id stands for `blockSizeTokens` tokens of content, the last one for what is left. */
  | { readonly kind: "blocks"; readonly hashIds: Uint32Array; readonly blockSizeTokens: number }
  /** The first `tokens` tokens are those of the group. */
  | { readonly kind: "group"; readonly group: number; readonly tokens: number }
  | { readonly kind: "unique" };

export interface TraceTurn {
  /** Prompt tokens that are new with this turn: its prompt is all of the turn before, its answer, and these. */
  readonly newTokens: number;
  readonly outputTokens: number;
  /** After the end of the turn before; for the first turn after the session's arrival. */
  readonly delayMs: number;
}

export interface Trace {
  readonly name: string;
  readonly sessions: readonly TraceSession[];
}

/** A day of a large cluster; each session costs some 200 bytes. */
export const MAX_TRACE_SESSIONS = 4_000_000;
/** Text of a trace file, characters. */
export const MAX_TRACE_CHARACTERS = 512 * 1024 * 1024;
/** Longer than any model's context. */
export const MAX_REQUEST_TOKENS = 16_777_216;

export interface TraceSummary {
  readonly sessions: number;
  readonly requests: number;
  readonly spanMs: number;
  readonly newTokens: number;
  readonly outputTokens: number;
  /** Share of the prompts' trace blocks that an endless cache would have; undefined when rows do not name their blocks. */
  readonly endlessCacheHitRate: number | undefined;
}

export function summarizeTrace({ sessions }: Trace): TraceSummary {
  const seen = new Set<number>();
  let blocks = 0;
  let hits = 0;
  let requests = 0;
  let spanMs = 0;
  let newTokens = 0;
  let outputTokens = 0;
  for (const { start, turns, arrivalMs } of sessions) {
    spanMs = Math.max(spanMs, arrivalMs);
    requests += turns.length;
    for (const turn of turns) {
      newTokens += turn.newTokens;
      outputTokens += turn.outputTokens;
    }
    if (start.kind !== "blocks") continue;
    blocks += start.hashIds.length;
    for (const id of start.hashIds) {
      if (seen.has(id)) hits++;
      else seen.add(id);
    }
  }
  const endlessCacheHitRate = blocks === 0 ? undefined : hits / blocks;
  return { sessions: sessions.length, requests, spanMs, newTokens, outputTokens, endlessCacheHitRate };
}

/** For a trace that breaks its format: names the file, the line and the field. */
export function invalidTrace(name: string, line: number, problem: string): DynamoError {
  return new DynamoError("invalid-config", `trace ${name}, line ${line}: ${problem}`);
}
