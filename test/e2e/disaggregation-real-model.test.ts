import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import OpenAI from "openai";
import { assertSameGreedy, greedyAnswer, partingOf, type GreedyToken } from "../helpers/greedy.ts";
import { until } from "../helpers/in-process-cluster.ts";
import { startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";

/**
 * SmolLM2 split over two processes: greedy text is that of one worker. By default a few prompts, so that all tests stay
 * quick; `DYN_TEST_DISAGG_PROMPTS=50 npm test -- test/e2e/disaggregation-real-model.test.ts` takes 50 of 10 to 3,000 tokens.
 *
 * The reference is the decode worker itself, named by the request (so that it does all of it) and under a cache salt (so that
 * nothing is reused).
 */
const MODEL = process.env["DYN_TEST_MODEL"];
const PROMPTS = Number(process.env["DYN_TEST_DISAGG_PROMPTS"] ?? 10);
/** Characters: a token has four to five. */
const LONGEST = PROMPTS > 10 ? 13_000 : 1_600;
const TEXT = readFileSync(join(import.meta.dirname, "../../LICENSE"), "utf8")
  .replaceAll(/\s+/g, " ")
  .repeat(2);
const MAX_TOKENS = 24;

class Split {
  readonly cluster: ProcessCluster;
  readonly client: OpenAI;
  readonly #model: string;
  readonly #decodeWorker: string;

  private constructor(cluster: ProcessCluster, client: OpenAI, model: string, decodeWorker: string) {
    this.cluster = cluster;
    this.client = client;
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
    let report: { workers: { prefill: number } } | undefined;
    await until(async () => {
      const answer = await fetch(`${cluster.baseUrl}/v1/admin/disagg`);
      report = ((await answer.json()) as { models: (typeof report)[] }).models[0];
      return report?.workers.prefill === 1;
    }, "the prefill worker to join");
    const preview = await fetch(`${cluster.baseUrl}/v1/route`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model, prompt: "who decodes" }),
    });
    const { decisions } = (await preview.json()) as { decisions: { worker: { instance_id: string } }[] };
    return new Split(cluster, client, model, decisions[0]!.worker.instance_id);
  }

  answer(text: string, nvext: object = {}, onToken?: () => void): Promise<GreedyToken[]> {
    const messages = [{ role: "user" as const, content: `Go on with this text: ${text}` }];
    const body = { model: this.#model, messages, max_tokens: MAX_TOKENS, nvext };
    return greedyAnswer(this.client, body, onToken);
  }

  /** By the decode worker alone, from nothing. */
  reference(text: string): Promise<GreedyToken[]> {
    return this.answer(text, { backend_instance_id: this.#decodeWorker, cache_salt: "reference" });
  }

  /** On the decode worker, whose cache has it then. */
  warm(text: string): Promise<GreedyToken[]> {
    return this.answer(text, { backend_instance_id: this.#decodeWorker });
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

/** Prompts of growing length, each from another place of the text. */
function prompts(count: number): string[] {
  return Array.from({ length: count }, (_, i) => {
    const length = Math.round(10 + ((LONGEST - 10) * i * i) / Math.max(1, (count - 1) ** 2));
    return TEXT.slice(i * 97, i * 97 + length);
  });
}

describe(
  "disaggregation with the real model: greedy text is that of one worker",
  { skip: MODEL === undefined ? "no test model (DYN_TEST_MODEL)" : false },
  () => {
    for (const [backend, count] of [
      ["shm", PROMPTS],
      ["tcp", PROMPTS > 10 ? PROMPTS : 2],
    ] as const) {
      test(`over ${backend}`, async (context) => {
        const split = await Split.start(["--transfer-backend", backend]);
        try {
          for (const [i, prompt] of prompts(count).entries()) {
            const [actual, expected] = [await split.answer(prompt), await split.reference(prompt)];
            const parting = partingOf(actual, expected);
            if (parting === undefined) continue;
            // Rounding: the decode worker computes the prompt's last tokens in another batch than the reference did.
            context.diagnostic(`prompt ${i}: near tie at token ${parting.index}, ${parting.gap.toFixed(3)} apart`);
            assertSameGreedy(actual, expected);
          }
          assert.deepEqual(await split.metric("dynamo_frontend_disagg_choices_total", "choice"), { split: count });
          assert.deepEqual(await split.metric("dynamo_frontend_disagg_fallbacks_total", "reason"), {});
          const bytes = await split.metric("dynamo_frontend_disagg_handoff_bytes_total", "backend");
          assert.ok(bytes[backend]! > 1e6, `moved over ${backend}: ${JSON.stringify(bytes)}`);
        } finally {
          await split.stop();
        }
      });
    }

    test("with half of the blocks at the decode worker, and with a prefill worker that dies as it hands over", async () => {
      const split = await Split.start([]);
      try {
        const text = TEXT.slice(500, 2_300);
        const expected = await split.reference(text);
        await split.warm(text.slice(0, 900));
        assertSameGreedy(await split.answer(text), expected);
        const [moved] = Object.values(await split.metric("dynamo_frontend_disagg_handoff_bytes_total", "backend"));
        assert.ok(moved! > 0 && moved! < 368_640 * Math.floor(text.length / 4 / 16), `${moved} bytes moved`);

        const other = TEXT.slice(3_000, 4_500);
        const expectedOther = await split.reference(other);
        const [victim] = split.cluster.pids("--disaggregation-mode=prefill");
        let isKilled = false;
        // Its first token is out: the blocks are being copied out, claimed, or read.
        const killOnce = (): void => {
          if (isKilled) return;
          isKilled = true;
          process.kill(victim!, "SIGKILL");
        };
        assertSameGreedy(await split.answer(other, {}, killOnce), expectedOther);
        assert.ok(isKilled);
      } finally {
        await split.stop();
      }
    });
  },
);
