import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { generateLoad } from "../src/bench/index.ts";
import { AdmissionGate, ModelPlaces } from "../src/frontend/admission.ts";
import { DEFAULT_LIMITS } from "../src/frontend/config.ts";
import type { GenerationRun } from "../src/frontend/generation-run.ts";
import type { Exchange } from "../src/frontend/http/index.ts";
import { LiveRequests, type LiveRequest } from "../src/frontend/live-requests.ts";
import type { ServedModel } from "../src/frontend/model-registry.ts";
import { ProgressWatch, type WatchedStream } from "../src/frontend/progress-watch.ts";
import { Metrics } from "../src/observability/index.ts";
import { TimerWheel, WheelTimer, systemClock } from "../src/std/index.ts";
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
 * The differences are smaller than what two equal frontends differ by on a shared machine, so the same parts are also called
 * in a loop, as a frontend with 32 requests under way calls them: their own CPU time per request.
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

/** Requests under way at a time in the loop. */
const IN_FLIGHT = 32;
const LOOP_REQUESTS = 500_000;
const LOOP_TOKENS = 16;

/** CPU ns per request of the gate, the live list, deadline and stage limits, the stream's own timer and the progress watch. */
function partsAloneNs(): number {
  const clock = systemClock;
  const metrics = new Metrics();
  const queuedGauge = metrics.gauge("dynamo_frontend_queued_requests").labels();
  const { concurrentRequests: limit, queuedRequests: queueLimit } = DEFAULT_LIMITS;
  const gate = new AdmissionGate({ limit, queueLimit, clock, queuedGauge });
  const live = new LiveRequests({ clock, gate, limits: DEFAULT_LIMITS, metrics });
  const watch = new ProgressWatch({ clock, limitMs: 30_000 });
  const wheel = new TimerWheel({ clock });
  // Only what these parts read of them.
  const model = { name: "echo", places: new ModelPlaces(() => 264) } as unknown as ServedModel;
  const exchange = { requestId: "x", arrivalMs: 0 } as unknown as Exchange;
  const run = {} as unknown as GenerationRun;
  const ring: { request: LiveRequest; stream: WatchedStream; timer: WheelTimer }[] = [];
  const begin = (): (typeof ring)[number] => {
    const nowMs = clock.monotonicMs();
    const request = live.enter({
      exchange,
      endpoint: "chat_completions",
      model,
      isStream: true,
      tenant: "",
      strictPriority: 0,
      priorityJump: 0,
      choices: 1,
      deadlineMs: nowMs + 600_000,
    });
    live.start(request, run, nowMs);
    const stream: WatchedStream = { isExpecting: true, onStalled: () => undefined };
    const progress = watch.enter("worker", stream);
    const timer = new WheelTimer({ onExpire: () => undefined });
    wheel.add(timer, 600_000);
    for (let token = 0; token < LOOP_TOKENS; token++) progress.items++;
    return { request, stream, timer };
  };
  const loop = (count: number): void => {
    for (let i = 0; i < count; i++) {
      const { request, stream, timer } = ring[i % IN_FLIGHT]!;
      wheel.cancel(timer);
      watch.leave("worker", stream);
      request.release();
      ring[i % IN_FLIGHT] = begin();
    }
  };
  for (let i = 0; i < IN_FLIGHT; i++) ring.push(begin());
  loop(LOOP_REQUESTS / 10);
  const before = process.cpuUsage();
  loop(LOOP_REQUESTS);
  const { user, system } = process.cpuUsage(before);
  for (const { request, stream, timer } of ring) {
    wheel.cancel(timer);
    watch.leave("worker", stream);
    request.release();
  }
  watch.close();
  return ((user + system) * 1_000) / LOOP_REQUESTS;
}

export async function run(): Promise<void> {
  console.log(machineLine());
  console.log(`the parts alone, in a loop: ${Math.round(partsAloneNs())} ns of CPU per request`);
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
