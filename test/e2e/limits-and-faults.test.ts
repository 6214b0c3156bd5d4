import assert from "node:assert/strict";
import { connect } from "node:net";
import { describe, test } from "node:test";
import OpenAI from "openai";
import { ECHO, startInProcessCluster, until } from "../helpers/in-process-cluster.ts";

const SLOW = { ...ECHO, contextLength: 200_000, stepMs: 5 };

async function metric(baseUrl: string, pattern: RegExp): Promise<number> {
  const text = await (await fetch(`${baseUrl}/metrics`)).text();
  const line = text.split("\n").find((candidate) => pattern.test(candidate));
  return line === undefined ? Number.NaN : Number(line.split(" ").at(-1));
}

describe("limits and faults of a whole cluster", () => {
  test("concurrency: above the limit requests wait in a bounded queue, above that 529 with Retry-After, and all places come back", async () => {
    const cluster = await startInProcessCluster({
      worker: { engine: SLOW },
      frontend: { limits: { concurrentRequests: 2, queuedRequests: 2 } },
    });
    try {
      const post = (maxTokens: number): Promise<Response> =>
        fetch(`${cluster.baseUrl}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ model: "echo", prompt: "abc", max_tokens: maxTokens }),
        });
      const four = [post(60), post(60), post(60), post(60)];
      await until(
        async () => (await metric(cluster.baseUrl, /^dynamo_frontend_queued_requests/)) === 2,
        "two to queue",
      );
      const refused = await post(1);
      assert.equal(refused.status, 529);
      assert.ok(Number(refused.headers.get("retry-after")) >= 1);
      const body = (await refused.json()) as { error: { message: string } };
      assert.match(body.error.message, /capacity/);
      for (const answer of await Promise.all(four)) assert.equal(answer.status, 200);
      assert.equal((await post(1)).status, 200);
      assert.equal(await metric(cluster.baseUrl, /^dynamo_frontend_active_requests/), 0);
    } finally {
      await cluster.stop();
    }
  });

  test("a client that does not read is cut off with bounded memory, and others are not slowed", async () => {
    const cluster = await startInProcessCluster({
      worker: { engine: { ...ECHO, contextLength: 1_000_000 } },
      frontend: { limits: { responseBufferBytes: 64 * 1024 } },
    });
    try {
      const body = JSON.stringify({ model: "echo", prompt: "abcdefgh", max_tokens: 900_000, stream: true });
      const socket = connect(Number(new URL(cluster.baseUrl).port), "127.0.0.1");
      socket.on("error", () => undefined);
      socket.pause();
      socket.write(
        `POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`,
      );
      await until(
        async () => (await metric(cluster.baseUrl, /^dynamo_frontend_active_requests/)) === 1,
        "the stream to run",
      );
      const client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
      const other = await client.completions.create({ model: "echo", prompt: "abc", max_tokens: 50 });
      assert.equal(other.usage!.completion_tokens, 50);
      await until(
        async () => (await metric(cluster.baseUrl, /^dynamo_frontend_active_requests/)) === 0,
        "the slow reader to be cut off",
        60_000,
      );
      await until(() => cluster.workers[0]!.load().runningRequests === 0, "its work to stop");
      socket.destroy();
    } finally {
      await cluster.stop();
    }
  });

  test("no worker: 503 while the model is known, and requests succeed again once one is back", async () => {
    const cluster = await startInProcessCluster();
    try {
      const client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
      await cluster.workers[0]!.drain(5_000);
      await cluster.settled(0);
      assert.deepEqual((await client.models.list()).data, []);
      await assert.rejects(
        client.completions.create({ model: "echo", prompt: "abc" }),
        (error) => error instanceof OpenAI.InternalServerError && error.status === 503,
      );
      await cluster.addWorker();
      await cluster.settled(1);
      assert.equal(
        (await client.completions.create({ model: "echo", prompt: "abc", max_tokens: 2 })).choices.length,
        1,
      );
    } finally {
      await cluster.stop();
    }
  });

  test("drain: what runs is finished, new requests are refused with 503, and health says so", async () => {
    const cluster = await startInProcessCluster({ worker: { engine: SLOW } });
    try {
      const client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
      const running = client.completions.create({ model: "echo", prompt: "abc", max_tokens: 100 });
      await until(
        async () => (await metric(cluster.baseUrl, /^dynamo_frontend_active_requests/)) === 1,
        "the request to run",
      );
      const drained = cluster.frontend.drain(10_000);
      await until(async () => (await fetch(`${cluster.baseUrl}/health`)).status === 503, "health to say draining");
      await assert.rejects(
        client.completions.create({ model: "echo", prompt: "abc" }),
        (error) => error instanceof OpenAI.APIError && error.status === 503,
      );
      assert.equal((await running).usage!.completion_tokens, 100);
      await drained;
      await assert.rejects(fetch(`${cluster.baseUrl}/live`));
    } finally {
      await cluster.stop();
    }
  });

  test("routing: round-robin gives equal shares, and a worker that refuses is passed over without a trace", async () => {
    const cluster = await startInProcessCluster({ workers: 3 });
    try {
      const client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
      for (let i = 0; i < 9; i++) await client.completions.create({ model: "echo", prompt: "abc", max_tokens: 1 });
      // One more each for the canary.
      assert.deepEqual(
        cluster.workers.map((worker) => worker.load().generatedTokens),
        [4, 4, 4],
      );
      // Gone without a word: the frontend finds out by trying.
      const stopping = cluster.workers[1]!.stop();
      const answers = await Promise.all(
        Array.from({ length: 12 }, () => client.completions.create({ model: "echo", prompt: "abc", max_tokens: 2 })),
      );
      assert.equal(answers.length, 12);
      await stopping;
    } finally {
      await cluster.stop();
    }
  });

  test("health and metrics: instances with their addresses, and the families a dashboard needs", async () => {
    const cluster = await startInProcessCluster({ workers: 2 });
    try {
      const health = (await (await fetch(`${cluster.baseUrl}/health`)).json()) as Record<string, unknown>;
      assert.equal(health["status"], "healthy");
      assert.deepEqual(health["endpoints"], ["dyn://dynamo.backend.generate"]);
      assert.equal((health["instances"] as unknown[]).length, 2);
      const client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
      await client.completions.create({ model: "echo", prompt: "abc", max_tokens: 2 });
      const text = await (await fetch(`${cluster.baseUrl}/metrics`)).text();
      for (const family of [
        'dynamo_frontend_requests_total{model="echo",endpoint="completions",request_type="unary",status="success",error_type=""} 1',
        'dynamo_frontend_output_tokens_total{model="echo"} 2',
        'dynamo_frontend_model_context_length{model="echo"} 4096',
        'dynamo_frontend_time_to_first_token_seconds_count{model="echo"} 1',
        'dynamo_frontend_router_workers{model="echo"} 2',
      ]) {
        assert.ok(text.includes(family), `${family} is missing in\n${text}`);
      }
      const openapi = (await (await fetch(`${cluster.baseUrl}/openapi.json`)).json()) as {
        paths: Record<string, unknown>;
      };
      assert.ok(openapi.paths["/v1/chat/completions"] !== undefined);
    } finally {
      await cluster.stop();
    }
  });
});
