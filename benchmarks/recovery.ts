import { generateLoad, generateSessionLoad, type LoadSession } from "../src/bench/index.ts";
import { until } from "../test/helpers/in-process-cluster.ts";
import { RoleProcesses, longestGapMs, streamCompletion, type RoleProcess } from "../test/helpers/role-processes.ts";
import { machineLine, median, table } from "./harness.ts";

/**
 * What clients notice of workers that die: a frontend and three mock workers as processes of their own, one of which is
 * killed (SIGKILL) or frozen (SIGSTOP) again and again, and started anew.
 *
 *   1. 500 short requests a second (open loop: they come whatever happens), undisturbed and with a kill every 2 s:
 *      failures, rate, latency.
 *   2. 64 long streams, a fault while all of them run: the longest silence of any stream, and where it comes from:
 *      from the signal until the process is gone (the kernel frees its memory, then closes its sockets), until the
 *      frontend's log line that the last stream goes on elsewhere, and from there to the next worker's
 *      first word, which is dispatch and the prefill of all that moved. How long that prefill must take: as many prompts
 *      of the same lengths, at once, to one worker of the same kind that has nothing else to do.
 *   3. With DYN_TEST_MODEL=FILE.gguf the same with 32 streams of the real model on two workers of one thread each, with
 *      engine steps of 512 tokens (as by default) and of 96.
 *
 * Usage: node benchmarks/recovery.ts [--seconds=12] [--rounds=3] [--rate=500] [--only-real]
 */
const option = (name: string, fallback: number): number =>
  Number(process.argv.find((argument) => argument.startsWith(`--${name}=`))?.split("=")[1] ?? fallback);
const SECONDS = option("seconds", 12);
const ROUNDS = option("rounds", 3);
const ONLY_REAL = process.argv.includes("--only-real");
/** Short requests per second. */
const RATE = option("rate", 500);
/** Under way at most: a machine that cannot keep up sends fewer, and the report says so. */
const MAX_IN_FLIGHT = 1_000;
/** What the workers are, and what runs on them when one fails. */
interface Setup {
  readonly name: string;
  readonly worker: readonly string[];
  readonly workers: number;
  readonly streams: number;
  readonly maxTokens: number;
  /** Of `Stream 7 of round 1 tells of`: bytes for the mock engine. */
  readonly promptTokens: number;
}
const MOCK: Setup = { name: "mock", worker: ["mocker"], workers: 3, streams: 64, maxTokens: 300, promptTokens: 29 };
const REAL: Setup = {
  name: "real model",
  worker: ["worker", `--model=${process.env["DYN_TEST_MODEL"]}`, "--threads=1"],
  workers: 2,
  streams: 32,
  maxTokens: 48,
  promptTokens: 10,
};
/** The same with short engine steps: what moved comes back in turns, and what is there anyway is held up less. */
const REAL_SHORT_STEPS: Setup = {
  ...REAL,
  name: "real model, steps of 96 tokens",
  worker: [...REAL.worker, "--max-num-batched-tokens=96"],
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

  /** Of each stream that had to move: when the frontend noticed, Unix ms, and how many tokens it had. */
  moves(): { readonly atMs: number; readonly tokens: number }[] {
    return this.roles.output.split("\n").flatMap((line) => {
      if (!line.includes("request goes on with another worker")) return [];
      const { time, tokens } = JSON.parse(line) as { time: string; tokens: number };
      return [{ atMs: Date.parse(time), tokens }];
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
  JSON.stringify({
    model: "mock",
    prompt: `Prompt ${index % 500} about the sea`,
    max_tokens: 6,
    stream: true,
    stream_options: { include_usage: true },
  });

function sessionsAt(rate: number, seconds: number): LoadSession[] {
  return Array.from({ length: rate * seconds }, (_, index) => ({
    arrivalMs: (index * 1_000) / rate,
    requests: [{ delayMs: 0, body: () => shortBody(index) }].values(),
  }));
}

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
  const report = await generateSessionLoad({
    url: new URL("/v1/completions", cluster.baseUrl),
    sessions: sessionsAt(RATE, SECONDS),
    maxInFlight: MAX_IN_FLIGHT,
    timeoutMs: 60_000,
    timeLimitMs: 600_000,
  });
  isOver = true;
  await chaos;
  await cluster.joined();
  return {
    load: isDisturbed ? `${kills} workers killed` : "undisturbed",
    answers: report.okCount,
    failed: report.failedCount,
    "not sent": report.overloadCount,
    "requests/s": Math.round(report.requestsPerSecond),
    "sent late, p99 ms": Math.round(report.lateMs.p99),
    "latency p50 ms": Math.round(report.latencyMs.p50),
    "latency p99 ms": Math.round(report.latencyMs.p99),
    "max ms": Math.round(report.latencyMs.max),
  };
}

/** How long `lengths.length` prompts of those lengths take, sent at once, until all have their first token. */
async function prefillMs(cluster: Cluster, lengths: readonly number[], salt: number): Promise<number> {
  const startMs = performance.now();
  await Promise.all(
    lengths.map(async (length, index) => {
      // Unlike any prompt before from the first token on, so that no cache helps.
      const prompt = Array.from({ length }, (_, at) => 50 + ((salt * 31 + index * 7 + at) % 150));
      const answer = await fetch(`${cluster.baseUrl}/v1/completions`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ model: "mock", prompt, max_tokens: 1 }),
      });
      if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
      await answer.text();
    }),
  );
  return performance.now() - startMs;
}

