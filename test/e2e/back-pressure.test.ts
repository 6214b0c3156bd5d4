import assert from "node:assert/strict";
import { once } from "node:events";
import { connect, type Socket } from "node:net";
import { describe, test } from "node:test";
import { ECHO, startInProcessCluster, until, type InProcessCluster } from "../helpers/in-process-cluster.ts";

/**
 * What clients can do to a connection, and that it costs a bounded amount and nobody else anything. Numbers in the names
 * are rows of the failure catalogue that issue 5 names.
 */
const SLOW = { ...ECHO, contextLength: 1_000_000, stepMs: 5 };
const FAST = { ...ECHO, contextLength: 1_000_000 };

/** One token at once, and then none. */
const IDLE = { ...SLOW, contextLength: 4_096, stepMs: 3_600_000 };

/** A streaming request on a socket of its own, which the test reads or not. */
async function openStream(cluster: InProcessCluster, maxTokens = 900_000, more: object = {}): Promise<Socket> {
  const socket = connect(Number(new URL(cluster.baseUrl).port), "127.0.0.1");
  socket.on("error", () => undefined);
  await once(socket, "connect");
  const body = JSON.stringify({
    model: "echo",
    prompt: "abcdefgh",
    max_tokens: maxTokens,
    stream: true,
    ignore_eos: true,
    ...more,
  });
  socket.write(
    `POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: ${body.length}\r\n\r\n${body}`,
  );
  return socket;
}

/** One that has its first bytes and reads nothing more. */
async function openPaused(cluster: InProcessCluster): Promise<Socket> {
  const socket = await openStream(cluster);
  await once(socket, "data");
  socket.pause();
  return socket;
}

