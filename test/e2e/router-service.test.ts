import assert from "node:assert/strict";
import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import { createLogger } from "../../src/observability/index.ts";
import type { DecisionExplanation } from "../../src/router/index.ts";
import { encodeJson, encodeRouteQuery, decodeRouteAnswer, type RouteAnswer } from "../../src/router-service/index.ts";
import { newInstanceId, registerInstance, type Planes } from "../../src/runtime/component/index.ts";
import type { StreamEnd } from "../../src/runtime/request-plane/index.ts";
import {
  ECHO,
  startInProcessCluster,
  until,
  type InProcessCluster,
  type InProcessOptions,
} from "../helpers/in-process-cluster.ts";

const SLOW = { ...ECHO, contextLength: 100_000, stepMs: 5 };
const ASKS = { routerService: { answerTimeoutMs: 5_000 } };

async function withCluster(
  options: InProcessOptions,
  use: (cluster: InProcessCluster) => Promise<void>,
): Promise<void> {
  const cluster = await startInProcessCluster({ ...options, frontend: { ...ASKS, ...options.frontend } });
  try {
    await use(cluster);
  } finally {
    await cluster.stop();
  }
}

interface Answer {
  readonly usage: { readonly prompt_tokens_details?: { readonly cached_tokens?: number } };
  readonly nvext?: { readonly routing?: { readonly decisions: DecisionExplanation[] } };
}

