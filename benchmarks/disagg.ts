import { SeededRandom } from "../src/std/index.ts";
import { startProcessCluster, type ProcessCluster } from "../test/helpers/process-cluster.ts";
import { pullModel } from "../src/model/index.ts";
import { until } from "../test/helpers/in-process-cluster.ts";
import { machineLine, table } from "./harness.ts";

/**
 * One prefill and one decode worker against two aggregated ones, SmolLM2 on the same cores (a compute thread per worker),
 * real processes, through HTTP: `always` splits every request, `auto` decides. Closed loops of clients; prompts that no
 * request before has sent, so that nothing comes from a cache. The three clusters stand side by side, one of them loaded
 * at a time, in alternating order; windows are cut off at their end, requests under way are cancelled. Shown is the mean
 * over the rounds, for TTFT and ITL over all samples: on a shared machine trust the ratios.
 *
 * Usage: node benchmarks/disagg.ts [--rounds=2] [--scale=1] [--only=short,mixed]
 */
const argument = (name: string, value: number): number =>
  Number(process.argv.find((each) => each.startsWith(`--${name}=`))?.split("=")[1] ?? value);
const ROUNDS = argument("rounds", 2);
/** Of all times. */
const SCALE = argument("scale", 1);

const SETUPS = {
  "2 aggregated": ["--workers=2"],
  "1P+1D always": ["--prefill=1", "--decode=1", "--disagg=always"],
  "1P+1D auto": ["--prefill=1", "--decode=1", "--disagg=auto"],
} as const;
type Setup = keyof typeof SETUPS;
const ALL_SETUPS = Object.keys(SETUPS) as Setup[];

/** Words are about a token each; seconds before and inside the window. */
const LOADS = {
  short: { clients: 6, promptWords: [40], outputTokens: 48, seconds: [2, 6] },
  long: { clients: 4, promptWords: [600], outputTokens: 32, seconds: [3, 11] },
  /** Many that write, one that reads long texts in. */
  mixed: { clients: 6, promptWords: [40, 40, 40, 40, 40, 600], outputTokens: 48, seconds: [3, 11] },
} as const;
type Load = keyof typeof LOADS;
const ONLY = process.argv
  .find((each) => each.startsWith("--only="))
  ?.slice("--only=".length)
  .split(",");
const CHOSEN = (Object.keys(LOADS) as Load[]).filter((load) => ONLY?.includes(load) ?? true);

/** Of the windows of one load and setup. */
class Samples {
  readonly ttftMs: number[] = [];
  readonly gapsMs: number[] = [];
  tokens = 0;
  seconds = 0;

  get tokensPerSecond(): number {
    return this.tokens / this.seconds;
  }
}

const WORDS =
  "time way year work day world life hand part child eye place week case point company number group problem fact".split(
    " ",
  );
const random = new SeededRandom(Date.now() >>> 0);

function prompt(words: number): string {
  return Array.from({ length: words }, () => WORDS[random.nextU32() % WORDS.length]).join(" ");
}

interface Window {
  readonly fromMs: number;
  readonly samples: Samples;
  readonly signal: AbortSignal;
}

