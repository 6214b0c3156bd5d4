import { TokenSource } from "../../src/engines/mocker/token-source.ts";
import { SeededRandom, type Random } from "../../src/std/index.ts";
import { until } from "../helpers/in-process-cluster.ts";
import { ChaosCluster, getJson, getText, postJson } from "./chaos-cluster.ts";
import { CheckedLoad, type Ended, type Expected, type Outcome } from "./checked-load.ts";
import { GreedyJudge } from "./greedy-judge.ts";
import { Nemesis, type Disturbance, type Fault } from "./nemesis.ts";

export interface ChaosOptions {
  readonly seed: number;
  readonly durationMs: number;
  /** A GGUF file; without one, mock workers. */
  readonly modelPath?: string;
  readonly workers?: number;
  readonly frontends?: number;
  readonly concurrency?: number;
  readonly meanGapMs?: number;
  readonly maxOutageMs?: number;
  /** One line each; faults, and with `verbose` what the processes write. */
  readonly onLine: (line: string) => void;
  readonly verbose?: boolean;
  /** Breaks the run off: it ends with a violation, and leaves nothing behind either. */
  readonly signal?: AbortSignal;
}

export interface ChaosReport {
  readonly seed: number;
  readonly faults: Readonly<Record<Fault, number>>;
  readonly skipped: ReadonlyMap<Fault, string>;
  readonly outcomes: Readonly<Record<Outcome, number>>;
  /** Errors by their reason. */
  readonly details: ReadonlyMap<string, number>;
  readonly restarts: number;
  readonly processes: number;
  /** What must not be; empty when all held. */
  readonly violations: readonly string[];
  /** The longest any request took. */
  readonly slowestMs: number;
}

const REQUEST_TIMEOUT_MS = 60_000;
const RECOVERED_REQUESTS = 100;
const MAX_SHOWN = 20;

/**
 * A whole run: start, learn what is right, break things under load, heal, check. Leaves nothing behind. As the faults
 * leave a worker and a frontend alone at any time, none may cost a client anything but the connection to a frontend that
 * was killed: every request is answered in full.
 */
export async function runChaos(options: ChaosOptions): Promise<ChaosReport> {
  const { seed, durationMs, modelPath, onLine, workers = 3, frontends = 2 } = options;
  const random = new SeededRandom(seed);
  const startMs = performance.now();
  const since = (ms: number): string => `+${((ms - startMs) / 1_000).toFixed(2)} s`;
  const isMock = modelPath === undefined;
  const lines: string[] = [];
  const cluster = await ChaosCluster.start({
    workers,
    frontends,
    modelPath,
    speedupRatio: 1,
    logLevel: options.verbose === true ? "info" : "warn",
    onLine: (line) => {
      if (options.verbose === true) onLine(line);
      lines.push(line);
      if (lines.length > 4_000) lines.splice(0, 2_000);
    },
  });
  const violations: string[] = [];
  const ended: Ended[] = [];
  const nemesis = new Nemesis({
    cluster,
    random: new SeededRandom(seed + 1),
    meanGapMs: options.meanGapMs ?? 1_500,
    maxOutageMs: options.maxOutageMs ?? 6_000,
    onFault: (text) => onLine(`${since(performance.now())} ${text}`),
  });
  const run = async (): Promise<void> => {
    const expected = await learn(cluster, isMock ? mockPrompts(random) : modelPrompts(), isMock);
    const load = new CheckedLoad({
      ports: cluster.ports,
      model: cluster.model,
      expected,
      isAnswerUnique: isMock,
      concurrency: options.concurrency ?? (isMock ? 16 : 4),
      random,
      timeoutMs: REQUEST_TIMEOUT_MS,
      onEnd: (one) => ended.push(one),
    });
    load.start();
    await nemesis.run(durationMs);
    await cluster.settled(60_000);
    await load.stop();
    if (load.sentCount !== ended.length) violations.push(`${load.sentCount} sent, ${ended.length} ended`);
    const disturbedCount = ended.length;
    await askRecovered(load);
    if (!isMock) await judgeOthers(ended, cluster, expected);
    violations.push(...judge(ended.slice(0, disturbedCount), nemesis.disturbances, since));
    violations.push(...checkRecovered(ended.slice(disturbedCount)));
    violations.push(...(await checkAtRest(cluster)));
    load.close();
    violations.push(...(await cluster.leave()));
  };
  await Promise.race([run(), brokenOff(options.signal)]).catch((thrown: unknown) => violations.push(String(thrown)));
  violations.push(...nemesis.problems);
  for (const { name, unasked } of cluster.processes) {
    for (const { atMs, wasReady, text } of unasked) {
      if (wasReady || !isNear({ startedMs: atMs, endedMs: atMs }, nemesis.disturbances, stopsStarts, 1_000)) {
        violations.push(`${name}: ${text}`);
      }
    }
  }
  const restarts = cluster.processes.reduce((sum, { restartCount }) => sum + restartCount, 0);
  const stillThere = await cluster.stop();
  if (stillThere.length > 0) violations.push(`processes left: ${stillThere.join(", ")}`);
  if (violations.length > 0 && options.verbose !== true) for (const line of lines.slice(-200)) onLine(line);
  return {
    seed,
    faults: nemesis.counts,
    skipped: nemesis.skipped,
    outcomes: countOutcomes(ended),
    details: countDetails(ended),
    restarts,
    processes: cluster.pids.size,
    violations,
    slowestMs: Math.max(0, ...ended.map(({ startedMs, endedMs }) => endedMs - startedMs)),
  };
}

