import assert from "node:assert/strict";
import { describe, test } from "node:test";
import type { Engine, EngineInfo, EngineSink, ExportedBlocks, ImportedBlocks } from "../../src/engines/index.ts";
import { LoopEngine } from "../../src/engines/llama/fixtures/loop-engine.ts";
import { MockerEngine, mockerConfig } from "../../src/engines/mocker/index.ts";
import { ClusterView } from "../../src/cli/cluster-view.ts";
import type { FrontendConfig } from "../../src/frontend/index.ts";
import type { LoadSnapshot, PreprocessedRequest, TransferPairReport } from "../../src/protocol/index.ts";
import type { DecisionExplanation } from "../../src/router/index.ts";
import type { RunningRouter } from "../../src/router-service/index.ts";
import { MemoryNetwork } from "../../src/transfer/index.ts";
import { DEFAULT_HANDOFF, type HandoffConfig, type RunningWorker, type WorkerConfig } from "../../src/worker/index.ts";
import { startInProcessCluster, until, type InProcessCluster } from "../helpers/in-process-cluster.ts";

/**
 * Disaggregated serving with mock engines in one process: a prompt is computed on one worker, its blocks move over the
 * transfer plane's memory back end, another worker goes on. Mock answers follow from the tokens alone, so whatever happens
 * on the way the text must be the one that a single worker gives; and afterwards nothing may be left anywhere.
 */
const MOCK = mockerConfig({ blockSizeTokens: 16, contextLength: 8_192, totalBlocks: 1_024, speedupRatio: 0 });
const PROMPT = "a prompt that is long enough for some blocks of sixteen tokens each, one byte a token ".repeat(4);
const BLOCKS = Math.floor(PROMPT.length / 16);
const TOKENS = 24;

/** The mock engine with gates: what a test closes waits until the test opens it. */
class GatedEngine implements Engine {
  readonly mocker: MockerEngine;

  constructor(config: typeof MOCK = MOCK) {
    this.mocker = new MockerEngine(config);
  }

  readonly submitted: PreprocessedRequest[] = [];
  readonly imported: ImportedBlocks[] = [];
  gate: Partial<Record<"submit" | "count" | "export" | "import" | "steps", Promise<void>>> = {};
  reached: Partial<Record<"submit" | "count" | "export" | "import" | "steps", () => void>> = {};

  async start(sink: EngineSink, signal: AbortSignal): Promise<EngineInfo> {
    return this.mocker.start(
      {
        ...sink,
        onKvEvents: (events) => sink.onKvEvents(events),
        onFatal: (error) => sink.onFatal(error),
        onStep: (step) => {
          const gate = this.gate.steps;
          if (gate === undefined) return sink.onStep(step);
          const copy = Uint8Array.from(step);
          this.reached.steps?.();
          void gate.then(() => sink.onStep(copy));
        },
      },
      signal,
    );
  }
  async #pass(name: "count" | "export" | "import"): Promise<void> {
    this.reached[name]?.();
    await this.gate[name];
  }
  submit(streamId: number, request: PreprocessedRequest): void {
    this.submitted.push(request);
    this.reached.submit?.();
    const gate = this.gate.submit;
    if (gate === undefined) this.mocker.submit(streamId, request);
    else void gate.then(() => this.mocker.submit(streamId, request));
  }
  abort(streamId: number): void {
    this.mocker.abort(streamId);
  }
  load(): LoadSnapshot {
    return this.mocker.load();
  }
  async countBlocks(sequenceHashes: Uint32Array): Promise<number> {
    await this.#pass("count");
    return this.mocker.countBlocks(sequenceHashes);
  }
  async exportBlocks(sequenceHashes: Uint32Array): Promise<ExportedBlocks> {
    await this.#pass("export");
    return this.mocker.exportBlocks(sequenceHashes);
  }
  async importBlocks(blocks: ImportedBlocks): Promise<number> {
    await this.#pass("import");
    this.imported.push(blocks);
    return this.mocker.importBlocks(blocks);
  }
  clearBlocks(): Promise<number> {
    return this.mocker.clearBlocks();
  }
  drain(): Promise<void> {
    return this.mocker.drain();
  }
  stop(): Promise<void> {
    return this.mocker.stop();
  }
}

interface Node {
  readonly worker: RunningWorker;
  readonly engine: GatedEngine;
}

interface Pool {
  readonly cluster: InProcessCluster;
  readonly service: RunningRouter | undefined;
  readonly prefill: Node[];
  readonly decode: Node[];
  add(role: "prefill" | "decode" | "agg", overrides?: Partial<WorkerConfig>): Promise<Node>;
  ask(body?: object, options?: { signal?: AbortSignal; id?: string }): Promise<Response>;
  text(prompt?: string): Promise<string>;
  metric(name: string): Promise<Record<string, number>>;
  explain(id?: string): Promise<{ decisions: DecisionExplanation[]; disaggregation: Split[] }>;
}

interface Split {
  readonly choice: string;
  readonly waited_ms: number;
  readonly reason: string;
  readonly fallback: string | null;
  readonly handoff: null | {
    blocks: number;
    pull: null | {
      outcome: string;
      held_blocks: number;
      pulled_blocks: number;
      early_blocks: number;
      backend: string;
    };
  };
}

