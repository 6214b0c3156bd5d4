import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { createServer, type AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { COMMANDS } from "./commands.ts";
import { commandHelp, generalHelp } from "./help.ts";
import { COMMAND_NAMES, OPTION_NAMES, optionsOf, specOf } from "./options.ts";
import { checkPortFree } from "./port-check.ts";
import { PullDisplay } from "./progress.ts";
import { ManualClock } from "../std/index.ts";
import type { InstanceView } from "./cluster-view.ts";
import { duration, statusText, table } from "./status-table.ts";

const BIN = join(import.meta.dirname, "..", "..", "bin", "dynamo.mjs");
let folder = "";
before(() => (folder = mkdtempSync(join(tmpdir(), "cli-test-"))));
after(() => rmSync(folder, { recursive: true, force: true }));

interface Ended {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

function dynamo(argv: string[], env: Record<string, string> = {}): Promise<Ended> {
  const own = { PATH: process.env.PATH, HOME: folder, DYN_MODEL_DIR: folder, TMPDIR: folder, ...env };
  return new Promise((resolve) => {
    execFile(process.execPath, [BIN, ...argv], { env: own }, (error, stdout, stderr) => {
      resolve({ code: error === null ? 0 : Number(error.code), stdout, stderr });
    });
  });
}

test("help: names every command; a command's page has each of its options, its variable, and one example", () => {
  for (const name of COMMAND_NAMES) {
    assert.match(generalHelp(), new RegExp(`^  ${name} `, "m"));
    const page = commandHelp(name);
    assert.ok(page.includes(`Example: ${COMMANDS[name].example}\n`));
    for (const option of OPTION_NAMES) {
      const spec = specOf(option);
      const line = new RegExp(`^  (--${option}[= ,\\n]|${spec.env} )`, "m");
      assert.equal(line.test(page), optionsOf(name).includes(option), `${name} ${option}`);
      if (optionsOf(name).includes(option)) assert.ok(page.includes(spec.env), option);
    }
    for (const line of page.split("\n")) assert.ok(line.length <= 120, line);
  }
});

test("help: every example's flags are options of its command", () => {
  for (const name of COMMAND_NAMES) {
    for (const [, flag] of COMMANDS[name].example.matchAll(/--([a-z-]+)/g)) {
      assert.ok((optionsOf(name) as string[]).includes(flag!), `${name} --${flag}`);
    }
  }
});

test("dynamo: --help and --version go to stdout with exit code 0", async () => {
  const [help, version, page] = await Promise.all([
    dynamo(["--help"]),
    dynamo(["--version"]),
    dynamo(["worker", "--help"]),
  ]);
  assert.deepEqual(help, { code: 0, stdout: generalHelp(), stderr: "" });
  assert.match(version.stdout, /^\d+\.\d+\.\d+\n$/);
  assert.deepEqual(page, { code: 0, stdout: commandHelp("worker"), stderr: "" });
});

test("dynamo: wrong usage is exit code 2 with all mistakes on stderr, and nothing was started", async () => {
  const wrong = await dynamo(["local", "--htp-port", "1", "--workers=none"]);
  assert.equal(wrong.code, 2);
  assert.equal(wrong.stdout, "");
  assert.equal(
    wrong.stderr,
    "dynamo local: the configuration has 2 mistakes:\n" +
      "  --htp-port: no such option; did you mean --http-port?\n" +
      "  --workers: expected a whole number from 1 to 64, got none\n" +
      "See dynamo local --help.\n",
  );
  const unknown = await dynamo(["locl"]);
  assert.deepEqual(
    [unknown.code, unknown.stderr],
    [2, 'dynamo: no command "locl"; did you mean local? See dynamo --help.\n'],
  );
});

test("dynamo local: a busy port is one clear line that names the flag, and nothing was started", async () => {
  const server = createServer();
  const { promise, resolve } = Promise.withResolvers<void>();
  server.listen(0, "127.0.0.1", resolve);
  await promise;
  const { port } = server.address() as AddressInfo;
  try {
    const ended = await dynamo(["local", "--engine=echo", `--http-port=${port}`]);
    assert.equal(ended.code, 1);
    assert.equal(ended.stderr, `dynamo local: port ${port} on 127.0.0.1 is in use; choose another with --http-port\n`);
    assert.deepEqual(
      readdirSync(folder).filter((name) => name.startsWith("dynamo-local-")),
      [],
    );
  } finally {
    server.close();
  }
});

test("port check: a free port passes, a foreign address is named", async () => {
  await checkPortFree("127.0.0.1", 0);
  await assert.rejects(checkPortFree("192.0.2.1", 8000), /--http-host: 192\.0\.2\.1 is not an address of this machine/);
});

test("dynamo model: list, a missing name and a model that is not there", async () => {
  const list = await dynamo(["model", "list"]);
  assert.match(list.stdout, /^SmolLM2-135M-Instruct {2}98\.4 MB {2}not pulled/);
  const json = JSON.parse((await dynamo(["model", "list", "--json"])).stdout) as {
    available: string[];
    models: unknown[];
  };
  assert.deepEqual([json.available, json.models], [["SmolLM2-135M-Instruct"], []]);
  assert.equal((await dynamo(["model", "pull"])).code, 2);
  assert.equal((await dynamo(["model", "fetch"])).code, 2);
  const gone = await dynamo(["model", "rm", "smollm2"]);
  assert.deepEqual([gone.code, gone.stderr], [1, `dynamo model: smollm2 is not in ${folder}\n`]);
});

test("dynamo worker: a model that is not there fails with the next command to type", async () => {
  const ended = await dynamo(["worker", "--model=smollm2"]);
  assert.deepEqual(
    [ended.code, ended.stderr],
    [1, `dynamo worker: smollm2 is not in ${folder}; run "dynamo model pull smollm2" first\n`],
  );
});

test("dynamo doctor: each check has a line, a failing one its fix, and the exit code says so", async () => {
  const damaged = join(folder, "damaged.gguf");
  writeFileSync(damaged, "no model");
  const ended = await dynamo(["doctor", "--engine=echo", "--http-port=0", `--model=${damaged}`, "--json"]);
  const findings = JSON.parse(ended.stdout) as { check: string; result: string; detail: string; fix?: string }[];
  assert.deepEqual(
    findings.map(({ check }) => check),
    ["node", "cpu", "port", "disk", "model", "discovery"],
  );
  const model = findings.find(({ check }) => check === "model");
  assert.equal(model?.result, "fail");
  assert.match(model?.fix ?? "", /copy the file again/);
  for (const { result, fix } of findings) assert.equal(fix === undefined, result === "ok");
  assert.equal(ended.code, 1);
  const text = await dynamo(["doctor", "--engine=echo", "--http-port=0"]);
  assert.equal(text.code, 0);
  assert.match(text.stdout, /^ok {4}model {6}the echo engine needs none$/m);
});

test("dynamo status: without a cluster folder says how to name one", async () => {
  const ended = await dynamo(["status", "--file-kv", join(folder, "nowhere")]);
  assert.deepEqual([ended.code, ended.stdout], [1, ""]);
  assert.match(ended.stderr, /name the cluster's with --file-kv/);
});

test("status: who is left out of its model, and why", () => {
  const base = { component: "backend", endpoints: ["generate"], address: "tcp://x", host: "h", startedMs: 0, pid: 1, load: undefined }; // prettier-ignore
  const card = { name: "m", engine: "vllm", engineVersion: "1", role: "agg", tokenizerSha256: "aa", vocabularySize: 9, contextLength: 64 }; // prettier-ignore
  const of = (instanceId: string, blockSizeTokens: number): InstanceView => ({ ...base, instanceId, card: { ...card, blockSizeTokens, created: 1 } as never }); // prettier-ignore
  const text = statusText([of("a", 32), of("b", 16), of("c", 16)], "here", 0);
  assert.match(text, /^LEFT OUT {2}MODEL {2}WHY$/m);
  assert.match(text, /^a {9}m {6}its KV blocks have 32 tokens, .* start it with --kv-cache-block-size=16$/m);
  assert.doesNotMatch(statusText([of("b", 16), of("c", 16)], "here", 0), /LEFT OUT/);
});

test("status: a table per model and instance; what is not known yet is a dash", () => {
  const base = { component: "backend", endpoints: ["generate"], address: "tcp://x", host: "h", startedMs: 0 };
  const load = {
    runningRequests: 3,
    waitingRequests: 1,
    activeBlocks: 40,
    cachedBlocks: 9,
    totalBlocks: 100,
    pendingPrefillTokens: 0,
    steps: 1,
    generatedTokens: 77,
    promptTokens: 5,
    cachedPromptTokens: 0,
    preemptions: 0,
  };
  const card = { name: "m", engine: "echo", engineVersion: "1", role: "prefill" } as never;
  const text = statusText(
    [
      { ...base, instanceId: "a".repeat(16), pid: 1, card, load, transfers: undefined },
      { ...base, instanceId: "b".repeat(16), pid: 22, card: undefined, load: undefined, transfers: [] },
    ],
    "here",
    8_000,
  );
  const lines = text.split("\n");
  assert.deepEqual(lines[2]!.split(/\s{2,}/), ["MODEL", "WORKERS"]);
  assert.deepEqual(lines[3]!.split(/\s{2,}/), ["m", "1"]);
  assert.deepEqual(lines[6]!.split(/\s{2,}/), [
    "aaaaaaaaaaaaaaaa",
    "backend",
    "prefill",
    "m",
    "echo 1",
    "3",
    "1",
    "40/100",
    "9",
    "77",
    "1",
    "8s",
  ]);
  assert.deepEqual(lines[7]!.split(/\s{2,}/).slice(2), ["-", "-", "-", "-", "-", "-", "-", "-", "22", "8s"]);
  assert.doesNotMatch(text, /TRANSFERS/);
  assert.equal(statusText([], "here", 0), "No instances in here.\n");
  const pair = {
    peer: "dynamo.backend.0123456789abcdef",
    backend: "tcp",
    operation: "read",
    reason: "shm: not available here, the peer has it",
    isSlowPath: true,
    isSlow: false,
    transferCount: 3,
    byteCount: 12_340_000,
    errorCount: 1,
    lastGigabytesPerSecond: 0.456,
    meanGigabytesPerSecond: 0.5,
  };
  const fast = { ...pair, backend: "shm", isSlowPath: false, isSlow: true, lastGigabytesPerSecond: 0, reason: "why" };
  const transfers = [pair, fast];
  const view = { ...base, instanceId: "b".repeat(16), pid: 22, card: undefined, load: undefined, transfers };
  const rows = statusText([view], "here", 8_000).trimEnd().split("\n").slice(-3);
  assert.deepEqual(
    rows.map((row) => row.split(/\s{2,}/)),
    [
      ["KV TRANSFERS", "WITH", "OVER", "COUNT", "MB", "GB/S", "LAST", "ERRORS", "WHY"],
      // prettier-ignore
      ["bbbbbbbbbbbbbbbb reads", "0123456789abcdef", "tcp", "3", "12.3", "0.50", "0.46", "1", `SLOW PATH: ${pair.reason}`],
      ["bbbbbbbbbbbbbbbb reads", "0123456789abcdef", "shm", "3", "12.3", "0.50", "-", "1", "SLOW: why"],
    ],
  );
  assert.equal(
    table([
      ["A", "B"],
      ["long", "x"],
    ]),
    "A     B\nlong  x\n",
  );
  assert.deepEqual([0, 59_999, 61_000, 7_380_000, 180_000_000].map(duration), ["0s", "59s", "1m 1s", "2h 3m", "2d 2h"]);
});

test("status: the KV tiers of workers that have some, with what they hold, how often they had what was asked for, and their state", () => {
  const base = { component: "backend", endpoints: [], address: "tcp://x", pid: 1, host: "h", startedMs: 0 };
  const unknown = { card: undefined, load: undefined };
  const counts = { hitBlocks: 62, lookedUpBlocks: 248, restoredBlocks: 60, isDegraded: false };
  const view = {
    ...base,
    ...unknown,
    instanceId: "a".repeat(16),
    kvTiers: [
      { ...counts, tier: "host", usedBytes: 512e6, capacityBytes: 1e9 },
      {
        ...counts,
        tier: "disk",
        usedBytes: 0,
        capacityBytes: 4.25e9,
        hitBlocks: 0,
        restoredBlocks: 0,
        isDegraded: true,
      },
      { ...counts, tier: "object", usedBytes: 999, lookedUpBlocks: 0 },
    ],
  } as const;
  const text = statusText([view, { ...base, ...unknown, instanceId: "b".repeat(16) }], "here", 0);
  const rows = text
    .split("\n\n")
    .at(-1)!
    .trimEnd()
    .split("\n")
    .map((line) => line.split(/\s{2,}/));
  const id = "a".repeat(16);
  assert.deepEqual(rows, [
    ["INSTANCE", "KV TIER", "USED", "BUDGET", "HITS", "RESTORED", "STATE"],
    [id, "host", "512.0 MB", "1.0 GB", "25.0 % of 248 blocks", "60 blocks", "ok"],
    [id, "disk", "0 B", "4.3 GB", "0.0 % of 248 blocks", "0 blocks", "degraded"],
    [id, "object", "999 B", "-", "-", "60 blocks", "ok"],
  ]);
});

test("pull display: a bar that redraws on a terminal, a line every five seconds elsewhere", () => {
  const show = (isTerminal: boolean): string => {
    const clock = new ManualClock();
    let text = "";
    const display = new PullDisplay({ write: (part) => (text += part), isTerminal, columns: 80, clock });
    const base = { model: "m", source: "the hub", phase: "downloading", totalBytes: 100e6 } as const;
    for (let second = 0; second <= 10; second++) {
      display.update({ ...base, receivedBytes: second * 10e6 });
      clock.advance(1_000);
    }
    display.update({ ...base, receivedBytes: 0, gaveUp: "broken" });
    display.update({ ...base, receivedBytes: 100e6, phase: "checking" });
    display.close();
    return text;
  };
  assert.deepEqual(show(false).split("\n"), [
    "m: pulling from the hub",
    "m: 50.0 MB of 100.0 MB (50 %), 10.0 MB/s, 5 s left",
    "m: 100.0 MB of 100.0 MB (100 %), 10.0 MB/s, 0 s left",
    "the hub: broken",
    "m: checking",
    "",
  ]);
  const bar = show(true);
  assert.ok(bar.includes(`\r\u001b[K[${"#".repeat(15)}${".".repeat(15)}] 50.0 MB of 100.0 MB`));
  assert.ok(bar.endsWith("\r\u001b[Kthe hub: broken\nm: checking\n"));
});

test("dynamo: an older Node hands over to the installed one, which leaves when that one is killed", async () => {
  // The hand-over itself, with the version check turned round: this Node stands in for the older one.
  const source = readFileSync(BIN, "utf8").replace(
    "const MIN_MAJOR = 24;",
    "const MIN_MAJOR = process.env.SECOND ? 0 : 999;",
  );
  const bin = join(folder, "pkg", "bin");
  const { mkdirSync, symlinkSync } = await import("node:fs");
  mkdirSync(bin, { recursive: true });
  mkdirSync(join(folder, "pkg", "node_modules", ".bin"), { recursive: true });
  mkdirSync(join(folder, "pkg", "dist", "cli"), { recursive: true });
  writeFileSync(join(bin, "dynamo.mjs"), source);
  writeFileSync(join(folder, "pkg", "package.json"), '{"type":"module"}');
  writeFileSync(
    join(folder, "pkg", "dist", "cli", "main.js"),
    `export async function main(argv) {
       const ready = () => console.log("pid", process.pid, argv.join());
       if (argv[0] === "code") {
         ready();
         return 7;
       }
       const alive = setInterval(() => {}, 2 ** 30);
       return new Promise((resolve) => {
         process.on("SIGTERM", () => resolve(5));
         process.on("disconnect", () => resolve(0));
         ready();
       });
     }`,
  );
  const shim = join(folder, "pkg", "node_modules", ".bin", "node");
  writeFileSync(shim, `#!/bin/sh\nSECOND=1 exec "${process.execPath}" "$@"\n`, { mode: 0o755 });
  symlinkSync(shim, join(folder, "pkg", "node_modules", ".bin", "node.cmd"));

  const run = (
    argv: string[],
  ): {
    first: Promise<string>;
    ended: Promise<[number | null, string | null]>;
    kill: (signal: NodeJS.Signals) => void;
  } => {
    const child = spawn(process.execPath, [join(bin, "dynamo.mjs"), ...argv], { stdio: ["ignore", "pipe", "inherit"] });
    const first = Promise.withResolvers<string>();
    const ended = Promise.withResolvers<[number | null, string | null]>();
    child.stdout.once("data", (bytes: Buffer) => first.resolve(String(bytes)));
    child.once("close", (code, signal) => ended.resolve([code, signal]));
    return { first: first.promise, ended: ended.promise, kill: (signal) => void child.kill(signal) };
  };
  const exit = run(["code", "--flag"]);
  assert.match(await exit.first, /code,--flag/);
  assert.deepEqual(await exit.ended, [7, null], "the exit code comes back");
  const term = run(["wait"]);
  await term.first;
  term.kill("SIGTERM");
  assert.deepEqual(await term.ended, [5, null], "SIGTERM goes through");
  const killed = run(["wait"]);
  await killed.first;
  killed.kill("SIGKILL");
  // The pipe closes only when the second process, which shares it, is gone as well.
  assert.deepEqual(await killed.ended, [null, "SIGKILL"]);
});
