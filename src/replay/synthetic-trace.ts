import { DynamoError } from "../errors/index.ts";
import { SeededRandom, type Random } from "../std/index.ts";
import { MAX_REQUEST_TOKENS, MAX_TRACE_SESSIONS, type Trace, type TraceSession } from "./trace.ts";

/** Sessions with shared prefixes and turns, drawn from one seed: the same options give the same trace. */
export interface SyntheticOptions {
  readonly sessions: number;
  /** Prompt tokens of a first turn. */
  readonly inputTokens: number;
  readonly outputTokens: number;
  /** Lengths are drawn evenly from mean x (1 - spread) to mean x (1 + spread). @default 0 */
  readonly lengthSpread?: number;
  /** Mean time between arrivals; they come at random (Poisson). 0 = all at once. */
  readonly intervalMs: number;
  /** @default 1 */
  readonly turns?: number;
  /** Prompt tokens a later turn adds. @default a tenth of inputTokens */
  readonly turnTokens?: number;
  /** Mean pause between an answer and the next turn; drawn like the arrivals. @default 0 */
  readonly turnDelayMs?: number;
  /** Share of a first prompt that all sessions of its group begin with. @default 0 */
  readonly sharedPrefixRatio?: number;
  /** @default 1 */
  readonly groups?: number;
  /** How much more popular a group is than the next: weight of group i = 1 / (i + 1)^skew. @default 0, all alike */
  readonly groupSkew?: number;
  /** @default 1 */
  readonly seed?: number;
}

/** Throws `invalid-config`. */
export function syntheticTrace(options: SyntheticOptions): Trace {
  const {
    sessions,
    inputTokens,
    outputTokens,
    intervalMs,
    lengthSpread = 0,
    turns = 1,
    turnTokens = Math.ceil(inputTokens / 10),
    turnDelayMs = 0,
    sharedPrefixRatio = 0,
    groups = 1,
    groupSkew = 0,
    seed = 1,
  } = options;
  check("sessions", sessions, 1, MAX_TRACE_SESSIONS);
  check("input tokens", inputTokens, 1, MAX_REQUEST_TOKENS);
  check("output tokens", outputTokens, 1, MAX_REQUEST_TOKENS);
  check("turns", turns, 1, 10_000);
  check("turn tokens", turnTokens, 1, MAX_REQUEST_TOKENS);
  check("groups", groups, 1, 1_000_000);
  for (const [name, value, max] of [
    ["length spread", lengthSpread, 1],
    ["shared prefix ratio", sharedPrefixRatio, 1],
    ["interval", intervalMs, 1e12],
    ["turn delay", turnDelayMs, 1e12],
    ["group skew", groupSkew, 100],
  ] as const) {
    // prettier-ignore
    if (!(value >= 0 && value <= max)) throw invalid(`${name}: expected 0 to ${max}, got ${value}`);
  }
  const random = new SeededRandom(seed);
  const length = (mean: number): number =>
    Math.max(1, Math.round(mean * (1 + lengthSpread * (2 * random.nextFloat() - 1))));
  const drawGroup = groupDraw(groups, groupSkew, random);
  // Of the mean, so that all of a group share the same tokens whatever their own lengths.
  const sharedTokens = Math.round(inputTokens * sharedPrefixRatio);
  let arrivalMs = 0;
  const list = Array.from({ length: sessions }, (): TraceSession => {
    const session: TraceSession = {
      arrivalMs,
      start: sharedTokens === 0 ? { kind: "unique" } : { kind: "group", group: drawGroup(), tokens: sharedTokens },
      turns: Array.from({ length: turns }, (_, turn) => ({
        newTokens: turn === 0 ? length(inputTokens) : length(turnTokens),
        outputTokens: length(outputTokens),
        delayMs: turn === 0 ? 0 : exponential(turnDelayMs, random),
      })),
    };
    arrivalMs += exponential(intervalMs, random);
    return session;
  });
  return { name: `synthetic-${sessions}`, sessions: list };
}

function exponential(mean: number, random: Random): number {
  return -mean * Math.log(1 - random.nextFloat());
}

function groupDraw(groups: number, skew: number, random: Random): () => number {
  const sums = new Float64Array(groups);
  let sum = 0;
  for (let i = 0; i < groups; i++) sums[i] = sum += 1 / (i + 1) ** skew;
  return () => {
    const at = random.nextFloat() * sum;
    let low = 0;
    let high = groups - 1;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (sums[middle]! > at) high = middle;
      else low = middle + 1;
    }
    return low;
  };
}

function check(name: string, value: number, min: number, max: number): void {
  if (!Number.isInteger(value) || value < min || value > max) {
    throw invalid(`${name}: expected a whole number from ${min} to ${max}, got ${value}`);
  }
}

function invalid(problem: string): DynamoError {
  return new DynamoError("invalid-config", `synthetic trace: ${problem}`);
}
