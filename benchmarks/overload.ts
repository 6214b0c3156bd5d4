import { Agent, request as httpRequest } from "node:http";
import { mockerConfig } from "../src/engines/mocker/index.ts";
import { SeededRandom } from "../src/std/index.ts";
import { startInProcessCluster, type InProcessCluster } from "../test/helpers/in-process-cluster.ts";
import { machineLine, table } from "./harness.ts";

/**
 * What is left of a server beyond saturation: two mock workers, requests at random times at half to four times what they
 * can do, clients that do not retry. Goodput is answers that were complete and within the limits (SLO) per second; once
 * with the frontend's gates, once with all of them open, in one process and one run.
 *
 * Usage: node benchmarks/overload.ts [--seconds=12]
 */
const SECONDS = Number(process.argv.find((argument) => argument.startsWith("--seconds="))?.split("=")[1] ?? 12);
const FACTORS = [0.5, 1, 2, 4];
/** To the first token, and to the end. */
const SLO = { firstMs: 1_000, wholeMs: 3_000 };
/** A client that has no answer by then leaves. */
const PATIENCE_MS = 10_000;
const OUTPUT_TOKENS = 40;
const PROMPT = "The quick brown fox jumps over the lazy dog. ".repeat(6);

const ENGINE = mockerConfig({ contextLength: 4_096, maxSequences: 8, maxBatchedTokens: 512, totalBlocks: 1_024 });

const OPEN = 1_000_000;
const SETUPS = {
  gates: { maxQueuedRequests: 16, limits: { queueTimeoutMs: 500 } },
  none: {
    maxQueuedRequests: OPEN,
    limits: {
      concurrentPerModel: OPEN,
      concurrentRequests: OPEN,
      queuedRequests: OPEN,
      queueTimeoutMs: 0,
      firstTokenTimeoutMs: 0,
      idleTimeoutMs: 0,
    },
  },
} as const;

interface Outcome {
  readonly status: number;
  readonly firstMs: number;
  readonly wholeMs: number;
  readonly isComplete: boolean;
}

const agent = new Agent({ keepAlive: true, maxSockets: Infinity });

function ask(port: number): Promise<Outcome> {
  const { promise, resolve } = Promise.withResolvers<Outcome>();
  const startMs = performance.now();
  let firstMs = Infinity;
  let status = 0;
  let tail = "";
  const end = (isComplete: boolean): void => {
    clearTimeout(timer);
    resolve({ status, firstMs, wholeMs: performance.now() - startMs, isComplete });
  };
  const body = JSON.stringify({
    model: "mock",
    prompt: PROMPT,
    max_tokens: OUTPUT_TOKENS,
    stream: true,
    ignore_eos: true,
  });
  const request = httpRequest(
    {
      port,
      agent,
      method: "POST",
      path: "/v1/completions",
      headers: { "content-type": "application/json", "content-length": Buffer.byteLength(body) },
    },
    (response) => {
      status = response.statusCode ?? 0;
      response.setEncoding("latin1");
      response.on("data", (text: string) => {
        if (firstMs === Infinity) firstMs = performance.now() - startMs;
        tail = (tail + text).slice(-64);
      });
      response.on("end", () => end(tail.includes("[DONE]")));
      response.on("error", () => end(false));
    },
  );
  const timer = setTimeout(() => request.destroy(), PATIENCE_MS);
  request.on("error", () => end(false));
  request.end(body);
  return promise;
}

/** Answers per second when each place always has a next request. */
async function capacity(cluster: InProcessCluster): Promise<number> {
  const untilMs = performance.now() + 4_000;
  let count = 0;
  const one = async (): Promise<void> => {
    while (performance.now() < untilMs) {
      await ask(cluster.frontend.port);
      count++;
    }
  };
  const startMs = performance.now();
  await Promise.all(Array.from({ length: 2 * ENGINE.maxSequences }, one));
  return (count * 1_000) / (performance.now() - startMs);
}

async function offer(cluster: InProcessCluster, perSecond: number, seed: number): Promise<Outcome[]> {
  const random = new SeededRandom(seed);
  const outcomes: Promise<Outcome>[] = [];
  const startMs = performance.now();
  let dueMs = startMs;
  for (;;) {
    dueMs += (-Math.log(1 - random.nextFloat()) * 1_000) / perSecond;
    if (dueMs > startMs + SECONDS * 1_000) break;
    const waitMs = dueMs - performance.now();
    if (waitMs > 0) await new Promise((resolve) => setTimeout(resolve, waitMs));
    outcomes.push(ask(cluster.frontend.port));
  }
  return Promise.all(outcomes);
}

function percentile(values: readonly number[], share: number): number {
  if (values.length === 0) return Number.NaN;
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]!;
}

export async function run(): Promise<void> {
  console.log(machineLine());
  const rows: Record<string, string | number>[] = [];
  const first = await start("gates");
  const most = await capacity(first);
  await first.stop();
  console.log(`capacity ${most.toFixed(1)} requests/s; SLO: first token ${SLO.firstMs} ms, whole ${SLO.wholeMs} ms\n`);
  for (const factor of FACTORS) {
    for (const setup of ["gates", "none"] as const) {
      const cluster = await start(setup);
      try {
        const outcomes = await offer(cluster, factor * most, Math.round(factor * 10));
        const accepted = outcomes.filter(({ status, firstMs }) => status === 200 && firstMs < Infinity);
        const good = accepted.filter(
          ({ isComplete, firstMs, wholeMs }) => isComplete && firstMs <= SLO.firstMs && wholeMs <= SLO.wholeMs,
        );
        rows.push({
          offered: `${factor}x`,
          gates: setup,
          requests: outcomes.length,
          "refused (529)": outcomes.filter(({ status }) => status === 529).length,
          "left or failed": outcomes.filter(({ isComplete, status }) => status !== 529 && !isComplete).length,
          "goodput/s": good.length / SECONDS,
          "p50 first ms": Math.round(
            percentile(
              accepted.map(({ firstMs }) => firstMs),
              0.5,
            ),
          ),
          "p99 first ms": Math.round(
            percentile(
              accepted.map(({ firstMs }) => firstMs),
              0.99,
            ),
          ),
          "p99 whole ms": Math.round(
            percentile(
              accepted.map(({ wholeMs }) => wholeMs),
              0.99,
            ),
          ),
        });
      } finally {
        await cluster.stop();
      }
    }
  }
  console.log(table(rows, 1));
  agent.destroy();
}

function start(setup: keyof typeof SETUPS): Promise<InProcessCluster> {
  const { maxQueuedRequests, limits } = SETUPS[setup];
  return startInProcessCluster({
    workers: 2,
    worker: { engine: ENGINE, modelName: "mock", maxQueuedRequests },
    frontend: { routerMode: "least-loaded", limits },
  });
}

if (import.meta.main) await run();
