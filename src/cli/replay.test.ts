import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { ECHO, startInProcessCluster, until, type InProcessCluster } from "../../test/helpers/in-process-cluster.ts";
import type { SessionLoadReport } from "../bench/index.ts";
import { DynamoError } from "../errors/index.ts";
import type { ReplayReport } from "../replay/index.ts";
import { run } from "./replay.ts";

const FIXTURES = join(import.meta.dirname, "..", "replay", "fixtures");
const MOONCAKE = join(FIXTURES, "mooncake-conversation-200.jsonl");
const AZURE = join(FIXTURES, "azure-conv-20.csv");
const BIN = join(import.meta.dirname, "..", "..", "bin", "dynamo.mjs");

let folder = "";
let cluster: InProcessCluster;
before(async () => {
  folder = mkdtempSync(join(tmpdir(), "replay-test-"));
  cluster = await startInProcessCluster({ workers: 1, worker: { engine: { ...ECHO, maxSequences: 16 } } });
});
after(async () => {
  rmSync(folder, { recursive: true, force: true });
  await cluster.stop();
});

interface Ended {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** The command as `main` calls it. */
async function replay(argv: readonly string[], env: NodeJS.ProcessEnv = {}): Promise<Ended> {
  let stdout = "";
  let stderr = "";
  const code = await run({
    argv,
    env,
    out: (text) => void (stdout += text),
    err: (text) => void (stderr += text),
  });
  return { code, stdout, stderr };
}

async function mistakesOf(argv: readonly string[]): Promise<string> {
  const thrown = await replay(argv).then(
    () => undefined,
    (error: unknown) => error,
  );
  assert.ok(thrown instanceof DynamoError && thrown.reason === "invalid-config", String(thrown));
  return thrown.publicMessage;
}

function reportsOf({ stdout }: Ended): ReplayReport[] {
  return (JSON.parse(stdout) as { reports: ReplayReport[] }).reports;
}

function onlineReportOf({ stdout }: Ended): SessionLoadReport {
  return (JSON.parse(stdout) as { report: SessionLoadReport }).report;
}

// ---- Simulated ----

test("dynamo replay: one report for each router mode, the same for the same seed, another for another", async () => {
  const argv = [MOONCAKE, "--limit=40", "--workers=3", "--router-mode=kv,round-robin", "--smear-ms=3000", "--json"];
  const [first, second, other] = [await replay(argv), await replay(argv), await replay([...argv, "--seed=7"])];
  assert.equal(first.stdout, second.stdout);
  assert.notDeepEqual(reportsOf(first), reportsOf(other));
  const reports = reportsOf(first);
  assert.deepEqual(reports.map(({ policy, workers, requests }) => [policy, workers, requests]), [["kv", 3, 40], ["round-robin", 3, 40]]); // prettier-ignore
  assert.match(first.stderr, /^simulating mooncake-conversation-200\.jsonl: 40 requests over .* on 3 workers, kv\n/);
});

test("dynamo replay: without --json a table with a column per router mode", async () => {
  const { code, stdout } = await replay([AZURE, "--router-mode", "random,least-loaded", "--limit=10"]);
  assert.equal(code, 0);
  assert.match(stdout, /^ +random +least-loaded\nrequests finished +10 of 10 +10 of 10\n/);
});

test("dynamo replay: flags of the engine, the router and the arrivals reach the simulation, variables too", async () => {
  const argv = ["--format=synthetic", "--request-count=30", "--input-tokens=500", "--output-tokens=5", "--json"];
  const [plain] = reportsOf(await replay([...argv, "--workers=1"]));
  assert.deepEqual([plain!.requests, plain!.outputTokens], [30, 150]);
  const [uncached] = reportsOf(await replay([...argv, "--workers=1", "--no-enable-prefix-caching"]));
  assert.deepEqual([plain!.cachedTokens > 0, uncached!.cachedTokens], [true, 0]);
  const [faster] = reportsOf(await replay([...argv, "--workers=1", "--speedup-ratio=10"]));
  assert.ok(faster!.e2eMs.mean < plain!.e2eMs.mean / 5);
  const [soon] = reportsOf(await replay([...argv, "--workers=1", "--arrival-speedup=100"]));
  assert.ok(soon!.simulatedMs < plain!.simulatedMs / 2);
  const [single] = reportsOf(await replay([...argv, "--workers=1", "--concurrency=1"]));
  assert.ok(Math.abs(single!.simulatedMs - 30 * single!.e2eMs.mean) < 1, "one after the other");
  const [small] = reportsOf(await replay([...argv, "--workers=1", "--context-length=400"]));
  assert.deepEqual(small!.refused, { "context-length": 30 });
  const env = { DYN_REPLAY_FORMAT: "synthetic", DYN_REPLAY_REQUEST_COUNT: "4", DYN_WORKERS: "200", DYN_ROUTER_MODE: "random", DYN_JSON: "1" }; // prettier-ignore
  const [fromEnvironment] = reportsOf(await replay([], env));
  assert.deepEqual([fromEnvironment!.policy, fromEnvironment!.workers, fromEnvironment!.requests], ["random", 200, 4]);
});

test("dynamo replay: mistakes are named together, those of a trace with their line", async () => {
  assert.equal(await mistakesOf([]), "TRACE: expected a file, or --format=synthetic, got nothing");
  assert.equal(
    await mistakesOf([MOONCAKE, "--max-in-flight=3", "--input-tokens=4", "--concurrency=2", "--arrival-speedup=3"]),
    "--input-tokens: only with --format=synthetic\n--max-in-flight: only with --url\n" +
      "--arrival-speedup: not with --concurrency, which takes no notice of arrivals",
  );
  assert.equal(await mistakesOf([MOONCAKE, "--format=synthetic"]), `${MOONCAKE}: expected no trace with --format=synthetic`); // prettier-ignore
  assert.equal(
    await mistakesOf([MOONCAKE, "--router-mode=kv,kv,best,direct,"]),
    "--router-mode: kv is given twice\n" +
      "--router-mode: expected kv, round-robin, random, power-of-two, least-loaded or stay-until-saturated, got best\n" +
      "--router-mode: direct needs requests that name their worker; a trace has none\n" +
      "--router-mode: expected kv, round-robin, random, power-of-two, least-loaded or stay-until-saturated, got nothing",
  );
  assert.match(await mistakesOf([AZURE, "--format=mooncake"]), /^trace azure-conv-20\.csv, line 1: not a JSON object$/);
  assert.match(await mistakesOf([MOONCAKE, "--format=azure"]), /, line 1: expected a Mooncake row or the header /);
  const broken = join(folder, "broken.jsonl");
  writeFileSync(broken, '{"timestamp":0,"input_length":5,"output_length":1,"hash_ids":[1]}\n\n{"timestamp":-1}\n');
  assert.match(await mistakesOf([broken]), /^trace broken\.jsonl, line 3: timestamp: expected a number from 0/);
  assert.match(await mistakesOf([join(folder, "none")]), /cannot be read$/);
  assert.match(await mistakesOf([MOONCAKE, "--workers=5000"]), /^--workers: expected a whole number from 1 to 4096/);
});

// ---- Against a cluster ----

test("dynamo replay --url: every request is sent and measured, and shared prefixes show as hits", async () => {
  const argv = ["--format=synthetic", "--request-count=30", "--input-tokens=320", "--output-tokens=8", "--num-prefix-groups=1", "--arrival-interval-ms=5", "--turns-per-session=2", "--json"]; // prettier-ignore
  const ended = await replay([...argv, "--url", cluster.baseUrl, "--model=echo"]);
  const report = onlineReportOf(ended);
  assert.equal(ended.code, 0);
  assert.deepEqual([report.endedBy, report.okCount, report.statuses, report.errors], ["last-session", 60, { 200: 60 }, {}]); // prettier-ignore
  // A second turn is the first, its answer and a tenth more.
  assert.equal(report.promptTokens, 30 * 320 + 30 * (320 + 8 + 32));
  assert.equal(report.outputTokens, 60 * 8);
  assert.equal(report.ttftMs.count, 60);
  // All but the first prompt find 160 shared tokens, all second turns their first.
  assert.ok(report.cachedTokens >= 29 * 160 + 30 * 304, String(report.cachedTokens));
  assert.ok(report.hitRate! < 1);
  assert.match(ended.stderr, /^sending synthetic-30: 60 requests over .* to http:\/\/127\.0\.0\.1:\d+, model echo\n$/);
});

test("dynamo replay --url: rows longer than the context are counted by their status, the table says so", async () => {
  const rows = [[20, 1], [8_000, 16], [20, 1], [30, 1]].map(([length, ids], i) => JSON.stringify({ timestamp: i, input_length: length, output_length: 4, hash_ids: Array.from({ length: ids! }, (_, id) => id) })); // prettier-ignore
  const trace = join(folder, "rows.jsonl");
  writeFileSync(trace, rows.join("\n"));
  // The only model there is needs no name.
  const { code, stdout } = await replay([trace, "--url", `${cluster.baseUrl}/v1`]);
  assert.equal(code, 0);
  for (const line of [
    /^ended by +the end of the trace$/m,
    /^requests answered +3 of 4 sent$/m,
    /^status 400 +1$/m,
    /^prompt tokens +70$/m,
    /^output tokens +12$/m,
    /^TTFT p99 /m,
    /^ITL mean /m,
    /^prompt tokens from cache +\d+\.\d %$/m,
  ]) {
    // prettier-ignore
    assert.match(stdout, line);
  }
  const all = await replay([trace, "--limit=1", "--url", cluster.baseUrl, "--concurrency=1", "--json"]);
  assert.equal(onlineReportOf(all).requestCount, 1);
  writeFileSync(trace, rows[1]!);
  assert.equal((await replay([trace, "--url", cluster.baseUrl])).code, 1, "nothing was answered");
});

test("dynamo replay --url: only this machine unless told otherwise, and a wrong address or model is one clear line", async () => {
  for (const url of ["http://192.0.2.1:8000", "http://example.invalid", "http://0.0.0.0:1", "http://[2001:db8::1]/"]) {
    assert.match(await mistakesOf([MOONCAKE, "--url", url]), /^--url: .* is another machine; --allow-remote/);
  }
  for (const url of [
    "https://127.0.0.1",
    "127.0.0.1:8000",
    "http://u:secret@127.0.0.1",
    "http://127.0.0.1/?a=b",
    "-",
  ]) {
    assert.equal(await mistakesOf([MOONCAKE, "--url", url]), "--url: expected http://HOST:PORT, got something else");
  }
  assert.equal(await mistakesOf([MOONCAKE, "--url", cluster.baseUrl, "--workers=3"]), "--workers: only without --url");
  await assert.rejects(
    replay([MOONCAKE, "--url", cluster.baseUrl, "--model=none"]),
    (error: DynamoError) => error.reason === "model-not-found" && error.publicMessage.endsWith("; served: echo"),
  );
  await assert.rejects(
    replay([MOONCAKE, "--url", `${cluster.baseUrl}/else`]),
    /nothing at http:\/\/127\.0\.0\.1:\d+ lists models at \/else\/v1\/models/,
  );
});

test("dynamo replay --url: Ctrl-C ends it with the report so far", async () => {
  const trace = join(folder, "long.jsonl");
  const row = (timestamp: number): string => JSON.stringify({ timestamp, input_length: 9, output_length: 3, hash_ids: [1] }); // prettier-ignore
  writeFileSync(trace, `${row(0)}\n${row(1)}\n${row(3_600_000)}\n`);
  const child = spawn(process.execPath, [BIN, "replay", trace, "--url", cluster.baseUrl, "--json"], {
    env: { PATH: process.env.PATH, HOME: folder },
    stdio: ["ignore", "pipe", "inherit"],
  });
  let stdout = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => (stdout += text));
  const exited = new Promise<number | null>((resolve) => child.once("close", resolve));
  try {
    const served = /^dynamo_frontend_requests_total\{.*\} (\d+)$/gm;
    const before = await requestsServed(served);
    await until(async () => (await requestsServed(served)) >= before + 2, "two requests to be answered");
    child.kill("SIGINT");
    assert.equal(await exited, 0);
  } finally {
    child.kill("SIGKILL");
  }
  const report = onlineReportOf({ code: 0, stdout, stderr: "" });
  assert.deepEqual([report.endedBy, report.requestCount, report.notStartedCount], ["signal", 2, 1]);
});

async function requestsServed(pattern: RegExp): Promise<number> {
  const text = await (await fetch(`${cluster.baseUrl}/metrics`)).text();
  return [...text.matchAll(pattern)].reduce((sum, match) => sum + Number(match[1]), 0);
}
