import { execFileSync, spawn } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { request } from "node:http";
import { homedir, tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { LlamaContext, MAX_SEQUENCE_IDS } from "../src/engines/llama/llama-context.ts";
import { argmax } from "../src/engines/llama/logit-kernels.ts";
import { freePort, startProcessCluster } from "../test/helpers/process-cluster.ts";
import { machineLine, median, table } from "./harness.ts";

/**
 * The whole path, from HTTP to SSE, with the real model: one worker process, one frontend process, this process as
 * client and, in turn with it, as a bare loop over libllama with the same batch and threads. Then the first token of a
 * 1,000-token prompt, cold and cached, and the time from the command to the first answer.
 *
 * Environment: DYN_TEST_MODEL a GGUF file, BENCH_THREADS compute threads (default 1), BENCH_ROUNDS.
 */
const MODEL =
  process.env["DYN_TEST_MODEL"] ?? join(homedir(), ".cache/dynamo-ts/models/SmolLM2-135M-Instruct.Q4_1.gguf");
const THREADS = Number(process.env["BENCH_THREADS"] ?? 1);
const ROUNDS = Number(process.env["BENCH_ROUNDS"] ?? 5);
const STREAMS = 16;
const PROMPT_TOKENS = 16;
const STEPS = 48;
const COMMAND = resolve(import.meta.dirname, "../bin/dynamo.mjs");

function aPrompt(length: number, salt: number): number[] {
  return Array.from({ length }, (_, i) => 300 + ((i * 37 + salt * 101 + ((i * i) % 7) * 11) % 4000));
}

interface StreamTimes {
  readonly firstMs: number;
  readonly lastMs: number;
  /** When each event with text came. */
  readonly eventsMs: readonly number[];
}

/** One streamed completion; resolves with when its first and its last event with text came. */
function streamOnce(port: number, prompt: number[], maxTokens: number): Promise<StreamTimes> {
  const body = JSON.stringify({
    model: "bench",
    prompt,
    max_tokens: maxTokens,
    temperature: 0,
    stream: true,
    ignore_eos: true,
  });
  return new Promise((done, failed) => {
    const sent = request(
      {
        port,
        host: "127.0.0.1",
        path: "/v1/completions",
        method: "POST",
        headers: { "content-type": "application/json" },
      },
      (response) => {
        let firstMs = 0;
        let lastMs = 0;
        const eventsMs: number[] = [];
        let tail = "";
        response.setEncoding("utf8");
        response.on("data", (chunk: string) => {
          const nowMs = performance.now();
          if (firstMs === 0) firstMs = nowMs;
          if (!chunk.startsWith("data: [DONE]")) lastMs = nowMs;
          for (let at = chunk.indexOf('"text":"'); at >= 0; at = chunk.indexOf('"text":"', at + 1)) {
            if (chunk[at + 8] !== '"') eventsMs.push(nowMs);
          }
          tail = (tail + chunk).slice(-40);
        });
        response.on("end", () =>
          tail.includes("[DONE]") ? done({ firstMs, lastMs, eventsMs }) : failed(new Error(`broken stream: ${tail}`)),
        );
      },
    );
    sent.on("error", failed);
    sent.end(body);
  });
}

/**
 * Tokens per second of all streams together while all of them run: from the first token of the last to begin, to the last
 * token of the first to end. A token is an event with text; the few tokens without text of their own are not counted.
 */
async function pathDecode(port: number): Promise<number> {
  const streams = await Promise.all(
    Array.from({ length: STREAMS }, (_, s) => streamOnce(port, aPrompt(PROMPT_TOKENS, s), STEPS + 1)),
  );
  const fromMs = Math.max(...streams.map((stream) => stream.firstMs));
  const toMs = Math.min(...streams.map((stream) => stream.lastMs));
  let tokens = 0;
  for (const { eventsMs } of streams) for (const ms of eventsMs) if (ms > fromMs && ms <= toMs) tokens++;
  return (tokens * 1_000) / (toMs - fromMs);
}

function bareDecode(context: LlamaContext): number {
  const { batch } = context;
  context.clearCells();
  const put = (at: number, token: number, position: number, sequence: number, wantsLogits: boolean): void => {
    batch.tokenIds[at] = token;
    batch.positions[at] = position;
    batch.sequenceIds[at] = sequence;
    batch.wantsLogits[at] = wantsLogits ? 1 : 0;
  };
  const next = new Int32Array(STREAMS);
  for (let s = 0; s < STREAMS; s++) {
    aPrompt(PROMPT_TOKENS, s).forEach((token, i) => put(i, token, i, s, i === PROMPT_TOKENS - 1));
    context.decode(PROMPT_TOKENS);
    next[s] = argmax(context.logits(PROMPT_TOKENS - 1));
  }
  const startedMs = performance.now();
  for (let step = 0; step < STEPS; step++) {
    for (let s = 0; s < STREAMS; s++) put(s, next[s]!, PROMPT_TOKENS + step, s, true);
    context.decode(STREAMS);
    for (let s = 0; s < STREAMS; s++) next[s] = argmax(context.logits(s));
  }
  return (STREAMS * STEPS * 1_000) / (performance.now() - startedMs);
}

/** From the command to the end of the first answer, model on disk. */
async function startToFirstAnswer(): Promise<number> {
  const port = await freePort();
  const root = mkdtempSync(join(tmpdir(), "dynamo-bench-"));
  const startedMs = performance.now();
  const child = spawn(
    process.execPath,
    [COMMAND, "local", "--http-port", String(port), "--model", MODEL, "--model-name", "bench"],
    {
      stdio: "ignore",
      env: { ...process.env, DYN_FILE_KV: root },
    },
  );
  const ended = new Promise((gone) => child.once("exit", gone));
  try {
    for (;;) {
      const answer = await fetch(`http://127.0.0.1:${port}/v1/completions`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ model: "bench", prompt: "Hello", max_tokens: 1 }),
      }).catch(() => undefined);
      if (answer?.ok === true) {
        await answer.json();
        return performance.now() - startedMs;
      }
      if (performance.now() - startedMs > 60_000) throw new Error("no answer within 60 s");
      await new Promise((wait) => setTimeout(wait, 20));
    }
  } finally {
    child.kill("SIGINT");
    await ended;
    rmSync(root, { recursive: true, force: true });
  }
}

