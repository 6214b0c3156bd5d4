import { existsSync, readFileSync } from "node:fs";
import { mkdtemp, readdir, rm, stat } from "node:fs/promises";
import { homedir, tmpdir } from "node:os";
import { join } from "node:path";
import { systemClock, systemRandom } from "../src/std/index.ts";
import { BUCKET, type S3Server } from "../src/transfer/s3/fixtures/s3-server.ts";
import { S3Client } from "../src/transfer/s3/index.ts";
import { startProcessCluster, type ProcessCluster } from "../test/helpers/process-cluster.ts";
import { machineLine, median, table } from "./harness.ts";
import { startS3Process } from "./s3-process.ts";

/**
 * KV tiers, from HTTP to SSE with the real model and one worker: the first token of a 1,000-token prompt computed, and
 * with its blocks restored from host memory, from disk, from a shared folder and from an object store (a local S3 server
 * in a process of its own), beside bare GETs of the same objects; then decode throughput with offload running beside the same without tiers. Disk, folder and store are
 * read by a restarted worker, so that nothing is left in memory but the kernel's page cache.
 *
 * Environment: DYN_TEST_MODEL a GGUF file, BENCH_THREADS compute threads (default 1), BENCH_ROUNDS; BENCH_ONLY=pattern
 * leaves out tiers whose name it does not match;
 * BENCH_TEXTS=50 compares the texts of so many prompts instead, of at most BENCH_CHARACTERS.
 */
const MODEL =
  process.env["DYN_TEST_MODEL"] ?? join(homedir(), ".cache/dynamo-ts/models/SmolLM2-135M-Instruct.Q4_1.gguf");
const THREADS = Number(process.env["BENCH_THREADS"] ?? 1);
const ROUNDS = Number(process.env["BENCH_ROUNDS"] ?? 5);
/** Only compares texts, of so many prompts. */
const TEXTS = Number(process.env["BENCH_TEXTS"] ?? 0);
const MAX_CHARACTERS = Number(process.env["BENCH_CHARACTERS"] ?? 7_000);
/** Tiers to measure. */
const ONLY = new RegExp(process.env["BENCH_ONLY"] ?? "");
/** 62 whole blocks of 16 before the last token. */
const PROMPT_TOKENS = 1_000;
const BLOCKS = Math.floor((PROMPT_TOKENS - 1) / 16);
const CACHED_TOKENS = BLOCKS * 16;
/** Two prompts fit into the engine's own cache, so older ones must come from below. */
const DEVICE_TOKENS = 2_560;
const ANSWER_TOKENS = 16;
const STREAMS = 8;
const DECODE_TOKENS = 128;

const aPrompt = (length: number, salt: number): number[] =>
  Array.from({ length }, (_, i) => 300 + ((i * 37 + salt * 101 + ((i * i) % 7) * 11) % 4000));

interface Answer {
  readonly firstMs: number;
  readonly text: string;
  readonly cachedTokens: number;
  readonly elapsedMs: number;
}

