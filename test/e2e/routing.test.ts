import assert from "node:assert/strict";
import { request as httpRequest } from "node:http";
import { describe, test } from "node:test";
import OpenAI from "openai";
import type { DecisionExplanation } from "../../src/router/index.ts";
import {
  ECHO,
  startInProcessCluster,
  until,
  type InProcessCluster,
  type InProcessOptions,
} from "../helpers/in-process-cluster.ts";

const SLOW = { ...ECHO, contextLength: 100_000, stepMs: 5 };

async function withCluster(
  options: InProcessOptions,
  use: (cluster: InProcessCluster) => Promise<void>,
): Promise<void> {
  const cluster = await startInProcessCluster(options);
  try {
    await use(cluster);
  } finally {
    await cluster.stop();
  }
}

function post(
  cluster: InProcessCluster,
  path: string,
  body: object,
  headers: Record<string, string> = {},
): Promise<Response> {
  return fetch(cluster.baseUrl + path, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: JSON.stringify(body),
  });
}

async function explain(cluster: InProcessCluster, requestId: string): Promise<DecisionExplanation[]> {
  const answer = await fetch(`${cluster.baseUrl}/v1/route/explain/${requestId}`);
  assert.equal(answer.status, 200, await answer.clone().text());
  return ((await answer.json()) as { decisions: DecisionExplanation[] }).decisions;
}

async function metric(cluster: InProcessCluster, pattern: RegExp): Promise<number> {
  const text = await (await fetch(`${cluster.baseUrl}/metrics`)).text();
  const line = text.split("\n").find((candidate) => pattern.test(candidate));
  return line === undefined ? Number.NaN : Number(line.split(" ").at(-1));
}

