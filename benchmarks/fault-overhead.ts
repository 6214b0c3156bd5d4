import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { generateLoad } from "../src/bench/index.ts";
import { startProcessCluster, type ProcessCluster } from "../test/helpers/process-cluster.ts";
import { cpuTimeOf, machineLine, median, table } from "./harness.ts";

/**
 * What fault handling costs a frontend while nothing fails: frontends of the same build side by side, each with an echo
 * worker of its own, under the same load in turn (all in order, then all in reverse order), compared round by round.
 *
 *   on      as shipped: migration, deadline and stage limits, gate, progress watch, heartbeats, live requests
 *   flags   what flags can switch off is off, limits are out of reach
 *   out     besides, what has no flag does nothing (preload/without-fault-handling.ts)
 *   on (2)  as shipped once more: how far two equal frontends are apart on this machine
 *
 * CPU is the frontend process's, from the kernel. Requests per second are those of a closed loop on whatever cores there
 * are, client and worker included.
 *
 * Usage: node benchmarks/fault-overhead.ts [--rounds=10]
 */
const ROUNDS = Number(process.argv.find((argument) => argument.startsWith("--rounds="))?.split("=")[1] ?? 10);
const PROMPT = "The quick brown fox jumps over the lazy dog. ".repeat(23).slice(0, 1_000);
const FLAGS = ["--engine=echo", "--workers=1", "--model-name=echo", "--max-num-seqs=256"];
const MODEL = process.env["DYN_TEST_MODEL"];
const PRELOAD = pathToFileURL(join(import.meta.dirname, "preload/without-fault-handling.ts")).href;
const OFF = [
  "--migration-limit=0",
  "--worker-stall-timeout-secs=0",
  "--engine-stall-timeout-secs=0",
  "--worker-heartbeat-timeout-secs=3600",
  "--queue-timeout-secs=0",
  "--first-token-timeout-secs=0",
  "--stream-idle-timeout-secs=0",
  "--request-timeout-secs=86400",
  "--max-concurrent-requests=1000000",
  "--max-concurrent-requests-per-model=1000000",
  "--request-queue-limit=1000000",
];

interface Variant {
  readonly name: string;
  readonly flags: readonly string[];
  readonly env: NodeJS.ProcessEnv;
}
const BASE = "out";
const VARIANTS: readonly Variant[] = [
  { name: "on", flags: [], env: {} },
  { name: "flags", flags: OFF, env: {} },
  { name: BASE, flags: OFF, env: { NODE_OPTIONS: `--import=${PRELOAD}` } },
  { name: "on (2)", flags: [], env: {} },
];

interface Load {
  readonly name: string;
  readonly maxTokens: number;
  readonly stream: boolean;
  readonly requestCount: number;
  readonly concurrency: number;
}
const LOADS: readonly Load[] = [
  { name: "1 token, whole, c=32", maxTokens: 1, stream: false, requestCount: 5_000, concurrency: 32 },
  { name: "16 tokens, streamed, c=32", maxTokens: 16, stream: true, requestCount: 4_000, concurrency: 32 },
  { name: "256 tokens, streamed, c=64", maxTokens: 256, stream: true, requestCount: 1_500, concurrency: 64 },
];

interface Running extends Variant {
  readonly cluster: ProcessCluster;
  readonly pid: number;
}

interface Measured {
  readonly cpuUs: number;
  readonly perSecond: number;
}

async function start(variant: Variant): Promise<Running> {
  const model = MODEL === undefined ? [] : [`--model-path=${MODEL}`];
  const cluster = await startProcessCluster([...FLAGS, ...model, ...variant.flags], {
    DYN_LOG: "warn",
    ...variant.env,
  });
  return { ...variant, cluster, pid: cluster.pids(" frontend")[0]! };
}

async function measure({ cluster, pid }: Running, load: Load): Promise<Measured> {
  const { maxTokens, stream, requestCount, concurrency } = load;
  const body = JSON.stringify({
    model: "echo",
    messages: [{ role: "user", content: PROMPT }],
    max_tokens: maxTokens,
    stream,
    ignore_eos: true,
  });
  const before = cpuTimeOf(pid);
  const report = await generateLoad({ host: "127.0.0.1", port: cluster.port, body, requestCount, concurrency });
  const after = cpuTimeOf(pid);
  if (report.failedCount > 0) throw new Error(`${report.failedCount} failed: ${JSON.stringify(report.errors)}`);
  const cpuMs = after.userMs + after.systemMs - before.userMs - before.systemMs;
  return { cpuUs: (cpuMs * 1_000) / requestCount, perSecond: report.requestsPerSecond };
}

/** By variant, one figure a round. */
async function compare(running: readonly Running[], load: Load): Promise<Map<string, Measured[]>> {
  const found = new Map<string, Measured[]>(running.map(({ name }) => [name, []]));
  for (const one of running) await measure(one, load);
  for (let round = 0; round < ROUNDS; round++) {
    for (const one of round % 2 === 0 ? running : running.toReversed()) {
      found.get(one.name)!.push(await measure(one, load));
    }
  }
  return found;
}

function rowsOf(load: Load, found: ReadonlyMap<string, readonly Measured[]>): Record<string, string | number>[] {
  const base = found.get(BASE)!;
  const ratio = (values: readonly Measured[], of: keyof Measured): string => {
    const ratios = values.map((value, round) => value[of] / base[round]![of]).toSorted((a, b) => a - b);
    const quarter = Math.floor(ratios.length / 4);
    return `${median(ratios).toFixed(3)} (${ratios[quarter]!.toFixed(2)} to ${ratios.at(-1 - quarter)!.toFixed(2)})`;
  };
  return [...found].map(([name, values]) => ({
    load: load.name,
    "fault handling": name,
    "CPU us per request": median(values.map(({ cpuUs }) => cpuUs)),
    [`CPU / ${BASE} (middle half)`]: ratio(values, "cpuUs"),
    "requests/s": Math.round(median(values.map(({ perSecond }) => perSecond))),
    [`rate / ${BASE} (middle half)`]: ratio(values, "perSecond"),
  }));
}

export async function run(): Promise<void> {
  console.log(machineLine());
  const running: Running[] = [];
  try {
    for (const variant of VARIANTS) running.push(await start(variant));
    console.log(
      `tokenizer: ${MODEL === undefined ? "bytes" : "SmolLM2"}; medians of ${ROUNDS} rounds, aim 1.05 / 0.95\n`,
    );
    for (const load of LOADS) console.log(`${table(rowsOf(load, await compare(running, load)))}\n`);
  } finally {
    await Promise.all(running.map(({ cluster }) => cluster.stop()));
  }
}

if (import.meta.main) await run();