/** One streamed completion: when its first event with text came, after the request was sent. */
async function ask(cluster: ProcessCluster, prompt: readonly number[] | string, maxTokens: number): Promise<Answer> {
  const sentMs = performance.now();
  const response = await fetch(`${cluster.baseUrl}/v1/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({
      model: "bench",
      prompt,
      max_tokens: maxTokens,
      temperature: 0,
      stream: true,
      stream_options: { include_usage: true },
      ignore_eos: true,
    }),
  });
  let firstMs = 0;
  let body = "";
  const decoder = new TextDecoder();
  for await (const chunk of response.body!) {
    if (firstMs === 0) firstMs = performance.now() - sentMs;
    body += decoder.decode(chunk as Uint8Array, { stream: true });
  }
  if (!body.includes("[DONE]")) throw new Error(`broken stream: ${body.slice(-200)}`);
  const events = [...body.matchAll(/^data: (\{.*\})$/gm)].map(
    ([, json]) =>
      JSON.parse(json!) as {
        choices: { text?: string }[];
        usage?: { prompt_tokens_details?: { cached_tokens?: number } } | null;
      },
  );
  const usage = events.findLast((event) => (event.usage ?? undefined) !== undefined)?.usage;
  return {
    firstMs,
    text: events.map((event) => event.choices[0]?.text ?? "").join(""),
    cachedTokens: usage?.prompt_tokens_details?.cached_tokens ?? 0,
    elapsedMs: performance.now() - sentMs,
  };
}

function start(tierFlags: readonly string[], environment: NodeJS.ProcessEnv = {}): Promise<ProcessCluster> {
  return startProcessCluster(
    [
      `--model=${MODEL}`,
      "--model-name=bench",
      "--workers=1",
      `--threads=${THREADS}`,
      `--kv-cache-tokens=${DEVICE_TOKENS}`,
      ...tierFlags,
    ],
    { DYN_LOG: "warn", ...environment },
  );
}

interface Setup {
  readonly name: string;
  readonly aim: number;
  readonly flags: readonly string[];
  readonly environment?: NodeJS.ProcessEnv;
  /** Blocks that are below; undefined = the tier is the worker's memory, which a restart would lose. */
  readonly storedBlocks?: () => Promise<number>;
}

async function measure(setup: Setup): Promise<Record<string, string | number>> {
  let cluster = await start(setup.flags, setup.environment);
  try {
    const prompts = Array.from({ length: ROUNDS }, (_, round) => aPrompt(PROMPT_TOKENS, 1_000 + round));
    const cold: Answer[] = [];
    const again: Answer[] = [];
    for (const prompt of prompts) {
      cold.push(await ask(cluster, prompt, ANSWER_TOKENS));
      again.push(await ask(cluster, prompt, ANSWER_TOKENS));
    }
    if (setup.storedBlocks !== undefined) {
      const deadlineMs = performance.now() + 60_000;
      while ((await setup.storedBlocks()) < ROUNDS * BLOCKS) {
        if (performance.now() > deadlineMs) throw new Error(`${setup.name}: the blocks were not stored within 60 s`);
        await new Promise((wait) => setTimeout(wait, 50));
      }
      await cluster.stop();
      cluster = await start(setup.flags, setup.environment);
      await ask(cluster, aPrompt(100, 1), 4);
    }
    const restored: Answer[] = [];
    for (const prompt of prompts) restored.push(await ask(cluster, prompt, ANSWER_TOKENS));
    const short = restored.filter((answer) => answer.cachedTokens !== CACHED_TOKENS).length;
    if (short > 0) console.log(`${setup.name}: ${short} of ${ROUNDS} prompts were not restored whole`);
    return {
      "first token from": setup.name,
      ms: median(restored.map((answer) => answer.firstMs)),
      "engine's cache, ms": median(again.map((answer) => answer.firstMs)),
      "computed, ms": median(cold.map((answer) => answer.firstMs)),
      "times sooner": median(restored.map((answer, i) => cold[i]!.firstMs / answer.firstMs)),
      aim: setup.aim,
      "same text": `${restored.filter((answer, i) => answer.text === again[i]!.text).length} of ${ROUNDS}`,
    };
  } finally {
    await cluster.stop();
  }
}

/**
 * Greedy texts of prompts of 10 to 2,400 tokens, cut from our own pages, computed whole and restored from each tier, beside
 * the same from the engine's own cache. See docs/design/same-text.md.
 */
async function compareTexts(
  folder: string,
  s3: readonly [flag: string, environment: NodeJS.ProcessEnv],
): Promise<void> {
  const pages = ["faults", "walk", "environment"].map((page) =>
    readFileSync(join(import.meta.dirname, `../docs/${page}.md`), "utf8"),
  );
  const text = pages.join("\n").replaceAll(/ {2,}|-{3,}/g, " ");
  const prompts = Array.from({ length: TEXTS }, (_, i) => {
    const at = Math.floor((i * (text.length - MAX_CHARACTERS)) / TEXTS);
    return text.slice(at, at + 30 + Math.floor((MAX_CHARACTERS * i * i) / TEXTS ** 2));
  });
  const disk = ["--kv-disk=4GB", `--kv-disk-path=${folder}`, "--kv-disk-every-block"];
  const [bucketFlag, environment] = s3;
  const cached: Answer[] = [];
  const rows: Record<string, string | number>[] = [];
  const note = (what: string, answers: readonly Answer[]): void => {
    rows.push({
      "greedy texts": what,
      "the same": answers.filter((answer, i) => answer.text === cached[i]!.text).length,
      of: TEXTS,
      "tokens restored": answers.reduce((sum, answer) => sum + answer.cachedTokens, 0),
    });
  };
  const askAll = async (cluster: ProcessCluster): Promise<Answer[]> => {
    const answers: Answer[] = [];
    for (const prompt of prompts) answers.push(await ask(cluster, prompt, ANSWER_TOKENS));
    return answers;
  };
  const inOneLife = async (
    flags: readonly string[],
    body: (cluster: ProcessCluster) => Promise<void>,
  ): Promise<void> => {
    const cluster = await start(flags, environment);
    try {
      // A listing of the store goes on beside it.
      await ask(cluster, aPrompt(100, 1), 4);
      await body(cluster);
    } finally {
      await cluster.stop();
    }
  };
  await inOneLife(["--kv-host=4GB", ...disk, bucketFlag], async (cluster) => {
    const cold: Answer[] = [];
    for (const prompt of prompts) {
      cold.push(await ask(cluster, prompt, ANSWER_TOKENS));
      cached.push(await ask(cluster, prompt, ANSWER_TOKENS));
    }
    note("computed whole", cold);
    note("from host memory", await askAll(cluster));
    // What still goes down.
    await new Promise((wait) => setTimeout(wait, 5_000));
  });
  await inOneLife(disk, async (cluster) => note("from disk, after a restart", await askAll(cluster)));
  await inOneLife([bucketFlag], async (cluster) => note("from the store, after a restart", await askAll(cluster)));
  console.log(table(rows, 0));
}

/** What the server alone costs: the objects of one prompt, fetched by a client that does nothing else with them. */
async function bareGets({ options, directory }: S3Server): Promise<void> {
  const client = new S3Client(options, { clock: systemClock, random: systemRandom });
  const limits = (): { signal: AbortSignal; deadlineMs: number } => ({
    signal: AbortSignal.timeout(60_000),
    deadlineMs: Infinity,
  });
  try {
    const objects = await client.list(BUCKET, "", "", limits());
    const pieces = objects.map(({ byteCount }) => Buffer.alloc(byteCount));
    const times: number[] = [];
    for (let round = 0; round < ROUNDS; round++) {
      const startedMs = performance.now();
      await Promise.all(objects.map(({ key }, i) => client.get({ bucket: BUCKET, key }, 0, [pieces[i]!], limits())));
      times.push((performance.now() - startedMs) / ROUNDS);
    }
    const blocks = await blocksBelow(directory);
    console.log(
      table([
        {
          "bare GETs": "the blocks of one prompt",
          ms: median(times),
          "blocks per object": (blocks / objects.length).toFixed(1),
        },
      ]),
    );
  } finally {
    await client.close();
  }
}

/** Tokens per second of all streams together, prompts included: every round fills the tiers with new blocks. */
async function decode(cluster: ProcessCluster, round: number): Promise<number> {
  const startedMs = performance.now();
  await Promise.all(
    Array.from({ length: STREAMS }, (_, s) => ask(cluster, aPrompt(32, round * STREAMS + s), DECODE_TOKENS)),
  );
  return (STREAMS * DECODE_TOKENS * 1_000) / (performance.now() - startedMs);
}

async function compareDecode(folder: string): Promise<void> {
  const off = await start([]);
  const on = await start(["--kv-host=400MB", "--kv-disk=1GB", `--kv-disk-path=${folder}`, "--kv-disk-every-block"]);
  try {
    await decode(off, 0);
    await decode(on, 0);
    const rounds: { off: number; on: number }[] = [];
    for (let round = 1; round <= ROUNDS; round++) {
      const offFirst = round % 2 === 0 ? await decode(off, round) : 0;
      const withOffload = await decode(on, round);
      rounds.push({ on: withOffload, off: offFirst === 0 ? await decode(off, round) : offFirst });
    }
    console.log(
      table([
        {
          [`decode, ${STREAMS} streams, tok/s`]: "offload to host and disk",
          ours: median(rounds.map((round) => round.on)),
          "without tiers": median(rounds.map((round) => round.off)),
          ratio: median(rounds.map((round) => round.on / round.off)),
          aim: "0.95",
        },
      ]),
    );
  } finally {
    await on.stop();
    await off.stop();
  }
}

/** Whole blocks in the files below a folder. */
async function blocksBelow(folder: string): Promise<number> {
  let count = 0;
  for (const name of await readdir(folder, { recursive: true }).catch(() => [])) {
    const { size } = await stat(join(folder, name)).catch(() => ({ size: 0 }));
    count += Math.floor(size / BLOCK_BYTES);
  }
  return count;
}

/** 23,040 bytes a token. */
const BLOCK_BYTES = 16 * 23_040;

export async function run(): Promise<void> {
  console.log(machineLine());
  if (!existsSync(MODEL)) {
    console.log(`tiers: skipped, no model at ${MODEL} (npx dynamo model pull)`);
    return;
  }
  const folder = await mkdtemp(join(tmpdir(), "dynamo-bench-tiers-"));
  let server: S3Server | undefined;
  try {
    server = await startS3Process();
    const { endpoint, accessKeyId, secretAccessKey } = server.options;
    const disk = join(folder, "disk");
    const shared = await mkdtemp(join(folder, "shared-"));
    const setups: readonly Setup[] = [
      { name: "host memory", aim: 25, flags: ["--kv-host=600MB"] },
      {
        name: "disk, after a restart",
        aim: 20,
        flags: ["--kv-disk=2GB", `--kv-disk-path=${disk}`, "--kv-disk-every-block"],
        storedBlocks: () => blocksBelow(disk),
      },
      {
        name: "shared folder, after a restart",
        aim: 10,
        flags: [`--kv-s3=file://${shared}`],
        storedBlocks: () => blocksBelow(shared),
      },
      {
        name: "object store, after a restart",
        aim: 10,
        flags: [`--kv-s3=${endpoint}/${BUCKET}`],
        environment: { AWS_ACCESS_KEY_ID: accessKeyId, AWS_SECRET_ACCESS_KEY: secretAccessKey },
        storedBlocks: () => blocksBelow(server!.directory),
      },
    ];
    if (TEXTS > 0) {
      await compareTexts(join(folder, "texts"), [
        `--kv-s3=${endpoint}/${BUCKET}`,
        { AWS_ACCESS_KEY_ID: accessKeyId, AWS_SECRET_ACCESS_KEY: secretAccessKey },
      ]);
      return;
    }
    const rows: Record<string, string | number>[] = [];
    for (const setup of setups) if (ONLY.test(setup.name)) rows.push(await measure(setup));
    console.log(`${PROMPT_TOKENS} tokens, ${THREADS} compute thread(s), ${ROUNDS} rounds, medians; HTTP to SSE\n`);
    console.log(table(rows));
    if (ONLY.test("object store")) await bareGets(server);
    console.log("");
    if (ONLY.test("decode")) await compareDecode(join(folder, "decode"));
  } finally {
    await server?.close();
    await rm(folder, { recursive: true, force: true });
  }
}

if (import.meta.main) await run();
