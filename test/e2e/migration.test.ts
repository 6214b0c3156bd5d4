import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { DynamoError, type Reason } from "../../src/errors/index.ts";
import { mockerConfig } from "../../src/engines/mocker/index.ts";
import { EchoEngine } from "../../src/engines/echo/echo-engine.ts";
import type { EchoEngineConfig } from "../../src/engines/index.ts";
import { ManualClock } from "../../src/std/index.ts";
import type { WorkerParts } from "../../src/worker/index.ts";
import type { DecisionExplanation } from "../../src/router/index.ts";
import {
  ECHO,
  startInProcessCluster,
  until,
  type InProcessCluster,
  type InProcessOptions,
} from "../helpers/in-process-cluster.ts";
import { logprobOf, startScriptedWorker, type ScriptedCall, type ScriptedWorker } from "../helpers/scripted-worker.ts";

/**
 * Migration, with exact breaks: scripted workers answer with the bytes of one text from wherever they are told to go on,
 * and break where a test says. What the client gets must be what it would have got from one worker that lives.
 */
const ANSWER = Buffer.from("The sea: größer als 海 und 🌊, deep. STOP here and never there");
const SLOW_ECHO = { ...(ECHO as EchoEngineConfig), stepMs: 5 };
const PROMPT = "Tell me.";

interface Choice {
  readonly text: string;
  readonly finish_reason: string;
  readonly logprobs: {
    readonly tokens: string[];
    readonly token_logprobs: (number | null)[];
    readonly text_offset: number[];
  } | null;
}

interface Answer {
  readonly choices: readonly Choice[];
  readonly usage: {
    readonly prompt_tokens: number;
    readonly completion_tokens: number;
    readonly prompt_tokens_details?: { readonly cached_tokens?: number };
  };
}

/** How a call of a scripted worker goes: so many tokens of the answer, then what. */
type Break = "error-item" | "error-end" | "clean-end" | "kill" | "alive";

interface Plan {
  /** Absolute position in the answer at which it breaks. */
  readonly at: number;
  readonly how: Break;
  readonly reason?: Reason;
  /** With the last token, in one item. */
  readonly together?: boolean;
}

class Pool {
  readonly cluster: InProcessCluster;
  readonly workers: ScriptedWorker[] = [];
  /** One per call, in the order of arrival; without one a call answers to its end. */
  plans: Plan[] = [];
  readonly calls: ScriptedCall[] = [];

  constructor(cluster: InProcessCluster) {
    this.cluster = cluster;
  }

  async add(): Promise<void> {
    const worker = await startScriptedWorker(this.cluster.planes(), (call) => this.#answer(worker, call));
    this.workers.push(worker);
  }

  #answer(worker: ScriptedWorker, call: ScriptedCall): void {
    this.calls.push(call);
    const plan = this.plans.shift() ?? { at: Infinity, how: "alive" };
    const { stop } = call.request;
    const end = Math.min(ANSWER.length, stop.maxTokens);
    const to = Math.min(plan.at, end);
    const tokens = [...ANSWER.subarray(call.resumedTokens, to)];
    if (plan.at > end || plan.how === "alive") {
      for (const token of tokens.slice(0, -1)) call.tokens([token]);
      call.tokens(tokens.slice(-1), end === stop.maxTokens ? "length" : "stop");
      return;
    }
    const error = new DynamoError(plan.reason ?? "engine-stopped", "as planned");
    if (plan.how === "error-item" && plan.together === true) return call.tokens(tokens, error);
    for (const token of tokens) call.tokens([token]);
    if (plan.how === "error-item") call.tokens([], error);
    else if (plan.how === "error-end") call.end(error);
    else if (plan.how === "clean-end") call.end();
    // What was written is on its way: the connection breaks behind it.
    else setImmediate(() => setImmediate(() => this.cluster.kill(worker.address)));
  }