async function whole(cluster: InProcessCluster, maxTokens: number): Promise<{ status: number; ms: number }> {
  const startMs = performance.now();
  const answer = await fetch(`${cluster.baseUrl}/v1/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model: "echo", prompt: "abc", max_tokens: maxTokens }),
  });
  await answer.text();
  return { status: answer.status, ms: performance.now() - startMs };
}

async function metric({ baseUrl }: InProcessCluster, start: string): Promise<number> {
  const text = await (await fetch(`${baseUrl}/metrics`)).text();
  const line = text.split("\n").find((candidate) => candidate.startsWith(start));
  return line === undefined ? 0 : Number(line.split(" ").at(-1));
}

async function stages({ baseUrl }: InProcessCluster): Promise<string[]> {
  const answer = await fetch(`${baseUrl}/v1/admin/requests?limit=1000`);
  return ((await answer.json()) as { data: { stage: string }[] }).data.map(({ stage }) => stage);
}

/** Nothing of any request is left, on either side. */
async function atRest(cluster: InProcessCluster): Promise<void> {
  await until(async () => (await stages(cluster)).length === 0, "the frontend to be at rest");
  for (const worker of cluster.workers) {
    await until(() => worker.load().runningRequests + worker.load().waitingRequests === 0, "the engine to be at rest");
    assert.equal(worker.load().activeBlocks, 0);
  }
  assert.equal(await metric(cluster, "dynamo_frontend_active_requests"), 0);
  assert.equal(await metric(cluster, "dynamo_frontend_queued_requests"), 0);
  for (const stage of ["preprocess", "route", "dispatch"]) {
    assert.equal(await metric(cluster, `dynamo_frontend_stage_requests{stage="${stage}"`), 0, stage);
  }
}

describe("back-pressure", () => {
  test("row 10: a place is held until the whole stream ended, so no more run than the limit", async () => {
    const cluster = await startInProcessCluster({
      worker: { engine: SLOW },
      frontend: { limits: { concurrentPerModel: 2 } },
    });
    try {
      const sockets = await Promise.all([1, 2].map(() => openStream(cluster)));
      for (const socket of sockets) await once(socket, "data");
      const third = whole(cluster, 2);
      await until(async () => (await stages(cluster)).includes("gate_queue"), "the third to wait");
      let most = 0;
      for (let i = 0; i < 20; i++) {
        most = Math.max(most, cluster.workers[0]!.load().runningRequests);
        await new Promise((resolve) => setImmediate(resolve));
      }
      assert.equal(most, 2);
      sockets[0]!.destroy();
      assert.equal((await third).status, 200);
      sockets[1]!.destroy();
      await atRest(cluster);
    } finally {
      await cluster.stop();
    }
  });

  test("row 11: a worker that is full is passed over, and is no broken worker for it", async () => {
    const cluster = await startInProcessCluster({
      workers: 2,
      worker: { engine: { ...SLOW, maxSequences: 1 }, maxQueuedRequests: 0 },
      frontend: { limits: { concurrentPerModel: 100 } },
    });
    try {
      const sockets = [await openStream(cluster), await openStream(cluster)];
      await until(() => cluster.workers.every((worker) => worker.load().runningRequests === 1), "both to be full");
      for (let i = 0; i < 5; i++) {
        const answer = await fetch(`${cluster.baseUrl}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ model: "echo", prompt: "abc", max_tokens: 2 }),
        });
        assert.equal(answer.status, 529);
        assert.ok(Number(answer.headers.get("retry-after-ms")) > 0, "the worker's own estimate came through");
        assert.match(await answer.text(), /"worker_full"/);
      }
      const inhibited = 'dynamo_frontend_router_worker_state{model="echo",state="inhibited",reason="failed"}';
      assert.equal(await metric(cluster, inhibited), 0);
      sockets[0]!.destroy();
      await until(() => cluster.workers.some((worker) => worker.load().runningRequests === 0), "one to be free");
      assert.equal((await whole(cluster, 2)).status, 200, "it serves at once");
      sockets[1]!.destroy();
      await atRest(cluster);
    } finally {
      await cluster.stop();
    }
  });

  test("row 19: what is kept for clients that do not read is bounded, and the others do not notice", async () => {
    const cluster = await startInProcessCluster({ worker: { engine: FAST } });
    try {
      const before = await whole(cluster, 200);
      const paused = await Promise.all(Array.from({ length: 8 }, () => openPaused(cluster)));
      const startBytes = process.memoryUsage().rss;
      await until(async () => {
        const now = await stages(cluster);
        return now.length === 8 && now.every((stage) => stage === "write");
      }, "all of them to be behind");
      const during = await whole(cluster, 200);
      assert.equal(during.status, 200);
      assert.ok(during.ms < 20 * before.ms + 500, `${during.ms} ms, ${before.ms} ms before`);
      // Each: the frontend's buffer, and the worker's parked items up to its limit of 1 MiB.
      const heldBytes = process.memoryUsage().rss - startBytes;
      assert.ok(heldBytes < 8 * 6 * 2 ** 20, `${Math.round(heldBytes / 2 ** 20)} MiB held`);
      for (const socket of paused) socket.destroy();
      await atRest(cluster);
    } finally {
      await cluster.stop();
    }
  });

  test("row 19: a client that reads again gets the rest of its answer, in order and complete", async () => {
    // Logprobs make it more than the kernel keeps, in however few events it comes. The worker is made to wait before the
    // frontend has more for it than it keeps for anybody.
    const cluster = await startInProcessCluster({
      worker: { engine: FAST },
      frontend: { limits: { responseBufferBytes: 4 * 1024 * 1024 } },
    });
    try {
      const socket = await openStream(cluster, 60_000, { logprobs: 5 });
      const chunks: string[] = [];
      socket.setEncoding("latin1");
      socket.on("data", (text: string) => chunks.push(text));
      await until(() => chunks.length > 0, "the first bytes");
      socket.pause();
      await until(async () => (await stages(cluster))[0] === "write", "it to be behind");
      socket.resume();
      await until(() => chunks.slice(-2).join("").includes("[DONE]"), "the end");
      const texts = [...chunks.join("").matchAll(/"text":"([a-h]*)"/g)].map((match) => match[1]!).join("");
      assert.equal(texts, "abcdefgh".repeat(7_500));
      socket.destroy();
      await atRest(cluster);
    } finally {
      await cluster.stop();
    }
  });

  test("row 20: a client that stops reading and then leaves is forgotten, with all that waited for it", async () => {
    const cluster = await startInProcessCluster({ worker: { engine: FAST } });
    try {
      const paused = await openPaused(cluster);
      await until(async () => (await stages(cluster))[0] === "write", "it to be behind");
      assert.ok(!paused.destroyed);
      paused.resetAndDestroy();
      await atRest(cluster);
    } finally {
      await cluster.stop();
    }
  });

  test("row 21: hundreds of clients that leave in the middle of their streams leave nothing behind", async () => {
    const cluster = await startInProcessCluster({ worker: { engine: { ...SLOW, maxSequences: 1_000 } } });
    const clients = 100;
    try {
      for (let round = 0; round < 4; round++) {
        const sockets = await Promise.all(Array.from({ length: clients }, () => openStream(cluster)));
        await Promise.all(sockets.map((socket) => once(socket, "data")));
        // Half say goodbye, half do not.
        sockets.forEach((socket, index) => (index % 2 === 0 ? socket.destroy() : socket.resetAndDestroy()));
      }
      await atRest(cluster);
      const left = await metric(cluster, "dynamo_frontend_disconnected_clients");
      assert.equal(left, 4 * clients);
    } finally {
      await cluster.stop();
    }
  });

  test("row 22: a worker that says nothing more does not keep a stream whose client left", async () => {
    const cluster = await startInProcessCluster({ worker: { engine: IDLE } });
    try {
      const socket = await openStream(cluster, 1_000);
      await once(socket, "data");
      assert.deepEqual(await stages(cluster), ["decode"]);
      socket.destroy();
      await until(async () => (await stages(cluster)).length === 0, "the frontend to let go");
      assert.equal(await metric(cluster, "dynamo_frontend_active_requests"), 0);
    } finally {
      await cluster.stop();
    }
  });

  test("row 23: streams that were aborted give their place on the connection back", async () => {
    const cluster = await startInProcessCluster({ worker: { engine: SLOW } });
    try {
      for (let i = 0; i < 50; i++) {
        const leave = new AbortController();
        const answer = await fetch(`${cluster.baseUrl}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ model: "echo", prompt: "abc", max_tokens: 90_000, stream: true }),
          signal: leave.signal,
        });
        const reader = answer.body!.getReader();
        await reader.read();
        leave.abort();
        await assert.rejects(reader.read());
      }
      await atRest(cluster);
      assert.equal(await metric(cluster, "dynamo_request_plane_inflight"), 0);
    } finally {
      await cluster.stop();
    }
  });

  test("700 idle streams stay open, cost little, and others are served as before", async () => {
    const count = 700;
    const cluster = await startInProcessCluster({
      worker: { engine: { ...IDLE, maxSequences: count } },
    });
    try {
      await cluster.addWorker({ modelName: "quick", engine: ECHO });
      await cluster.settled(2);
      const sockets = await Promise.all(Array.from({ length: count }, () => openStream(cluster, 1_000)));
      await until(async () => (await stages(cluster)).length === count, "all of them to run");
      const answer = await fetch(`${cluster.baseUrl}/v1/completions`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ model: "quick", prompt: "abc", max_tokens: 20 }),
      });
      assert.equal(answer.status, 200);
      await answer.text();
      assert.ok(sockets.every((socket) => !socket.destroyed));
      for (const socket of sockets) socket.destroy();
      await until(async () => (await stages(cluster)).length === 0, "the frontend to be at rest");
    } finally {
      await cluster.stop();
    }
  });
});
