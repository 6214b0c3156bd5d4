import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { after, before, describe, test } from "node:test";
import { promisify } from "node:util";
import OpenAI from "openai";
import type { DecisionExplanation } from "../../src/router/index.ts";
import { until, workersJoined } from "../helpers/in-process-cluster.ts";
import { assertSameGreedy, greedyAnswer, type GreedyToken } from "../helpers/greedy.ts";
import { alive, startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";

const run = promisify(execFile);
const MODEL = process.env["DYN_TEST_MODEL"];
const STREAMS = 32;
const FRANCE = [{ role: "user" as const, content: "What is the capital of France?" }];

/** `dynamo local` with the real SmolLM2: two llama workers and a frontend as processes of their own. */
describe(
  "dynamo local with the real model",
  { skip: MODEL === undefined ? "no test model (DYN_TEST_MODEL)" : false },
  () => {
    let cluster: ProcessCluster;
    let client: OpenAI;
    let model: string;

    before(async () => {
      cluster = await startProcessCluster([
        "--model",
        MODEL!,
        "--workers",
        "2",
        "--worker-heartbeat-timeout-secs",
        "1",
      ]);
      client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
      model = (await client.models.list()).data[0]!.id;
    });
    after(async () => {
      assert.equal(await cluster.stop("SIGINT"), 0, cluster.output());
    });

    test("curl streams an answer with Paris", async () => {
      const body = JSON.stringify({ model, messages: FRANCE, max_tokens: 24, temperature: 0, stream: true });
      const { stdout } = await run("curl", [
        "-sN",
        `${cluster.baseUrl}/v1/chat/completions`,
        "-H",
        "content-type: application/json",
        "-d",
        body,
      ]);
      const events = stdout.split("\n\n").filter((event) => event !== "");
      assert.equal(events.at(-1), "data: [DONE]");
      const text = events
        .slice(0, -1)
        .map(
          (event) =>
            (JSON.parse(event.slice("data: ".length)) as OpenAI.ChatCompletionChunk).choices[0]?.delta.content ?? "",
        )
        .join("");
      assert.match(text, /Paris/);
    });

    test("streamed and whole greedy answers are the same, and a repeated prompt comes from the cache", async () => {
      const body = {
        model,
        messages: [{ role: "user" as const, content: "Name three colours of the rainbow. ".repeat(6) }],
        max_tokens: 16,
        temperature: 0,
      };
      const texts: string[] = [];
      let cached = 0;
      // Routed by cached prefix unless told otherwise: they go where the first one went.
      for (let i = 0; i < 4; i++) {
        const answer = await client.chat.completions.create(body);
        texts.push(answer.choices[0]!.message.content!);
        cached = Math.max(cached, answer.usage!.prompt_tokens_details!.cached_tokens!);
      }
      assert.equal(new Set(texts).size, 1, texts.join("\n---\n"));
      assert.ok(cached >= 16, `cached tokens: ${cached}`);
      assert.match(cluster.output(), /router \(kv\)/);
      let streamed = "";
      for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) {
        streamed += chunk.choices[0]?.delta.content ?? "";
      }
      assert.equal(streamed, texts[0]);
    });

    test("what the router predicted is what the engine reused", async () => {
      const story = "Once upon a time there was a small model that answered every question it was asked. ";
      for (let turns = 1; turns <= 6; turns++) {
        const id = `turn-${turns}`;
        const messages = [{ role: "user" as const, content: story.repeat(turns) }];
        const body = { model, messages, max_tokens: 2, temperature: 0 };
        const answer = await client.chat.completions.create(body, { headers: { "x-request-id": id } });
        const explained = await fetch(`${cluster.baseUrl}/v1/route/explain/${id}`);
        const decision = ((await explained.json()) as { decisions: DecisionExplanation[] }).decisions[0]!;
        assert.equal(decision.policy, "kv");
        assert.equal(decision.predicted.cached_tokens, answer.usage!.prompt_tokens_details!.cached_tokens);
        if (turns > 1) assert.ok(decision.predicted.cached_tokens > 0, JSON.stringify(decision));
      }
    });

    test("sampling options are honoured: seeds repeat, logit bias forbids, stop strings stop, logprobs sum up", async () => {
      const seeded = { model, messages: FRANCE, max_tokens: 12, temperature: 1, seed: 42 };
      const first = await client.chat.completions.create(seeded);
      const second = await client.chat.completions.create(seeded);
      assert.equal(first.choices[0]!.message.content, second.choices[0]!.message.content);
      const stopped = await client.chat.completions.create({
        model,
        messages: FRANCE,
        max_tokens: 24,
        temperature: 0,
        stop: ["Paris"],
      });
      assert.equal(stopped.choices[0]!.finish_reason, "stop");
      assert.doesNotMatch(stopped.choices[0]!.message.content!, /Paris/);
      const logprobs = await client.chat.completions.create({
        model,
        messages: FRANCE,
        max_tokens: 5,
        temperature: 0,
        logprobs: true,
        top_logprobs: 5,
      });
      for (const entry of logprobs.choices[0]!.logprobs!.content!) {
        assert.equal(entry.top_logprobs.length, 5);
        assert.equal(entry.top_logprobs[0]!.token, entry.token, "greedy takes the most likely token");
        const mass = entry.top_logprobs.reduce((sum, top) => sum + Math.exp(top.logprob), 0);
        assert.ok(mass > 0 && mass <= 1.0001);
      }
      const choices = await client.chat.completions.create({
        model,
        messages: FRANCE,
        max_tokens: 8,
        temperature: 1,
        seed: 7,
        n: 3,
      });
      assert.equal(choices.choices.length, 3);
      assert.ok(new Set(choices.choices.map((choice) => choice.message.content)).size > 1, "three samples differ");
    });

    test("completions: echo with logprobs gives the prompt's too, the first without one", async () => {
      const answer = await client.completions.create({
        model,
        prompt: "The capital of France is",
        max_tokens: 2,
        temperature: 0,
        echo: true,
        logprobs: 1,
      });
      const logprobs = answer.choices[0]!.logprobs!;
      assert.ok(answer.choices[0]!.text.startsWith("The capital of France is"));
      assert.equal(logprobs.tokens!.join(""), answer.choices[0]!.text);
      assert.equal(logprobs.token_logprobs![0], null);
      assert.ok(logprobs.token_logprobs!.slice(1).every((value) => typeof value === "number" && value <= 0));
    });

    /** Greedy streams on both workers; a fault once all of them run. Their answers, and the longest silence after it. */
    async function disturbed(fault: () => void): Promise<{ answers: GreedyToken[][]; gapMs: number }> {
      let running = 0;
      const begun = Promise.withResolvers<void>();
      let gapMs = 0;
      let sinceMs = Infinity;
      const answers = Array.from({ length: STREAMS }, (_, i) => {
        let count = 0;
        let lastMs = 0;
        return greedyAnswer(client, story(i), () => {
          const nowMs = performance.now();
          if (nowMs > sinceMs) gapMs = Math.max(gapMs, nowMs - Math.max(lastMs, sinceMs));
          lastMs = nowMs;
          if (++count === 3 && ++running === STREAMS) begun.resolve();
        });
      });
      await Promise.race([begun.promise, Promise.all(answers)]);
      sinceMs = performance.now();
      fault();
      return { answers: await Promise.all(answers), gapMs };
    }

    const story = (
      i: number,
    ): { model: string; messages: OpenAI.ChatCompletionMessageParam[]; max_tokens: number } => ({
      model,
      messages: [{ role: "user", content: `Write a long story about the sea and ${i + 2} ships.` }],
      max_tokens: 24,
    });
    const bothServe = (): Promise<void> => workersJoined(cluster.baseUrl, 2, 30_000);
    let undisturbed: GreedyToken[][] = [];

    test("a worker killed under 32 streams: 32 whole answers, the same as undisturbed, no error among the next 100 requests, and it comes back", async (t) => {
      const workers = cluster.pids(" worker");
      assert.equal(workers.length, 2, cluster.output());
      undisturbed = await Promise.all(Array.from({ length: STREAMS }, (_, i) => greedyAnswer(client, story(i))));
      const { answers, gapMs } = await disturbed(() => process.kill(workers[0]!, "SIGKILL"));
      const same = answers.filter((answer, i) => assertSameGreedy(answer, undisturbed[i]!)).length;
      t.diagnostic(
        `${same} of ${STREAMS} to the last token, the others part at a near tie; longest silence ${Math.round(gapMs)} ms`,
      );
      for (let i = 0; i < 100; i += 10) {
        const next = await Promise.all(
          Array.from({ length: 10 }, () =>
            client.chat.completions.create({ model, messages: FRANCE, max_tokens: 2, temperature: 0 }),
          ),
        );
        assert.ok(next.every((answer) => answer.choices[0]!.finish_reason === "length"));
      }
      await until(() => cluster.pids(" worker").filter(alive).length === 2, "the worker to be restarted", 20_000);
      await bothServe();
      assert.match(cluster.output(), /restart/);
    });

    test("a worker frozen under 32 streams: the same, and it comes back when it is thawed", async (t) => {
      const victim = cluster.pids(" worker")[0]!;
      const { answers, gapMs } = await disturbed(() => process.kill(victim, "SIGSTOP"));
      try {
        const same = answers.filter((answer, i) => assertSameGreedy(answer, undisturbed[i]!)).length;
        t.diagnostic(`${same} of ${STREAMS} to the last token; longest silence ${Math.round(gapMs)} ms`);
      } finally {
        process.kill(victim, "SIGCONT");
      }
      await bothServe();
      const next = await client.chat.completions.create({ model, messages: FRANCE, max_tokens: 4, temperature: 0 });
      assert.equal(next.choices.length, 1);
    });
  },
);
