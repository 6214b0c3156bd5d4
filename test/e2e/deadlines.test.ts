import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { run as requestsCommand } from "../../src/cli/requests.ts";
import { mockerConfig } from "../../src/engines/mocker/index.ts";
import type { LiveRequestView } from "../../src/frontend/live-requests.ts";
import { ECHO, startInProcessCluster, until, type InProcessCluster } from "../helpers/in-process-cluster.ts";

const SLOW = { ...ECHO, contextLength: 200_000, stepMs: 5 };
/** Its first token at once, the second long after. */
const STUCK = { ...SLOW, stepMs: 6_000 };
const ENDLESS = 100_000;

interface Ask {
  readonly maxTokens?: number;
  readonly stream?: boolean;
  readonly headers?: Record<string, string>;
  readonly nvext?: object;
  readonly signal?: AbortSignal;
  readonly model?: string;
}

function post({ baseUrl }: { baseUrl: string }, ask: Ask = {}): Promise<Response> {
  return fetch(`${baseUrl}/v1/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", ...ask.headers },
    body: JSON.stringify({
      model: ask.model ?? "echo",
      prompt: "abcdefgh",
      max_tokens: ask.maxTokens ?? ENDLESS,
      stream: ask.stream ?? false,
      ignore_eos: true,
      ...(ask.nvext === undefined ? {} : { nvext: ask.nvext }),
    }),
    ...(ask.signal === undefined ? {} : { signal: ask.signal }),
  });
}

async function metric({ baseUrl }: InProcessCluster, start: string): Promise<number> {
  const text = await (await fetch(`${baseUrl}/metrics`)).text();
  const line = text.split("\n").find((candidate) => candidate.startsWith(start));
  return line === undefined ? 0 : Number(line.split(" ").at(-1));
}

async function list({ baseUrl }: InProcessCluster): Promise<{ total: number; data: LiveRequestView[] }> {
  return (await (await fetch(`${baseUrl}/v1/admin/requests`)).json()) as { total: number; data: LiveRequestView[] };
}

async function code(answer: Response): Promise<string> {
  return ((await answer.json()) as { error: { code: string } }).error.code;
}

describe("deadlines and stage limits", () => {
  test("a client's own deadline ends the request on time, and the engine stops and frees its blocks", async () => {
    const engine = mockerConfig({ contextLength: 200_000, maxSequences: 8, totalBlocks: 20_000 });
    const cluster = await startInProcessCluster({ worker: { engine, modelName: "mock" } });
    try {
      const load = () => cluster.workers[0]!.load();
      const startMs = performance.now();
      const whole = await post(cluster, { model: "mock", headers: { "x-request-timeout-ms": "300" } });
      assert.equal(whole.status, 504);
      assert.equal(await code(whole), "request_deadline");
      assert.equal(whole.headers.get("x-should-retry"), "false");
      assert.ok(performance.now() - startMs < 5_000);
      const streamed = await post(cluster, { model: "mock", stream: true, nvext: { request_timeout_ms: 300 } });
      assert.equal(streamed.status, 200);
      const text = await streamed.text();
      assert.match(text, /"code":"request_deadline"/);
      assert.doesNotMatch(text, /\[DONE\]/);
      await until(() => {
        const { runningRequests, waitingRequests, activeBlocks } = load();
        return runningRequests + waitingRequests + activeBlocks === 0;
      }, "the engine to let go");
      assert.equal((await list(cluster)).total, 0);
    } finally {
      await cluster.stop();
    }
  });

  test("a client cannot ask for more time than there is, and bad values are refused by name", async () => {
    const cluster = await startInProcessCluster({
      worker: { engine: SLOW },
      frontend: { limits: { requestTimeoutMs: 200 } },
    });
    try {
      assert.equal((await post(cluster, { headers: { "x-request-timeout-ms": "600000" } })).status, 504);
      for (const bad of ["0", "-5", "soon", "1.5"]) {
        const refused = await post(cluster, { headers: { "x-request-timeout-ms": bad } });
        assert.equal(refused.status, 400, bad);
        assert.match(await refused.text(), /x-request-timeout-ms/);
      }
      assert.match(
        await (await post(cluster, { nvext: { request_timeout_ms: 0 } })).text(),
        /nvext.request_timeout_ms/,
      );
    } finally {
      await cluster.stop();
    }
  });

  test("who waits at the gate is told at its deadline, or at the queue's limit with a time to retry", async () => {
    const cluster = await startInProcessCluster({
      worker: { engine: SLOW },
      frontend: { limits: { concurrentPerModel: 1, queueTimeoutMs: 400 } },
    });
    try {
      const leave = new AbortController();
      const holder = post(cluster, { signal: leave.signal });
      await until(async () => (await list(cluster)).data[0]?.stage === "decode", "the holder to decode");
      const late = await post(cluster, { headers: { "x-request-timeout-ms": "150" } });
      assert.equal(late.status, 504);
      assert.equal(await code(late), "request_deadline");
      const waited = await post(cluster);
      assert.equal(waited.status, 529);
      assert.equal(await code(waited), "queue_timeout");
      assert.ok(Number(waited.headers.get("retry-after")) >= 1);
      assert.equal(await metric(cluster, 'dynamo_frontend_stage_timeouts_total{model="echo",stage="queue"}'), 1);
      assert.equal(await metric(cluster, "dynamo_frontend_queued_requests"), 0);
      leave.abort();
      await assert.rejects(holder);
      assert.equal((await post(cluster, { maxTokens: 2 })).status, 200);
    } finally {
      await cluster.stop();
    }
  });

  test("who waits in the router's queue is told at the queue's limit", async () => {
    const cluster = await startInProcessCluster({
      worker: { engine: mockerConfig({ maxBatchedTokens: 16, maxSequences: 8, speedupRatio: 0.2 }), modelName: "mock" },
      frontend: {
        routerMode: "kv",
        router: { queueThreshold: 0 },
        limits: { concurrentPerModel: 100, queueTimeoutMs: 200, firstTokenTimeoutMs: 0 },
      },
    });
    try {
      const leave = new AbortController();
      const prompt = "x".repeat(20_000);
      const first = fetch(`${cluster.baseUrl}/v1/completions`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ model: "mock", prompt, max_tokens: 10 }),
        signal: leave.signal,
      });
      await until(async () => (await list(cluster)).data[0]?.stage === "dispatch", "the first to be on its worker");
      const second = post(cluster, { model: "mock" });
      await until(async () => (await list(cluster)).data[1]?.stage === "route_queue", "the second to wait");
      assert.equal((await list(cluster)).data[1]!.owner, "router");
      const answer = await second;
      assert.equal(answer.status, 529);
      assert.equal(await code(answer), "queue_timeout");
      leave.abort();
      await assert.rejects(first);
    } finally {
      await cluster.stop();
    }
  });

  test("a worker that gives no first token in time is left for another one, without blame and without a trace", async () => {
    const cluster = await startInProcessCluster({
      workers: 0,
      frontend: { limits: { concurrentPerModel: 100, firstTokenTimeoutMs: 300, idleTimeoutMs: 0 } },
    });
    try {
      // Room for one, which stays: whoever comes next waits in its engine.
      const full = await cluster.addWorker({ engine: { ...SLOW, maxSequences: 1 } });
      await cluster.settled(1);
      const leave = new AbortController();
      const holder = post(cluster, { signal: leave.signal });
      await until(() => full.load().runningRequests === 1, "the first worker to be full");
      await cluster.addWorker({ engine: SLOW });
      await cluster.settled(2);
      for (let i = 0; i < 4; i++) {
        const answer = await post(cluster, { maxTokens: 3 });
        assert.equal(answer.status, 200, await answer.text());
      }
      assert.ok((await metric(cluster, 'dynamo_frontend_stage_timeouts_total{model="echo",stage="first_token"}')) >= 1);
      assert.equal(
        await metric(cluster, 'dynamo_frontend_router_worker_state{model="echo",state="inhibited",reason="failed"}'),
        0,
      );
      await until(() => full.load().waitingRequests === 0, "the full worker to be told");
      leave.abort();
      await assert.rejects(holder);
    } finally {
      await cluster.stop();
    }
  });

  test("a stream that stays idle too long ends with its own reason when no other worker can go on with it", async () => {
    const cluster = await startInProcessCluster({
      worker: { engine: STUCK },
      frontend: { limits: { idleTimeoutMs: 200 } },
    });
    try {
      const answer = await post(cluster, { stream: true, maxTokens: 100 });
      assert.equal(answer.status, 200);
      assert.match(await answer.text(), /"code":"stream_idle_timeout"/);
      assert.equal(await metric(cluster, 'dynamo_frontend_stage_timeouts_total{model="echo",stage="idle"}'), 1);
    } finally {
      await cluster.stop();
    }
  });

  test("a stream that stays idle too long goes on with another worker, and its client sees one answer", async () => {
    const cluster = await startInProcessCluster({
      workers: 0,
      frontend: { limits: { idleTimeoutMs: 1_000, firstTokenTimeoutMs: 0 } },
    });
    try {
      await cluster.addWorker({ engine: STUCK });
      await cluster.addWorker({ engine: SLOW });
      await cluster.settled(2);
      const answers = await Promise.all([1, 2].map(async () => (await post(cluster, { maxTokens: 24 })).json()));
      const texts = answers.map((answer) => (answer as { choices: { text: string }[] }).choices[0]!.text);
      assert.deepEqual(texts, ["abcdefghabcdefghabcdefgh", "abcdefghabcdefghabcdefgh"]);
      assert.equal(await metric(cluster, 'dynamo_frontend_stage_timeouts_total{model="echo",stage="idle"}'), 1);
    } finally {
      await cluster.stop();
    }
  });
});

describe("fair shares", () => {
  test("a key that floods the gate does not hold up another key's request", async () => {
    const cluster = await startInProcessCluster({
      worker: { engine: SLOW },
      frontend: { limits: { concurrentPerModel: 1 } },
    });
    try {
      const order: string[] = [];
      const ask = async (key: string): Promise<void> => {
        const answer = await post(cluster, { maxTokens: 10, headers: { authorization: `Bearer ${key}` } });
        assert.equal(answer.status, 200);
        await answer.text();
        order.push(key);
      };
      const flood = Array.from({ length: 12 }, () => ask("hog"));
      await until(async () => (await list(cluster)).total === 12, "the flood to wait");
      await Promise.all([...flood, ask("small")]);
      assert.ok(order.indexOf("small") <= 4, order.join(" "));
    } finally {
      await cluster.stop();
    }
  });
});

describe("live requests", () => {
  test("operators see each request with its stage and owner, oldest first, and can end one", async () => {
    const cluster = await startInProcessCluster({
      worker: { engine: SLOW },
      frontend: { limits: { concurrentPerModel: 1 } },
    });
    try {
      const running = post(cluster, { stream: true, headers: { "x-request-id": "one", authorization: "Bearer k1" } });
      await until(async () => (await list(cluster)).data[0]?.stage === "decode", "the first to decode");
      const waiting = post(cluster, { headers: { "x-request-id": "two", "x-tenant-id": "team-b" } });
      await until(async () => (await list(cluster)).total === 2, "the second to come");
      const { data } = await list(cluster);
      assert.deepEqual(
        data.map(({ id, stage, owner, stream, prompt_tokens: prompt }) => ({ id, stage, owner, stream, prompt })),
        [
          { id: "one", stage: "decode", owner: cluster.workers[0]!.instanceId, stream: true, prompt: 8 },
          { id: "two", stage: "gate_queue", owner: "frontend", stream: false, prompt: 0 },
        ],
      );
      assert.match(data[0]!.tenant, /^key-[0-9a-f]{12}$/);
      assert.equal(data[1]!.tenant, "team-b");
      assert.ok(data[0]!.output_tokens > 0 && data[0]!.age_ms >= data[1]!.age_ms);
      assert.ok(data[0]!.deadline_in_ms > 590_000);

      let out = "";
      const io = { env: {}, out: (text: string) => (out += text), err: (text: string) => (out += text) };
      const flag = `--frontend=${cluster.baseUrl}`;
      assert.equal(await requestsCommand({ argv: [flag], ...io }), 0);
      assert.match(
        out,
        /2 of 2 requests[^]*one +echo +key-[0-9a-f]{12} [^]* decode [^]*two +echo +team-b .* gate_queue +frontend/,
      );
      out = "";
      assert.equal(await requestsCommand({ argv: [flag, "--json", "--show=1"], ...io }), 0);
      assert.equal((JSON.parse(out) as { data: unknown[] }).data.length, 1);
      out = "";
      assert.equal(await requestsCommand({ argv: ["cancel", "two", flag], ...io }), 0);
      assert.equal(out, "ended two\n");
      assert.equal(await code(await waiting), "cancelled");
      assert.equal(await requestsCommand({ argv: ["cancel", "two", flag], ...io }), 1);

      const ended = await fetch(`${cluster.baseUrl}/v1/admin/requests/one`, { method: "DELETE" });
      assert.deepEqual(await ended.json(), { object: "request.cancelled", id: "one", cancelled: 1 });
      assert.match(await (await running).text(), /"code":"cancelled"/);
      await until(() => cluster.workers[0]!.load().runningRequests === 0, "the engine to stop");
      assert.equal((await list(cluster)).total, 0);
    } finally {
      await cluster.stop();
    }
  });

  test("others learn nothing, and the list is bounded", async () => {
    const cluster = await startInProcessCluster({ frontend: { adminKey: "secret" } });
    try {
      const url = `${cluster.baseUrl}/v1/admin/requests`;
      assert.equal((await fetch(url)).status, 404);
      assert.equal((await fetch(`${url}/x`, { method: "DELETE" })).status, 404);
      const headers = { "x-dynamo-admin-key": "secret" };
      assert.equal((await fetch(url, { headers })).status, 200);
      for (const limit of ["0", "1001", "many"]) {
        assert.equal((await fetch(`${url}?limit=${limit}`, { headers })).status, 400);
      }
    } finally {
      await cluster.stop();
    }
  });
});