/** Rejects when the signal aborts. */
function brokenOff(signal: AbortSignal | undefined): Promise<never> {
  return new Promise((_, reject) => {
    const abort = (): void => reject(new Error("the run was broken off"));
    if (signal?.aborted === true) abort();
    else signal?.addEventListener("abort", abort, { once: true });
  });
}

// ---- What is right ----

interface Question {
  readonly prompt: string;
  readonly maxTokens: number;
}

function mockPrompts(random: Random): Question[] {
  return Array.from({ length: 48 }, (_, index) => ({
    prompt: `${index}: ${"lorem ipsum dolor ".repeat(1 + Math.floor(random.nextFloat() * 40))}`,
    maxTokens: 1 + Math.floor(random.nextFloat() * 120),
  }));
}

function modelPrompts(): Question[] {
  const subjects = ["rivers", "bread", "the moon", "sailing", "bees", "chess", "winter", "glass"];
  return subjects.map((subject, index) => ({
    prompt: `Here is a short text about ${subject}:`,
    maxTokens: 16 + 4 * index,
  }));
}

/** Answers of the undisturbed cluster; those of the mock engine are computed here as well, and must agree. */
function learn(cluster: ChaosCluster, questions: readonly Question[], isMock: boolean): Promise<Expected[]> {
  return Promise.all(
    questions.map(async ({ prompt, maxTokens }, index) => {
      const port = cluster.ports[index % cluster.ports.length]!;
      const body = { model: cluster.model, prompt, max_tokens: maxTokens, temperature: 0 };
      const answer = await postJson(port, "/v1/completions", body, 60_000);
      const { choices } = answer as { choices: { text: string }[] };
      const text = choices[0]!.text;
      if (isMock && text !== mockAnswer(prompt, maxTokens)) {
        throw new Error(`the mock engine answers ${JSON.stringify(text)} to ${JSON.stringify(prompt)}`);
      }
      return { prompt, maxTokens, text };
    }),
  );
}

function mockAnswer(prompt: string, maxTokens: number): string {
  const source = new TokenSource(Uint32Array.from(Buffer.from(prompt)), { vocabularySize: 256, maxTokens });
  const bytes: number[] = [];
  for (let i = 0; i < maxTokens; i++) {
    bytes.push(source.peek());
    source.absorb(bytes[i]!);
  }
  return Buffer.from(bytes).toString("latin1");
}

// ---- Checkers ----

function judge(ended: readonly Ended[], disturbances: readonly Disturbance[], since: (ms: number) => string): string[] {
  const found: string[] = [];
  for (const one of ended) {
    const why = violationOf(one, disturbances);
    if (why !== undefined)
      found.push(`${since(one.startedMs)} to ${since(one.endedMs)} ${one.outcome}: ${one.detail} (${why})`);
  }
  const more = found.length - MAX_SHOWN;
  return more > 0 ? [...found.slice(0, MAX_SHOWN), `and ${more} more requests`] : found;
}

function violationOf(one: Ended, disturbances: readonly Disturbance[]): string | undefined {
  if (one.outcome === "ok") return undefined;
  if (one.outcome === "connection") {
    // Who talks to a frontend that is killed sees its connection break: nothing of ours is left to answer.
    return isNear(one, disturbances, (fault) => fault === "frontend-kill", 1_000)
      ? undefined
      : "no frontend was killed";
  }
  // An error too: a worker and a frontend were left alone at any time.
  return "never allowed";
}

/** A role that cannot announce itself does not start; it says so and is started again. */
function stopsStarts(fault: Fault): boolean {
  return fault.startsWith("discovery") || fault === "disk-full";
}

function isNear(
  { startedMs, endedMs }: Pick<Ended, "startedMs" | "endedMs">,
  disturbances: readonly Disturbance[],
  matches: (fault: Fault) => boolean,
  slackMs: number,
): boolean {
  return disturbances.some(
    ({ fault, fromMs, toMs }) => matches(fault) && fromMs <= endedMs && startedMs <= toMs + slackMs,
  );
}

async function askRecovered(load: CheckedLoad): Promise<void> {
  const batch = 4;
  for (let i = 0; i < RECOVERED_REQUESTS / batch; i++) {
    await Promise.all(Array.from({ length: batch }, () => load.one()));
  }
}

