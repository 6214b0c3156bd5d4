import { fork } from "node:child_process";
import { once } from "node:events";
import { generateLoad, type LoadReport } from "../src/bench/index.ts";
import { createVllmEngine } from "../src/engines/vllm/index.ts";
import { FakeVllm } from "../src/engines/vllm/fixtures/fake-vllm.ts";
import { claimFreePorts } from "../src/engines/foreign/index.ts";
import { silentLogger } from "../src/observability/index.ts";
import { systemClock } from "../src/std/index.ts";
import { REAL_VLLM, REAL_VLLM_ARGS, REAL_VLLM_ENV, REAL_VLLM_MODEL, whyNoVllm } from "../test/helpers/real-vllm.ts";
import { freePort, startProcessCluster } from "../test/helpers/process-cluster.ts";
import { machineLine, median, table } from "./harness.ts";

/**
 * Stock engines beside us. What our frontend, router and worker add in front of one real vLLM, against the same server asked
 * directly: the same chat requests from the same client, in alternating rounds. And what engines cost that have nothing to
 * do. The real one is where the tests have it (DYN_TEST_VLLM, DYN_TEST_VLLM_MODEL, or `npm run real-vllm`).
 *
 *   node benchmarks/engines.ts [--only=added|idle]
 */
const ROUNDS = 5;
const MAX_TOKENS = 32;
const LOADS = [
  { concurrency: 1, requestCount: 6 },
  { concurrency: 16, requestCount: 48 },
] as const;
/** Aims: 2 ms to the first token, 98 % of the bare server's tokens. */
const AIMS = "aims: 2 ms to the first token, throughput 98 %";

/** No two begin alike, so that neither server finds anything in its cache. */
function bodyOf(round: number): (index: number) => string {
  return (index) =>
    JSON.stringify({
      model: "smollm2",
      messages: [{ role: "user", content: `${round}/${index} ${"The quick brown fox jumps over the lazy dog. ".repeat(8)}` }],
      max_tokens: MAX_TOKENS,
      temperature: 0,
      ignore_eos: true,
      stream: true,
    });
} // prettier-ignore

async function load(port: number, round: number, { concurrency, requestCount }: (typeof LOADS)[number]): Promise<LoadReport> {
  const report = await generateLoad({ host: "127.0.0.1", port, body: bodyOf(round), concurrency, requestCount });
  if (report.failedCount > 0) throw new Error(`requests failed: ${JSON.stringify([report.statuses, report.errors])}`);
  return report;
} // prettier-ignore

async function measureAdded(): Promise<void> {
  const why = whyNoVllm(true);
  if (why !== false) return console.log(`not measured: ${why}\n`);
  const enginePort = await freePort();
  const flags = ["--engine=vllm", `--engine-command=${REAL_VLLM}`, `--engine-port=${enginePort}`, `--model=${REAL_VLLM_MODEL}`, "--model-name=smollm2", "--workers=1"]; // prettier-ignore
  const args = ["--dtype=bfloat16", "--max-model-len=1024", "--kv-cache-memory-bytes=128M", ...REAL_VLLM_ARGS, "--max-num-seqs", "16"]; // prettier-ignore
  const cluster = await startProcessCluster([...flags, "--", ...args], { DYN_LOG: "warn", ...REAL_VLLM_ENV }, 240_000);
  try {
    let round = 0;
    for (const port of [enginePort, cluster.port]) await load(port, round++, LOADS[1]);
    for (const shape of LOADS) {
      const bare: LoadReport[] = [];
      const ours: LoadReport[] = [];
      for (let i = 0; i < ROUNDS; i++) {
        const both = [[enginePort, bare] as const, [cluster.port, ours] as const];
        for (const [port, reports] of i % 2 === 0 ? both : both.toReversed()) {
          reports.push(await load(port, round++, shape));
        }
      }
      printAdded(shape.concurrency, bare, ours);
    }
    console.log(`${AIMS}\n`);
  } finally {
    await cluster.stop("SIGINT");
  }
}