async function complete(baseUrl: string, id: string, body: object, signal?: AbortSignal): Promise<Answer> {
  const answer = await fetch(`${baseUrl}/v1/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", "x-request-id": id },
    body: JSON.stringify({ model: "echo", max_tokens: 2, ...body }),
    ...(signal === undefined ? {} : { signal }),
  });
  const text = await answer.text();
  assert.equal(answer.status, 200, text);
  return JSON.parse(text) as Answer;
}

async function explain(baseUrl: string, id: string): Promise<DecisionExplanation[]> {
  const answer = await fetch(`${baseUrl}/v1/route/explain/${id}`);
  assert.equal(answer.status, 200, await answer.clone().text());
  return ((await answer.json()) as { decisions: DecisionExplanation[] }).decisions;
}

async function fallbacks(baseUrl: string): Promise<number> {
  const text = await (await fetch(`${baseUrl}/metrics`)).text();
  const lines = text.split("\n").filter((line) => line.startsWith("dynamo_frontend_router_fallbacks_total{"));
  return lines.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

/** The service's own view, asked over the request plane by somebody who is no frontend. */
async function state(
  planes: Planes,
  address: string,
): Promise<{
  bookings: number;
  models: { workers: { ranks: { active_requests: number; prefill_tokens: number; decode_blocks: number }[] }[] }[];
}> {
  // prettier-ignore
  const asked = open(planes, address, "state", encodeJson({}));
  assert.equal(await asked.end, undefined);
  return JSON.parse(asked.items[0]!.toString()) as Awaited<ReturnType<typeof state>>;
}

interface Asked {
  readonly items: Buffer[];
  readonly end: Promise<StreamEnd>;
  cancel(): void;
}

function open(planes: Planes, address: string, endpoint: string, payload: Uint8Array): Asked {
  const { promise, resolve } = Promise.withResolvers<StreamEnd>();
  const items: Buffer[] = [];
  const stream = planes.request.client.open(
    address,
    payload,
    { endpoint: `dynamo.router.${endpoint}`, requestId: "t", traceparent: "", timeoutMs: 20_000, autoCredit: true },
    {
      onItem: (bytes, start, end) => items.push(Buffer.from(bytes.subarray(start, end))),
      onTurnEnd: () => undefined,
      onEnd: resolve,
    },
  );
  return { items, end: promise, cancel: () => stream.cancel() };
}

function routeQuery(requestId: string, tokenCount: number): Uint8Array {
  const request = { requestId, tokenIds: new Uint32Array(tokenCount).map((_, i) => i + requestId.length * 1_000) };
  return encodeRouteQuery({ model: "echo", prompt: "tokens", blockSizeTokens: 16, request });
}

async function answers(asked: Asked, count: number): Promise<RouteAnswer[]> {
  await until(() => asked.items.length >= count, `${count} answers of the router`);
  return asked.items.map((item) => decodeRouteAnswer(item));
}

describe("router service, in one process", () => {
  test("two frontends share one view: a prefix that one sent is found by the other, and engine and router agree", async () => {
    await withCluster({ workers: 3 }, async (cluster) => {
      const { router, planes } = await cluster.addRouter({ routerMode: "kv", router: { kvEvents: false } });
      const other = await cluster.addFrontend();
      const urls = [cluster.baseUrl, other.baseUrl];
      await until(async () => (await state(planes, router.address)).models[0]?.workers.length === 3, "three workers");
      await until(async () => {
        const models = (await (await fetch(`${other.baseUrl}/v1/models`)).json()) as { data: unknown[] };
        return models.data.length === 1;
      }, "the second frontend to serve the model");
      for (let i = 0; i < 24; i++) {
        const turn = Math.floor(i / 4);
        const prompt = `conversation ${i % 4} `.repeat(3 + turn);
        const { usage, nvext } = await complete(urls[turn % 2]!, `q${i}`, { prompt, nvext: { extra_fields: ["routing"] } }); // prettier-ignore
        const [decision] = await explain(urls[i % 2]!, `q${i}`);
        assert.equal(decision!.policy, "kv");
        assert.deepEqual(decision!.degradations, []);
        assert.equal(decision!.actual?.cached_tokens, usage.prompt_tokens_details!.cached_tokens);
        assert.equal(decision!.predicted.cached_blocks, decision!.actual?.cached_blocks, JSON.stringify(decision));
        assert.equal(decision!.actual?.outcome, "finished");
        if (turn > 0) assert.ok(decision!.predicted.cached_blocks > 0, "a later turn came by the other frontend");
        const [shown] = nvext!.routing!.decisions;
        assert.deepEqual(shown!.worker, decision!.worker);
        assert.equal(shown!.actual?.cached_tokens, decision!.actual?.cached_tokens);
      }
      for (const url of urls) assert.equal(await fallbacks(url), 0);
      await until(() => router.bookingCount === 0, "all bookings to be freed");
      const { models } = await state(planes, router.address);
      for (const { ranks } of models[0]!.workers) {
        assert.deepEqual([ranks[0]!.active_requests, ranks[0]!.prefill_tokens], [0, 0]);
      }
      assert.match(await planes.metrics.render(), /dynamo_router_service_bookings_dropped_total 0/);
    });
  });

  test("preview: the service answers, and nothing is booked", async () => {
    await withCluster({ workers: 2 }, async (cluster) => {
      const { router, planes } = await cluster.addRouter({ routerMode: "least-loaded" });
      await until(async () => (await state(planes, router.address)).models[0]?.workers.length === 2, "two workers");
      const answer = await fetch(`${cluster.baseUrl}/v1/route`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ model: "echo", prompt: "where to" }),
      });
      const { decisions } = (await answer.json()) as { decisions: DecisionExplanation[] };
      assert.deepEqual([decisions.length, decisions[0]!.policy], [1, "least-loaded"]);
      assert.equal(router.bookingCount, 0);
      const thresholds = await fetch(`${cluster.baseUrl}/busy_threshold`);
      assert.equal(thresholds.status, 501, "thresholds set here would change nothing");
    });
  });

  test("without a service the frontend chooses: marked in the explanation, counted, and over when one is there", async () => {
    const lines: string[] = [];
    const logger = createLogger({ level: "info", format: "jsonl", write: (line) => void lines.push(line) });
    const said = (text: string): number => lines.filter((line) => line.includes(text)).length;
    await withCluster({ workers: 2, logger }, async (cluster) => {
      await complete(cluster.baseUrl, "warm-up", { prompt: "nobody there" });
      await complete(cluster.baseUrl, "alone", { prompt: "nobody there" });
      assert.equal(said("the router service does not answer"), 1, "one line for all of them");
      const [alone] = await explain(cluster.baseUrl, "alone");
      assert.equal(alone!.policy, "round-robin");
      assert.deepEqual(alone!.degradations, ["router service: absent, chosen by the frontend itself"]);
      assert.equal(await fallbacks(cluster.baseUrl), 2);

      const first = await cluster.addRouter({ routerMode: "least-loaded" });
      await until(async () => (await state(first.planes, first.router.address)).models[0]?.workers.length === 2, "two workers"); // prettier-ignore
      await complete(cluster.baseUrl, "asked", { prompt: "somebody there" });
      const [asked] = await explain(cluster.baseUrl, "asked");
      assert.deepEqual([asked!.policy, asked!.degradations], ["least-loaded", []]);
      assert.equal(await fallbacks(cluster.baseUrl), 2);
      assert.equal(said("the router service answers again"), 1);

      await first.router.stop();
      await complete(cluster.baseUrl, "again", { prompt: "gone again" });
      const [again] = await explain(cluster.baseUrl, "again");
      assert.match(again!.degradations[0]!, /^router service: \S+, chosen by the frontend itself$/);
      assert.equal(await fallbacks(cluster.baseUrl), 3);
      assert.equal(said("the router service does not answer"), 2);
    });
  });

  test("a service that does not answer costs a request the timeout, and the next ones nothing", async () => {
    await withCluster({ workers: 1, frontend: { routerService: { answerTimeoutMs: 100 } } }, async (cluster) => {
      const planes = cluster.planes();
      const server = await planes.request.listen();
      let asked = 0;
      let left = 0;
      server.serve("dynamo.router.route", () => {
        asked++;
        return { onCancel: () => void left++ };
      });
      const lease = await planes.discovery.openLease();
      await registerInstance(lease, { namespace: "dynamo", component: "router", endpoint: "route", instanceId: newInstanceId(), address: server.address, pid: process.pid, host: "h", startedMs: 1 }); // prettier-ignore
      await until(async () => {
        await complete(cluster.baseUrl, `q${asked}`, { prompt: "silence" });
        return asked > 0;
      }, "the service to be asked");
      const [decision] = await explainLocally(cluster, "q0");
      assert.equal(decision!.policy, "round-robin");
      assert.equal(left, 1, "the question was withdrawn");
      const before = asked;
      await complete(cluster.baseUrl, "next", { prompt: "silence" });
      assert.equal(asked, before, "it is left out for a while");
      await lease.close();
    });
  });

  test("bookings of a frontend that vanished are freed, and the queue moves on", async () => {
    await withCluster({ workers: 1 }, async (cluster) => {
      const { router, planes } = await cluster.addRouter({ routerMode: "kv", router: { kvEvents: false, queueThreshold: 0 } }); // prettier-ignore
      await until(async () => (await state(planes, router.address)).models[0]?.workers.length === 1, "the worker");
      const gone = cluster.planes();
      const held = open(gone, router.address, "route", routeQuery("held", 100));
      assert.equal((await answers(held, 1))[0]!.type, "decision");
      const here = cluster.planes();
      const waiting = open(here, router.address, "route", routeQuery("waiting", 100));
      const impatient = open(here, router.address, "route", routeQuery("impatient", 100));
      assert.equal((await answers(waiting, 1))[0]!.type, "queued");
      assert.equal((await answers(impatient, 1))[0]!.type, "queued");
      assert.equal(router.bookingCount, 3);
      impatient.cancel();
      await until(() => router.bookingCount === 2, "the one that gave up to leave the queue");

      await gone.request.close();
      const [, decision] = await answers(waiting, 2);
      assert.ok(decision?.type === "decision" && decision.queuedMs >= 0);
      assert.equal(router.bookingCount, 1);
      const update = { booking: decision.booking, cachedTokens: 0, tokens: 3, outcome: "finished" };
      for (const endpoint of ["prefill_done", "add_output", "free"]) {
        const told = open(here, router.address, endpoint, encodeJson(update));
        await told.end;
        assert.equal(told.items[0]!.toString(), '{"known":true}', endpoint);
      }
      assert.equal(await waiting.end, undefined, "the booking's stream ends in good order");
      const late = open(here, router.address, "free", encodeJson(update));
      await late.end;
      assert.equal(late.items[0]!.toString(), '{"known":false}');
      assert.equal(router.bookingCount, 0);
      assert.match(await planes.metrics.render(), /dynamo_router_service_bookings_dropped_total 2/);
    });
  });

  test("a client that leaves, and a router that leaves, end no request and keep no booking", async () => {
    await withCluster({ workers: 2, worker: { engine: SLOW } }, async (cluster) => {
      const { router, planes } = await cluster.addRouter({ routerMode: "least-loaded" });
      await until(async () => (await state(planes, router.address)).models[0]?.workers.length === 2, "two workers");
      const leave = new AbortController();
      const left = complete(cluster.baseUrl, "left", { prompt: "x".repeat(2_000), max_tokens: 2_000 }, leave.signal);
      const stays = complete(cluster.baseUrl, "stays", { prompt: "y".repeat(100), max_tokens: 60 });
      await until(() => router.bookingCount === 2, "both to be booked");
      const { models } = await state(planes, router.address);
      assert.deepEqual(models[0]!.workers.map(({ ranks }) => ranks[0]!.active_requests), [1, 1]); // prettier-ignore
      leave.abort();
      await assert.rejects(left);
      await until(() => router.bookingCount <= 1, "the booking of the client that left to be freed");
      await router.stop();
      await stays;
      assert.equal(await fallbacks(cluster.baseUrl), 0, "it had its worker already");
    });
  });

  test("a service that counts output blocks sees an answer grow while it runs", async () => {
    await withCluster({ workers: 1, worker: { engine: SLOW } }, async (cluster) => {
      const router = { kvEvents: false, trackOutputBlocks: true };
      const service = await cluster.addRouter({ routerMode: "kv", router });
      const blocks = async (): Promise<number> => {
        const { models } = await state(service.planes, service.router.address);
        return models[0]?.workers[0]?.ranks[0]?.decode_blocks ?? -1;
      };
      await until(async () => (await blocks()) === 0, "the worker, with nothing to do");
      const answer = complete(cluster.baseUrl, "long", { prompt: "z".repeat(400), max_tokens: 300 });
      await until(async () => (await blocks()) > 400 / 16 + 2, "more blocks than the prompt has");
      await answer;
      await until(async () => (await blocks()) === 0, "the booking to be freed");
    });
  });

  test("questions the service cannot answer are refused with a reason", async () => {
    await withCluster({ workers: 1 }, async (cluster) => {
      const { router, planes } = await cluster.addRouter();
      await until(async () => (await state(planes, router.address)).models[0]?.workers.length === 1, "the worker");
      const request = { tokenIds: new Uint32Array(64), hashes: { blockCount: 1, sequenceHashes: new Uint32Array(2), localHashes: new Uint32Array(0) } }; // prettier-ignore
      const refusals: [Uint8Array, string][] = [
        [Uint8Array.of(1, 2, 3), "malformed-frame"],
        [
          Buffer.from(encodeRouteQuery({ model: "other", prompt: "tokens", blockSizeTokens: 16, request })),
          "no-workers",
        ],
        [Buffer.from(encodeRouteQuery({ model: "echo", prompt: "hashes", blockSizeTokens: 64, request })), "malformed-frame"], // prettier-ignore
      ];
      for (const [payload, reason] of refusals) {
        assert.equal((await open(planes, router.address, "route", payload).end)?.reason, reason);
      }
      assert.equal(router.bookingCount, 0);
    });
  });
});

/** The fallback is known to the frontend itself, though the service it would also ask is none. */
async function explainLocally(cluster: InProcessCluster, id: string): Promise<DecisionExplanation[]> {
  const decisions = await explain(cluster.baseUrl, id);
  assert.equal(decisions.length, 1);
  return decisions;
}

interface Commands {
  /** Starts `dynamo` with these arguments; gives what it says when it is ready. */
  readonly start: (
    ...argv: string[]
  ) => Promise<{ readonly child: ChildProcess; readonly facts: Record<string, unknown> }>;
}

/** Commands of one cluster, all gone afterwards. */
async function withCommands(use: (commands: Commands) => Promise<void>): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "router-service-"));
  const children: ChildProcess[] = [];
  const start: Commands["start"] = async (...argv) => {
    const child = spawn(process.execPath, [join(import.meta.dirname, "../../bin/dynamo.mjs"), ...argv, `--file-kv=${folder}`], { stdio: ["ignore", "ignore", "inherit", "ipc"], env: { ...process.env, DYN_LOG: "error" } }); // prettier-ignore
    children.push(child);
    const [ready] = (await once(child, "message", { signal: AbortSignal.timeout(30_000) })) as [{ facts: Record<string, unknown> }]; // prettier-ignore
    return { child, facts: ready.facts };
  };
  try {
    await use({ start });
  } finally {
    const exits = children.filter((child) => child.exitCode === null && child.signalCode === null).map((child) => once(child, "exit")); // prettier-ignore
    for (const child of children) child.kill("SIGKILL");
    await Promise.all(exits);
    await rm(folder, { recursive: true });
  }
}

describe("router service, in real processes", () => {
  test("frontend, router and workers as commands: routed by kv; a killed frontend's booking is freed; a killed router is survived", async () => {
    await withCommands(async ({ start }) => {
      const router = await start("router", "--router-mode=kv", "--system-port=0");
      const health = `http://127.0.0.1:${String(router.facts["systemPort"])}/health`;
      const bookings = async (): Promise<number> => ((await (await fetch(health)).json()) as { bookings: number }).bookings; // prettier-ignore
      await start("mocker", "--num-workers=2", "--model-name=echo", "--decode-speedup-ratio=0.2");
      const frontends = [
        await start("frontend", "--router-service", "--http-port=0"),
        await start("frontend", "--router-service", "--http-port=0"),
      ];
      const [doomed, stays] = frontends.map(({ facts }) => `http://127.0.0.1:${String(facts["port"])}`) as [string, string]; // prettier-ignore
      await until(async () => ((await (await fetch(health)).json()) as { models: { workers: unknown[] }[] }).models[0]?.workers.length === 2, "the router to know both workers"); // prettier-ignore
      for (const url of [doomed, stays]) {
        await until(async () => ((await (await fetch(`${url}/v1/models`)).json()) as { data: unknown[] }).data.length === 1, "the model"); // prettier-ignore
      }
      await complete(stays, "one", { prompt: "by the router service" });
      const [decision] = await explain(stays, "one");
      assert.equal(decision!.policy, "kv");
      await until(async () => (await bookings()) === 0, "the booking to be freed");

      const broken = complete(doomed, "long", { prompt: "a long one", max_tokens: 20_000 }).catch(() => "broken");
      await until(async () => (await bookings()) === 1, "the long request to be booked");
      frontends[0]!.child.kill("SIGKILL");
      assert.equal(await broken, "broken");
      await until(async () => (await bookings()) === 0, "the booking of the dead frontend to be freed");

      router.child.kill("SIGKILL");
      await once(router.child, "exit");
      await complete(stays, "two", { prompt: "by the frontend itself" });
      const [fallback] = await explain(stays, "two");
      assert.equal(fallback!.policy, "round-robin");
      assert.match(fallback!.degradations[0]!, /^router service: /);
      assert.equal(await fallbacks(stays), 1);
    });
  });

  test("two routers stand by for each other: both know the load and the blocks; when one is killed the other goes on", async () => {
    await withCommands(async ({ start }) => {
      const routers = await Promise.all(
        [0, 1].map(async () => {
          const { child, facts } = await start(
            "router",
            "--router-mode=kv",
            "--router-replica-sync",
            "--system-port=0",
          );
          return { child, health: `http://127.0.0.1:${String(facts["systemPort"])}/health` };
        }),
      );
      interface State {
        readonly bookings: number;
        readonly models: { workers: { instance_id: string; ranks: { active_requests: number }[] }[] }[];
      }
      const stateOf = async (health: string): Promise<State> => (await (await fetch(health)).json()) as State;
      const loads = async (health: string): Promise<string> =>
        JSON.stringify(
          (await stateOf(health)).models[0]?.workers.map((one) => [one.instance_id, one.ranks[0]!.active_requests]),
        );
      await start("mocker", "--num-workers=3", "--model-name=echo", "--decode-speedup-ratio=0.2");
      const { facts } = await start("frontend", "--router-service", "--http-port=0");
      const url = `http://127.0.0.1:${String(facts["port"])}`;
      for (const { health } of routers) {
        await until(async () => (await stateOf(health)).models[0]?.workers.length === 3, "the routers to know all workers"); // prettier-ignore
      }
      await until(async () => ((await (await fetch(`${url}/v1/models`)).json()) as { data: unknown[] }).data.length === 1, "the model"); // prettier-ignore

      // A prompt of several blocks (of 64) is cached on one worker, and long requests run.
      const prompt = "the long beginning of a story that is told again; ".repeat(8);
      await complete(url, "cold", { prompt });
      const [cold] = await explain(url, "cold");
      assert.deepEqual(
        [cold!.policy, cold!.degradations.filter((one) => one.startsWith("router service"))],
        ["kv", []],
      );
      const leave = new AbortController();
      const running = ["x", "y", "z"].map((mark) =>
        fetch(`${url}/v1/completions`, {
          method: "POST",
          signal: leave.signal,
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ model: "echo", prompt: `${mark} goes on and on`, max_tokens: 20_000, stream: true }),
        }),
      );
      for (const answer of running) assert.equal((await answer).status, 200);
      const [one, two] = routers as [(typeof routers)[0], (typeof routers)[0]];
      const isSame = async (): Promise<boolean> => {
        const [a, b] = [await loads(one.health), await loads(two.health)];
        return a === b && (a.match(/,1\]/g)?.length ?? 0) === 3;
      };
      await until(isSame, "both to see one request on each worker");

      const booked = await Promise.all(routers.map(async ({ health }) => (await stateOf(health)).bookings));
      const serving = booked[0]! > 0 ? one : two;
      const standby = serving === one ? two : one;
      serving.child.kill("SIGKILL");
      await once(serving.child, "exit");
      // The first request after may meet the dead one, and is placed by the frontend itself; then the other answers.
      let warm: DecisionExplanation | undefined;
      for (let i = 0; warm?.policy !== "kv"; i++) {
        assert.ok(i < 100, "the standby is not asked");
        await complete(url, `after-${i}`, { prompt });
        [warm] = await explain(url, `after-${i}`);
      }
      assert.deepEqual(warm.degradations, []);
      assert.equal(warm.worker.instance_id, cold!.worker.instance_id, "it knows who has the blocks");
      assert.ok(warm.predicted.cached_tokens > 0 && warm.predicted.cached_tokens === warm.actual!.cached_tokens);
      // The requests of the dead router's bookings run on, and end.
      leave.abort();
      await Promise.allSettled(running.map(async (answer) => (await answer).text()));
      await until(async () => !/,[1-9]/.test(await loads(standby.health)), "the standby to see no load");
    });
  });
});