async function withPool(
  counts: { prefill: number; decode: number },
  use: (pool: Pool) => Promise<void>,
  options: {
    frontend?: Partial<Omit<FrontendConfig, "limits">>;
    handoff?: Partial<HandoffConfig>;
    /** A router service that the frontend asks. */
    withRouter?: boolean;
  } = {},
): Promise<void> {
  const asks = options.withRouter === true ? { routerService: { answerTimeoutMs: 2_000 } } : {};
  const cluster = await startInProcessCluster({
    workers: 0,
    frontend: { disagg: "always", ...asks, ...options.frontend },
  });
  const service = options.withRouter === true ? await cluster.addRouter({ routerMode: "kv" }) : undefined;
  const memory = new MemoryNetwork();
  const pool: Pool = {
    cluster,
    service: service?.router,
    prefill: [],
    decode: [],
    async add(role, overrides = {}) {
      const engine = new GatedEngine(overrides.engine?.kind === "mocker" ? overrides.engine : MOCK);
      const handoff = { ...DEFAULT_HANDOFF, memoryBytes: 64 * 1024, ...options.handoff };
      const config = {
        engine: MOCK,
        modelName: "mock",
        role,
        handoff: { ...handoff, transfer: { memory, tcp: false as const, shm: false as const } },
        ...overrides,
      };
      const worker = await cluster.addWorker(config, { makeEngine: () => Promise.resolve(engine) });
      const node = { worker, engine };
      (role === "prefill" ? pool.prefill : pool.decode).push(node);
      return node;
    },
    ask: (body = {}, { signal, id = "asked" } = {}) =>
      fetch(`${cluster.baseUrl}/v1/completions`, {
        method: "POST",
        headers: { "content-type": "application/json", "x-request-id": id },
        body: JSON.stringify({ model: "mock", prompt: PROMPT, max_tokens: TOKENS, temperature: 0, ...body }),
        ...(signal === undefined ? {} : { signal }),
      }),
    async text(prompt = PROMPT) {
      const response = await pool.ask({ prompt });
      const body = (await response.json()) as { choices: { text: string }[]; usage: { completion_tokens: number } };
      assert.equal(response.status, 200, JSON.stringify(body));
      assert.equal(body.usage.completion_tokens, TOKENS);
      return body.choices[0]!.text;
    },
    async metric(name) {
      const text = await (await fetch(`${cluster.baseUrl}/metrics`)).text();
      const lines = text.split("\n").filter((line) => line.startsWith(`${name}{`));
      return Object.fromEntries(
        lines.map((line) => [
          /(?:reason|choice|backend)="([^"]*)"/.exec(line)?.[1] ?? "",
          Number(line.split(" ").at(-1)),
        ]),
      );
    },
    async explain(id = "asked") {
      return (await (await fetch(`${cluster.baseUrl}/v1/route/explain/${id}`)).json()) as never;
    },
  };
  try {
    for (let i = 0; i < counts.prefill; i++) await pool.add("prefill");
    for (let i = 0; i < counts.decode; i++) await pool.add("decode");
    await cluster.settled(counts.prefill + counts.decode);
    await use(pool);
    await nothingIsLeft(pool);
  } finally {
    await cluster.stop();
  }
}

/** No block is held, no byte is on its way, no stream runs, and the engines' accounts are right. */
async function nothingIsLeft(pool: Pool): Promise<void> {
  const nodes = [...pool.prefill, ...pool.decode];
  await until(
    () =>
      nodes.every(
        ({ worker, engine }) =>
          (worker.handoffs?.heldBlocks ?? 0) === 0 &&
          (worker.handoffs?.landingBytes ?? 0) === 0 &&
          worker.load().runningRequests + worker.load().waitingRequests === 0 &&
          engine.load().activeBlocks === 0,
      ),
    "all handoffs, transfers and streams to be over",
  );
  for (const { engine } of nodes) engine.mocker.check();
  await until(() => (pool.service?.bookingCount ?? 0) === 0, "the router service to have no bookings");
}

/** What one worker that does all of it answers. */
async function aggregatedText(prompt = PROMPT): Promise<string> {
  let text = "";
  await withPool({ prefill: 0, decode: 1 }, async (pool) => void (text = await pool.text(prompt)));
  return text;
}

function closed(engine: GatedEngine, name: keyof GatedEngine["gate"]): { reached: Promise<void>; open: () => void } {
  const gate = Promise.withResolvers<void>();
  const reached = Promise.withResolvers<void>();
  engine.gate[name] = gate.promise;
  engine.reached[name] = () => reached.resolve();
  return {
    reached: reached.promise,
    open: () => {
      delete engine.gate[name];
      gate.resolve();
    },
  };
}