  async complete(body: object = {}): Promise<{ status: number; answer: Answer; text: string }> {
    const response = await fetch(`${this.cluster.baseUrl}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json", "x-request-id": "migrated" },
      body: JSON.stringify({ model: "scripted", prompt: PROMPT, max_tokens: 500, temperature: 0, ...body }),
    });
    const text = await response.text();
    const answer = (body as { stream?: boolean }).stream === true ? ({} as Answer) : (JSON.parse(text) as Answer);
    return { status: response.status, answer, text };
  }
}

async function withPool(
  workers: number,
  use: (pool: Pool) => Promise<void>,
  frontend: InProcessOptions["frontend"] = {},
): Promise<void> {
  const cluster = await startInProcessCluster({ workers: 0, frontend });
  const pool = new Pool(cluster);
  try {
    for (let i = 0; i < workers; i++) await pool.add();
    await cluster.settled(workers);
    await use(pool);
  } finally {
    await cluster.stop();
  }
}

async function metric(baseUrl: string, name: string): Promise<number> {
  const text = await (await fetch(`${baseUrl}/metrics`)).text();
  const lines = text.split("\n").filter((line) => line.startsWith(name));
  return lines.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

/** Requests that the router has on the workers it could choose now. */
async function bookings(baseUrl: string, model: string): Promise<number> {
  const response = await fetch(`${baseUrl}/v1/route`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model, prompt: PROMPT }),
  });
  const { decisions } = (await response.json()) as { decisions: DecisionExplanation[] };
  assert.ok(decisions[0]!.candidates.length > 0);
  return decisions[0]!.candidates.reduce((sum, { load }) => sum + load.active_requests, 0);
}

describe("migration, break by break", { timeout: 120_000 }, () => {
  for (const how of ["error-item", "error-end", "clean-end", "kill"] as const) {
    test(`${how}: at every position of the answer the client gets the whole answer once`, async () => {
      await withPool(2, async (pool) => {
        const positions = how === "kill" ? [0, 1, 14, 23] : [...ANSWER.keys()];
        for (const at of positions) {
          pool.plans = [{ at, how }];
          pool.calls.length = 0;
          const { status, answer, text } = await pool.complete();
          assert.equal(status, 200, text);
          assert.equal(answer.choices[0]!.text, ANSWER.toString(), `broken at ${at}`);
          assert.equal(answer.choices[0]!.finish_reason, "stop");
          assert.equal(answer.usage.prompt_tokens, PROMPT.length);
          assert.equal(answer.usage.completion_tokens, ANSWER.length);
          assert.equal(answer.usage.prompt_tokens_details!.cached_tokens, 3);
          assert.equal(pool.calls.length, 2);
          const { request } = pool.calls[1]!;
          assert.equal(request.resumedTokens ?? 0, at);
          assert.deepEqual(Buffer.from(request.tokenIds), Buffer.concat([Buffer.from(PROMPT), ANSWER.subarray(0, at)]));
          assert.equal(request.stop.maxTokens, 500, "limits are those of the whole request");
          if (how === "kill") {
            await pool.add();
            await until(async () => (await pool.complete()).status === 200, "the next request to be served");
          }
        }
      });
    });
  }

  test("streamed: one unbroken stream, also when a character is cut in the middle, and tokens that came with the failure count", async () => {
    await withPool(2, async (pool) => {
      const cut = ANSWER.indexOf(Buffer.from("🌊")) + 2;
      pool.plans = [{ at: cut, how: "error-item", together: true }];
      const { text } = await pool.complete({ stream: true, stream_options: { include_usage: true } });
      const events = text.split("\n\n").filter((event) => event !== "");
      assert.equal(events.at(-1), "data: [DONE]");
      const chunks = events.slice(0, -1).map((event) => JSON.parse(event.slice("data: ".length)) as Answer);
      assert.equal(chunks.map((chunk) => chunk.choices[0]?.text ?? "").join(""), ANSWER.toString());
      assert.equal(new Set(chunks.map((chunk) => (chunk as unknown as { id: string }).id)).size, 1);
      assert.equal(chunks.at(-1)!.usage.completion_tokens, ANSWER.length);
    });
  });

  test("stop strings match across the break, and the worker that goes on is told to stop", async () => {
    await withPool(2, async (pool) => {
      const inStop = ANSWER.indexOf("STOP") + 2;
      pool.plans = [{ at: inStop, how: "error-end" }];
      const { answer } = await pool.complete({ stop: ["STOP here"] });
      assert.equal(answer.choices[0]!.text, ANSWER.toString().split("STOP")[0]);
      assert.equal(answer.choices[0]!.finish_reason, "stop");
      // All that was left came in one turn: what is behind the stop string was not asked for.
      assert.equal(answer.usage.completion_tokens, ANSWER.indexOf("STOP here") + "STOP here".length);
    });
  });

  test("logprobs: each token once, the prompt's once, whether or not they had come before the break", async () => {
    const undisturbed: Choice[] = [];
    for (const at of [-1, 0, 1, 9, 20, 40]) {
      await withPool(2, async (pool) => {
        if (at >= 0) pool.plans = [{ at, how: at % 2 === 0 ? "error-end" : "error-item" }];
        const { answer } = await pool.complete({ echo: true, logprobs: 1 });
        undisturbed.push(answer.choices[0]!);
        const { logprobs } = answer.choices[0]!;
        const all = [...Buffer.from(PROMPT), ...ANSWER];
        assert.deepEqual(logprobs!.token_logprobs, [
          null,
          ...all.slice(1).map((id) => Math.fround(logprobOf(id).logprob)),
        ]);
        if (at > 0) assert.equal(pool.calls[1]!.request.output.promptLogprobs, false, "not asked for twice");
        if (at === 0) assert.equal(pool.calls[1]!.request.output.promptLogprobs, true);
        assert.deepEqual(answer.choices[0], undisturbed[0]);
      });
    }
  });

  test("max_tokens is met exactly, and the finish reason is the one without a break", async () => {
    await withPool(2, async (pool) => {
      for (const at of [0, 1, 9]) {
        pool.plans = [{ at, how: "error-end" }];
        const { answer } = await pool.complete({ max_tokens: 10 });
        assert.equal(answer.usage.completion_tokens, 10);
        assert.equal(answer.choices[0]!.finish_reason, "length");
        assert.equal(answer.choices[0]!.text, ANSWER.subarray(0, 10).toString());
      }
    });
  });

  test("n > 1: each choice moves by itself, with a seed of its own that it keeps", async () => {
    await withPool(3, async (pool) => {
      pool.plans = [
        { at: 5, how: "error-end" },
        { at: Infinity, how: "alive" },
        { at: 12, how: "error-item" },
      ];
      const { answer } = await pool.complete({ n: 3, temperature: 1 });
      assert.deepEqual(
        answer.choices.map(({ text }) => text),
        [1, 2, 3].map(() => ANSWER.toString()),
      );
      assert.equal(answer.usage.completion_tokens, 3 * ANSWER.length);
      const seeds = new Map<string, Set<number | undefined>>();
      for (const { request } of pool.calls) {
        const known = seeds.get(request.requestId) ?? new Set();
        seeds.set(request.requestId, known.add(request.sampling.seed));
      }
      assert.equal(pool.calls.length, 5);
      assert.deepEqual(
        [...seeds.values()].map((own) => own.size),
        [1, 1, 1],
        "a continuation has the seed of its choice",
      );
      assert.ok(
        [...seeds.values()].every((own) => !own.has(undefined)),
        "drawn here when the client gave none",
      );
      assert.equal(new Set([...seeds.values()].flatMap((own) => [...own])).size, 3);
    });
  });

  test("workers that die one after the other: up to the limit it goes on, above it the error comes at once", async () => {
    await withPool(5, async (pool) => {
      const dies = (at: number): Plan => ({ at, how: "error-end" });
      pool.plans = [dies(3), dies(3), dies(20)];
      const good = await pool.complete();
      assert.equal(good.answer.choices[0]!.text, ANSWER.toString());
      assert.equal(pool.calls.length, 4);
      assert.equal(new Set(pool.calls.map((call) => call.stream)).size, 4);
      pool.plans = [dies(3), dies(4), dies(5), dies(6)];
      const bad = await pool.complete();
      assert.equal(bad.status, 503);
      assert.match(bad.text, /as planned/);
    });
  });

  test("limit 0: a request fails with its worker, after its first token and before it", async () => {
    await withPool(
      2,
      async (pool) => {
        pool.plans = [{ at: 4, how: "error-end" }];
        assert.equal((await pool.complete()).status, 503);
        pool.plans = [{ at: 0, how: "error-end" }];
        assert.equal((await pool.complete()).status, 503);
        assert.equal(pool.calls.length, 2);
      },
      { migration: { limit: 0, maxSequenceTokens: Infinity } },
    );
  });

  test("longer than --migration-max-seq-len: not moved, and counted", async () => {
    await withPool(
      2,
      async (pool) => {
        pool.plans = [{ at: 12, how: "error-end" }];
        assert.equal((await pool.complete()).answer.usage.completion_tokens, ANSWER.length);
        pool.plans = [{ at: 13, how: "error-end" }];
        assert.equal((await pool.complete()).status, 503);
        const { baseUrl } = pool.cluster;
        assert.equal(await metric(baseUrl, "dynamo_frontend_model_migration_max_seq_len_exceeded_total"), 1);
      },
      { migration: { limit: 3, maxSequenceTokens: PROMPT.length + 12 } },
    );
  });

  test("an engine's own failure is tried on one other worker and no more", async () => {
    await withPool(3, async (pool) => {
      const fails: Plan = { at: 7, how: "error-item", reason: "engine-failed" };
      pool.plans = [fails];
      assert.equal((await pool.complete()).answer.choices[0]!.text, ANSWER.toString());
      pool.calls.length = 0;
      pool.plans = [fails, fails];
      assert.equal((await pool.complete()).status, 500);
      assert.equal(pool.calls.length, 2);
    });
  });

  test("an error of the request is nobody's fault and moves nothing", async () => {
    await withPool(2, async (pool) => {
      pool.plans = [{ at: 7, how: "error-item", reason: "invalid-field" }];
      assert.equal((await pool.complete()).status, 400);
      assert.equal(pool.calls.length, 1);
    });
  });

  test("the whole pool gone is an error at once, with the reason", async () => {
    await withPool(2, async (pool) => {
      const dies: Plan = { at: 5, how: "error-end" };
      pool.plans = [dies, dies];
      const startMs = performance.now();
      const { status, text } = await pool.complete();
      assert.equal(status, 503);
      assert.match(text, /as planned/);
      assert.ok(performance.now() - startMs < 2_000);
    });
  });

  test("nobody untried is left: a worker whose connection broke is asked once more, the one that broke first before others", async () => {
    await withPool(2, async (pool) => {
      const breaks = (at: number): Plan => ({ at, how: "error-end", reason: "worker-lost" });
      pool.plans = [breaks(5), breaks(9)];
      const { answer, text } = await pool.complete();
      assert.equal(answer.choices?.[0]?.text, ANSWER.toString(), text);
      const asked = pool.calls.map((call) => pool.workers.findIndex(({ calls }) => calls.includes(call)));
      assert.deepEqual(asked.map((worker) => worker === asked[0]), [true, false, true]); // prettier-ignore
      assert.equal(pool.calls[2]!.resumedTokens, 9);
    });
  });

  test("once more and not for ever: a worker that breaks twice ends the request, with migrations left", async () => {
    await withPool(1, async (pool) => {
      const breaks = (at: number): Plan => ({ at, how: "error-end", reason: "worker-lost" });
      pool.plans = [breaks(5)];
      assert.equal((await pool.complete()).answer.choices[0]!.text, ANSWER.toString());
      pool.calls.length = 0;
      pool.plans = [breaks(5), breaks(9)];
      assert.equal((await pool.complete()).status, 503);
      assert.equal(pool.calls.length, 2);
    });
  });

  test("push-back is no reason to come back, nor is a worker that says it stops", async () => {
    await withPool(2, async (pool) => {
      for (const reason of ["worker-full", "draining", "engine-stopped"] as const) {
        pool.calls.length = 0;
        pool.plans = [0, 0, 0].map((at) => ({ at, how: "error-end", reason }));
        assert.ok((await pool.complete()).status >= 500);
        assert.equal(pool.calls.length, 2, reason);
      }
    });
  });

  test("a request that names its worker stays with it", async () => {
    await withPool(2, async (pool) => {
      pool.plans = [{ at: 5, how: "error-end" }];
      const nvext = { backend_instance_id: pool.workers[0]!.instanceId };
      assert.equal((await pool.complete({ nvext })).status, 503);
      assert.equal(pool.calls.length, 1);
    });
  });

  test("push-back is not blamed on the worker: it gets the next request, and no migration is used up", async () => {
    await withPool(2, async (pool) => {
      for (const reason of ["worker-full", "stream-limit"] as const) {
        pool.calls.length = 0;
        pool.plans = [{ at: 0, how: "error-end", reason }];
        assert.equal((await pool.complete()).status, 200);
        assert.equal((await pool.complete()).status, 200);
        assert.equal((await pool.complete()).status, 200);
      }
      assert.ok(
        pool.workers.every((worker) => worker.calls.length >= 3),
        "round-robin goes on with both",
      );
    });
  });

  test("an engine that does not resume is found out: no token is doubled", async () => {
    await withPool(1, async (pool) => {
      // Answers from the start, as a worker of an older version would.
      await startScriptedWorker(pool.cluster.planes(), (call) => {
        Object.defineProperty(call, "request", { value: { ...call.request, resumedTokens: 0 } });
        call.tokens([...ANSWER], "stop");
      });
      await pool.cluster.settled(2);
      // In turn: one request goes to the old worker and is answered, the other breaks and comes to it later.
      const statuses: number[] = [];
      for (let i = 0; i < 2; i++) {
        pool.plans = [{ at: 6, how: "error-end" }];
        const { status, text } = await pool.complete({ max_tokens: 80 });
        statuses.push(status);
        if (status === 500) assert.match(text, /did not take the request/);
        else assert.equal((JSON.parse(text) as Answer).choices[0]!.text, ANSWER.toString());
      }
      assert.deepEqual(new Set(statuses), new Set([200, 500]));
    });
  });

  test("a worker that lives but gives nothing to anybody is left, its streams move, and it is told to stop", async () => {
    await withPool(
      2,
      async (pool) => {
        const hung = Promise.withResolvers<ScriptedCall>();
        const worker = await startScriptedWorker(pool.cluster.planes(), (call) => {
          call.tokens([...ANSWER.subarray(0, 9)]);
          hung.resolve(call);
        });
        await pool.cluster.settled(3);
        const answers = await Promise.all([0, 1, 2].map(() => pool.complete()));
        for (const { answer, text } of answers) assert.equal(answer.choices?.[0]?.text, ANSWER.toString(), text);
        const call = await hung.promise;
        assert.equal((await call.cancelled.promise).reason, "worker-stalled");
        assert.equal(worker.calls.length, 1);
        const moved = pool.calls.find(({ resumedTokens }) => resumedTokens === 9);
        assert.ok(moved !== undefined);
      },
      { stallLimitMs: 200 },
    );
  });

  test("through a router service it is the same, and the service holds no booking afterwards", async () => {
    await withPool(
      2,
      async (pool) => {
        const { router } = await pool.cluster.addRouter();
        for (const at of [0, 9]) {
          pool.plans = [{ at, how: "error-end" }];
          pool.calls.length = 0;
          const { answer, text } = await pool.complete();
          assert.equal(answer.choices?.[0]?.text, ANSWER.toString(), text);
          assert.equal(pool.calls.length, 2);
        }
        await until(() => router.bookingCount === 0, "the service to hold no booking");
      },
      { routerService: { answerTimeoutMs: 5_000 } },
    );
  });

  test("metrics and the routing explanation tell each attempt with its reason", async () => {
    await withPool(3, async (pool) => {
      const { baseUrl } = pool.cluster;
      pool.plans = [
        { at: 0, how: "error-end", reason: "draining" },
        { at: 8, how: "clean-end" },
      ];
      assert.equal((await pool.complete()).status, 200);
      const total = 'dynamo_frontend_model_migration_total{model="scripted",migration_type=';
      assert.equal(await metric(baseUrl, `${total}"new_request"}`), 1);
      assert.equal(await metric(baseUrl, `${total}"ongoing_request"}`), 1);
      assert.equal(await metric(baseUrl, "dynamo_frontend_model_migration_duration_seconds_count"), 2);
      assert.equal(await metric(baseUrl, "dynamo_frontend_model_migration_limit"), 3);
      const { decisions } = (await (await fetch(`${baseUrl}/v1/route/explain/migrated`)).json()) as {
        decisions: DecisionExplanation[];
      };
      assert.deepEqual(
        decisions.map(({ outcome, prompt }) => [outcome, prompt.resumed_tokens]),
        [
          ["draining", 0],
          ["worker-lost", 0],
          ["finished", 8],
        ],
      );
      assert.equal(new Set(decisions.map(({ worker }) => worker.instance_id)).size, 3);
    });
  });
});

describe("migration between real engines", { timeout: 120_000 }, () => {
  const BODIES: readonly [string, object][] = [
    ["greedy", { temperature: 0 }],
    ["seeded", { temperature: 1, seed: 11 }],
    ["n = 2", { temperature: 1, seed: 5, n: 2 }],
    ["min_tokens and a stop token", { temperature: 0, min_tokens: 30, stop: ["q"] }],
    ["logprobs", { temperature: 0, logprobs: 2 }],
  ];

  test("mocker: a killed worker's streams go on to the same answers, and every booking and block comes back", async () => {
    const engine = mockerConfig({ speedupRatio: 1, contextLength: 4_096 });
    const cluster = await startInProcessCluster({ workers: 2, worker: { engine, modelName: "mocker" } });
    try {
      const ask = async (body: object): Promise<unknown> => {
        const response = await fetch(`${cluster.baseUrl}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ model: "mocker", prompt: "abcdefgh ".repeat(5), max_tokens: 60, ...body }),
        });
        const answer = (await response.json()) as Answer;
        assert.equal(response.status, 200, JSON.stringify(answer));
        const { prompt_tokens, completion_tokens } = answer.usage;
        return { choices: answer.choices, prompt_tokens, completion_tokens };
      };
      const whole = await Promise.all(BODIES.map(([, body]) => ask(body)));
      const victim = await cluster.addressOf(cluster.workers[0]!.instanceId);
      const before = cluster.workers[0]!.load().generatedTokens;
      const moved = Promise.all([...BODIES, ...BODIES].map(([, body]) => ask(body)));
      await until(() => cluster.workers[0]!.load().generatedTokens > before + 60, "the first worker to be well in");
      cluster.kill(victim);
      const answers = await moved;
      answers.forEach((answer, i) => assert.deepEqual(answer, whole[i % whole.length], BODIES[i % whole.length]![0]));
      assert.ok((await metric(cluster.baseUrl, "dynamo_frontend_model_migration_total")) > 0);
      await until(
        () => cluster.workers.every((worker) => worker.load().runningRequests === 0),
        "the engines to be idle",
      );
      for (const worker of cluster.workers) assert.equal(worker.load().activeBlocks, 0);
      assert.equal(await bookings(cluster.baseUrl, "mocker"), 0);
    } finally {
      await cluster.stop();
    }
  });

  test("a worker whose engine hangs finds out itself: it leaves with an error, and its streams go on elsewhere", async () => {
    const cluster = await startInProcessCluster({ workers: 0, worker: { engine: SLOW_ECHO } });
    try {
      // Its time stands still: after the first token of a request it makes no step.
      const makeEngine: WorkerParts["makeEngine"] = (config) =>
        Promise.resolve(new EchoEngine(config as EchoEngineConfig, { clock: new ManualClock() }));
      const hung = await cluster.addWorker({ engineStallMs: 300 }, { makeEngine });
      await cluster.addWorker();
      await cluster.settled(2);
      const ask = async (): Promise<Answer> => {
        const response = await fetch(`${cluster.baseUrl}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ model: "echo", prompt: "abc", max_tokens: 50 }),
        });
        return (await response.json()) as Answer;
      };
      const asked = Promise.all(Array.from({ length: 6 }, ask));
      await assert.rejects(hung.done, /hangs/);
      for (const { choices } of await asked) assert.equal(choices[0]!.text, "abc".repeat(17).slice(0, 50));
      await cluster.settled(1);
      assert.equal(await metric(cluster.baseUrl, "dynamo_frontend_model_migration_total"), 3);
    } finally {
      await cluster.stop();
    }
  });

  for (const { name, stepMs, hasTokens } of [
    { name: "what runs on a lost one", stepMs: 5, hasTokens: true },
    { name: "what a lost one had taken and not begun", stepMs: 400, hasTokens: false },
  ]) {
    test(`a full worker takes over ${name}, and nobody new is sent to it meanwhile`, async () => {
      const MAX_TOKENS = hasTokens ? 200 : 2;
      const cluster = await startInProcessCluster({
        workers: 2,
        worker: { engine: { ...SLOW_ECHO, stepMs, maxSequences: 4 }, maxQueuedRequests: 1 },
      });
      try {
        const ask = async (): Promise<{ status: number; answer: Answer }> => {
          const response = await fetch(`${cluster.baseUrl}/v1/completions`, {
            method: "POST",
            headers: { "content-type": "application/json" },
            body: JSON.stringify({ model: "echo", prompt: "abc", max_tokens: MAX_TOKENS }),
          });
          return { status: response.status, answer: (await response.json()) as Answer };
        };
        const asked = Array.from({ length: 8 }, ask);
        await until(
          () =>
            cluster.workers.every((worker) => {
              const { runningRequests, waitingRequests, generatedTokens } = worker.load();
              return hasTokens ? generatedTokens > 20 : runningRequests + waitingRequests === 4;
            }),
          "both workers to be full",
        );
        cluster.kill(await cluster.addressOf(cluster.workers[0]!.instanceId));
        await until(
          async () => (await metric(cluster.baseUrl, "dynamo_frontend_model_migration_total")) === 4,
          "four to move",
        );
        // The worker itself would refuse a new one; discovery still knows the lost one's places.
        asked.push(ask());
        if (hasTokens) {
          await until(
            async () => (await metric(cluster.baseUrl, "dynamo_frontend_queued_requests")) === 1,
            "the new one to wait at the gate",
          );
        }
        for (const { status, answer } of await Promise.all(asked)) {
          assert.equal(status, 200, JSON.stringify(answer));
          assert.equal(answer.choices[0]!.text, "abc".repeat(67).slice(0, MAX_TOKENS));
        }
      } finally {
        await cluster.stop();
      }
    });
  }

  test("echo: a worker that leaves hands over what does not finish in its time, and no client notices", async () => {
    const cluster = await startInProcessCluster({ workers: 2, worker: { engine: SLOW_ECHO } });
    try {
      const ask = async (): Promise<Answer> => {
        const response = await fetch(`${cluster.baseUrl}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ model: "echo", prompt: "abc", max_tokens: 100 }),
        });
        return (await response.json()) as Answer;
      };
      const asked = Promise.all(Array.from({ length: 8 }, ask));
      await until(() => cluster.workers[0]!.load().runningRequests === 4, "the streams to run");
      await cluster.workers[0]!.drain(100);
      const answers = await asked;
      for (const { choices, usage } of answers) {
        assert.equal(choices[0]!.text, "abc".repeat(34).slice(0, 100));
        assert.equal(usage.completion_tokens, 100);
      }
      assert.equal(await metric(cluster.baseUrl, "dynamo_frontend_model_migration_total"), 4);
      assert.equal(await bookings(cluster.baseUrl, "echo"), 0);
    } finally {
      await cluster.stop();
    }
  });
});
