import assert from "node:assert/strict";
import { describe, test, type TestContext } from "node:test";
import OpenAI from "openai";
import { PROMPT_SET_SIZE, allowedPartings, partOf, promptSet } from "../../src/engines/engine.prompts.ts";
import { PartingList, greedyCompletion, type GreedyToken } from "../helpers/greedy.ts";
import { until } from "../helpers/in-process-cluster.ts";
import { startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";

/**
 * SmolLM2 split over two processes: greedy text is that of one worker, computed cold. By default a few prompts, so that all
 * tests stay quick; `DYN_TEST_DISAGG_PROMPTS=50` takes the whole set (src/engines/engine.prompts.ts), to be run with
 * `npm test -- test/e2e/disaggregation-real-model.test.ts --test-timeout=3600000`, or a part of it with
 * `DYN_TEST_PROMPT_PART=1/3`.
 *
 * The reference is the decode worker itself, named by the request (so that it does all of it) and under a cache salt (so that
 * nothing is reused).
 */
const MODEL = process.env["DYN_TEST_MODEL"];
const PROMPTS = Number(process.env["DYN_TEST_DISAGG_PROMPTS"] ?? 5);
const SET = partOf(promptSet(PROMPTS, PROMPTS < PROMPT_SET_SIZE ? 200 : Infinity), process.env["DYN_TEST_PROMPT_PART"]);
const MAX_TOKENS = 24;

class Split {
  readonly cluster: ProcessCluster;
  readonly #client: OpenAI;
  readonly #model: string;
  readonly #decodeWorker: string;

  private constructor(cluster: ProcessCluster, client: OpenAI, model: string, decodeWorker: string) {
    this.cluster = cluster;
    this.#client = client;
    this.#model = model;
    this.#decodeWorker = decodeWorker;
  }

  static async start(flags: readonly string[]): Promise<Split> {
    const cluster = await startProcessCluster([
      "--model",
      MODEL!,
      "--prefill=1",
      "--decode=1",
      "--disagg=always",
      "--threads=1",
      "--worker-heartbeat-timeout-secs=1",
      ...flags,
    ]);
    const client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
    const model = (await client.models.list()).data[0]!.id;
    const split = new Split(cluster, client, model, "");
    await split.prefillWorkers(1);
    const preview = await fetch(`${cluster.baseUrl}/v1/route`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model, prompt: "who decodes" }),
    });
    const { decisions } = (await preview.json()) as { decisions: { worker: { instance_id: string } }[] };
    return new Split(cluster, client, model, decisions[0]!.worker.instance_id);
  }

  /** Resolves when there are so many. */
  async prefillWorkers(count: number): Promise<void> {
    let report: { workers: { prefill: number } } | undefined;
    await until(
      async () => {
        const answer = await fetch(`${this.cluster.baseUrl}/v1/admin/disagg`);
        report = ((await answer.json()) as { models: (typeof report)[] }).models[0];
        return report?.workers.prefill === count;
      },
      `${count} prefill workers`,
      60_000,
    );
  }

  /** Split, unless `nvext` names a worker. */
  answer(prompt: Uint32Array, nvext: object = {}, onToken?: () => void): Promise<GreedyToken[]> {
    const body = { model: this.#model, prompt: [...prompt], max_tokens: MAX_TOKENS, nvext };
    return greedyCompletion(this.#client, body, onToken);
  }

  /** By the decode worker alone. A prompt is computed once under a salt, and found in its cache after that. */
  alone(prompt: Uint32Array, salt?: string): Promise<GreedyToken[]> {
    const pinned = { backend_instance_id: this.#decodeWorker };
    return this.answer(prompt, salt === undefined ? pinned : { ...pinned, cache_salt: salt });
  }

  async metric(name: string, label: string): Promise<Record<string, number>> {
    const text = await (await fetch(`${this.cluster.baseUrl}/metrics`)).text();
    const lines = text.split("\n").filter((line) => line.startsWith(`${name}{`));
    const of = (line: string): string => new RegExp(`${label}="([^"]*)"`).exec(line)?.[1] ?? "";
    return Object.fromEntries(lines.map((line) => [of(line), Number(line.split(" ").at(-1))]));
  }

  async stop(): Promise<void> {
    assert.equal(await this.cluster.stop("SIGINT"), 0, this.cluster.output());
  }
}

/** Each prompt's text when one idle worker computed all of it; by prompt. */
const references = new Map<Uint32Array, GreedyToken[]>();

async function referenceOf(split: Split, prompt: Uint32Array): Promise<GreedyToken[]> {
  const known = references.get(prompt) ?? (await split.alone(prompt, "reference"));
  references.set(prompt, known);
  return known;
}

async function compare(
  context: TestContext,
  path: string,
  split: Split,
  answer: (prompt: Uint32Array) => Promise<GreedyToken[]>,
  prompts = SET,
): Promise<void> {
  const partings = new PartingList(path);
  for (const prompt of prompts) partings.add(prompt.length, await answer(prompt), await referenceOf(split, prompt));
  partings.check(allowedPartings(prompts.length), (line) => context.diagnostic(line));
}

describe(
  "disaggregation with the real model: greedy text is that of one worker",
  { skip: MODEL === undefined ? "no test model (DYN_TEST_MODEL)" : false },
  () => {
    for (const backend of ["shm", "tcp"]) {
      test(`over ${backend}, and from the decode worker's own cache`, async (context) => {
        const split = await Split.start(["--transfer-backend", backend]);
        try {
          await compare(context, `split over ${backend}`, split, (prompt) => split.answer(prompt));
          const choices = await split.metric("dynamo_frontend_disagg_choices_total", "choice");
          // A prompt without a whole block has nothing to hand over.
          const splittable = SET.filter(({ length }) => length > 16).length;
          assert.ok(choices["split"]! >= splittable, JSON.stringify(choices));
          assert.deepEqual(await split.metric("dynamo_frontend_disagg_fallbacks_total", "reason"), {});
          const bytes = await split.metric("dynamo_frontend_disagg_handoff_bytes_total", "backend");
          assert.ok(bytes[backend]! > 1e6, `moved over ${backend}: ${JSON.stringify(bytes)}`);
          // What the split left there, and what the decode worker computed itself.
          await compare(context, "aggregated, device hits", split, (prompt) => split.alone(prompt));
        } finally {
          await split.stop();
        }
      });
    }

    test("with half of the blocks at the decode worker", async (context) => {
      const split = await Split.start([]);
      try {
        await compare(context, "split, half at the decode worker", split, async (prompt) => {
          if (prompt.length > 1) await split.alone(prompt.slice(0, Math.ceil(prompt.length / 2)));
          return split.answer(prompt);
        });
        const bytes = await split.metric("dynamo_frontend_disagg_handoff_bytes_total", "backend");
        const blocks = SET.reduce((sum, { length }) => sum + Math.floor(length / 16), 0);
        const [moved] = Object.values(bytes);
        assert.ok(moved! > 0 && moved! < 0.7 * blocks * 369_576, `${moved} bytes of ${blocks} blocks moved`);
      } finally {
        await split.stop();
      }
    });

    test("with a prefill worker that dies as it hands over", async (context) => {
      const split = await Split.start([]);
      try {
        // Its supervisor starts another one each time, so a few prompts by default.
        const prompts = PROMPTS < PROMPT_SET_SIZE ? SET.slice(-1) : SET;
        const killed = new Set<number>();
        await compare(
          context,
          "split, transfer killed",
          split,
          async (prompt) => {
            const [victim] = split.cluster.pids("--disaggregation-mode=prefill");
            // Its first token is out: the blocks are being copied out, claimed, or read.
            const killOnce = (): void => {
              if (killed.has(victim!)) return;
              killed.add(victim!);
              process.kill(victim!, "SIGKILL");
            };
            const text = await split.answer(prompt, {}, killOnce);
            await until(
              () => {
                const [next] = split.cluster.pids("--disaggregation-mode=prefill");
                return next !== undefined && next !== victim;
              },
              "another prefill worker",
              60_000,
            );
            await split.prefillWorkers(1);
            return text;
          },
          prompts,
        );
        assert.equal(killed.size, prompts.length);
      } finally {
        await split.stop();
      }
    });
  },
);
