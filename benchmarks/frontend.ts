import { generateLoad, type LoadOptions } from "../src/bench/index.ts";
import { startProcessCluster, type ProcessCluster } from "../test/helpers/process-cluster.ts";
import { cpuTimeOf, machineLine, median, residentBytes, table } from "./harness.ts";

/**
 * The frontend alone: one frontend process, one echo worker process that answers at once, this process as client. CPU
 * time of the frontend comes from the kernel's accounting, so the others on the machine do not count; requests/s do not
 * say much where three processes share two cores. The baseline in the same run is a bare node:http server (benchmarks/http.ts).
 *
 * Usage: node benchmarks/frontend.ts [--requests=100000]
 */
const REQUESTS = Number(process.argv.find((argument) => argument.startsWith("--requests="))?.split("=")[1] ?? 100_000);
/** 1 kB of English, about 230 tokens of a real tokenizer; the echo engine's tokenizer has a token per byte. */
const PROMPT = "The quick brown fox jumps over the lazy dog. ".repeat(23).slice(0, 1_000);

function body(maxTokens: number, stream: boolean): string {
  return JSON.stringify({
    model: MODEL_NAME,
    messages: [{ role: "user", content: PROMPT }],
    max_tokens: maxTokens,
    stream,
    ignore_eos: true,
  });
}

const MODEL = process.env["DYN_TEST_MODEL"];
const MODEL_NAME = "echo";

interface Measured {
  readonly cpuUs: number;
  readonly perSecond: number;
}

/** CPU microseconds of the frontend per request over one run of load. */
async function cpuPerRequest(
  cluster: ProcessCluster,
  pid: number,
  load: Partial<LoadOptions> & { body: string },
): Promise<Measured> {
  const before = cpuTimeOf(pid);
  const report = await generateLoad({ host: "127.0.0.1", port: cluster.port, concurrency: 32, ...load });
  const after = cpuTimeOf(pid);
  if (report.failedCount > 0)
    throw new Error(`${report.failedCount} requests failed: ${JSON.stringify(report.errors)}`);
  const cpuMs = after.userMs + after.systemMs - before.userMs - before.systemMs;
  return { cpuUs: (cpuMs * 1_000) / report.okCount, perSecond: report.requestsPerSecond };
}

export async function run(): Promise<void> {
  console.log(machineLine());
  const flags = ["--engine", "echo", "--workers", "1", "--model-name", MODEL_NAME, "--max-num-seqs", "256"];
  // With a model file the frontend runs its real tokenizer and template.
  if (MODEL !== undefined) flags.push("--model-path", MODEL);
  const cluster = await startProcessCluster(flags, { DYN_LOG: "warn" });
  try {
    const pid = cluster.pids(" frontend")[0]!;
    await cpuPerRequest(cluster, pid, { body: body(1, false), requestCount: 5_000 });
    await cpuPerRequest(cluster, pid, { body: body(256, true), requestCount: 500 });
    const whole: Measured[] = [];
    const streamed: Measured[] = [];
    const long: Measured[] = [];
    for (let round = 0; round < 5; round++) {
      whole.push(await cpuPerRequest(cluster, pid, { body: body(1, false), requestCount: 8_000 }));
      streamed.push(await cpuPerRequest(cluster, pid, { body: body(1, true), requestCount: 8_000 }));
      long.push(await cpuPerRequest(cluster, pid, { body: body(256, true), requestCount: 1_500, concurrency: 64 }));
    }
    const mid = (values: readonly Measured[]): number => median(values.map((value) => value.cpuUs));
    const rate = (values: readonly Measured[]): number => Math.round(median(values.map((value) => value.perSecond)));
    const perToken = (mid(long) - mid(streamed)) / 255;
    console.log(
      `tokenizer: ${MODEL === undefined ? "bytes" : "SmolLM2"}; CPU of the frontend process, medians of 5 rounds\n`,
    );
    console.log(
      table([
        {
          load: "1 kB, 1 token, whole, c=32",
          "us per request": mid(whole),
          "us per token": "-",
          "requests/s": rate(whole),
        },
        {
          load: "1 kB, 1 token, streamed, c=32",
          "us per request": mid(streamed),
          "us per token": "-",
          "requests/s": rate(streamed),
        },
        {
          load: "1 kB, 256 tokens, streamed, c=64",
          "us per request": mid(long),
          "us per token": perToken.toFixed(2),
          "requests/s": rate(long),
        },
      ]),
    );
    const memory: number[] = [];
    for (let part = 0; part < 10; part++) {
      await cpuPerRequest(cluster, pid, {
        body: body(1, part % 2 === 0),
        requestCount: REQUESTS / 10,
        concurrency: 64,
      });
      memory.push(Math.round(residentBytes(pid) / 1e6));
    }
    console.log(`\nresident memory, MB, after each tenth of ${REQUESTS} more requests: ${memory.join(" ")}`);
  } finally {
    await cluster.stop();
  }
}

if (import.meta.main) await run();