function helpMs(): number {
  const startedMs = performance.now();
  execFileSync(process.execPath, [COMMAND, "--help"], { stdio: "ignore" });
  return performance.now() - startedMs;
}

export async function run(): Promise<void> {
  console.log(machineLine());
  if (!existsSync(MODEL)) {
    console.log(`whole-path: skipped, no model at ${MODEL} (npx dynamo model pull)`);
    return;
  }
  const cluster = await startProcessCluster(
    [
      "--model",
      MODEL,
      "--model-name",
      "bench",
      "--workers",
      "1",
      "--threads",
      String(THREADS),
      "--kv-cache-tokens",
      "8192",
    ],
    { DYN_LOG: "warn" },
  );
  const bare = new LlamaContext({
    modelPath: MODEL,
    cells: 8192,
    maxBatchedTokens: 512,
    maxLogitRows: MAX_SEQUENCE_IDS,
    sequenceIds: MAX_SEQUENCE_IDS,
    threads: THREADS,
    batchInvariant: true,
  });
  try {
    bareDecode(bare);
    await pathDecode(cluster.port);
    const rounds: { path: number; bare: number }[] = [];
    for (let round = 0; round < ROUNDS; round++) {
      const first = round % 2 === 0 ? await pathDecode(cluster.port) : 0;
      const ofBare = bareDecode(bare);
      rounds.push({ bare: ofBare, path: first === 0 ? await pathDecode(cluster.port) : first });
    }
    const prompts: { cold: number; cached: number }[] = [];
    for (let round = 0; round < ROUNDS; round++) {
      const times: number[] = [];
      for (let pass = 0; pass < 2; pass++) {
        const sentMs = performance.now();
        times.push((await streamOnce(cluster.port, aPrompt(1_000, 1_000 + round), 1)).firstMs - sentMs);
      }
      prompts.push({ cold: times[0]!, cached: times[1]! });
    }
    console.log(
      `one worker, ${THREADS} compute thread(s), ${ROUNDS} rounds, medians; decode: ${STREAMS} streams, HTTP to SSE\n`,
    );
    console.log(
      table([
        {
          what: "decode, tok/s",
          ours: median(rounds.map((round) => round.path)),
          baseline: median(rounds.map((round) => round.bare)),
          ratio: median(rounds.map((round) => round.path / round.bare)),
          aim: "0.9 of bare libllama",
        },
        {
          what: "first token of 1,000, ms",
          ours: median(prompts.map((round) => round.cached)),
          baseline: median(prompts.map((round) => round.cold)),
          ratio: median(prompts.map((round) => round.cold / round.cached)),
          aim: "25 times sooner than cold",
        },
      ]),
    );
  } finally {
    bare.close();
    await cluster.stop();
  }
  const starts: number[] = [];
  for (let round = 0; round < ROUNDS; round++) starts.push(await startToFirstAnswer());
  const helps = Array.from({ length: 9 }, helpMs);
  console.log(
    `\ndynamo local, command to first answer: ${starts.map((ms) => Math.round(ms)).join(" ")} ms, median ${Math.round(median(starts))} (aim 2,000)`,
  );
  console.log(`dynamo --help: median ${Math.round(median(helps))} ms (aim 100)`);
}

if (import.meta.main) await run();
