import { fork } from "node:child_process";
import { once } from "node:events";
import { generateLoad, type LoadReport } from "../src/bench/index.ts";
import { cpuTimeOf, machineLine, median, table } from "./harness.ts";
import { chat, prepare, startSide, type Side } from "./race.ts";

/**
 * Do streams stall behind long prompts? 16 streams of one model, whose mock workers give tokens at the pace of real ones,
 * while prompts of 288 kB arrive for another model of the same frontend, whose mock workers answer at once. So what the
 * streams feel is the frontend alone (and the machine that all share). The streams' gaps between tokens, as the client
 * sees them, with the long prompts and without in turn; our frontend and the real Dynamo 1.4.2 (see race.ts). The long
 * prompts come from a process of their own.
 *
 * Usage: npm run bench -- stall     Environment: those of race.ts but RACE_ROWS; STALL_SIDES=ours leaves Dynamo out.
 */
const SECONDS = Number(process.env["RACE_SECONDS"] ?? 6);
const ROUNDS = Number(process.env["RACE_ROUNDS"] ?? 3);
const STREAMS = 16;
const STREAM = { model: "steady", chars: 1_000, out: 256 };

const LOADS = [
  { name: "no long prompts", shared: 0, own: 0, concurrency: 0 },
  { name: "288 kB, 230 kB shared, c=8", shared: 230_000, own: 58_000, concurrency: 8 },
  { name: "288 kB, nothing shared, c=8", shared: 0, own: 288_000, concurrency: 8 },
  { name: "288 kB, nothing shared, c=32", shared: 0, own: 288_000, concurrency: 32 },
] as const;

type Load = (typeof LOADS)[number];

interface Measured {
  readonly streams: LoadReport;
  readonly longPrompts: LoadReport | undefined;
  readonly cpuShare: number;
}

async function measure(side: Side, load: Load): Promise<Measured> {
  const stop = new AbortController();
  const longPrompts = load.concurrency === 0 ? undefined : sendLongPrompts(side.port, load, stop.signal);
  await longPrompts?.started;
  const before = cpuTimeOf(side.pid);
  const streams = await generateLoad({
    host: "127.0.0.1",
    port: side.port,
    body: chat(STREAM),
    concurrency: STREAMS,
    durationMs: SECONDS * 1_000,
  });
  const after = cpuTimeOf(side.pid);
  const cpuMs = after.userMs + after.systemMs - before.userMs - before.systemMs;
  stop.abort();
  return { streams, longPrompts: await longPrompts?.report, cpuShare: cpuMs / streams.wallMs };
}

interface LongPrompts {
  readonly started: Promise<unknown>;
  readonly report: Promise<LoadReport>;
}

/** In another process, until the signal. */
function sendLongPrompts(port: number, load: Load, signal: AbortSignal): LongPrompts {
  const child = fork(import.meta.filename, ["long-prompts", String(port), load.name]);
  // Also when this benchmark itself fails half-way.
  const kill = (): void => void child.kill("SIGKILL");
  process.once("exit", kill);
  child.once("exit", () => process.off("exit", kill));
  const started = once(child, "message");
  const report = started.then(async () => {
    const answer = once(child, "message") as Promise<[LoadReport]>;
    if (!signal.aborted) await once(signal, "abort");
    child.send("stop");
    const [sent] = await answer;
    child.disconnect();
    return sent;
  });
  return { started, report };
}

async function longPromptsProcess(port: number, name: string): Promise<void> {
  const load = LOADS.find((each) => each.name === name)!;
  const stop = new AbortController();
  process.once("message", () => stop.abort());
  // Texts that no run before this one has sent.
  const body = chat({ chars: load.own, shared: load.shared, out: 1, variants: 400, seed: process.pid * 4_001 });
  const running = generateLoad({
    host: "127.0.0.1",
    port,
    body,
    concurrency: load.concurrency,
    durationMs: 600_000,
    signal: stop.signal,
  });
  process.send!("started");
  process.send!(await running);
}

export async function run(): Promise<void> {
  console.log(machineLine());
  const problem = prepare();
  if (problem !== undefined) {
    console.log(`stall: skipped, the real Dynamo could not be installed: ${problem}`);
    return;
  }
  const names: readonly Side["name"][] = process.env["STALL_SIDES"] === "ours" ? ["ours"] : ["ours", "dynamo"];
  const rows: Record<string, string | number>[] = [];
  for (const name of names) {
    const side = await startSide(name, 4, 2);
    try {
      // Both models have their tokenizer and the code is compiled.
      for (const load of LOADS) await measure(side, load);
      const all = LOADS.map((load) => ({ load, rounds: [] as Measured[] }));
      for (let round = 0; round < ROUNDS; round++) {
        for (const { load, rounds } of all) rounds.push(await measure(side, load));
      }
      for (const { load, rounds } of all) rows.push(row(name, load, rounds));
    } finally {
      await side.stop();
    }
  }
  console.log(
    `\n${STREAMS} streams, gaps between their tokens; ${ROUNDS} rounds of ${SECONDS} s, medians; aim: p99 20 ms\n`,
  );
  console.log(table(rows));
}

function row(name: string, load: Load, rounds: readonly Measured[]): Record<string, string | number> {
  const mid = (of: (measured: Measured) => number): string => median(rounds.map(of)).toFixed(1);
  return {
    frontend: name,
    "long prompts": load.name,
    "gap p50 ms": mid(({ streams }) => streams.itlMs.p50),
    "p99 ms": mid(({ streams }) => streams.itlMs.p99),
    "max ms": mid(({ streams }) => streams.itlMs.max),
    "long prompts/s": mid(({ longPrompts }) => longPrompts?.requestsPerSecond ?? 0),
    "frontend cores": mid(({ cpuShare }) => cpuShare),
    failed: rounds.reduce((sum, { streams }) => sum + streams.failedCount, 0),
  };
}

if (process.argv[2] === "long-prompts") await longPromptsProcess(Number(process.argv[3]), process.argv[4]!);
else if (import.meta.main) await run();