function checkRecovered(answers: readonly Ended[]): string[] {
  const problems: string[] = [];
  for (const { outcome, detail } of answers) {
    if (outcome !== "ok") problems.push(`after the faults: ${outcome} ${detail}`);
  }
  return problems.slice(0, MAX_SHOWN);
}

/** Of a real model: whether what differs from the answers learned is right as well. Changes `ended` in place. */
async function judgeOthers(ended: Ended[], cluster: ChaosCluster, expected: readonly Expected[]): Promise<void> {
  const judge = new GreedyJudge(cluster.ports[0]!, cluster.model);
  await checkJudge(judge, expected);
  for (const [index, one] of ended.entries()) {
    if (one.outcome !== "other") continue;
    const problem = await judge.problemOf(one.prompt, one.text);
    ended[index] = problem === undefined ? { ...one, outcome: "ok" } : { ...one, outcome: "wrong", detail: problem };
  }
}

/** A judge that could not find a lost or doubled word would be no judge. */
async function checkJudge(judge: GreedyJudge, expected: readonly Expected[]): Promise<void> {
  let missed = 0;
  for (const { prompt, text } of expected) {
    const problem = await judge.problemOf(prompt, text);
    if (problem !== undefined) throw new Error(`the judge rejects what was learned: ${problem}`);
    const words = text.split(" ");
    const middle = Math.floor(words.length / 2);
    for (const broken of [words.toSpliced(middle, 1), words.toSpliced(middle, 0, words[middle]!)]) {
      if ((await judge.problemOf(prompt, broken.join(" "))) === undefined) missed++;
    }
  }
  if (missed > expected.length / 4)
    throw new Error(`the judge missed ${missed} of ${2 * expected.length} broken answers`);
}

interface Preview {
  readonly decisions: readonly Decision[];
}

interface Decision {
  readonly candidates: readonly {
    readonly instance_id: string;
    readonly load: { readonly active_requests: number; readonly prefill_tokens: number };
  }[];
}

/** With no request anywhere: nothing booked, nothing open, no block in use. */
async function checkAtRest(cluster: ChaosCluster): Promise<string[]> {
  const problems: string[] = [];
  for (const port of cluster.ports) {
    let left = "";
    const isAtRest = async (): Promise<boolean> => {
      const preview = await getJson<Preview>(port, "/v1/route", { model: cluster.model, prompt: "x", max_tokens: 1 });
      const text = await getText(port, "/metrics");
      const busy =
        preview?.decisions[0]?.candidates.filter(
          ({ load }) => load.active_requests !== 0 || load.prefill_tokens !== 0,
        ) ?? [];
      const open = [...text.matchAll(AT_REST)].filter(([, , value]) => Number(value) !== 0).map(([line]) => line);
      left = [...busy.map((candidate) => JSON.stringify(candidate)), ...open].join("; ");
      return preview?.decisions[0] !== undefined && left === "";
    };
    await until(isAtRest, "rest", 10_000).catch(() => problems.push(`frontend on ${port} at rest: ${left}`));
  }
  return problems;
}

const AT_REST =
  /^(dynamo_frontend_active_requests|dynamo_request_plane_inflight|dynamo_frontend_queued_requests|dynamo_frontend_worker_active_decode_blocks|dynamo_frontend_worker_active_prefill_tokens)(?:\{[^}]*\})? (\S+)$/gm;

function countOutcomes(ended: readonly Ended[]): Record<Outcome, number> {
  const counts: Record<Outcome, number> = { ok: 0, error: 0, connection: 0, wrong: 0, malformed: 0, hung: 0, other: 0 };
  for (const { outcome } of ended) counts[outcome]++;
  return counts;
}

function countDetails(ended: readonly Ended[]): Map<string, number> {
  const counts = new Map<string, number>();
  for (const { outcome, detail } of ended) {
    if (outcome === "ok" || counts.size > 100) continue;
    const key = `${outcome} ${detail.slice(0, 80)}`;
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  return counts;
}

/** The summary, for people. */
export function describe(report: ChaosReport): string {
  const { faults, skipped, outcomes, details, restarts, processes, violations, seed, slowestMs } = report;
  const faultLines = Object.entries(faults).map(
    ([name, count]) =>
      `  ${name.padEnd(20)}${String(count).padStart(5)}${skipped.has(name as Fault) ? `  skipped: ${skipped.get(name as Fault)}` : ""}`,
  );
  const outcomeText = Object.entries(outcomes)
    .filter(([, count]) => count > 0)
    .map(([name, count]) => `${count} ${name}`)
    .join(", ");
  return [
    `chaos, seed ${seed}: ${violations.length === 0 ? "all held" : `${violations.length} violations`}`,
    ...faultLines,
    `requests: ${outcomeText}; slowest ${Math.round(slowestMs)} ms`,
    ...[...details].map(([detail, count]) => `  ${count} x ${detail}`),
    `processes: ${processes} in all, ${restarts} restarts`,
    ...violations.map((violation) => `VIOLATION ${violation}`),
  ].join("\n");
}
