import { SeededRandom } from "../src/std/index.ts";
import { startProcessCluster, type ProcessCluster } from "../test/helpers/process-cluster.ts";
import { pullModel } from "../src/model/index.ts";
import { machineLine, table } from "./harness.ts";

/**
 * One prefill and one decode worker against two aggregated ones, SmolLM2 on the same cores (a compute thread per worker),
 * real processes, through HTTP: `always` splits every request, `auto` decides. Closed loops of clients; prompts that no
 * request before has sent, so that nothing comes from a cache. Rounds alternate between the setups and the median of
 * each figure is shown: on a shared machine trust the ratios.
 *
 * Usage: node benchmarks/disagg.ts [--seconds=12] [--rounds=2] [--only=short,mixed]
 */
const argument = (name: string, value: number): number =>
  Number(process.argv.find((each) => each.startsWith(`--${name}=`))?.split("=")[1] ?? value);
const SECONDS = argument("seconds", 12);
const ROUNDS = argument("rounds", 2);

const SETUPS = {
  "2 aggregated": ["--workers=2"],
  "1P+1D always": ["--prefill=1", "--decode=1", "--disagg=always"],
  "1P+1D auto": ["--prefill=1", "--decode=1", "--disagg=auto"],
} as const;
type Setup = keyof typeof SETUPS;

/** Words are about a token each. */
const LOADS = {
  short: { clients: 6, promptWords: [40], outputTokens: 48 },
  long: { clients: 6, promptWords: [900], outputTokens: 48 },
  /** Many that write, one that reads long texts in. */
  mixed: { clients: 6, promptWords: [40, 40, 40, 40, 40, 900], outputTokens: 64 },
} as const;
type Load = keyof typeof LOADS;
const ONLY = process.argv
  .find((each) => each.startsWith("--only="))
  ?.slice("--only=".length)
  .split(",");
const CHOSEN = (Object.keys(LOADS) as Load[]).filter((load) => ONLY?.includes(load) ?? true);

interface Figures {
  readonly ttftP50: number;
  readonly ttftP99: number;
  readonly itlP50: number;
  readonly itlP99: number;
  readonly tokensPerSecond: number;
}

const WORDS =
  "time way year work day world life hand part child eye place week case point company number group problem fact".split(
    " ",
  );
const random = new SeededRandom(Date.now() >>> 0);

function prompt(words: number): string {
  return Array.from({ length: words }, () => WORDS[random.nextU32() % WORDS.length]).join(" ");
}

async function stream(
  baseUrl: string,
  model: string,
  words: number,
  outputTokens: number,
  note: { ttft: number[]; gaps: number[] },
): Promise<void> {
  const startMs = performance.now();
  let lastMs = startMs;
  let count = 0;
  const response = await fetch(`${baseUrl}/v1/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      model,
      prompt: prompt(words),
      max_tokens: outputTokens,
      ignore_eos: true,
      stream: true,
      temperature: 0,
    }),
  });
  if (!response.ok) throw new Error(await response.text());
  let rest = "";
  for await (const chunk of response.body!) {
    rest += Buffer.from(chunk).toString();
    const events = rest.split("\n\n");
    rest = events.pop()!;
    for (const event of events) {
      if (!event.includes('"text":')) continue;
      const nowMs = performance.now();
      if (count === 0) note.ttft.push(nowMs - startMs);
      else note.gaps.push(nowMs - lastMs);
      lastMs = nowMs;
      count++;
    }
  }
}

async function measure(cluster: ProcessCluster, load: Load, seconds: number): Promise<Figures> {
  const { data } = (await (await fetch(`${cluster.baseUrl}/v1/models`)).json()) as { data: { id: string }[] };
  const model = data[0]!.id;
  const { clients, promptWords, outputTokens } = LOADS[load];
  const note = { ttft: [] as number[], gaps: [] as number[] };
  const untilMs = performance.now() + seconds * 1_000;
  const startMs = performance.now();
  let tokens = 0;
  await Promise.all(
    Array.from({ length: clients }, async (_, client) => {
      const words = promptWords[client % promptWords.length]!;
      while (performance.now() < untilMs) {
        await stream(cluster.baseUrl, model, words, outputTokens, note);
        tokens += outputTokens;
      }
    }),
  );
  const elapsed = (performance.now() - startMs) / 1_000;
  return {
    ttftP50: percentile(note.ttft, 0.5),
    ttftP99: percentile(note.ttft, 0.99),
    itlP50: percentile(note.gaps, 0.5),
    itlP99: percentile(note.gaps, 0.99),
    tokensPerSecond: tokens / elapsed,
  };
}

function percentile(values: readonly number[], share: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? Number.NaN;
}

function median(values: readonly number[]): number {
  return percentile(values, 0.5);
}

async function round(modelPath: string, results: Map<string, Figures[]>): Promise<void> {
  for (const setup of Object.keys(SETUPS) as Setup[]) {
    const cluster = await startProcessCluster([`--model=${modelPath}`, "--threads=1", "--log=warn", ...SETUPS[setup]]);
    try {
      await new Promise((resolve) => setTimeout(resolve, 1_000));
      for (const load of CHOSEN) {
        // Long enough to learn what things cost here.
        await measure(cluster, load, Math.min(4, SECONDS / 2));
        const figures = await measure(cluster, load, SECONDS);
        const key = `${load}/${setup}`;
        console.log(
          key,
          JSON.stringify(figures, (_, value: unknown) => (typeof value === "number" ? Math.round(value) : value)),
        );
        results.set(key, [...(results.get(key) ?? []), figures]);
      }
      if (setup === "1P+1D auto") await tell(cluster);
    } finally {
      await cluster.stop();
    }
  }
}

async function tell(cluster: ProcessCluster): Promise<void> {
  const text = await (await fetch(`${cluster.baseUrl}/metrics`)).text();
  const lines = text.split("\n").filter((line) => /^dynamo_frontend_disagg_(choices|fallbacks)_total\{/.test(line));
  console.log(lines.join("\n"));
}

export async function run(): Promise<void> {
  console.log(machineLine());
  const { path } = await pullModel("SmolLM2-135M-Instruct", {});
  const results = new Map<string, Figures[]>();
  for (let i = 0; i < ROUNDS; i++) await round(path, results);
  const rows: Record<string, string | number>[] = [];
  for (const load of CHOSEN) {
    for (const setup of Object.keys(SETUPS) as Setup[]) {
      const all = results.get(`${load}/${setup}`)!;
      const of = (field: keyof Figures): number => median(all.map((figures) => figures[field]));
      rows.push({
        load,
        setup,
        "TTFT p50 ms": of("ttftP50"),
        "TTFT p99 ms": of("ttftP99"),
        "ITL p50 ms": of("itlP50"),
        "ITL p99 ms": of("itlP99"),
        "tokens/s": of("tokensPerSecond"),
      });
    }
  }
  console.log(table(rows));
}

if (import.meta.main) await run();
