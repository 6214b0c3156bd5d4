import type { HfStep } from "../../model/index.ts";
import { LETTER, NEWLINE, NUMBER, OTHER, SPACE, SURROGATE, UNIT_CLASS, pairClass } from "./character-class.ts";

/**
 * Cutting text into the pieces that merges never cross. The patterns of the big model families are scanners over code
 * units, 5 to 20 times as fast as the regular expression; any other pattern runs as a regular expression, as far as
 * JavaScript's and Oniguruma's agree on it. The scanners follow their pattern alternative by alternative;
 * `pre-tokenizer.test.ts` compares them with the pattern itself.
 */

/** Where the piece that begins at `start` ends; `start < result <= end`. The units are well-formed UTF-16. */
export type PieceScanner = (units: Uint16Array, start: number, end: number) => number;

export interface PreTokenizer {
  /** Every \p{N} is a piece of its own, before anything else. */
  readonly digitsApart: boolean;
  /** undefined: use `patterns`, in order, each on what the one before left. */
  readonly scan: PieceScanner | undefined;
  readonly patterns: readonly RegExp[];
  /** Pieces end wherever `text-cut.ts` would cut. */
  readonly cutsSafely: boolean;
}

const GPT2_PATTERN = String.raw`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`;
const contractions = [
  String.raw`(?i:'s|'t|'re|'ve|'m|'ll|'d)`,
  String.raw`(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])`,
];
const tail = String.raw`| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`;

/** Pattern as written in model files -> scanner. Two spellings of the contractions are in use; they mean the same. */
const SCANNERS = new Map<string, PieceScanner>([[GPT2_PATTERN, scanGpt2]]);
for (const contraction of contractions) {
  const head = contraction + String.raw`|[^\r\n\p{L}\p{N}]?\p{L}+`;
  SCANNERS.set(head + String.raw`|\p{N}` + tail, scanQwen2);
  SCANNERS.set(head + String.raw`|\p{N}{1,3}` + tail, scanLlama3);
}

/**
 * undefined when the steps are not of the byte-level kind or use what we do not have; the caller then takes the library.
 */
export function createPreTokenizer(step: HfStep | null): PreTokenizer | undefined {
  const steps = flatten(step);
  const last = steps.pop();
  if (last?.type !== "ByteLevel" || last.add_prefix_space === true) return undefined;
  let digitsApart = false;
  const sources: string[] = [];
  for (const { type, ...settings } of steps) {
    const source = type === "Split" ? splitSource(settings) : undefined;
    if ((type === "Digits" && settings.individual_digits === true) || source === String.raw`\p{N}`) {
      if (sources.length === 0) digitsApart = true;
      else sources.push(String.raw`\p{N}`);
    } else if (type === "Digits") sources.push(String.raw`\p{N}+`);
    else if (source !== undefined) sources.push(source);
    else return undefined;
  }
  if (last.use_regex !== false) sources.push(GPT2_PATTERN);
  if (sources.length === 0) return { digitsApart, scan: scanAll, patterns: [], cutsSafely: false };
  const scan = sources.length === 1 ? SCANNERS.get(sources[0] as string) : undefined;
  if (scan !== undefined) return { digitsApart, scan, patterns: [], cutsSafely: true };
  const patterns = sources.map(toJavaScriptPattern);
  if (!patterns.every((pattern) => pattern !== undefined)) return undefined;
  return { digitsApart, scan: undefined, patterns, cutsSafely: false };
}

/** The lengths of the pieces of `text`, in order; the slow way, for patterns without a scanner. */
export function* pieceLengths(text: string, patterns: readonly RegExp[], first = 0): Generator<number> {
  const pattern = patterns[first];
  if (pattern === undefined) {
    if (text.length > 0) yield text.length;
    return;
  }
  let done = 0;
  for (const match of text.matchAll(pattern)) {
    if (match[0].length === 0) continue;
    if (match.index > done) yield* pieceLengths(text.slice(done, match.index), patterns, first + 1);
    yield* pieceLengths(match[0], patterns, first + 1);
    done = match.index + match[0].length;
  }
  if (done < text.length) yield* pieceLengths(text.slice(done), patterns, first + 1);
}

/** The end of the next segment: one number character, or everything up to the next one. */
export function scanDigitSegment(units: Uint16Array, start: number, end: number): number {
  const first = characterEnd(units, start, NUMBER);
  if (first !== start) return first;
  let index = start;
  while (index < end) {
    const kind = UNIT_CLASS[units[index] as number] as number;
    if (kind === NUMBER || (kind === SURROGATE && pairClass(units, index) === NUMBER)) break;
    index += kind === SURROGATE ? 2 : 1;
  }
  return index;
}

function flatten(step: HfStep | null): HfStep[] {
  if (step === null) return [];
  if (step.type !== "Sequence" || !Array.isArray(step.pretokenizers)) return [step];
  return (step.pretokenizers as HfStep[]).flatMap(flatten);
}

/** The pattern of a `Split` that keeps matches and gaps as pieces; undefined for other behaviours. */
function splitSource(settings: Readonly<Record<string, unknown>>): string | undefined {
  if (settings.behavior !== "Isolated" || settings.invert === true) return undefined;
  const pattern = settings.pattern as { Regex?: unknown; String?: unknown } | undefined;
  if (typeof pattern?.Regex === "string") return pattern.Regex;
  if (typeof pattern?.String === "string") return pattern.String.replace(/[\\^$.*+?()[\]{}|/]/g, String.raw`\$&`);
  return undefined;
}

