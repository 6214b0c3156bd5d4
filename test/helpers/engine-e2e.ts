import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import OpenAI from "openai";
import { byteArtifact } from "../../src/model/index.ts";
import { until } from "./in-process-cluster.ts";
import { startProcessCluster, type ProcessCluster } from "./process-cluster.ts";
import { checkPredictedReuse } from "./reuse.ts";

/**
 * `dynamo local` with two workers, each with a server of its own of one engine: a fake one, as a process, spoken to by the
 * official client through the frontend.
 */
export interface EngineClusterUnderTest {
  /** `--engine`. */
  readonly engine: string;
  /** `SGLang`, as its start says it. */
  readonly title: string;
  /** The fake server's main file. */
  readonly fake: string;
  readonly args: readonly string[];
  /** What the worker says it found. */
  readonly found: RegExp;
  /** Top logprobs come with an answer. */
  readonly hasAlternatives: boolean;
}

/** A model folder of which only the tokenizer is there: bytes are tokens. */
function modelFolder(root: string): string {
  const folder = join(root, "bytes-model");
  const { tokenizerJson, chatTemplate } = byteArtifact();
  mkdirSync(folder);
  writeFileSync(join(folder, "tokenizer.json"), JSON.stringify(tokenizerJson));
  writeFileSync(join(folder, "config.json"), JSON.stringify({ max_position_embeddings: 2_048 }));
  const config = { bos_token: "<|endoftext|>", eos_token: "<|im_end|>", chat_template: chatTemplate };
  writeFileSync(join(folder, "tokenizer_config.json"), JSON.stringify(config));
  return folder;
}

export function engineClusterTests(under: EngineClusterUnderTest): void {
  void describe(`dynamo local --engine ${under.engine} (fake server)`, { timeout: 120_000 }, () => {
    let root: string;
    let cluster: ProcessCluster;
    let client: OpenAI;
    const model = "bytes";

    before(async () => {
      root = mkdtempSync(join(tmpdir(), `${under.engine}-e2e-`));
      cluster = await startProcessCluster(
        [
          `--engine=${under.engine}`,
          `--engine-command=${process.execPath} ${under.fake}`,
          `--model=${modelFolder(root)}`,
          `--model-name=${model}`,
          "--workers=2",
          "--kv-cache-block-size=16",
          "--engine-metrics-interval-secs=0.1",
          "--",
          ...under.args,
        ],
        { STEP_MS: "4" },
      );
      client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
    });
    after(async () => {
      assert.equal(await cluster.stop("SIGINT"), 0, cluster.output());
      rmSync(root, { recursive: true, force: true });
    });

    void test("answers, whole and streamed, and says how its engines started", async () => {
      const body = { model, prompt: "Hello, ".repeat(10), max_tokens: 7, temperature: 0 };
      const answer = await client.completions.create(body);
      assert.deepEqual([answer.usage?.completion_tokens, answer.usage?.prompt_tokens], [7, 70]);
      let text = "";
      const stream = await client.completions.create({ ...body, stream: true });
      for await (const chunk of stream) text += chunk.choices[0]?.text ?? "";
      assert.equal(text, answer.choices[0]!.text);
      assert.match(cluster.output(), new RegExp(`${under.title} serves`));
      assert.match(cluster.output(), under.found);
    });

    void test("chat with several choices and logprobs", async () => {
      const answer = await client.chat.completions.create({
        model,
        messages: [{ role: "user", content: "Say something." }],
        max_tokens: 5,
        n: 2,
        seed: 7,
        logprobs: true,
        ...(under.hasAlternatives ? { top_logprobs: 2 } : {}),
      });
      assert.equal(answer.choices.length, 2);
      for (const { logprobs } of answer.choices) {
        assert.ok(logprobs!.content!.every(({ logprob }) => logprob === -0.5));
        if (under.hasAlternatives) assert.ok(logprobs!.content!.every(({ top_logprobs: top }) => top.length === 2));
      }
    });

    void test("routed by the engines' own KV events: predicted reuse is what the engine reports", async () => {
      const prompts = Array.from(
        { length: 12 },
        (_, i) => `Group ${i % 3}: ${"shared words ".repeat(12)} and question ${i}`,
      );
      const blockSizeTokens = 16;
      const reused = await checkPredictedReuse({ client, baseUrl: cluster.baseUrl, model, prompts, blockSizeTokens });
      // Nine of them share 160 tokens and more with one before.
      assert.ok(reused >= 9 * 160, `${reused} tokens reused`);
    });

    void test("an engine killed in mid-stream: the answers go on elsewhere, whole; it comes back into discovery", async () => {
      const ask = async (i: number): Promise<string> => {
        const body = { model, prompt: `Tell me story ${i}`, max_tokens: 300, temperature: 0, ignore_eos: true };
        const answer = await client.completions.create(body);
        assert.equal(answer.usage?.completion_tokens, 300);
        return answer.choices[0]!.text;
      };
      const all = (): Promise<string[]> => Promise.all(Array.from({ length: 8 }, (_, i) => ask(i)));
      const wanted = await all();
      const name = under.fake.split("/").at(-1)!.replace(".ts", "");
      const engines = (): number[] => cluster.pids(name).filter((pid) => isEngine(pid, under.fake));
      assert.equal(engines().length, 2);
      const running = all();
      await new Promise((done) => setTimeout(done, 300));
      process.kill(engines()[0]!, "SIGKILL");
      assert.deepEqual(await running, wanted);
      const back = new RegExp(`${under.engine} is back`);
      await until(() => Promise.resolve(back.test(cluster.output())), "the engine", 30_000);
      assert.equal(engines().length, 2);
      assert.deepEqual(await all(), wanted);
    });
  });
}

/** Not the shell that keeps it, and not the worker, which has it on its command line. */
function isEngine(pid: number, fake: string): boolean {
  return readFileSync(`/proc/${pid}/cmdline`, "latin1").split("\0")[1] === fake;
}