describe("disaggregation: a request over two workers", () => {
  test("the prompt is computed on one, its blocks move, the other goes on with the same text", async () => {
    const expected = await aggregatedText();
    await withPool({ prefill: 1, decode: 1 }, async (pool) => {
      assert.equal(await pool.text(), expected);
      const [prefill, decode] = [pool.prefill[0]!, pool.decode[0]!];
      assert.deepEqual(
        prefill.engine.submitted.slice(1).map((request) => [request.prefillOnly, request.stop.maxTokens]),
        [[true, 1]],
      );
      const resumed = decode.engine.submitted.at(-1)!;
      assert.equal(resumed.resumedTokens, 1);
      assert.equal(resumed.handoff, undefined, "an engine is not told of handoffs");
      assert.equal(decode.engine.imported[0]!.data.length, BLOCKS * 64);
      const { decisions, disaggregation } = await pool.explain();
      assert.deepEqual(
        decisions.map(({ stage, worker }) => [stage, worker.instance_id]),
        // The decode worker first: it keeps the room.
        [
          ["decode", decode.worker.instanceId],
          ["prefill", prefill.worker.instanceId],
        ],
      );
      const [split] = disaggregation;
      assert.equal(split!.fallback, null);
      assert.deepEqual(split!.handoff!.pull!.pulled_blocks, BLOCKS);
      assert.equal(split!.handoff!.pull!.backend, "memory");
      assert.deepEqual(await pool.metric("dynamo_frontend_disagg_choices_total"), { split: 1 });
    });
  });

  test("what moved between which workers, over what and how fast, is told to dynamo status", async () => {
    await withPool({ prefill: 1, decode: 1 }, async (pool) => {
      const [prefill, decode] = [pool.prefill[0]!, pool.decode[0]!];
      const { discovery, events } = pool.cluster.planes();
      const view = new ClusterView();
      await view.open(discovery, events, "dynamo");
      try {
        await until(() => view.isComplete, "both workers to tell of their transfers");
        await pool.text();
        const pairsOf = ({ worker }: Node): readonly TransferPairReport[] =>
          view.instances().find(({ instanceId }) => instanceId === worker.instanceId)!.transfers!;
        await until(() => pairsOf(decode).length > 0, "the transfer to be told");
        const [pair] = pairsOf(decode);
        assert.equal(pair!.peer, `dynamo.backend.${prefill.worker.instanceId}`);
        assert.deepEqual([pair!.backend, pair!.operation, pair!.byteCount], ["memory", "read", BLOCKS * 64]);
        assert.deepEqual(pairsOf(prefill), []);
      } finally {
        await view.close();
      }
    });
  });

  test("only the blocks that the decode worker does not hold travel", async () => {
    await withPool({ prefill: 1, decode: 1 }, async (pool) => {
      await pool.text(PROMPT.slice(0, PROMPT.length / 2));
      const heldBlocks = Math.floor(PROMPT.length / 2 / 16);
      await pool.text();
      const second = pool.decode[0]!.engine.imported.at(-1)!;
      assert.ok(second.startBlock! >= heldBlocks);
      assert.equal(second.data.length, (BLOCKS - second.startBlock!) * 64);
      // Now it holds everything: nothing travels.
      await pool.text();
      assert.equal(pool.decode[0]!.engine.imported.length, 2);
      const { disaggregation } = await pool.explain();
      assert.deepEqual(disaggregation.at(-1)!.handoff!.pull!.held_blocks, BLOCKS);
    });
  });

  test("the first token goes to the client before the blocks have moved", async () => {
    await withPool({ prefill: 1, decode: 1 }, async (pool) => {
      const gate = closed(pool.decode[0]!.engine, "import");
      const response = await pool.ask({ stream: true });
      const reader = response.body!.getReader();
      const first = Buffer.from((await reader.read()).value!).toString();
      assert.match(first, /"text":"[^"]+"/);
      await gate.reached;
      gate.open();
      while (!(await reader.read()).done);
    });
  });

  test("a prompt without a whole block, one token, prompt logprobs and a named worker are served whole", async () => {
    await withPool({ prefill: 1, decode: 1 }, async (pool) => {
      assert.equal((await pool.ask({ max_tokens: 1 })).status, 200);
      const pin = { backend_instance_id: pool.decode[0]!.worker.instanceId };
      assert.equal((await pool.ask({ nvext: pin })).status, 200);
      assert.equal((await pool.ask({ prompt: "short" })).status, 200);
      assert.equal(pool.decode[0]!.engine.imported.length, 0);
      const there = pool.prefill[0]!.engine.submitted.filter(({ requestId }) => requestId !== "canary");
      assert.deepEqual(there, []);
    });
  });

  test("several workers of each kind share the work, samples of one prompt too", async () => {
    await withPool({ prefill: 2, decode: 2 }, async (pool) => {
      const prompts = Array.from({ length: 12 }, (_, i) => `${i} ${PROMPT}`);
      const texts = await Promise.all(prompts.map((prompt) => pool.text(prompt)));
      assert.equal(new Set(texts).size, prompts.length);
      const response = await pool.ask({ n: 3 });
      const { choices } = (await response.json()) as { choices: unknown[] };
      assert.equal(choices.length, 3);
      for (const { engine } of pool.prefill) assert.ok(engine.submitted.length > 1);
      for (const { engine } of pool.decode) assert.ok(engine.imported.length > 0);
    });
  });
});

/** The llama engine's loop on a fake model whose text depends on every cell: a wrong or missing block is seen. */
function loopEngine(): LoopEngine {
  return new LoopEngine({ totalBlocks: 64, blockSizeTokens: 16, vocabularySize: 512 });
}

interface LoopCluster {
  readonly cluster: InProcessCluster;
  readonly prefill: { worker: RunningWorker; engine: LoopEngine };
  readonly decode: { worker: RunningWorker; engine: LoopEngine }[];
  readonly ask: (prompt: string, id?: string, signal?: AbortSignal) => Promise<{ text: string; split: Split }>;
  explain(id?: string): Promise<Split>;
  /** Of one worker that does all of it. */
  readonly expected: (prompt: string) => Promise<string>;
}

