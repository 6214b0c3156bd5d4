import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { request } from "node:http";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import OpenAI from "openai";
import type { DecisionExplanation } from "../../src/router/index.ts";
import { until, workersJoined } from "../helpers/in-process-cluster.ts";
import { startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";

/**
 * `--frontend-threads=2` with real processes: clients cannot tell it from one thread. Every request here is made on a
 * connection of its own, so that the kernel chooses its thread anew; the log says which thread served it.
 */
const PROMPT = "the same long prompt, told again and again; ".repeat(20);

interface Reply {
  readonly status: number;
  readonly text: string;
}

function call(
  cluster: ProcessCluster,
  path: string,
  body?: object,
  requestId?: string,
  extraHeaders: Readonly<Record<string, string>> = {},
): Promise<Reply> {
  const headers = {
    ...extraHeaders,
    connection: "close",
    "content-type": "application/json",
    ...(requestId === undefined ? {} : { "x-request-id": requestId }),
  };
  return new Promise((resolve, reject) => {
    const method = body === undefined ? "GET" : "POST";
    const sent = request(cluster.baseUrl + path, { method, headers, agent: false }, (answer) => {
      let text = "";
      answer.setEncoding("utf8");
      answer.on("data", (chunk: string) => (text += chunk));
      answer.on("end", () => resolve({ status: answer.statusCode!, text }));
      answer.on("error", reject);
    });
    sent.on("error", reject);
    sent.end(body === undefined ? undefined : JSON.stringify(body));
  });
}

async function json<T>(reply: Promise<Reply>): Promise<T> {
  const { status, text } = await reply;
  assert.equal(status, 200, text);
  return JSON.parse(text) as T;
}

/** By request id. */
function threads(cluster: ProcessCluster): Map<string, number> {
  const served = new Map<string, number>();
  for (const line of cluster.output().split("\n")) {
    if (!line.startsWith("{")) continue;
    const { message, thread, x_request_id: id } = JSON.parse(line) as Record<string, unknown>;
    if (message === "request ended") served.set(String(id), Number(thread));
  }
  return served;
}

async function metricOf(cluster: ProcessCluster, pattern: RegExp): Promise<number> {
  const { text } = await call(cluster, "/metrics");
  const line = text.split("\n").find((candidate) => pattern.test(candidate));
  return line === undefined ? Number.NaN : Number(line.split(" ").at(-1));
}

describe("two frontend threads", { timeout: 120_000 }, () => {
  let cluster: ProcessCluster;

  before(async () => {
    const flags = ["--engine=echo", "--workers=2", "--router-mode=kv", "--frontend-threads=2", "--echo-step-ms=4"];
    cluster = await startProcessCluster([...flags, "--logging-console-format=jsonl"], { DYN_LOG: "info" });
    // Whoever saw the model listed once, as this helper did, finds it on every thread.
    for (let i = 0; i < 12; i++) assert.match((await call(cluster, "/v1/models")).text, /"id":"echo"/);
    await until(
      async () => (await metricOf(cluster, /^dynamo_router_kv_ranks_recovering/)) === 0,
      "ranks to be restored",
    );
  });
  after(() => cluster.stop("SIGKILL"));

  test("serve the openai client on one port, whole and streamed", async () => {
    const client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
    const ask = (text: string) => ({
      model: "echo",
      max_tokens: 16,
      messages: [{ role: "user" as const, content: text }],
    });
    const whole = await client.chat.completions.create(ask("hello threads"));
    assert.equal(whole.usage!.completion_tokens, 16);
    let streamed = "";
    const stream = await client.chat.completions.create({ ...ask("hello threads"), stream: true });
    for await (const chunk of stream) streamed += chunk.choices[0]?.delta.content ?? "";
    assert.equal(streamed, whole.choices[0]!.message.content);
  });

  test("share the index: what one thread sent to a worker, both count as cached there", async () => {
    const complete = (id: string) =>
      json(call(cluster, "/v1/completions", { model: "echo", prompt: PROMPT, max_tokens: 2 }, id));
    await complete("cold");
    const best = async (): Promise<number> => {
      const preview = call(cluster, "/v1/route", { model: "echo", prompt: PROMPT });
      const { decisions } = await json<{ decisions: DecisionExplanation[] }>(preview);
      return Math.max(...decisions[0]!.candidates.map((one) => one.overlap_blocks.device));
    };
    await until(async () => (await best()) > 10, "the block events to reach the index");
    const ids = Array.from({ length: 24 }, (_, i) => `warm-${i}`);
    for (const id of ids) await complete(id);
    await until(() => ids.every((id) => threads(cluster).has(id)), "the log lines");
    const served = threads(cluster);
    assert.deepEqual(new Set(ids.map((id) => served.get(id))), new Set([0, 1]), "both threads served");
    let worker: string | undefined;
    for (const id of ids) {
      // Asked of either thread: the one that does not know asks the other.
      const explained = call(cluster, `/v1/route/explain/${id}`);
      const { decisions } = await json<{ decisions: DecisionExplanation[] }>(explained);
      const { worker: chosen, candidates, degradations } = decisions[0]!;
      const overlap = candidates.find((one) => one.instance_id === chosen.instance_id)!.overlap_blocks.device;
      assert.ok(overlap > 10, `${id} on thread ${served.get(id)} saw ${overlap} blocks`);
      assert.deepEqual(degradations, []);
      assert.equal(chosen.instance_id, (worker ??= chosen.instance_id), id);
    }
    assert.equal((await call(cluster, "/v1/route/explain/never")).status, 404);
  });

  test("answer a scrape with the sum of the process, whichever thread is asked", async () => {
    const pattern = /^dynamo_frontend_requests_total\{model="echo",endpoint="completions",.*status="success"/;
    const sums = new Set<number>();
    for (let i = 0; i < 12; i++) sums.add(await metricOf(cluster, pattern));
    assert.deepEqual([...sums], [25]);
    assert.equal(await metricOf(cluster, /^dynamo_frontend_router_workers\{/), 2);
  });

  test("tell each other what is on the workers", async () => {
    assert.ok(
      (await metricOf(cluster, /^dynamo_router_replica_sync_events_total\{direction="received",outcome="applied"/)) > 0,
    );
  });

  test("know the same workers, and take busy thresholds together", async () => {
    const healths = new Set<string>();
    for (let i = 0; i < 12; i++) healths.add((await call(cluster, "/health")).text);
    assert.equal(healths.size, 1, [...healths].join("\n"));
    const body = { model: "echo", active_prefill_tokens_threshold: 123 };
    assert.equal((await call(cluster, "/busy_threshold", body)).status, 200);
    for (let i = 0; i < 12; i++) {
      const { text } = await call(cluster, "/busy_threshold");
      assert.match(text, /"active_prefill_tokens_threshold":123/);
    }
  });

  test("show each other's requests to operators, and end them", async () => {
    const list = () => json<{ total: number; data: { id: string }[] }>(call(cluster, "/v1/admin/requests"));
    // Two whose client does not read, so that they stay; on connections of their own, most likely one for each thread.
    const held = ["held-1", "held-2"].map((id) => {
      const headers = { "content-type": "application/json", "x-request-id": id };
      const sent = request(`${cluster.baseUrl}/v1/completions`, { method: "POST", headers, agent: false });
      sent.on("error", () => undefined);
      sent.end(JSON.stringify({ model: "echo", prompt: "abc", max_tokens: 8_000, n: 16, stream: true }));
      return sent;
    });
    try {
      await until(async () => (await list()).total === 2, "both to be listed");
      for (let i = 0; i < 8; i++) {
        const { data } = await list();
        assert.deepEqual(data.map(({ id }) => id).toSorted(), ["held-1", "held-2"]);
      }
      for (const id of ["held-1", "held-2"]) {
        const url = `${cluster.baseUrl}/v1/admin/requests/${id}`;
        assert.equal((await fetch(url, { method: "DELETE", headers: { connection: "close" } })).status, 200);
        assert.equal((await fetch(url, { method: "DELETE", headers: { connection: "close" } })).status, 404);
      }
      assert.equal((await list()).total, 0);
    } finally {
      for (const sent of held) sent.destroy();
    }
  });

  test("a second frontend on their port is refused", async () => {
    const command = join(import.meta.dirname, "..", "..", "bin", "dynamo.mjs");
    const flags = [`--http-port=${cluster.port}`, "--frontend-threads=2", "--log=error"];
    const second = spawn(process.execPath, [command, "frontend", ...flags], { stdio: ["ignore", "ignore", "pipe"] });
    let text = "";
    second.stderr.on("data", (chunk: Buffer) => (text += chunk.toString()));
    const [code] = (await once(second, "exit")) as [number | null];
    assert.notEqual(code, 0);
    assert.match(text, /already in use/);
  });

  test("finish what runs when told to leave, and leave nothing behind", async () => {
    const running = Array.from({ length: 8 }, (_, i) =>
      call(cluster, "/v1/completions", { model: "echo", prompt: PROMPT, max_tokens: 250, stream: true }, `last-${i}`),
    );
    await until(
      async () => (await metricOf(cluster, /^dynamo_frontend_active_requests\{model="echo"/)) === running.length,
      "all of them to run, on whichever thread",
    );
    const code = await cluster.stop("SIGTERM");
    assert.equal(code, 0);
    for (const { status, text } of await Promise.all(running)) {
      assert.equal(status, 200);
      assert.match(text, /data: \[DONE\]\s*$/);
    }
    assert.doesNotMatch(cluster.output(), /did not leave in time|ran out of time|failed while leaving/);
    await assert.rejects(call(cluster, "/live"), { code: "ECONNREFUSED" });
  });
});

describe("two frontend threads without KV events, with sessions", { timeout: 120_000 }, () => {
  let cluster: ProcessCluster;

  before(async () => {
    const routing = ["--router-mode=kv", "--no-router-kv-events", "--router-session-affinity-ttl-secs=30"];
    const flags = [
      "--engine=echo",
      "--workers=3",
      "--frontend-threads=2",
      "--logging-console-format=jsonl",
      ...routing,
    ];
    cluster = await startProcessCluster(flags, { DYN_LOG: "info" });
    await workersJoined(cluster.baseUrl, 3);
  });
  after(() => cluster.stop("SIGKILL"));

  interface Told {
    readonly worker: string;
    readonly reason: string;
    readonly overlapBlocks: number;
  }

  async function ask(id: string, prompt: string, session?: string): Promise<Told> {
    const headers: Record<string, string> = session === undefined ? {} : { "x-dynamo-session-id": session };
    const body = { model: "echo", prompt, max_tokens: 1 };
    const { status, text } = await call(cluster, "/v1/completions", body, id, headers);
    assert.equal(status, 200, text);
    const explained = call(cluster, `/v1/route/explain/${id}`);
    const { worker, reason, candidates } = (await json<{ decisions: DecisionExplanation[] }>(explained)).decisions[0]!;
    const chosen = candidates.find((one) => one.instance_id === worker.instance_id)!;
    return { worker: worker.instance_id, reason, overlapBlocks: chosen.overlap_blocks.device };
  }

  /** Each of `count` asks on a thread of the kernel's choice; both were chosen. */
  async function onBothThreads(name: string, count: number, one: (id: string) => Promise<void>): Promise<void> {
    const ids = Array.from({ length: count }, (_, i) => `${name}-${i}`);
    for (const id of ids) await one(id);
    await until(() => ids.every((id) => threads(cluster).has(id)), "the log lines");
    const served = threads(cluster);
    assert.deepEqual(new Set(ids.map((id) => served.get(id))), new Set([0, 1]), "both threads served");
  }

  test("a session stays with its worker on whichever thread its requests come in", async () => {
    const first = await ask("session-first", "turn one of a talk", "talk");
    // Other sessions are spread, so that staying is no accident.
    const others = new Set<string>();
    for (let i = 0; i < 8; i++) others.add((await ask(`other-${i}`, `another talk ${i}`, `other-${i}`)).worker);
    assert.ok(others.size > 1, "sessions share one worker");
    // The threads tell each other in their own time.
    const knowing = new Set<number | undefined>();
    for (let i = 0; knowing.size < 2; i++) {
      const id = `told-${i}`;
      const { reason } = await ask(id, `${id} asks who knows`, "talk");
      await until(() => threads(cluster).has(id), "the log line");
      if (reason === "the session's worker") knowing.add(threads(cluster).get(id));
    }
    await onBothThreads("session", 16, async (id) => {
      const { worker, reason } = await ask(id, `${id} is a turn that shares nothing`, "talk");
      assert.equal(worker, first.worker);
      assert.equal(reason, "the session's worker");
    });
  });

  test("what one thread sent to a worker counts as cached there on both", async () => {
    const first = await ask("decided", PROMPT);
    await onBothThreads("again", 16, async (id) => {
      const told = await ask(id, PROMPT);
      assert.equal(told.worker, first.worker);
      assert.ok(told.overlapBlocks > 10, `${id} saw ${told.overlapBlocks} blocks`);
    });
  });
});

test("predicted decisions beside KV events are shared by the threads too", { timeout: 60_000 }, async () => {
  // No event can tell of a block before its request's prefill, which takes 600 ms here.
  const routing = ["--router-mode=kv", "--router-predicted-ttl-secs=30"];
  const flags = ["--engine=echo", "--workers=2", "--frontend-threads=2", "--echo-step-ms=600", ...routing];
  const cluster = await startProcessCluster(flags);
  try {
    const slow = call(cluster, "/v1/completions", { model: "echo", prompt: PROMPT, max_tokens: 1 }, "slow");
    const best = async (): Promise<number> => {
      const preview = call(cluster, "/v1/route", { model: "echo", prompt: PROMPT });
      const { decisions } = await json<{ decisions: DecisionExplanation[] }>(preview);
      return Math.max(...decisions[0]!.candidates.map((one) => one.overlap_blocks.device));
    };
    await until(async () => (await best()) > 10, "a thread to know");
    const seen: number[] = [];
    for (let i = 0; i < 16; i++) seen.push(await best());
    assert.ok(Math.min(...seen.slice(2)) > 10, `both threads know: ${seen.join()}`);
    assert.equal((await slow).status, 200);
  } finally {
    await cluster.stop("SIGTERM");
  }
});

test("what one thread alone can do is refused with several", async () => {
  const command = join(import.meta.dirname, "..", "..", "bin", "dynamo.mjs");
  const decisions = ["--router-mode=kv", "--no-router-kv-events", "--no-router-assume-kv-reuse"];
  const flags = ["--frontend-threads=2", "--event-plane=memory", "--router-service", ...decisions];
  const child = spawn(process.execPath, [command, "frontend", ...flags], { stdio: ["ignore", "ignore", "pipe"] });
  let text = "";
  child.stderr.on("data", (chunk: Buffer) => (text += chunk.toString()));
  const [code] = (await once(child, "exit")) as [number | null];
  assert.equal(code, 2, text);
  assert.match(text, /--event-plane: memory is for one frontend thread alone/);
  assert.match(text, /--router-service: a router service is asked by one frontend thread alone/);
  assert.match(text, /--no-router-assume-kv-reuse: .* one frontend thread alone/);
});