/** Per round the longest silence of any stream, and how many streams failed. */
async function longStreams(cluster: Cluster, signal: "SIGKILL" | "SIGSTOP"): Promise<Record<string, string | number>> {
  const { name, streams, maxTokens, promptTokens } = cluster.setup;
  const longest: number[] = [];
  const typical: number[] = [];
  const toCompute: number[] = [];
  const alone: number[] = [];
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
    const silences = done.map((answer) => longestGapMs(answer, sinceMs));
    longest.push(Math.max(...silences));
    typical.push(median(silences));
    victim.child.kill("SIGKILL");
    await victim.exited;
    const moves = cluster.moves().filter(({ atMs }) => atMs >= wallMs);
    noticed.push(Math.max(0, ...moves.map(({ atMs }) => atMs - wallMs)));
    const lengths = moves.map(({ tokens }) => promptTokens + tokens);
    toCompute.push(lengths.reduce((sum, length) => sum + length, 0));
    alone.push(await prefillMs(cluster, lengths, round));
    await cluster.addWorker();
    await cluster.joined();
  }
  const after = await cluster.migrations();
  const moved = after.count - before.count;
  return {
    fault: `${signal}, ${streams} streams, ${name}`,
    failed,
    moved,
    "silence, median stream, ms": Math.round(median(typical)),
    "longest silence, median ms": Math.round(median(longest)),
    worst: Math.round(Math.max(...longest)),
    "process gone after, median ms": signal === "SIGKILL" ? Math.round(median(gone)) : "-",
    "noticed after, last stream, median ms": Math.round(median(noticed)),
    "noticed to first word, mean ms": Math.round(((after.seconds - before.seconds) / moved) * 1_000),
    "tokens to compute": Math.round(median(toCompute)),
    "the same alone, ms": Math.round(median(alone)),
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
  if (!ONLY_REAL)
    await onCluster(MOCK, async (cluster) => {
      await generateLoad({ host: "127.0.0.1", port: cluster.port, path: "/v1/completions", body: shortBody, concurrency: 64, requestCount: 2_000 }); // prettier-ignore
      console.log(`${table([await shortRequests(cluster, false), await shortRequests(cluster, true)])}\n`);
    });
  if (process.env["DYN_TEST_MODEL"] === undefined) return;
  for (const setup of [REAL, REAL_SHORT_STEPS]) await onCluster(setup, () => Promise.resolve());
}

if (import.meta.main) await run();