/** Workers on the real engine loop. */
async function withLoopCluster(
  use: (loop: LoopCluster) => Promise<void>,
  options: { decode?: number; tiers?: boolean; handoff?: Partial<HandoffConfig>; stallLimitMs?: number } = {},
): Promise<void> {
  const { stallLimitMs } = options;
  const frontend = { disagg: "always", ...(stallLimitMs === undefined ? {} : { stallLimitMs }) } as const;
  const cluster = await startInProcessCluster({ workers: 0, frontend });
  const whole = await startInProcessCluster({ workers: 0 });
  const memory = new MemoryNetwork();
  const add = async (role: "prefill" | "decode"): Promise<LoopCluster["prefill"]> => {
    const engine = loopEngine();
    const transfer = { memory, tcp: false, shm: false } as const;
    const handoff = { ...DEFAULT_HANDOFF, memoryBytes: 1 << 20, ...options.handoff, transfer };
    const kvTiers = role === "decode" && options.tiers === true ? { kvTiers: { hostBytes: 1 << 20 } } : {};
    const config = { role, handoff, ...kvTiers };
    return { engine, worker: await cluster.addWorker(config, { makeEngine: () => Promise.resolve(engine) }) };
  };
  const text = async ({ baseUrl }: InProcessCluster, prompt: string, id: string, signal?: AbortSignal) => {
    const response = await fetch(`${baseUrl}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json", "x-request-id": id },
      body: JSON.stringify({ model: "echo", prompt, max_tokens: 4, temperature: 0 }),
      ...(signal === undefined ? {} : { signal }),
    });
    return ((await response.json()) as { choices: { text: string }[] }).choices[0]!.text;
  };
  try {
    await whole.addWorker({}, { makeEngine: () => Promise.resolve(loopEngine()) });
    const prefill = await add("prefill");
    const decode: LoopCluster["decode"] = [];
    for (let i = 0; i < (options.decode ?? 1); i++) decode.push(await add("decode"));
    await Promise.all([cluster.settled(1 + decode.length), whole.settled(1)]);
    const explain = async (id = "asked"): Promise<Split> => {
      const told = await (await fetch(`${cluster.baseUrl}/v1/route/explain/${id}`)).json();
      return (told as { disaggregation: Split[] }).disaggregation[0]!;
    };
    await use({
      cluster,
      prefill,
      decode,
      explain,
      expected: (prompt) => text(whole, prompt, "whole"),
      ask: async (prompt, id = "asked", signal) => ({
        text: await text(cluster, prompt, id, signal),
        split: await explain(id),
      }),
    });
    const nodes = [prefill, ...decode];
    await until(
      () =>
        nodes.every(
          ({ worker, engine }) =>
            worker.handoffs!.heldBlocks === 0 &&
            worker.handoffs!.landingBytes === 0 &&
            engine.load().activeBlocks === 0 &&
            engine.load().runningRequests + engine.load().waitingRequests === 0,
        ),
      "all handoffs, transfers and streams to be over",
      15_000,
    );
  } finally {
    await cluster.stop();
    await whole.stop();
  }
}

test("disaggregation: blocks in the decode worker's host memory do not travel, and the text is the same", async () => {
  await withLoopCluster(
    async ({ ask, expected, decode: [decode] }) => {
      const blocksOf = ({ split }: { split: Split }): unknown => {
        const { held_blocks, pulled_blocks } = split.handoff!.pull!;
        return { held_blocks, pulled_blocks };
      };
      const prompt = PROMPT.slice(0, 160);
      const cold = await ask(prompt, "cold");
      assert.deepEqual(blocksOf(cold), { held_blocks: 0, pulled_blocks: 10 });
      assert.equal(cold.text, await expected(prompt));
      await until(() => decode!.engine.copiedOutBlocks >= 10, "the blocks to be in host memory");
      await decode!.engine.clearBlocks();
      const again = await ask(prompt, "again");
      assert.deepEqual(blocksOf(again), { held_blocks: 10, pulled_blocks: 0 });
      assert.equal(again.text, cold.text);
      await decode!.engine.clearBlocks();
      const longer = prompt + PROMPT.slice(0, 64);
      const part = await ask(longer, "longer");
      assert.deepEqual(blocksOf(part), { held_blocks: 10, pulled_blocks: 4 });
      assert.equal(part.text, await expected(longer));
    },
    { tiers: true },
  );
});

describe("disaggregation: finished chunks of a prompt travel while the next ones are computed", () => {
  const EARLY = 6;

  /** The prefill worker stands still after so many blocks of the prompt; resolves when they are at a decode worker: that one. */
  async function halfWay({ prefill, decode }: LoopCluster): Promise<LoopCluster["decode"][number]> {
    const { engine } = prefill;
    const before = decode.map((node) => node.engine.load().cachedBlocks);
    let steps = 0;
    engine.model.onDecode = () => {
      steps++;
      if (steps === EARLY) engine.pause();
    };
    const holder = (): LoopCluster["decode"][number] | undefined =>
      decode.find((node, i) => node.engine.load().cachedBlocks - before[i]! >= EARLY);
    await until(() => holder() !== undefined, "a decode worker to have the first blocks");
    return holder()!;
  }

  test("what is computed is at the decode worker before the prompt is complete; the rest follows, the text is the same", () =>
    withLoopCluster(async (loop) => {
      const answer = loop.ask(PROMPT);
      const holder = await halfWay(loop);
      assert.equal(loop.prefill.engine.load().runningRequests, 1, "the prompt is still being computed");
      assert.equal(holder, loop.decode[0]);
      loop.prefill.engine.resume();
      const { text, split } = await answer;
      assert.equal(text, await loop.expected(PROMPT));
      const pull = split.handoff!.pull!;
      assert.deepEqual(
        [pull.outcome, pull.held_blocks, pull.pulled_blocks, split.handoff!.blocks],
        ["pulled", 0, BLOCKS, BLOCKS],
      );
      assert.ok(pull.early_blocks >= EARLY);
      // What is there already does not travel, early or late.
      const { split: again } = await loop.ask(`${PROMPT} and something new at its end, of a few blocks`, "again");
      assert.equal(again.handoff!.pull!.held_blocks, BLOCKS);
    }));

  test("a worker that is long at the rest of a prompt, of which it has handed chunks over, is not taken for stuck", () => {
    const stallLimitMs = 150;
    return withLoopCluster(
      async (loop) => {
        const answer = loop.ask(PROMPT);
        await halfWay(loop);
        const sinceMs = performance.now();
        await until(() => performance.now() - sinceMs > 2 * stallLimitMs, "more than the limit to go by");
        loop.prefill.engine.resume();
        const { text, split } = await answer;
        assert.equal(text, await loop.expected(PROMPT));
        assert.equal(split.fallback, null);
        assert.equal(split.handoff!.pull!.outcome, "pulled");
      },
      { stallLimitMs },
    );
  });

  test("a prompt that is larger than the memory for handoffs flows through it", () =>
    withLoopCluster(
      async (loop) => {
        const { engine } = loop.prefill;
        const before = loop.decode[0]!.engine.load().cachedBlocks;
        engine.model.onDecode = () => engine.pause();
        const answer = loop.ask(PROMPT);
        // Each is let go when it has been read, or there would be no room for the fifth.
        for (let come = 1; come <= EARLY; come++) {
          await until(() => loop.decode[0]!.engine.load().cachedBlocks - before >= come, `block ${come} to come`);
          if (come === EARLY) engine.model.onDecode = () => undefined;
          engine.resume();
        }
        const { text, split } = await answer;
        assert.equal(text, await loop.expected(PROMPT));
        assert.ok(split.handoff!.pull!.early_blocks >= EARLY);
      },
      { handoff: { memoryBytes: 4 * 128 } },
    ));

  test("the decode worker is killed half-way: another one computes what it does not get, the text is the same", () =>
    withLoopCluster(
      async (loop) => {
        const answer = loop.ask(PROMPT);
        const holder = await halfWay(loop);
        loop.cluster.kill(await loop.cluster.addressOf(holder.worker.instanceId));
        await holder.worker.drain(1_000).catch(() => undefined);
        await loop.cluster.settled(2);
        loop.prefill.engine.resume();
        const { text, split } = await answer;
        assert.equal(text, await loop.expected(PROMPT));
        assert.equal(split.fallback, "handoff-gone");
      },
      { decode: 2 },
    ));

  test("the prefill worker is killed half-way: the decode worker goes on from what it has", () =>
    withLoopCluster(async (loop) => {
      const answer = loop.ask(PROMPT);
      const holder = await halfWay(loop);
      holder.engine.model.decodedTokens = 0;
      loop.cluster.kill(await loop.cluster.addressOf(loop.prefill.worker.instanceId));
      const { text, split } = await answer;
      assert.equal(text, await loop.expected(PROMPT));
      assert.equal(split.fallback, "worker-lost");
      assert.ok(holder.engine.model.decodedTokens <= PROMPT.length - EARLY * 16 + 4);
      loop.prefill.engine.resume();
    }));

  test("a client that leaves half-way leaves nothing behind", () =>
    withLoopCluster(async (loop) => {
      const abort = new AbortController();
      const answer = loop.ask(PROMPT, "asked", abort.signal);
      await halfWay(loop);
      abort.abort();
      await assert.rejects(answer);
      loop.prefill.engine.resume();
      await until(() => loop.prefill.engine.load().runningRequests === 0, "the prompt to be given up");
      const { text } = await loop.ask(PROMPT, "again");
      assert.equal(text, await loop.expected(PROMPT));
    }));
});

describe("disaggregation: what fails is computed by the decode worker, visibly", () => {
  async function fallsBack(
    reason: string,
    meddle: (pool: Pool, answer: Promise<string>) => Promise<void>,
    prepare: (pool: Pool) => Promise<void> | void = () => undefined,
    options: { handoff?: Partial<HandoffConfig>; frontend?: Partial<FrontendConfig>; decode?: number } = {},
  ): Promise<void> {
    const expected = await aggregatedText();
    await withPool(
      { prefill: 1, decode: options.decode ?? 1 },
      async (pool) => {
        await prepare(pool);
        const answer = pool.text();
        await meddle(pool, answer);
        assert.equal(await answer, expected);
        const { disaggregation } = await pool.explain();
        assert.equal(disaggregation[0]!.fallback, reason);
        assert.deepEqual(await pool.metric("dynamo_frontend_disagg_fallbacks_total"), { [reason]: 1 });
      },
      options,
    );
  }
  const kill = async (pool: Pool, node: Node): Promise<void> =>
    pool.cluster.kill(await pool.cluster.addressOf(node.worker.instanceId));

  test("the prefill worker is killed before its first token", async () => {
    let gate: ReturnType<typeof closed>;
    await fallsBack(
      "worker-lost",
      async (pool) => {
        await gate.reached;
        await kill(pool, pool.prefill[0]!);
        gate.open();
      },
      (pool) => void (gate = closed(pool.prefill[0]!.engine, "submit")),
    );
  });

  test("the prefill worker is killed after its first token, before it handed over", async () => {
    let gate: ReturnType<typeof closed>;
    await fallsBack(
      "worker-lost",
      async (pool) => {
        await gate.reached;
        await kill(pool, pool.prefill[0]!);
        gate.open();
      },
      (pool) => void (gate = closed(pool.prefill[0]!.engine, "export")),
    );
  });

  test("the prefill worker is killed when its blocks are about to be claimed", async () => {
    let gate: ReturnType<typeof closed>;
    await fallsBack(
      "worker-unreachable",
      async (pool) => {
        await gate.reached;
        await kill(pool, pool.prefill[0]!);
        gate.open();
      },
      (pool) => void (gate = closed(pool.decode[0]!.engine, "count")),
      { handoff: { leaseMs: 500 } },
    );
  });

  test("the prefill worker does not hand over in time", async () => {
    let gate: ReturnType<typeof closed>;
    await fallsBack(
      "first-token-timeout",
      async (_pool, answer) => {
        await answer;
        gate.open();
      },
      (pool) => void (gate = closed(pool.prefill[0]!.engine, "export")),
      { frontend: { handoffTimeoutMs: 100 } },
    );
  });

  test("the lease is over before the blocks are claimed", async () => {
    let gate: ReturnType<typeof closed>;
    await fallsBack(
      "handoff-gone",
      async (pool) => {
        await gate.reached;
        await until(() => pool.prefill[0]!.worker.handoffs!.heldBlocks === 0, "the lease to end");
        gate.open();
      },
      (pool) => void (gate = closed(pool.decode[0]!.engine, "count")),
      { handoff: { leaseMs: 50 } },
    );
  });

  test("there is no room for what is handed over", async () => {
    await fallsBack(
      "transfer-full",
      () => Promise.resolve(),
      async (pool) => {
        const gate = closed(pool.decode[0]!.engine, "count");
        // Another request's blocks fill the prefill worker's memory as long as nobody claims them.
        const other = pool.ask({ prompt: `other ${PROMPT.repeat(3)}` }, { id: "other" });
        await gate.reached;
        void until(() => pool.decode[0]!.engine.submitted.length > 1, "the request to fall back").then(gate.open);
        void other.then((response) => response.text());
      },
      { handoff: { memoryBytes: 20 * 64 } },
    );
  });

  test("the decode worker is killed while it pulls: another one computes it all, and the blocks' claim ends", async () => {
    const expected = await aggregatedText();
    await withPool({ prefill: 1, decode: 2 }, async (pool) => {
      const gates = pool.decode.map(({ engine }) => closed(engine, "import"));
      const answer = pool.text();
      const victim = await Promise.race(gates.map(({ reached }, i) => reached.then(() => i)));
      await kill(pool, pool.decode[victim]!);
      for (const gate of gates) gate.open();
      assert.equal(await answer, expected);
    });
  });

  test("prefill workers that left are not waited for; new ones are used again", async () => {
    const expected = await aggregatedText();
    await withPool({ prefill: 1, decode: 1 }, async (pool) => {
      await pool.prefill[0]!.worker.drain(5_000);
      await pool.cluster.settled(1);
      assert.equal(await pool.text(), expected);
      assert.deepEqual(await pool.metric("dynamo_frontend_disagg_fallbacks_total"), { "no-workers": 1 });
      await pool.add("prefill");
      await pool.cluster.settled(2);
      assert.equal(await pool.text(`again ${PROMPT}`), await aggregatedText(`again ${PROMPT}`));
      assert.deepEqual(await pool.metric("dynamo_frontend_disagg_choices_total"), { split: 1 });
    });
  });
});

test("disaggregation: auto sends a prompt past answers under way, whole to an idle prefill worker, which may die", async () => {
  const expected = await aggregatedText();
  await withPool(
    { prefill: 1, decode: 1 },
    async (pool) => {
      const [prefill, decode] = [pool.prefill[0]!, pool.decode[0]!];
      // The first one is split for news.
      assert.equal(await pool.text(), expected);
      assert.deepEqual(await pool.metric("dynamo_frontend_disagg_choices_total"), { split: 1 });
      await decode.engine.clearBlocks();
      await prefill.engine.clearBlocks();
      const writing = closed(decode.engine, "steps");
      const first = pool.ask({ prompt: "short", max_tokens: 200 }, { id: "first" });
      await writing.reached;
      const gate = closed(prefill.engine, "steps");
      const second = pool.text();
      await gate.reached;
      assert.equal(prefill.engine.submitted.at(-1)!.prefillOnly, undefined);
      const { disaggregation } = await pool.explain();
      assert.equal(disaggregation[1]!.choice, "prefill", disaggregation[1]!.reason);
      pool.cluster.kill(await pool.cluster.addressOf(prefill.worker.instanceId));
      gate.open();
      writing.open();
      assert.equal(await second, expected);
      assert.equal((await first).status, 200);
      assert.deepEqual(await pool.metric("dynamo_frontend_disagg_fallbacks_total"), { "worker-lost": 1 });
    },
    { frontend: { disagg: "auto" } },
  );
});

describe("disaggregation: no prompt is computed before its answer has room at a decode worker", () => {
  const onePlace = { ...MOCK, maxSequences: 1 };
  /** 64 blocks: the prompt twice fits once. */
  const littleMemory = { ...MOCK, contextLength: 1_024, totalBlocks: 64 };
  const twice = PROMPT + PROMPT;
  const ours = ({ engine }: Node, id: string): PreprocessedRequest[] =>
    engine.submitted.filter(({ requestId }) => requestId === id);

  /** One answer under way at the only decode worker, its prompt long. */
  async function withOneAnswering(
    engine: typeof MOCK,
    use: (pool: Pool, first: Promise<Response>, go: () => void) => Promise<void>,
    frontend: Partial<FrontendConfig> = {},
  ): Promise<void> {
    await withPool(
      { prefill: 0, decode: 0 },
      async (pool) => {
        await pool.add("prefill", { engine });
        const decode = await pool.add("decode", { engine });
        await pool.cluster.settled(2);
        const gate = closed(decode.engine, "steps");
        const first = pool.ask({ prompt: `first ${twice}` }, { id: "first" });
        await gate.reached;
        await use(pool, first, gate.open);
      },
      { frontend },
    );
  }

  for (const [what, engine] of Object.entries({ "no place": onePlace, "too little KV memory": littleMemory })) {
    test(`${what}: the prompt waits until an answer has ended`, async () => {
      const expected = await aggregatedText(twice);
      await withOneAnswering(engine, async (pool, first, go) => {
        const second = pool.text(twice);
        const waiting = async (): Promise<boolean> =>
          Object.values(await pool.metric("dynamo_frontend_disagg_waiting"))[0] === 1;
        await until(waiting, "the second one to wait");
        assert.deepEqual(ours(pool.prefill[0]!, "asked"), [], "its prompt is not computed");
        go();
        assert.equal((await first).status, 200);
        assert.equal(await second, expected);
        const { disaggregation } = await pool.explain();
        assert.equal(disaggregation[0]!.fallback, null);
        assert.ok(disaggregation[0]!.waited_ms > 0);
        assert.equal(ours(pool.prefill[0]!, "asked").length, 1);
        assert.deepEqual(await pool.metric("dynamo_frontend_disagg_fallbacks_total"), {});
      });
    });
  }

  test("who has waited for long enough is served whole, and told so", async () => {
    const expected = await aggregatedText(twice);
    const waits = { decodeWaitMs: 50 };
    await withOneAnswering(
      onePlace,
      async (pool, first, go) => {
        const second = pool.text(twice);
        await until(() => ours(pool.decode[0]!, "asked").length === 1, "the second one to be at the decode worker");
        go();
        assert.equal((await first).status, 200);
        assert.equal(await second, expected);
        assert.deepEqual(ours(pool.prefill[0]!, "asked"), []);
        assert.equal((await pool.explain()).disaggregation[0]!.fallback, "worker-full");
      },
      waits,
    );
  });

  test("a client that leaves while it waits, or while its prompt is computed, gives the room back", async () => {
    await withOneAnswering(onePlace, async (pool, first, go) => {
      const abort = new AbortController();
      const second = pool.ask({ prompt: twice }, { signal: abort.signal, id: "second" });
      await until(
        async () => Object.values(await pool.metric("dynamo_frontend_disagg_waiting"))[0] === 1,
        "the second one to wait",
      );
      abort.abort();
      await assert.rejects(second);
      go();
      assert.equal((await first).status, 200);
      const computing = closed(pool.prefill[0]!.engine, "submit");
      const later = new AbortController();
      const third = pool.ask({ prompt: `third ${twice}` }, { signal: later.signal, id: "third" });
      await computing.reached;
      later.abort();
      await assert.rejects(third);
      computing.open();
      // With a place kept for one of them, this one would not get any.
      await pool.text(twice);
      assert.equal((await pool.explain()).disaggregation[0]!.fallback, null);
    });
  });

  test("the decode worker that was kept is killed while the prompt is computed: the blocks go to another one", async () => {
    const expected = await aggregatedText();
    await withPool({ prefill: 1, decode: 2 }, async (pool) => {
      const gate = closed(pool.prefill[0]!.engine, "submit");
      const answer = pool.text();
      await gate.reached;
      const { decisions } = await pool.explain();
      const kept = pool.decode.find(({ worker }) => worker.instanceId === decisions[0]!.worker.instance_id)!;
      await kept.worker.drain(1_000);
      await pool.cluster.settled(2);
      gate.open();
      assert.equal(await answer, expected);
      const { disaggregation } = await pool.explain();
      assert.equal(disaggregation[0]!.handoff!.pull!.pulled_blocks, BLOCKS);
    });
  });
});

describe("disaggregation: workers are chosen by a router service", () => {
  const withRouter = { withRouter: true };
  const metricSum = async (pool: Pool, name: string): Promise<number> =>
    Object.values(await pool.metric(name)).reduce((sum, value) => sum + value, 0);

  const serves = (baseUrl: string): Promise<void> =>
    until(async () => {
      const { data } = (await (await fetch(`${baseUrl}/v1/models`)).json()) as { data: unknown[] };
      return data.length === 1;
    }, "the other frontend to serve");

  test("it chooses both workers, and its explanation has them", async () => {
    const expected = await aggregatedText();
    await withPool(
      { prefill: 2, decode: 2 },
      async (pool) => {
        assert.equal(await pool.text(), expected);
        const { decisions, disaggregation } = await pool.explain();
        assert.deepEqual(
          decisions.map(({ stage, policy }) => [stage, policy]),
          [
            ["decode", "kv"],
            ["prefill", "kv"],
          ],
        );
        assert.ok(pool.decode.some(({ worker }) => worker.instanceId === decisions[0]!.worker.instance_id));
        assert.ok(pool.prefill.some(({ worker }) => worker.instanceId === decisions[1]!.worker.instance_id));
        assert.deepEqual(
          [disaggregation[0]!.fallback, disaggregation[0]!.handoff!.pull!.pulled_blocks],
          [null, BLOCKS],
        );
        // The prefix is on one of two prefill workers by now: a router that knows it sends the prompt there again.
        for (const { engine } of pool.decode) await engine.clearBlocks();
        assert.equal(await pool.text(), expected);
        const again = (await pool.explain()).decisions.at(-1)!;
        assert.equal(again.worker.instance_id, decisions[1]!.worker.instance_id);
        assert.equal(await metricSum(pool, "dynamo_frontend_router_fallbacks_total"), 0);
      },
      withRouter,
    );
  });

  test("auto asks it how its pools would take the prompt, of two frontends each", async () => {
    await withPool(
      { prefill: 1, decode: 1 },
      async (pool) => {
        await pool.text();
        assert.deepEqual(await pool.metric("dynamo_frontend_disagg_choices_total"), { split: 1 });
        for (const { engine } of [...pool.decode, ...pool.prefill]) await engine.clearBlocks();
        // Another frontend has an answer under way on the decode worker, which only the service can tell of at once.
        const other = await pool.cluster.addFrontend({ routerService: { answerTimeoutMs: 2_000 } });
        await serves(other.baseUrl);
        const writing = closed(pool.decode[0]!.engine, "steps");
        const first = fetch(`${other.baseUrl}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ model: "mock", prompt: "short", max_tokens: 200 }),
        });
        await writing.reached;
        const second = pool.text();
        const split = async (): Promise<Split | undefined> => (await pool.explain()).disaggregation[1];
        await until(async () => (await split()) !== undefined, "a choice");
        const { disaggregation } = await pool.explain();
        assert.equal(disaggregation.at(-1)!.choice, "prefill", disaggregation.at(-1)!.reason);
        await second;
        writing.open();
        assert.equal((await first).status, 200);
      },
      { ...withRouter, frontend: { disagg: "auto" } },
    );
  });

  test("a prompt waits at the service for room at a decode worker, whichever frontend it came by", async () => {
    const expected = await aggregatedText();
    const engine = { ...MOCK, maxSequences: 1 };
    await withPool(
      { prefill: 0, decode: 0 },
      async (pool) => {
        await pool.add("prefill", { engine });
        const decode = await pool.add("decode", { engine });
        await pool.cluster.settled(2);
        const other = await pool.cluster.addFrontend({ routerService: { answerTimeoutMs: 2_000 } });
        await serves(other.baseUrl);
        const gate = closed(decode.engine, "steps");
        const first = fetch(`${other.baseUrl}/v1/completions`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ model: "mock", prompt: `first ${PROMPT}`, max_tokens: 30 }),
        });
        await gate.reached;
        const second = pool.text();
        await until(
          async () => (await metricSum(pool, "dynamo_frontend_disagg_waiting")) === 1,
          "the second one to wait",
        );
        assert.equal(pool.prefill[0]!.engine.submitted.filter(({ requestId }) => requestId === "asked").length, 0);
        gate.open();
        assert.equal((await first).status, 200);
        assert.equal(await second, expected);
        assert.equal((await pool.explain()).disaggregation[0]!.fallback, null);
      },
      withRouter,
    );
  });

  test("a role that changes, and a service that dies, are noticed: the frontend chooses both workers then", async () => {
    const expected = await aggregatedText();
    await withPool(
      { prefill: 2, decode: 1 },
      async (pool) => {
        assert.equal(await pool.text(), expected);
        const turned = pool.prefill[0]!;
        const response = await fetch(`${pool.cluster.baseUrl}/v1/admin/role`, {
          method: "POST",
          headers: { "content-type": "application/json" },
          body: JSON.stringify({ instance_id: turned.worker.instanceId, role: "decode" }),
        });
        assert.equal(response.status, 200, await response.text());
        await pool.cluster.settled(3);
        for (let i = 0; i < 4; i++) await pool.text(`${i} ${PROMPT}`);
        const since = turned.engine.submitted.slice(-4).filter(({ prefillOnly }) => prefillOnly === true);
        assert.ok(since.length <= 1, "it prefills no more for others");
        pool.cluster.kill(pool.service!.address);
        assert.equal(await pool.text(), expected);
        const { disaggregation, decisions } = await pool.explain();
        assert.equal(disaggregation.at(-1)!.fallback, null);
        assert.deepEqual(
          decisions.slice(-2).map(({ stage }) => stage),
          ["decode", "prefill"],
        );
        for (const decision of decisions.slice(-2)) {
          assert.ok(decision.degradations.some((each) => each.startsWith("router service: ")));
        }
        assert.ok((await metricSum(pool, "dynamo_frontend_router_fallbacks_total")) >= 2);
      },
      withRouter,
    );
  });
});

