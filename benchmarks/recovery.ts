import { generateLoad } from "../src/bench/index.ts";
import { until } from "../test/helpers/in-process-cluster.ts";
import { RoleProcesses, longestGapMs, streamCompletion, type RoleProcess } from "../test/helpers/role-processes.ts";
import { machineLine, median, table } from "./harness.ts";

/**
 * What clients notice of workers that die: a frontend and three mock workers as processes of their own, one of which is
 * killed (SIGKILL) or frozen (SIGSTOP) again and again, and started anew.
 *
 *   1. Short requests in a closed loop, undisturbed and with a kill every 2 s: failures, rate, latency.
 *   2. 64 long streams, a fault while all of them run: the longest silence of any stream, and where it comes from:
 *      from the signal until the process is gone (the kernel frees its memory, then closes its sockets), until the
 *      frontend's log line that the last stream goes on elsewhere, and from there to the next worker's
 *      first word, which is dispatch and the prefill of all that moved.
 *   3. With DYN_TEST_MODEL=FILE.gguf the same with 32 streams of the real model on two workers of one thread each.
 *
 * Usage: node benchmarks/recovery.ts [--seconds=12] [--rounds=3]
 */
const option = (name: string, fallback: number): number =>
  Number(process.argv.find((argument) => argument.startsWith(`--${name}=`))?.split("=")[1] ?? fallback);
const SECONDS = option("seconds", 12);
const ROUNDS = option("rounds", 3);
const CONCURRENCY = 64;
/** What the workers are, and what runs on them when one fails. */
interface Setup {
  readonly name: string;
  readonly worker: readonly string[];
  readonly workers: number;
  readonly streams: number;
  readonly maxTokens: number;
}
const MOCK: Setup = { name: "mock", worker: ["mocker"], workers: 3, streams: 64, maxTokens: 300 };
const REAL: Setup = {
  name: "real model",
  worker: ["worker", `--model=${process.env["DYN_TEST_MODEL"]}`, "--threads=1"],
  workers: 2,
  streams: 32,
  maxTokens: 48,
};
const KILL_EVERY_MS = 2_000;
const HEARTBEAT_SECONDS = 1;

class Cluster {
  readonly roles = new RoleProcesses({ DYN_LOG: "info", DYN_LOGGING_CONSOLE_FORMAT: "jsonl" });
  readonly workers: RoleProcess[] = [];
  readonly setup: Setup;
  port = 0;

  constructor(setup: Setup) {
    this.setup = setup;
  }

