/**
 * The Prometheus text format as engines write it, read into samples. Only what is asked for is kept: a scrape of a vLLM
 * server has a thousand lines, and four of them say what a router needs. Lines that are no samples are skipped.
 */
export interface PrometheusSample {
  readonly name: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}

const LINE = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)",?\s*/g;

export function parsePrometheus(text: string, wanted: ReadonlySet<string>): PrometheusSample[] {
  const samples: PrometheusSample[] = [];
  for (const line of text.split("\n")) {
    if (line === "" || line.startsWith("#")) continue;
    const nameEnd = line.search(/[{\s]/);
    if (nameEnd === -1 || !wanted.has(line.slice(0, nameEnd))) continue;
    const match = LINE.exec(line.trimEnd());
    const value = match === null ? NaN : valueOf(match[3]!);
    if (match === null || Number.isNaN(value)) continue;
    samples.push({ name: match[1]!, labels: labelsOf(match[2] ?? ""), value });
  }
  return samples;
}

/** Sum over all label sets: one per data-parallel rank, usually. */
export function sumOf(samples: readonly PrometheusSample[], name: string): number | undefined {
  let sum: number | undefined;
  for (const sample of samples) if (sample.name === name) sum = (sum ?? 0) + sample.value;
  return sum;
}

function valueOf(text: string): number {
  if (text === "+Inf") return Infinity;
  if (text === "-Inf") return -Infinity;
  return Number(text);
}

function labelsOf(text: string): Record<string, string> {
  const labels: Record<string, string> = {};
  for (const [, name, value] of text.matchAll(LABEL)) {
    labels[name!] = value!.replace(/\\(.)/g, (_, escaped: string) => (escaped === "n" ? "\n" : escaped));
  }
  return labels;
}

/** Only these families, with their help and type lines, for passing an engine's metrics on: process and Python ones are not ours to show. */
export function familiesWithPrefix(text: string, prefix: string): string {
  const kept = text.split("\n").filter((line) => {
    const name = line.startsWith("# ") ? line.split(" ", 3)[2] : line;
    return name?.startsWith(prefix) === true;
  });
  return kept.length === 0 ? "" : `${kept.join("\n")}\n`;
}