describe("disaggregation: a client that goes away", () => {
  const arrows = {
    "while the prompt is computed": ["prefill", "submit"],
    "while the blocks are copied out": ["prefill", "export"],
    "while the decode worker looks what it holds": ["decode", "count"],
    "while the blocks are imported": ["decode", "import"],
    "while it is decoded": ["decode", "steps"],
  } as const;
  for (const [when, [side, name]] of Object.entries(arrows)) {
    test(`${when}: everything stops and nothing is kept`, async () => {
      await withPool({ prefill: 1, decode: 1 }, async (pool) => {
        const { engine } = pool[side][0]!;
        const gate = closed(engine, name);
        const abort = new AbortController();
        const answer = pool.ask({ max_tokens: 4_000, stream: true }, { signal: abort.signal }).then((r) => r.text());
        await gate.reached;
        abort.abort();
        await assert.rejects(answer);
        await until(async () => {
          const gauge = await pool.metric("dynamo_frontend_inflight_requests");
          return Object.values(gauge).every((value) => value === 0);
        }, "the frontend to end the request");
        gate.open();
      });
    });
  }
});

test("disaggregation: a client cannot say what only our processes may: handoffs and prefill-only requests", async () => {
  await withPool({ prefill: 1, decode: 1 }, async (pool) => {
    for (const field of ["handoff", "prefillOnly", "prefill_only", "resumedTokens", "kv_transfer_params"]) {
      const response = await pool.ask({ [field]: "x" });
      assert.equal(response.status, 400, field);
      const nested = await pool.ask({ nvext: { [field]: "x" } });
      assert.equal(nested.status, 400, `nvext.${field}`);
    }
    assert.equal(pool.decode[0]!.engine.submitted.filter(({ requestId }) => requestId !== "canary").length, 0);
  });
});