describe("routing of a whole cluster", () => {
  test("kv by own decisions: what the router predicts is what the engine reuses, request by request", async () => {
    await withCluster({ workers: 3, frontend: { routerMode: "kv", router: { kvEvents: false } } }, async (cluster) => {
      for (let i = 0; i < 60; i++) {
        // Conversations of four that grow: each turn repeats the one before it and says more.
        const conversation = i % 4;
        const turn = Math.floor(i / 4);
        const prompt = `conversation ${conversation} `.repeat(3 + turn);
        const answer = await post(
          cluster,
          "/v1/completions",
          { model: "echo", prompt, max_tokens: 2 },
          { "x-request-id": `q${i}` },
        );
        assert.equal(answer.status, 200);
        const { usage } = (await answer.json()) as OpenAI.Completion;
        const [decision] = await explain(cluster, `q${i}`);
        assert.equal(decision!.actual?.cached_tokens, usage!.prompt_tokens_details!.cached_tokens);
        assert.equal(decision!.predicted.cached_blocks, decision!.actual?.cached_blocks, JSON.stringify(decision));
        assert.equal(decision!.actual?.outcome, "finished");
        if (turn > 0) assert.ok(decision!.predicted.cached_blocks > 0, "a later turn reuses the one before it");
      }
      assert.ok((await metric(cluster, /^dynamo_component_router_kv_hit_rate_count/)) === 60);
    });
  });

  test("preview: says where a prompt would go without running it, and agrees with what then happens", async () => {
    await withCluster({ workers: 3, frontend: { routerMode: "kv", router: { kvEvents: false } } }, async (cluster) => {
      const prompt = "the same words again and again ".repeat(4);
      const first = await post(
        cluster,
        "/v1/completions",
        { model: "echo", prompt, max_tokens: 1 },
        { "x-request-id": "first" },
      );
      assert.equal(first.status, 200);
      await first.text();
      const body = { model: "echo", prompt, max_tokens: 1 };
      const preview = (await (await post(cluster, "/v1/route", body)).json()) as { decisions: DecisionExplanation[] };
      const [decision] = await explain(cluster, "first");
      assert.equal(preview.decisions[0]!.worker.instance_id, decision!.worker.instance_id);
      assert.equal(preview.decisions[0]!.candidates.length, 3);
      assert.equal(preview.decisions[0]!.actual, null);
      assert.equal(await metric(cluster, /^dynamo_component_router_requests_started_total/), 1);
      const chat = await post(cluster, "/v1/route", { model: "echo", messages: [{ role: "user", content: "hi" }] });
      assert.ok([200, 501].includes(chat.status));
      assert.equal((await post(cluster, "/v1/route", { model: "nobody", prompt: "x" })).status, 404);
      assert.equal((await post(cluster, "/v1/route", [])).status, 400);
    });
  });

  test("nvext: an operator sees the decision in the answer, streamed and whole, and can name the worker", async () => {
    await withCluster({ workers: 2 }, async (cluster) => {
      const health = (await (await fetch(`${cluster.baseUrl}/health`)).json()) as {
        instances: { instance_id: string }[];
      };
      const named = health.instances[1]!.instance_id;
      const nvext = { extra_fields: ["routing", "worker_id"], backend_instance_id: named };
      for (let i = 0; i < 3; i++) {
        const answer = await post(cluster, "/v1/completions", { model: "echo", prompt: "abc", max_tokens: 2, nvext });
        const body = (await answer.json()) as {
          nvext: { worker_id: object; routing: { decisions: DecisionExplanation[] } };
        };
        assert.deepEqual(body.nvext.worker_id, { decode_worker_id: named, decode_dp_rank: 0 });
        assert.equal(body.nvext.routing.decisions[0]!.reason, "named by the caller");
      }
      const client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
      const params = { model: "echo", prompt: "abc", max_tokens: 2, stream: true as const, nvext };
      const last: OpenAI.Completion[] = [];
      for await (const chunk of await client.completions.create(params)) last.push(chunk);
      const extra = (last.at(-1) as unknown as { nvext?: { routing: { decisions: DecisionExplanation[] } } }).nvext;
      assert.equal(extra?.routing.decisions[0]!.worker.instance_id, named);
      const absent = { ...nvext, backend_instance_id: "0000000000000000" };
      assert.equal(
        (await post(cluster, "/v1/completions", { model: "echo", prompt: "abc", nvext: absent })).status,
        503,
      );
    });
  });

  test("operators only: without the key there is no explanation, no preview, no pin; with it there is", async () => {
    await withCluster({ frontend: { adminKey: "secret" } }, async (cluster) => {
      const key = { "x-dynamo-admin-key": "secret" };
      await (
        await post(
          cluster,
          "/v1/completions",
          { model: "echo", prompt: "abc", max_tokens: 1 },
          { "x-request-id": "one" },
        )
      ).text();
      const get = (path: string, headers: Record<string, string>) => fetch(cluster.baseUrl + path, { headers });
      for (const wrong of [{}, { "x-dynamo-admin-key": "Secret" }, { authorization: "Bearer none" }]) {
        assert.equal((await get("/v1/route/explain/one", wrong)).status, 404);
        assert.equal((await get("/busy_threshold", wrong)).status, 404);
        assert.equal((await post(cluster, "/v1/route", { model: "echo", prompt: "abc" }, wrong)).status, 404);
        const asked = { model: "echo", prompt: "abc", nvext: { extra_fields: ["routing"] } };
        assert.equal((await post(cluster, "/v1/completions", asked, wrong)).status, 501);
      }
      assert.equal((await get("/v1/route/explain/one", key)).status, 200);
      assert.equal((await get("/v1/route/explain/one", { authorization: "Bearer secret" })).status, 200);
      assert.equal((await get("/v1/route/explain/two", key)).status, 404);
      assert.equal((await get("/v1/route/explain/%E0%A4%A", key)).status, 404);
    });
  });

  test("operators only: without a key, clients of this machine are operators, but not what comes through a proxy on it", async () => {
    await withCluster({}, async (cluster) => {
      assert.equal((await fetch(`${cluster.baseUrl}/busy_threshold`)).status, 200);
      const proxied = await fetch(`${cluster.baseUrl}/busy_threshold`, { headers: { "x-forwarded-for": "10.0.0.1" } });
      assert.equal(proxied.status, 404);
    });
  });

  test("busy thresholds: set while running; when every worker is busy a request gets 529, and is served once one is not", async () => {
    await withCluster({ worker: { engine: SLOW } }, async (cluster) => {
      const set = (value: object) => post(cluster, "/busy_threshold", { model: "echo", ...value });
      assert.equal((await set({ active_decode_blocks_threshold: 2 })).status, 400);
      assert.equal((await set({ unknown: 2 })).status, 400);
      assert.equal((await post(cluster, "/busy_threshold", { model: "nobody" })).status, 404);
      const answer = await set({ active_decode_blocks_threshold: 0 });
      assert.deepEqual(await answer.json(), {
        model: "echo",
        active_decode_blocks_threshold: 0,
        active_prefill_tokens_threshold: null,
        active_prefill_tokens_threshold_frac: null,
      });
      const prompt = "more than one block of a prompt, to be in use";
      const running = post(cluster, "/v1/completions", { model: "echo", prompt, max_tokens: 200 });
      await until(async () => (await metric(cluster, /^dynamo_frontend_active_requests/)) === 1, "it to run");
      const refused = await post(cluster, "/v1/completions", { model: "echo", prompt, max_tokens: 1 });
      assert.equal(refused.status, 529);
      assert.equal(await metric(cluster, /^dynamo_frontend_router_worker_state.*busy/), 1);
      await set({ active_decode_blocks_threshold: null });
      assert.equal((await post(cluster, "/v1/completions", { model: "echo", prompt, max_tokens: 1 })).status, 200);
      assert.equal((await running).status, 200);
    });
  });

  test("queue: requests wait for a worker's backlog, all are served in the end, and one whose client left does not hold a place", async () => {
    const engine = { ...SLOW, maxSequences: 1, stepMs: 20 };
    // The frontend's gate would keep them back before they come to the router.
    const limits = { concurrentPerModel: 100 };
    const options: InProcessOptions = { worker: { engine }, frontend: { router: { queueThreshold: 0 }, limits } };
    await withCluster(options, async (cluster) => {
      const body = { model: "echo", prompt: "some words", max_tokens: 5 };
      const first = [post(cluster, "/v1/completions", body), post(cluster, "/v1/completions", body)];
      const queued = () => metric(cluster, /^dynamo_frontend_router_queue_pending_requests/);
      const url = new URL(`${cluster.baseUrl}/v1/completions`);
      const leaving = httpRequest(url, { method: "POST", headers: { "content-type": "application/json" } });
      leaving.on("error", () => undefined);
      leaving.end(JSON.stringify(body));
      await until(async () => (await queued()) >= 1, "one to wait");
      leaving.destroy();
      for (const answer of await Promise.all(first)) assert.equal(answer.status, 200);
      await until(async () => (await queued()) === 0, "the queue to be empty");
      assert.equal((await post(cluster, "/v1/completions", body)).status, 200);
      await until(() => cluster.workers[0]!.load().runningRequests === 0, "the worker to be idle");
      assert.equal(await metric(cluster, /^dynamo_frontend_stage_requests\{stage="route"/), 0);
    });
  });

  test("headers: a session keeps its worker, and bad values are refused by name", async () => {
    await withCluster({ workers: 3, frontend: { router: { sessionAffinityTtlMs: 60_000 } } }, async (cluster) => {
      const workers = new Set<string>();
      for (let i = 0; i < 5; i++) {
        const headers = { "x-dynamo-session-id": "s1", "x-request-id": `s${i}` };
        await (
          await post(cluster, "/v1/completions", { model: "echo", prompt: `turn ${i}`, max_tokens: 1 }, headers)
        ).text();
        workers.add((await explain(cluster, `s${i}`))[0]!.worker.instance_id);
      }
      assert.equal(workers.size, 1);
      for (const [name, value] of [
        ["x-dynamo-session-id", "with a space"],
        ["x-dynamo-request-priority", "high"],
        ["x-dynamo-request-strict-priority", "-1"],
      ] as const) {
        const refused = await post(cluster, "/v1/completions", { model: "echo", prompt: "x" }, { [name]: value });
        assert.equal(refused.status, 400);
        assert.match(await refused.text(), new RegExp(name));
      }
    });
  });

  test("cache salt: prompts of another salt do not count as cached", async () => {
    await withCluster({ frontend: { routerMode: "kv", router: { kvEvents: false } } }, async (cluster) => {
      const ask = async (requestId: string, nvext?: object): Promise<DecisionExplanation> => {
        const body = {
          model: "echo",
          prompt: "a prompt that is long enough for some blocks",
          max_tokens: 1,
          ...(nvext && { nvext }),
        };
        await (await post(cluster, "/v1/completions", body, { "x-request-id": requestId })).text();
        return (await explain(cluster, requestId))[0]!;
      };
      await ask("a");
      const salted = await ask("b", { cache_salt: "tenant" });
      assert.deepEqual([salted.predicted.cached_blocks, salted.actual?.cached_blocks], [0, 0]);
      const again = await ask("c", { cache_salt: "tenant" });
      assert.ok(again.predicted.cached_blocks > 0);
      assert.equal(again.predicted.cached_blocks, again.actual?.cached_blocks);
    });
  });
});
