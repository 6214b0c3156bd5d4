import { generateLoad } from "../src/bench/index.ts";
import { until } from "../test/helpers/in-process-cluster.ts";
import { RoleProcesses, longestGapMs, streamCompletion, type RoleProcess } from "../test/helpers/role-processes.ts";
import { machineLine, median, table } from "./harness.ts";

/**
 * What clients notice of workers that die: a frontend and three mock workers as processes of their own, one of which is
 * killed (SIGKILL) or frozen (SIGSTOP) again and again, and started anew.
 *
 *   1. Short requests in a closed loop, undisturbed and with a kill every 2 s: failures, rate, latency.
 *   2. 64 long streams, a fault while all of them run: the longest silence of each stream that had to move.
 *
 * Usage: node benchmarks/recovery.ts [--seconds=12] [--rounds=3]
 */
const option = (name: string, fallback: number): number =>
  Number(process.argv.find((argument) => argument.startsWith(`--${name}=`))?.split("=")[1] ?? fallback);
const SECONDS = option("seconds", 12);
const ROUNDS = option("rounds", 3);
const CONCURRENCY = 64;
const STREAMS = 64;
const KILL_EVERY_MS = 2_000;
const HEARTBEAT_SECONDS = 1;

class Cluster {
  readonly roles = new RoleProcesses();
  readonly workers: RoleProcess[] = [];
  port = 0;

  get baseUrl(): string {
    return `http://127.0.0.1:${this.port}`;
  }

  async start(): Promise<void> {
    const heartbeat = `--worker-heartbeat-timeout-secs=${HEARTBEAT_SECONDS}`;
    const frontend = await this.roles.start("frontend", "--http-port=0", heartbeat);
    this.port = Number(frontend.facts["port"]);
    for (let i = 0; i < 3; i++) await this.addWorker();
    await this.joined(3);
  }

  async addWorker(): Promise<void> {
    this.workers.push(await this.roles.start("mocker", "--model-name=mock"));
  }

  async joined(count: number): Promise<void> {
    await until(
      async () => {
        const health = (await (await fetch(`${this.baseUrl}/health`)).json()) as { instances: { problem?: string }[] };
        return health.instances.filter(({ problem }) => problem === undefined).length === count;
      },
      `${count} workers`,
      60_000,
    );
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
  await cluster.joined(3);
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
  const longest: number[] = [];
  let failed = 0;
  for (let round = 0; round < ROUNDS; round++) {
    let running = 0;
    const begun = Promise.withResolvers<void>();
    const answers = Array.from({ length: STREAMS }, (_, i) => {
      let pieces = 0;
      const body = { model: "mock", prompt: `Stream ${i} of round ${round}`, max_tokens: 150 };
      return streamCompletion(cluster.baseUrl, body, () => {
        if (++pieces === 20 && ++running === STREAMS) begun.resolve();
      });
    });
    await begun.promise;
    const victim = cluster.workers.shift()!;
    const sinceMs = performance.now();
    victim.child.kill(signal);
    const done = await Promise.all(answers);
    failed += done.filter(({ error, tokens }) => error !== undefined || tokens !== 150).length;
    longest.push(Math.max(...done.map((answer) => longestGapMs(answer, sinceMs))));
    victim.child.kill("SIGKILL");
    await victim.exited;
    await cluster.addWorker();
    await cluster.joined(3);
  }
  return {
    fault: `${signal} under ${STREAMS} streams`,
    rounds: ROUNDS,
    failed,
    "longest silence, median ms": Math.round(median(longest)),
    "worst round ms": Math.round(Math.max(...longest)),
    "aim ms": signal === "SIGKILL" ? 300 : `${HEARTBEAT_SECONDS * 1_000} + a quarter beat`,
  };
}

export async function run(): Promise<void> {
  console.log(machineLine());
  const cluster = new Cluster();
  try {
    await cluster.start();
    await generateLoad({ host: "127.0.0.1", port: cluster.port, path: "/v1/completions", body: shortBody, concurrency: CONCURRENCY, requestCount: 2_000 }); // prettier-ignore
    console.log(table([await shortRequests(cluster, false), await shortRequests(cluster, true)]));
    console.log();
    for (const signal of ["SIGKILL", "SIGSTOP"] as const)
      console.log(`${table([await longStreams(cluster, signal)])}\n`);
  } finally {
    await cluster.roles.stop();
  }
}

if (import.meta.main) await run();