describe("disaggregation: pairs that cannot work are refused at start", () => {
  test("another block size, an engine that exports no blocks, too little KV memory", async () => {
    await withPool({ prefill: 1, decode: 0 }, async (pool) => {
      const refused = (engine: WorkerConfig["engine"], message: RegExp): Promise<void> =>
        assert.rejects(
          pool.cluster.addWorker({ engine, modelName: "mock", role: "decode" }),
          (error: { reason: string; publicMessage: string }) => {
            assert.equal(error.reason, "invalid-config");
            assert.match(error.publicMessage, message);
            return true;
          },
        );
      await refused({ ...MOCK, blockSizeTokens: 32 }, /KV block size in tokens is 32.*prefill worker is 16/);
      await refused(
        { ...MOCK, contextLength: 4_096, totalBlocks: 256 },
        /4096 tokens holds 0 sequences of the 8192 tokens/,
      );
      await refused(
        { kind: "echo", contextLength: 8_192, maxSequences: 8, blockSizeTokens: 16, stepMs: 0 },
        /the echo engine cannot export/,
      );
    });
  });
});

test("disaggregation: a role changes while requests run, and none fails", async () => {
  await withPool({ prefill: 2, decode: 2 }, async (pool) => {
    const texts = new Map<string, string>();
    let failed: unknown;
    let isOver = false;
    const load = Array.from({ length: 6 }, async (_, client) => {
      for (let i = 0; !isOver; i++) {
        const prompt = `${client} ${i % 5} ${PROMPT}`;
        const text = await pool.text(prompt).catch((thrown: unknown) => void (failed ??= thrown));
        if (text === undefined) return;
        assert.equal(texts.get(prompt) ?? text, text);
        texts.set(prompt, text);
      }
    });
    const turn = async (node: Node, role: string): Promise<void> => {
      const response = await fetch(`${pool.cluster.baseUrl}/v1/admin/role`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ instance_id: node.worker.instanceId, role }),
      });
      assert.deepEqual(await response.json(), { instance_id: node.worker.instanceId, role });
      assert.equal(node.worker.role, role);
      await pool.cluster.settled(4);
    };
    await turn(pool.prefill[0]!, "decode");
    await turn(pool.decode[0]!, "prefill");
    await turn(pool.prefill[0]!, "agg");
    await turn(pool.prefill[0]!, "prefill");
    isOver = true;
    await Promise.all(load);
    assert.equal(failed, undefined);
    assert.ok(texts.size > 0);
  });
});
