import assert from "node:assert/strict";
import { spawn, type ChildProcess } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as delay } from "node:timers/promises";

/** `dynamo local` for real: its processes, with the echo engine, on a port that the system chose. */
const BIN = join(import.meta.dirname, "..", "..", "bin", "dynamo.mjs");
/** Generous: the machine may be busy with other tests. */
const DEADLINE_MS = 60_000;

let folder = "";
before(() => (folder = mkdtempSync(join(tmpdir(), "local-test-"))));
after(() => rmSync(folder, { recursive: true, force: true }));

class Cluster {
  readonly child: ChildProcess;
  readonly ended: Promise<number | null>;
  text = "";

  constructor(flags: readonly string[]) {
    const env = { PATH: process.env.PATH, HOME: folder, TMPDIR: folder };
    this.child = spawn(process.execPath, [BIN, "local", "--engine=echo", "--http-port=0", ...flags], {
      env,
      stdio: ["ignore", "pipe", "pipe"],
    });
    for (const stream of [this.child.stdout, this.child.stderr]) {
      stream?.setEncoding("utf8").on("data", (text: string) => (this.text += text));
    }
    this.ended = new Promise((resolve) => this.child.once("close", (code) => resolve(code)));
  }

  async until(what: string, done: () => boolean | Promise<boolean>): Promise<void> {
    const deadline = Date.now() + DEADLINE_MS;
    while (!(await done())) {
      assert.ok(Date.now() < deadline, `waited in vain for ${what}:\n${this.text}`);
      await delay(10);
    }
  }

  /** Address and the pids of all children, once it serves. */
  async serves(): Promise<{ address: string; pids: number[] }> {
    await this.until("the address", () => /Stop it/.test(this.text));
    const address = /is served at (\S+)/.exec(this.text)![1]!;
    const pids = [...this.text.matchAll(/^ {2}(?:frontend|worker-\d) +pid (\d+)/gm)].map(([, pid]) => Number(pid));
    return { address, pids };
  }
}

function isRunning(pid: number): boolean {
  try {
    // A zombie of a parent that was killed answers to signals for a moment.
    if (existsSync("/proc/self/stat")) return !readFileSync(`/proc/${pid}/stat`, "latin1").includes(") Z ");
    return process.kill(pid, 0);
  } catch {
    return false;
  }
}

async function post(address: string, request: Record<string, unknown>): Promise<Response> {
  const body = JSON.stringify({
    model: "echo",
    max_tokens: 4,
    messages: [{ role: "user", content: "hello" }],
    ...request,
  });
  return fetch(`${address}/v1/chat/completions`, {
    method: "POST",
    body,
    headers: { "content-type": "application/json" },
  });
}

async function ask(address: string): Promise<number> {
  const response = await post(address, {});
  await response.arrayBuffer();
  return response.status;
}

/** A stream that takes a while, begun: its headers are there. */
function longStream(address: string, tokens: number): Promise<Response> {
  return post(address, { stream: true, ignore_eos: true, max_tokens: tokens });
}

test("dynamo local: serves, replaces a killed worker, and leaves nothing behind after Ctrl-C", async () => {
  const cluster = new Cluster(["--workers=2", "--echo-step-ms=10"]);
  const { address, pids } = await cluster.serves();
  assert.equal(pids.length, 3);
  assert.equal(await ask(address), 200);
  const curl = /curl -N (\S+)\/v1\/chat\/completions .*\n\s+-d '(.+)'/.exec(cluster.text);
  assert.equal(curl?.[1], address);
  assert.equal((JSON.parse(curl![2]!) as { model: string }).model, "echo");
  process.kill(pids[1]!, "SIGKILL");
  await cluster.until("the restart", () => /worker-0 serves again/.test(cluster.text));
  assert.match(cluster.text, new RegExp(`worker-0 \\(pid ${pids[1]}\\) was ended by SIGKILL; restarting in 0\\.2 s`));
  const stream = await longStream(address, 60);
  cluster.child.kill("SIGINT");
  assert.match(await stream.text(), /data: \[DONE\]\s*$/, "what runs is finished");
  assert.equal(await cluster.ended, 0, cluster.text);
  assert.deepEqual(pids.filter(isRunning), []);
  assert.deepEqual(
    readdirSync(folder).filter((name) => name.startsWith("dynamo-local-")),
    [],
  );
});

test("dynamo local: a second Ctrl-C ends everything at once, with exit code 130", async () => {
  const cluster = new Cluster(["--workers=1", "--echo-step-ms=100", "--graceful-shutdown-timeout-secs=600"]);
  const { address, pids } = await cluster.serves();
  const stream = await longStream(address, 5_000);
  cluster.child.kill("SIGINT");
  await cluster.until("the drain", () => /draining/.test(cluster.text));
  cluster.child.kill("SIGINT");
  await assert.rejects(stream.text());
  assert.equal(await cluster.ended, 130, cluster.text);
  assert.deepEqual(pids.filter(isRunning), []);
});

test("dynamo local: when it is killed its children leave by themselves", async () => {
  const cluster = new Cluster(["--workers=1"]);
  const { pids } = await cluster.serves();
  cluster.child.kill("SIGKILL");
  await cluster.until("the children to leave", () => !pids.some(isRunning));
});
