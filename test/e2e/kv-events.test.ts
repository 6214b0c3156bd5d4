import assert from "node:assert/strict";
import { describe, test } from "node:test";
import type OpenAI from "openai";
import { createLogger } from "../../src/observability/index.ts";
import type { DecisionExplanation } from "../../src/router/index.ts";
import { mockerConfig } from "../../src/engines/mocker/index.ts";
import { SeededRandom } from "../../src/std/index.ts";
import {
  ECHO,
  startInProcessCluster,
  until,
  workersJoined,
  type InProcessCluster,
  type InProcessOptions,
} from "../helpers/in-process-cluster.ts";
import { startProcessCluster } from "../helpers/process-cluster.ts";

/** 64 blocks: a few conversations, then the oldest blocks go. */
const SMALL = { ...ECHO, contextLength: 512, maxSequences: 2 };
const KV = { routerMode: "kv" } as const;
const MODEL = process.env["DYN_TEST_MODEL"];
/** Each takes a good part of a second; the whole run of 1,000 is for who changes the engine's cache or the index. */
const REAL_REQUESTS = Number(process.env["DYN_TEST_REAL_REQUESTS"] ?? 16);

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

function post(baseUrl: string, path: string, body: object, requestId = ""): Promise<Response> {
  const headers = { "content-type": "application/json", ...(requestId === "" ? {} : { "x-request-id": requestId }) };
  return fetch(baseUrl + path, { method: "POST", headers, body: JSON.stringify(body) });
}

/** Completes a prompt; gives the router's record of it, and what the engine told. */
async function complete(baseUrl: string, model: string, prompt: string, requestId: string) {
  const answer = await post(baseUrl, "/v1/completions", { model, prompt, max_tokens: 2, temperature: 0 }, requestId);
  assert.equal(answer.status, 200, await answer.clone().text());
  const { usage } = (await answer.json()) as OpenAI.Completion;
  const explained = await fetch(`${baseUrl}/v1/route/explain/${requestId}`);
  const { decisions } = (await explained.json()) as { decisions: DecisionExplanation[] };
  return { decision: decisions[0]!, cachedTokens: usage!.prompt_tokens_details!.cached_tokens! };
}

async function preview(baseUrl: string, prompt: string): Promise<DecisionExplanation> {
  const answer = await post(baseUrl, "/v1/route", { model: "echo", prompt });
  assert.equal(answer.status, 200, await answer.clone().text());
  return ((await answer.json()) as { decisions: DecisionExplanation[] }).decisions[0]!;
}

/** Device blocks of the prompt by worker. */
function overlaps(explanation: DecisionExplanation): Record<string, number> {
  return Object.fromEntries(explanation.candidates.map((one) => [one.instance_id, one.overlap_blocks.device]));
}

async function metric(baseUrl: string, pattern: RegExp): Promise<number> {
  const text = await (await fetch(`${baseUrl}/metrics`)).text();
  const line = text.split("\n").find((candidate) => pattern.test(candidate));
  return line === undefined ? Number.NaN : Number(line.split(" ").at(-1));
}

/** All workers have joined this frontend, and it has what they have. */
async function whole(baseUrl: string, workers: number): Promise<void> {
  await workersJoined(baseUrl, workers);
  await until(
    async () => (await metric(baseUrl, /^dynamo_router_kv_ranks_recovering/)) === 0,
    "all ranks to be restored",
  );
}

/** Conversations that grow and fall back, so that prefixes are shared, extended, evicted and computed again. */
function promptOf(i: number): string {
  return `conversation ${i % 11}: ${"and then she said ".repeat(2 + ((i * 7) % 17))}`;
}

/** A path down a tree of texts: each level is about two blocks, or some letters more, and has one of four words. */
function branchOf(random: SeededRandom): string {
  const words = ["north", "south", "east", "west"];
  let text = "";
  for (let depth = 1 + (random.nextU32() % 6); depth > 0; depth--) {
    const word = words[random.nextU32() % words.length]!;
    text += `${word} of the ${word}ern river and `.repeat(1 + word.length / 5);
  }
  return text;
}