async function stream(cluster: Cluster, load: Load, words: number, { fromMs, samples, signal }: Window): Promise<void> {
  const { outputTokens } = LOADS[load];
  const startMs = performance.now();
  let lastMs = startMs;
  let count = 0;
  const response = await fetch(`${cluster.process.baseUrl}/v1/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      model: cluster.model,
      prompt: prompt(words),
      max_tokens: outputTokens,
      ignore_eos: true,
      stream: true,
      temperature: 0,
    }),
    signal,
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
      if (nowMs >= fromMs) {
        samples.tokens++;
        (count === 0 ? samples.ttftMs : samples.gapsMs).push(nowMs - lastMs);
      }
      lastMs = nowMs;
      count++;
    }
  }
}

interface Cluster {
  readonly setup: Setup;
  readonly process: ProcessCluster;
  readonly model: string;
}

async function start(setup: Setup, modelPath: string): Promise<Cluster> {
  const flags = [`--model=${modelPath}`, "--threads=1", "--log=warn", ...SETUPS[setup]];
  const process = await startProcessCluster(flags);
  await until(async () => {
    const { instances } = (await (await fetch(`${process.baseUrl}/health`)).json()) as { instances: unknown[] };
    return instances.length === 2;
  }, "both workers to be there");
  const { data } = (await (await fetch(`${process.baseUrl}/v1/models`)).json()) as { data: { id: string }[] };
  return { setup, process, model: data[0]!.id };
}

async function measure(cluster: Cluster, load: Load, samples: Samples): Promise<void> {
  const { clients, promptWords, seconds } = LOADS[load];
  const [warmMs, windowMs] = seconds.map((each) => each * 1_000 * SCALE) as [number, number];
  const end = new AbortController();
  const window = { fromMs: performance.now() + warmMs, samples, signal: end.signal };
  const timer = setTimeout(() => end.abort(), warmMs + windowMs);
  const client = async (index: number): Promise<void> => {
    const words = promptWords[index % promptWords.length]!;
    try {
      while (!end.signal.aborted) await stream(cluster, load, words, window);
    } catch (thrown) {
      if (!end.signal.aborted) throw thrown;
    }
  };
  try {
    await Promise.all(Array.from({ length: clients }, (_, index) => client(index)));
  } finally {
    clearTimeout(timer);
    end.abort();
  }
  samples.seconds += windowMs / 1_000;
}

function percentile(values: readonly number[], share: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? Number.NaN;
}

/** What became of the requests of a cluster so far, and why some were not split after all. */
async function tell({ setup, process }: Cluster): Promise<void> {
  const text = await (await fetch(`${process.baseUrl}/metrics`)).text();
  const told = [...text.matchAll(/^dynamo_frontend_disagg_(choices|fallbacks)_total\{(.*?)\} (\d+)$/gm)];
  const counts = told.map(
    ([, what, labels, count]) => `${what} ${/(?:choice|reason)="(.*?)"/.exec(labels!)?.[1]} ${count}`,
  );
  if (counts.length > 0) console.log(`${setup}: ${counts.join(", ")}`);
}

export async function run(): Promise<void> {
  console.log(machineLine());
  const { path } = await pullModel("SmolLM2-135M-Instruct", {});
  const results = new Map(CHOSEN.flatMap((load) => ALL_SETUPS.map((setup) => [`${load}/${setup}`, new Samples()])));
  const clusters: Cluster[] = [];
  try {
    for (const setup of ALL_SETUPS) clusters.push(await start(setup, path));
    for (let round = 0; round < ROUNDS; round++) {
      for (const load of CHOSEN) {
        const order = round % 2 === 0 ? clusters : clusters.toReversed();
        for (const cluster of order) await measure(cluster, load, results.get(`${load}/${cluster.setup}`)!);
      }
    }
    for (const cluster of clusters) await tell(cluster);
  } finally {
    await Promise.all(clusters.map(({ process }) => process.stop()));
  }
  console.log(table(CHOSEN.flatMap((load) => rowsOf(load, results))));
}

/** Against the better of the two fixed setups. */
function rowsOf(load: Load, results: ReadonlyMap<string, Samples>): Record<string, string | number>[] {
  const of = (setup: Setup): Samples => results.get(`${load}/${setup}`)!;
  const best = Math.max(of("2 aggregated").tokensPerSecond, of("1P+1D always").tokensPerSecond);
  return ALL_SETUPS.map((setup) => {
    const { ttftMs, gapsMs, tokensPerSecond } = of(setup);
    return {
      load,
      setup,
      requests: ttftMs.length,
      "TTFT p50 ms": percentile(ttftMs, 0.5),
      "TTFT p99 ms": percentile(ttftMs, 0.99),
      "ITL p50 ms": percentile(gapsMs, 0.5),
      "ITL p99 ms": percentile(gapsMs, 0.99),
      "tokens/s": tokensPerSecond,
      "of the best": (tokensPerSecond / best).toFixed(2),
    };
  });
}

if (import.meta.main) await run();