function printAdded(concurrency: number, bare: readonly LoadReport[], ours: readonly LoadReport[]): void {
  const measures: readonly (readonly [string, (report: LoadReport) => number])[] = [
    ["first token p50, ms", ({ ttftMs }) => ttftMs.p50],
    ["first token p99, ms", ({ ttftMs }) => ttftMs.p99],
    ["between tokens p50, ms", ({ itlMs }) => itlMs.p50],
    ["between tokens p99, ms", ({ itlMs }) => itlMs.p99],
    ["requests/s", ({ requestsPerSecond }) => requestsPerSecond],
  ];
  const rows = measures.map(([name, of]) => {
    const [a, b] = [bare.map(of), ours.map(of)];
    const added = b.map((value, round) => value - a[round]!);
    return {
      [`c=${concurrency}`]: name,
      "bare vLLM": median(a),
      "through us": median(b),
      "added, median of rounds": median(added),
      least: Math.min(...added),
      most: Math.max(...added),
      ratio: median(b.map((value, round) => value / a[round]!)),
    };
  });
  console.log(`${table(rows)}\n`);
}

// ---- Idle ----

const ENGINES = 100;
const SETTLE_MS = 20_000;
const IDLE_MS = 30_000;
const IDLE_AIM = 0.1;

/** The servers, in a process of their own: their CPU is not ours. */
async function serveFakes(): Promise<void> {
  const servers = [];
  for (let i = 0; i < ENGINES; i++) {
    const { port } = await claimFreePorts("127.0.0.1", 2, Math.random);
    const kvEvents = { endpoint: `tcp://*:${port}`, replay_endpoint: `tcp://127.0.0.1:${port + 1}` };
    const url = await new FakeVllm({ kvEvents }).listen({ port: 0 });
    servers.push({ url, kvEventsConfig: JSON.stringify({ enable_kv_cache_events: true, ...kvEvents }) });
  }
  process.send!(servers);
}

async function measureIdle(): Promise<void> {
  const child = fork(import.meta.filename, ["serve"]);
  try {
    const [servers] = (await once(child, "message")) as [{ url: string; kvEventsConfig: string }[]];
    const sink = { onStep() {}, onKvEvents() {}, onFatal() {} };
    const engines = [];
    for (const server of servers) {
      const sizes = { maxSequences: 0, maxBatchedTokens: 0, contextLength: 0, blockSizeTokens: 0 };
      const config = { kind: "vllm" as const, ...server, ...sizes, vocabularySize: 4_096, startTimeoutMs: 10_000, kvEvents: true }; // prettier-ignore
      const engine = await createVllmEngine(config, { clock: systemClock, logger: silentLogger });
      await engine.start(sink, new AbortController().signal);
      engines.push(engine);
    }
    await new Promise((resolve) => setTimeout(resolve, SETTLE_MS));
    const before = process.cpuUsage();
    await new Promise((resolve) => setTimeout(resolve, IDLE_MS));
    const { user, system } = process.cpuUsage(before);
    const cores = (user + system) / 1e3 / IDLE_MS;
    const up = engines.filter((engine) => engine.processState().isUp && engine.processState().isKvWhole).length;
    console.log(`${up} of ${ENGINES} attached idle engines, KV events and metrics followed, in one process: ${cores.toFixed(3)} cores over ${IDLE_MS / 1e3} s (aim ${IDLE_AIM}: ${cores <= IDLE_AIM ? "met" : "missed"})`); // prettier-ignore
    for (const engine of engines) await engine.stop();
  } finally {
    child.kill("SIGKILL");
  }
}

export async function run(): Promise<void> {
  console.log(machineLine());
  const only = process.argv.find((word) => word.startsWith("--only="))?.slice("--only=".length);
  if (only !== "idle") await measureAdded();
  if (only !== "added") await measureIdle();
}

if (process.argv[2] === "serve") await serveFakes();
else if (import.meta.main) await run();
