import { SeededRandom } from "../src/std/index.ts";
import { startProcessCluster, type ProcessCluster } from "../test/helpers/process-cluster.ts";
import { pullModel } from "../src/model/index.ts";
import { until } from "../test/helpers/in-process-cluster.ts";
import { machineLine, table } from "./harness.ts";

/**
 * One prefill and one decode worker against two aggregated ones, SmolLM2 on the same cores (a compute thread per worker),
 * real processes, through HTTP: `always` splits every request, `auto` decides. The same work for each: a list of requests
 * that four clients take from, with prompts that no request before has sent, so that nothing comes from a cache. The three
 * clusters stand side by side, one of them at work at a time, in alternating order, after some requests each to learn from.
 * Throughput is all output tokens over all rounds' time: on a shared machine trust the ratios.
 *
 * Usage: node benchmarks/disagg.ts [--rounds=2] [--scale=1] [--only=short,mixed]
 */
const argument = (name: string, value: number): number =>
  Number(process.argv.find((each) => each.startsWith(`--${name}=`))?.split("=")[1] ?? value);
const ROUNDS = argument("rounds", 2);
/** Of the lists. */
const SCALE = argument("scale", 1);
const CLIENTS = 4;

const SETUPS = {
  "2 aggregated": ["--workers=2"],
  "1P+1D always": ["--prefill=1", "--decode=1", "--disagg=always"],
  "1P+1D auto": ["--prefill=1", "--decode=1", "--disagg=auto"],
} as const;
type Setup = keyof typeof SETUPS;
const ALL_SETUPS = Object.keys(SETUPS) as Setup[];

/** Of one round. Words are about a token each. */
const LOADS = {
  /** Many, or the tail of a round decides: with 10 for four clients the last two were often on one worker. */
  short: { prompts: repeat(30, [40]), outputTokens: 32 },
  long: { prompts: repeat(5, [300]), outputTokens: 24 },
  /** Some that write, some that read longer texts in. */
  mixed: { prompts: repeat(2, [40, 40, 300, 40, 40]), outputTokens: 32 },
} as const;
const TO_LEARN = [40, 300, 40, 300];

function repeat(times: number, words: readonly number[]): readonly number[] {
  return Array.from({ length: Math.max(1, Math.round(times * SCALE)) }, () => words).flat();
}
type Load = keyof typeof LOADS;
const ONLY = process.argv
  .find((each) => each.startsWith("--only="))
  ?.slice("--only=".length)
  .split(",");
const CHOSEN = (Object.keys(LOADS) as Load[]).filter((load) => ONLY?.includes(load) ?? true);

/** Of the rounds of one load and setup. */
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

async function stream(cluster: Cluster, words: number, outputTokens: number, samples: Samples): Promise<void> {
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
      (count === 0 ? samples.ttftMs : samples.gapsMs).push(nowMs - lastMs);
      lastMs = nowMs;
      count++;
    }
  }
  samples.tokens += outputTokens;
}

interface Cluster {
  readonly setup: Setup;
  readonly process: ProcessCluster;
  readonly model: string;
}

async function start(setup: Setup, modelPath: string): Promise<Cluster> {
  // Steps of a few hundred milliseconds, as on machines of more cores.
  const steps = "--max-num-batched-tokens=128";
  const flags = [`--model=${modelPath}`, "--threads=1", steps, "--log=warn", ...SETUPS[setup]];
  const process = await startProcessCluster(flags);
  await until(async () => {
    const { instances } = (await (await fetch(`${process.baseUrl}/health`)).json()) as { instances: unknown[] };
    return instances.length === 2;
  }, "both workers to be there");
  const { data } = (await (await fetch(`${process.baseUrl}/v1/models`)).json()) as { data: { id: string }[] };
  return { setup, process, model: data[0]!.id };
}

async function measure(
  cluster: Cluster,
  prompts: readonly number[],
  outputTokens: number,
  samples: Samples,
): Promise<void> {
  const left = [...prompts];
  const startMs = performance.now();
  const client = async (): Promise<void> => {
    for (let words = left.shift(); words !== undefined; words = left.shift()) {
      await stream(cluster, words, outputTokens, samples);
    }
  };
  await Promise.all(Array.from({ length: CLIENTS }, client));
  samples.seconds += (performance.now() - startMs) / 1_000;
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
    for (const cluster of clusters) await measure(cluster, TO_LEARN, 24, new Samples());
    for (let round = 0; round < ROUNDS; round++) {
      for (const load of CHOSEN) {
        const order = round % 2 === 0 ? clusters : clusters.toReversed();
        const { prompts, outputTokens } = LOADS[load];
        for (const cluster of order) {
          await measure(cluster, prompts, outputTokens, results.get(`${load}/${cluster.setup}`)!);
        }
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