  get baseUrl(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  async start(): Promise<void> {
    const heartbeat = `--worker-heartbeat-timeout-secs=${HEARTBEAT_SECONDS}`;
    const frontend = await this.roles.start("frontend", "--http-port=0", heartbeat);
    this.port = Number(frontend.facts["port"]);
    for (let i = 0; i < this.setup.workers; i++) await this.addWorker();
    await this.joined();
  }

  async addWorker(): Promise<void> {
    this.workers.push(await this.roles.start(...this.setup.worker, "--model-name=mock"));
  }

  async joined(): Promise<void> {
    const count = this.setup.workers;
    await until(
      async () => {
        const health = (await (await fetch(`${this.baseUrl}/health`)).json()) as { instances: { problem?: string }[] };
        return health.instances.filter(({ problem }) => problem === undefined).length === count;
      },
      `${count} workers`,
      60_000,
    );
  }

  /** When the frontend noticed of each stream that it had to move, Unix ms. */
  moves(): number[] {
    return this.roles.output.split("\n").flatMap((line) => {
      if (!line.includes("request goes on with another worker")) return [];
      return [Date.parse((JSON.parse(line) as { time: string }).time)];
    });
  }

  /** Seconds from there to the next worker's first word, all of them together, and how many they were. */
  async migrations(): Promise<{ seconds: number; count: number }> {
    const text = await (await fetch(`${this.baseUrl}/metrics`)).text();
    const sum = (suffix: string): number =>
      [...text.matchAll(new RegExp(`^dynamo_frontend_model_migration_duration_seconds_${suffix}\\S* (\\S+)$`, "gm"))] // prettier-ignore
        .reduce((total, [, value]) => total + Number(value), 0);
    return { seconds: sum("sum"), count: sum("count") };
  }
}

const shortBody = (index: number): string =>
  JSON.stringify({ model: "mock", prompt: `Prompt ${index % 500} about the sea`, max_tokens: 6, stream: true });

async function shortRequests(cluster: Cluster, isDisturbed: boolean): Promise<Record<string, string | number>> {
  let isOver = false;
  let kills = 0;
  const chaos = (async () => {
    while (isDisturbed && !isOver) {
      await new Promise((resolve) => setTimeout(resolve, KILL_EVERY_MS));
      if (isOver) break;
      cluster.workers.shift()!.child.kill("SIGKILL");
      kills++;
      await cluster.addWorker();
    }
  })();
  const report = await generateLoad({
    host: "127.0.0.1",
    port: cluster.port,
    path: "/v1/completions",
    body: shortBody,
    concurrency: CONCURRENCY,
    durationMs: SECONDS * 1_000,
  });
  isOver = true;
  await chaos;
  await cluster.joined();
  return {
    load: isDisturbed ? `${kills} workers killed` : "undisturbed",
    answers: report.okCount,
    failed: report.failedCount,
    "requests/s": Math.round(report.requestsPerSecond),
    "latency p50 ms": Math.round(report.latencyMs.p50),
    "latency p99 ms": Math.round(report.latencyMs.p99),
  };
}

/** Per round the longest silence of any stream, and how many streams failed. */
async function longStreams(cluster: Cluster, signal: "SIGKILL" | "SIGSTOP"): Promise<Record<string, string | number>> {
  const { name, streams, maxTokens } = cluster.setup;
  const longest: number[] = [];
  const noticed: number[] = [];
  const gone: number[] = [];
  let failed = 0;
  const before = await cluster.migrations();
  for (let round = 0; round < ROUNDS; round++) {
    let begunCount = 0;
    const allBegun = Promise.withResolvers<void>();
    const answers = Array.from({ length: streams }, async (_, i) => {
      let hasBegun = false;
      // Once a stream: by its first text, or its end if it has none. A busy machine joins many tokens in one piece.
      const begin = (): void => {
        if (!hasBegun && ++begunCount === streams) allBegun.resolve();
        hasBegun = true;
      };
      const body = { model: "mock", prompt: `Stream ${i} of round ${round} tells of`, max_tokens: maxTokens, ignore_eos: true, temperature: 0 }; // prettier-ignore
      const answer = await streamCompletion(cluster.baseUrl, body, begin);
      begin();
      return answer;
    });
    await allBegun.promise;
    const victim = cluster.workers.shift()!;
    const sinceMs = performance.now();
    const wallMs = Date.now();
    victim.child.kill(signal);
    void victim.exited.then(() => gone.push(performance.now() - sinceMs));
    const done = await Promise.all(answers);
    failed += done.filter(({ error, tokens }) => error !== undefined || tokens !== maxTokens).length;
    longest.push(Math.max(...done.map((answer) => longestGapMs(answer, sinceMs))));
    victim.child.kill("SIGKILL");
    await victim.exited;
    noticed.push(Math.max(0, ...cluster.moves().flatMap((ms) => (ms >= wallMs ? [ms - wallMs] : []))));
    await cluster.addWorker();
    await cluster.joined();
  }
  const after = await cluster.migrations();
  const moved = after.count - before.count;
  return {
    fault: `${signal}, ${streams} streams, ${name}`,
    failed,
    moved,
    "longest silence, median ms": Math.round(median(longest)),
    worst: Math.round(Math.max(...longest)),
    "process gone after, median ms": signal === "SIGKILL" ? Math.round(median(gone)) : "-",
    "noticed after, last stream, median ms": Math.round(median(noticed)),
    "noticed to first word, mean ms": Math.round(((after.seconds - before.seconds) / moved) * 1_000),
    "aim ms": signal === "SIGKILL" ? 300 : `${HEARTBEAT_SECONDS * 1_000} + a quarter beat`,
  };
}

async function onCluster(setup: Setup, measure: (cluster: Cluster) => Promise<void>): Promise<void> {
  const cluster = new Cluster(setup);
  try {
    await cluster.start();
    await measure(cluster);
    for (const signal of ["SIGKILL", "SIGSTOP"] as const)
      console.log(`${table([await longStreams(cluster, signal)])}\n`);
  } finally {
    await cluster.roles.stop();
  }
}

export async function run(): Promise<void> {
  console.log(machineLine());
  await onCluster(MOCK, async (cluster) => {
    await generateLoad({ host: "127.0.0.1", port: cluster.port, path: "/v1/completions", body: shortBody, concurrency: CONCURRENCY, requestCount: 2_000 }); // prettier-ignore
    console.log(`${table([await shortRequests(cluster, false), await shortRequests(cluster, true)])}\n`);
  });
  if (process.env["DYN_TEST_MODEL"] === undefined) return;
  await onCluster(REAL, () => Promise.resolve());
}

if (import.meta.main) await run();