describe("KV events of a whole cluster", () => {
  test("what the router predicts is what the engine reuses, request by request, also while blocks are evicted", async () => {
    await withCluster({ workers: 3, worker: { engine: SMALL }, frontend: KV }, async (cluster) => {
      await whole(cluster.baseUrl, 3);
      let reused = 0;
      for (let i = 0; i < 150; i++) {
        const { decision, cachedTokens } = await complete(cluster.baseUrl, "echo", promptOf(i), `q${i}`);
        assert.equal(decision.predicted.cached_tokens, cachedTokens, `request ${i}: ${JSON.stringify(decision)}`);
        assert.deepEqual(decision.degradations, i === 0 ? ["kv: index empty, choosing by load"] : []);
        if (cachedTokens > 0) reused++;
      }
      assert.ok(reused > 50, `${reused} requests reused something`);
      const removed = /^dynamo_component_kv_cache_events_applied\{status="ok",event_type="removed"\}/;
      assert.ok((await metric(cluster.baseUrl, removed)) > 0, "the caches were full, so blocks were evicted");
    });
  });

  test("mock engines with two ranks each: 1,000 explanations agree with what the engines reused", async () => {
    const engine = mockerConfig({
      blockSizeTokens: 16,
      contextLength: 1_024,
      totalBlocks: 96,
      maxSequences: 8,
      maxBatchedTokens: 512,
      speedupRatio: 0,
      dataParallelSize: 2,
    });
    await withCluster({ workers: 3, worker: { engine, modelName: "echo" }, frontend: KV }, async (cluster) => {
      await whole(cluster.baseUrl, 3);
      const random = new SeededRandom(11);
      const ranks = new Set<string>();
      let [reused, partly] = [0, 0];
      for (let i = 0; i < 1_000; i++) {
        const { decision, cachedTokens } = await complete(cluster.baseUrl, "echo", branchOf(random), `q${i}`);
        assert.equal(decision.predicted.cached_tokens, cachedTokens, `request ${i}: ${JSON.stringify(decision)}`);
        assert.equal(decision.actual!.cached_tokens, cachedTokens);
        assert.deepEqual(decision.degradations, i === 0 ? ["kv: index empty, choosing by load"] : []);
        ranks.add(`${decision.worker.instance_id}/${decision.worker.dp_rank}`);
        if (cachedTokens > 0) reused++;
        if (cachedTokens > 0 && decision.prompt.tokens - cachedTokens > 16) partly++;
      }
      assert.ok(ranks.size > 2, `${ranks.size} ranks were used`);
      assert.ok(reused > 300 && partly > 100, `${reused} requests reused something, ${partly} a part`);
      const removed = /^dynamo_component_kv_cache_events_applied\{status="ok",event_type="removed"\}/;
      assert.ok((await metric(cluster.baseUrl, removed)) > 100, "the caches were full, so blocks were evicted");
    });
  });

  test("a frontend that starts late knows within a second what the first one knows, and serves at once", async () => {
    await withCluster({ workers: 4, frontend: KV }, async (cluster) => {
      await whole(cluster.baseUrl, 4);
      for (let i = 0; i < 60; i++) await complete(cluster.baseUrl, "echo", promptOf(i), `q${i}`);
      const late = await cluster.addFrontend();
      const startMs = performance.now();
      await whole(late.baseUrl, 4);
      assert.ok(performance.now() - startMs < 1_000, "within a second");
      let known = 0;
      for (let i = 0; i < 60; i++) {
        const seen = overlaps(await preview(late.baseUrl, promptOf(i)));
        assert.deepEqual(seen, overlaps(await preview(cluster.baseUrl, promptOf(i))));
        known += Math.max(...Object.values(seen));
      }
      assert.ok(known > 60);
    });
  });

  test("events that never arrive are got by asking the worker, and requests are served meanwhile", async () => {
    let losing = true;
    // Nothing arrives of the events themselves; what the worker tells when asked still does.
    const drop = (kind: string, topic: string): boolean => losing && kind !== "beacon" && topic === "kv-events";
    await withCluster({ workers: 2, frontend: KV, drop }, async (cluster) => {
      await whole(cluster.baseUrl, 2);
      const { cachedTokens } = await complete(cluster.baseUrl, "echo", promptOf(3), "first");
      assert.equal(cachedTokens, 0);
      // The plane gives up on its replay after its deadline, then the router asks the worker.
      await until(
        async () => Math.max(...Object.values(overlaps(await preview(cluster.baseUrl, promptOf(3))))) > 0,
        "the lost events to be restored",
      );
      await until(
        async () => (await metric(cluster.baseUrl, /^dynamo_router_kv_events_lost_total/)) > 0,
        "the loss to be counted",
      );
      losing = false;
      const { decision } = await complete(cluster.baseUrl, "echo", promptOf(3), "second");
      assert.ok(decision.predicted.cached_tokens > 0);
    });
  });

  test("under heavy loss of events every index becomes exact again by itself", async () => {
    const random = new SeededRandom(7);
    let losing = true;
    const drop = (kind: string): boolean => losing && kind !== "beacon" && random.nextFloat() < 0.4;
    await withCluster({ workers: 3, worker: { engine: SMALL }, frontend: KV, drop }, async (cluster) => {
      for (let i = 0; i < 100; i++) await complete(cluster.baseUrl, "echo", promptOf(i), `q${i}`);
      losing = false;
      // A frontend that starts now gets each worker's truth by a dump: the one that lost events must agree with it.
      const fresh = await cluster.addFrontend();
      await whole(fresh.baseUrl, 3);
      const truth: Record<string, number>[] = [];
      for (let i = 0; i < 85; i++) truth.push(overlaps(await preview(fresh.baseUrl, promptOf(i))));
      await until(async () => {
        const seen: Record<string, number>[] = [];
        for (let i = 0; i < 85; i++) seen.push(overlaps(await preview(cluster.baseUrl, promptOf(i))));
        return JSON.stringify(seen) === JSON.stringify(truth);
      }, "the index to be exact again");
      await whole(cluster.baseUrl, 3);
    });
  });

  test("a worker with another block size is left out with the reason, and the model goes on", async () => {
    const lines: string[] = [];
    const logger = createLogger({ level: "info", format: "jsonl", write: (line) => lines.push(line) });
    await withCluster({ workers: 2, frontend: KV, logger }, async (cluster) => {
      const odd = await cluster.addWorker({ engine: { ...ECHO, blockSizeTokens: 32 } });
      let problem: string | undefined;
      await until(async () => {
        const health = (await (await fetch(`${cluster.baseUrl}/health`)).json()) as {
          instances: { instance_id: string; problem?: string }[];
        };
        problem = health.instances.find((one) => one.instance_id === odd.instanceId)?.problem;
        return problem !== undefined && problem !== "no model card yet";
      }, "the worker to be refused");
      assert.match(
        problem ?? "",
        /^its KV blocks have 32 tokens, those of most of the model's workers 16; start it with /,
      );
      assert.equal(lines.filter((line) => line.includes(`worker left out: ${problem}`)).length, 1);
      assert.equal((await preview(cluster.baseUrl, "abc")).candidates.length, 2);
      // While there is nothing in the index, that is marked in each explanation, counted, and said once.
      for (const id of ["a", "b"]) {
        const { decision } = await complete(cluster.baseUrl, "echo", "short", id);
        assert.deepEqual(decision.degradations, ["kv: index empty, choosing by load"]);
      }
      const degraded = /^dynamo_router_degraded_decisions_total\{model="echo",kind="index_empty"\}/;
      assert.equal(await metric(cluster.baseUrl, degraded), 2);
      assert.equal(lines.filter((line) => line.includes("routing is degraded: kv: index empty")).length, 1);
    });
  });

  test("a worker that leaves takes its blocks along", async () => {
    await withCluster({ workers: 2, frontend: KV }, async (cluster) => {
      await whole(cluster.baseUrl, 2);
      const { decision } = await complete(cluster.baseUrl, "echo", promptOf(4), "q");
      await until(
        async () => Object.values(overlaps(await preview(cluster.baseUrl, promptOf(4)))).some((blocks) => blocks > 0),
        "the blocks",
      );
      const holder = cluster.workers.find((worker) => worker.instanceId === decision.worker.instance_id)!;
      await holder.drain(2_000);
      await cluster.settled(1);
      assert.deepEqual(Object.values(overlaps(await preview(cluster.baseUrl, promptOf(4)))), [0]);
    });
  });

  test("two frontends with replica sync see the same load while requests run, and none when they are over", async () => {
    const slow = { ...ECHO, contextLength: 100_000, stepMs: 5 };
    const frontend = { ...KV, routerReplicaSync: true };
    await withCluster({ workers: 3, worker: { engine: slow }, frontend }, async (cluster) => {
      const second = await cluster.addFrontend();
      await whole(second.baseUrl, 3);
      const urls = [cluster.baseUrl, second.baseUrl];
      const controllers = Array.from({ length: 12 }, () => new AbortController());
      const streams = controllers.map((controller, i) =>
        fetch(`${urls[i % 2]}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ model: "echo", prompt: promptOf(i), max_tokens: 50_000, stream: true }),
          signal: controller.signal,
        }),
      );
      for (const stream of streams) assert.equal((await stream).status, 200);
      const active = async (baseUrl: string): Promise<number[]> =>
        (await preview(baseUrl, "zzz")).candidates.map((one) => one.load.active_requests);
      const isSame = async (total: number): Promise<boolean> => {
        const [one, two] = [await active(urls[0]!), await active(urls[1]!)];
        return JSON.stringify(one) === JSON.stringify(two) && one.reduce((sum, count) => sum + count, 0) === total;
      };
      await until(() => isSame(12), "both to see all twelve");
      // One that starts now is told of them too.
      const third = await cluster.addFrontend();
      await whole(third.baseUrl, 3);
      await until(
        async () => (await active(third.baseUrl)).reduce((sum, count) => sum + count, 0) === 12,
        "the third to see them",
      );
      for (const controller of controllers) controller.abort();
      await Promise.allSettled(streams.map(async (stream) => (await stream).text()));
      await until(() => isSame(0), "both to see none");
      assert.deepEqual(await active(third.baseUrl), [0, 0, 0]);
    });
  });

  test("with eight frontends the hit rate stays within 5 points of one", async () => {
    const engine = mockerConfig({
      blockSizeTokens: 16,
      contextLength: 4_096,
      totalBlocks: 600,
      maxSequences: 16,
      maxBatchedTokens: 2_048,
      speedupRatio: 0,
    });
    const frontend = { ...KV, routerReplicaSync: true };
    /** Share of the prompt tokens that came from a cache, of the same conversations, `width` turns at a time. */
    const hitRate = async (frontends: number, width: number): Promise<number> => {
      let [cached, total] = [0, 0];
      await withCluster({ workers: 4, worker: { engine, modelName: "echo" }, frontend }, async (cluster) => {
        const urls = [cluster.baseUrl];
        while (urls.length < frontends) urls.push((await cluster.addFrontend()).baseUrl);
        for (const url of urls) await whole(url, 4);
        // 24 conversations over 6 documents; their blocks fill the caches more than once.
        const texts = Array.from(
          { length: 24 },
          (_, i) => `document ${i % 6}: ${"so it is written ".repeat(60)} ${i}: `,
        );
        const random = new SeededRandom(5);
        let turn = 0;
        const talk = async (): Promise<void> => {
          while (turn < 360) {
            const i = turn++;
            const who = random.nextU32() % texts.length;
            texts[who] += `turn ${i} asks for more of it; `;
            const body = { model: "echo", prompt: texts[who], max_tokens: 2 };
            const answer = await post(urls[i % urls.length]!, "/v1/completions", body);
            const { usage } = (await answer.json()) as OpenAI.Completion;
            cached += usage!.prompt_tokens_details!.cached_tokens!;
            total += usage!.prompt_tokens;
          }
        };
        await Promise.all(Array.from({ length: width }, talk));
      });
      return cached / total;
    };
    const [one, eight] = [await hitRate(1, 4), await hitRate(8, 4)];
    assert.ok(one > 0.5 && one < 0.99, `one frontend: ${one}`);
    assert.ok(eight > one - 0.05, `one frontend: ${one}, eight: ${eight}`);
  });

  test("the same between processes, over files, TCP and ZMQ", async () => {
    const cluster = await startProcessCluster(["--engine=echo", "--workers=2", "--router-mode=kv"]);
    try {
      await whole(cluster.baseUrl, 2);
      let reused = 0;
      for (let i = 0; i < 60; i++) {
        const { decision, cachedTokens } = await complete(cluster.baseUrl, "echo", promptOf(i), `q${i}`);
        assert.equal(decision.predicted.cached_tokens, cachedTokens, `request ${i}: ${JSON.stringify(decision)}`);
        if (cachedTokens > 0) reused++;
      }
      assert.ok(reused > 20, `${reused} requests reused something`);
    } finally {
      assert.equal(await cluster.stop(), 0);
    }
  });

  test(
    "the embedded engine: predicted and reused tokens agree, request by request, on real prompts",
    { skip: MODEL === undefined ? "no test model: DYN_TEST_MODEL is not set" : false },
    async () => {
      const engine = {
        kind: "llama",
        modelPath: MODEL!,
        contextLength: 1_024,
        kvCacheTokens: 1_536,
        maxSequences: 2,
        maxBatchedTokens: 512,
        blockSizeTokens: 16,
        threads: 1,
      } as const;
      await withCluster({ workers: 2, worker: { engine, modelName: "echo" }, frontend: KV }, async (cluster) => {
        await whole(cluster.baseUrl, 2);
        const random = new SeededRandom(12);
        let reused = 0;
        for (let i = 0; i < REAL_REQUESTS; i++) {
          const { decision, cachedTokens } = await complete(cluster.baseUrl, "echo", branchOf(random), `q${i}`);
          assert.equal(decision.predicted.cached_tokens, cachedTokens, `request ${i}: ${JSON.stringify(decision)}`);
          if (cachedTokens > 0) reused++;
        }
        assert.ok(reused > REAL_REQUESTS / 4, `${reused} requests reused something`);
      });
    },
  );
});