/**
 * An Oniguruma pattern as a JavaScript one: only `\s` and `\S` differ among what real patterns use. What else differs is
 * refused here (`. ^ $ \w \d \b`, class intersections) or by the compiler (possessive quantifiers, `\h`, POSIX classes).
 */
function toJavaScriptPattern(source: string): RegExp | undefined {
  const outsideClasses = source.replace(/\\.|\[(?:\\.|[^\]\\])*\]/gs, (part) => (part.startsWith("[") ? "" : part));
  if (/[.^$]/.test(outsideClasses.replace(/\\./gs, "")) || /\\[wWdDbBhH]/.test(source) || source.includes("&&")) {
    return undefined;
  }
  const unicodeSpace = source.replace(/\\(.)/gs, (escape, letter: string) =>
    letter === "s" ? String.raw`\p{White_Space}` : letter === "S" ? String.raw`\P{White_Space}` : escape,
  );
  try {
    return new RegExp(unicodeSpace, "gu");
  } catch {
    return undefined;
  }
}

function scanAll(_units: Uint16Array, _start: number, end: number): number {
  return end;
}

function scanQwen2(units: Uint16Array, start: number, end: number): number {
  return scanModern(units, start, end, 1);
}

function scanLlama3(units: Uint16Array, start: number, end: number): number {
  return scanModern(units, start, end, 3);
}

/** `contraction | [^\r\n L N]? L+ | N{1,max} | " "? other+ [\r\n]* | \s*[\r\n]+ | \s+(?!\S) | \s+` */
function scanModern(units: Uint16Array, start: number, end: number, numbersMax: number): number {
  const unit = units[start] as number;
  let kind = UNIT_CLASS[unit] as number;
  let next = start + 1;
  if (kind === SURROGATE) {
    kind = pairClass(units, start);
    next++;
  }
  if (kind === LETTER) return runEnd(units, next, end, LETTER);
  if (unit === APOSTROPHE) {
    const contractionEnd = scanContraction(units, start, end, 0x20);
    if (contractionEnd !== start) return contractionEnd;
  }
  if (kind === NUMBER) {
    let count = 1;
    while (count < numbersMax && next < end) {
      const after = characterEnd(units, next, NUMBER);
      if (after === next) break;
      next = after;
      count++;
    }
    return next;
  }
  if (kind !== NEWLINE && next < end) {
    const letters = runEnd(units, next, end, LETTER);
    if (letters !== next) return letters;
  }
  if (kind === OTHER || unit === BLANK) {
    const others = runEnd(units, next, end, OTHER);
    if (kind === OTHER || others !== next) return runEnd(units, others, end, NEWLINE);
  }
  // White space: up to the last line break of the run if it has one.
  let lastNewline = kind === NEWLINE ? start : -1;
  let index = start + 1;
  for (; index < end; index++) {
    const spaceKind = UNIT_CLASS[units[index] as number] as number;
    if (spaceKind === NEWLINE) lastNewline = index;
    else if (spaceKind !== SPACE) break;
  }
  if (lastNewline >= 0) return lastNewline + 1;
  return index === end || index === start + 1 ? index : index - 1;
}

/** `'s|'t|'re|'ve|'m|'ll|'d | " "? L+ | " "? N+ | " "? other+ | \s+(?!\S) | \s+` */
function scanGpt2(units: Uint16Array, start: number, end: number): number {
  const unit = units[start] as number;
  if (unit === APOSTROPHE) {
    const contractionEnd = scanContraction(units, start, end, 0);
    if (contractionEnd !== start) return contractionEnd;
  }
  const first = unit === BLANK && start + 1 < end ? start + 1 : start;
  let kind = UNIT_CLASS[units[first] as number] as number;
  if (kind === SURROGATE) kind = pairClass(units, first);
  if (kind === LETTER || kind === NUMBER || kind === OTHER) return runEnd(units, first, end, kind);
  let index = start + 1;
  while (index < end) {
    const spaceKind = UNIT_CLASS[units[index] as number] as number;
    if (spaceKind !== SPACE && spaceKind !== NEWLINE) break;
    index++;
  }
  return index === end || index === start + 1 ? index : index - 1;
}

const APOSTROPHE = 0x27;
const BLANK = 0x20;

/** `fold` = 0x20 ignores the case of ASCII letters, 0 does not. Returns `start` when there is none. */
function scanContraction(units: Uint16Array, start: number, end: number, fold: number): number {
  if (start + 1 >= end) return start;
  const first = (units[start + 1] as number) | fold;
  if (first === 0x73 || first === 0x74 || first === 0x6d || first === 0x64) return start + 2;
  if (start + 2 >= end) return start;
  const second = (units[start + 2] as number) | fold;
  const pair = (first === 0x72 || first === 0x76) && second === 0x65;
  return pair || (first === 0x6c && second === 0x6c) ? start + 3 : start;
}

function runEnd(units: Uint16Array, start: number, end: number, kind: number): number {
  let index = start;
  while (index < end) {
    const unitKind = UNIT_CLASS[units[index] as number] as number;
    if (unitKind === kind) index++;
    else if (unitKind === SURROGATE && pairClass(units, index) === kind) index += 2;
    else break;
  }
  return index;
}

/** The end of the character at `index` if it is of that kind, else `index`. */
function characterEnd(units: Uint16Array, index: number, kind: number): number {
  const unitKind = UNIT_CLASS[units[index] as number] as number;
  if (unitKind === kind) return index + 1;
  return unitKind === SURROGATE && pairClass(units, index) === kind ? index + 2 : index;
}
