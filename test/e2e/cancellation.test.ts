import assert from "node:assert/strict";
import { describe, test } from "node:test";
import type { EchoEngineConfig } from "../../src/engines/index.ts";
import { DynamoError } from "../../src/errors/index.ts";
import type { DecisionExplanation } from "../../src/router/index.ts";
import { ECHO, startInProcessCluster, until, type InProcessCluster } from "../helpers/in-process-cluster.ts";
import { startScriptedWorker, type ScriptedCall } from "../helpers/scripted-worker.ts";

/**
 * A client that leaves, at every arrow of the walk: the work stops there, whatever was held for it is given back, and it is
 * counted. `assertAtRest` is what must hold afterwards in each case.
 */
const SLOW = { ...(ECHO as EchoEngineConfig), contextLength: 100_000, stepMs: 5 };

/** Within the context of a scripted worker. */
const SHORT = { max_tokens: 1_000 };

async function metric(baseUrl: string, name: string): Promise<number> {
  const text = await (await fetch(`${baseUrl}/metrics`)).text();
  const lines = text.split("\n").filter((line) => line.startsWith(name));
  return lines.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

interface Leaver {
  leave(): void;
  /** Settles when the client is gone or answered. */
  readonly ended: Promise<unknown>;
}

function ask(baseUrl: string, body: object, headers: Record<string, string> = {}): Leaver {
  const abort = new AbortController();
  const ended = fetch(`${baseUrl}/v1/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: JSON.stringify({ model: "echo", prompt: "abcdefgh".repeat(8), max_tokens: 50_000, stream: true, ...body }),
    signal: abort.signal,
  }).then(
    (response) => response.text().catch(() => "left"),
    () => "left",
  );
  return { leave: () => abort.abort(), ended };
}

async function bookings(baseUrl: string, model: string): Promise<number> {
  const response = await fetch(`${baseUrl}/v1/route`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model, prompt: "x" }),
  });
  const { decisions } = (await response.json()) as { decisions: DecisionExplanation[] };
  return decisions[0]!.candidates.reduce(
    (sum, { load }) => sum + load.active_requests + load.decode_blocks + load.prefill_tokens,
    0,
  );
}

/** Nothing is held for anybody: places at the gate, bookings, streams, engine slots, blocks. */
async function assertAtRest(cluster: InProcessCluster, model = "echo"): Promise<void> {
  const { baseUrl, workers } = cluster;
  const gone = async (): Promise<boolean> =>
    (await metric(baseUrl, "dynamo_frontend_active_requests")) === 0 &&
    (await metric(baseUrl, "dynamo_frontend_queued_requests")) === 0 &&
    (await metric(baseUrl, "dynamo_frontend_stage_requests")) === 0 &&
    (await metric(baseUrl, "dynamo_frontend_router_queue_pending_requests")) === 0 &&
    (await bookings(baseUrl, model)) === 0 &&
    workers.every((worker) => {
      const load = worker.load();
      return load.runningRequests + load.waitingRequests + load.activeBlocks + load.pendingPrefillTokens === 0;
    });
  await until(gone, "everything to be given back", 5_000);
}

describe("a client that leaves", { timeout: 120_000 }, () => {
  test("while it waits at the gate: its place in the queue is free, and no worker hears of it", async () => {
    const limits = { concurrentRequests: 1, queuedRequests: 1 };
    const cluster = await startInProcessCluster({ worker: { engine: SLOW }, frontend: { limits } });
    try {
      const { baseUrl } = cluster;
      const first = ask(baseUrl, {});
      await until(async () => (await metric(baseUrl, "dynamo_frontend_active_requests")) === 1, "the first to run");
      const queued = ask(baseUrl, {});
      await until(async () => (await metric(baseUrl, "dynamo_frontend_queued_requests")) === 1, "the second to wait");
      queued.leave();
      await queued.ended;
      await until(
        async () => (await metric(baseUrl, "dynamo_frontend_queued_requests")) === 0,
        "it to leave the queue",
      );
      assert.equal(cluster.workers[0]!.load().runningRequests, 1);
      first.leave();
      await first.ended;
      await assertAtRest(cluster);
    } finally {
      await cluster.stop();
    }
  });

  test("while it waits in the router's queue: it is taken out, and nothing is sent", async () => {
    const router = { queueThreshold: 0 };
    const cluster = await startInProcessCluster({ workers: 0, frontend: { router } });
    try {
      const { baseUrl } = cluster;
      const calls: ScriptedCall[] = [];
      // Never answers: the first prompt stays to be computed, the next waits for it.
      await startScriptedWorker(cluster.planes(), (call) => calls.push(call), "echo");
      await cluster.settled(1);
      const first = ask(baseUrl, SHORT);
      await until(() => calls.length === 1, "the first to be sent");
      const queued = ask(baseUrl, SHORT);
      const pending = "dynamo_frontend_router_queue_pending_requests";
      await until(async () => (await metric(baseUrl, pending)) === 1, "the second to wait");
      queued.leave();
      await queued.ended;
      await until(async () => (await metric(baseUrl, pending)) === 0, "it to be taken out");
      first.leave();
      await first.ended;
      assert.equal((await calls[0]!.cancelled.promise).reason, "client-gone");
      await assertAtRest(cluster);
      assert.equal(calls.length, 1);
      assert.equal(await metric(baseUrl, "dynamo_frontend_model_cancellation_total"), 2);
    } finally {
      await cluster.stop();
    }
  });

  test("while its long prompt is tokenized: it is not sent to any worker", async () => {
    const cluster = await startInProcessCluster({ worker: { engine: { ...SLOW, contextLength: 10_000_000 } } });
    try {
      const { baseUrl } = cluster;
      const before = cluster.workers[0]!.load().promptTokens;
      const leaver = ask(baseUrl, { prompt: "the sea is deep ".repeat(100_000) });
      const inPreprocess = 'dynamo_frontend_stage_requests{stage="preprocess"';
      await until(async () => (await metric(baseUrl, inPreprocess)) === 1, "the prompt to be worked on");
      leaver.leave();
      await leaver.ended;
      await assertAtRest(cluster);
      assert.equal(cluster.workers[0]!.load().promptTokens, before);
    } finally {
      await cluster.stop();
    }
  });

  test("before its first token: the worker is told to stop", async () => {
    const cluster = await startInProcessCluster({ workers: 0 });
    try {
      const calls: ScriptedCall[] = [];
      await startScriptedWorker(cluster.planes(), (call) => calls.push(call), "echo");
      await cluster.settled(1);
      const leaver = ask(cluster.baseUrl, { ...SHORT, n: 3 });
      await until(() => calls.length === 3, "all choices to be sent");
      leaver.leave();
      await leaver.ended;
      for (const call of calls) assert.equal((await call.cancelled.promise).reason, "client-gone");
      await assertAtRest(cluster);
      assert.equal(await metric(cluster.baseUrl, "dynamo_frontend_disconnected_clients"), 1);
    } finally {
      await cluster.stop();
    }
  });

  test("while it is answered: the engine stops within a step, blocks are free, and the worker counts it", async () => {
    const cluster = await startInProcessCluster({ worker: { engine: SLOW } });
    try {
      const worker = cluster.workers[0]!;
      const leavers = Array.from({ length: 8 }, () => ask(cluster.baseUrl, {}));
      await until(() => worker.load().runningRequests === 8, "all to run");
      for (const leaver of leavers) leaver.leave();
      await Promise.all(leavers.map(({ ended }) => ended));
      await assertAtRest(cluster);
      const { steps } = worker.load();
      await new Promise((resolve) => setImmediate(resolve));
      assert.equal(worker.load().steps, steps, "no step without work");
      assert.equal(await metric(cluster.baseUrl, "dynamo_frontend_model_cancellation_total"), 8);
    } finally {
      await cluster.stop();
    }
  });

  test("while it moves to another worker: that one is told to stop, and the broken one is not asked again", async () => {
    const cluster = await startInProcessCluster({ workers: 0 });
    try {
      const calls: ScriptedCall[] = [];
      const script = (call: ScriptedCall): void => {
        calls.push(call);
        // The first begins and breaks; the second gets the rest and is silent.
        if (calls.length > 1) return;
        call.tokens([104, 105]);
        call.end(new DynamoError("engine-stopped", "as planned"));
      };
      for (let i = 0; i < 3; i++) await startScriptedWorker(cluster.planes(), script, "echo");
      await cluster.settled(3);
      const leaver = ask(cluster.baseUrl, SHORT);
      await until(() => calls.length === 2, "the rest to be sent");
      assert.equal(calls[1]!.resumedTokens, 2);
      leaver.leave();
      await leaver.ended;
      assert.equal((await calls[1]!.cancelled.promise).reason, "client-gone");
      await assertAtRest(cluster);
      assert.equal(calls.length, 2);
      const failed = 'dynamo_frontend_model_migration_duration_seconds_count{outcome="failure"}';
      assert.equal(await metric(cluster.baseUrl, failed), 1);
    } finally {
      await cluster.stop();
    }
  });
});
