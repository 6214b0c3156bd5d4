import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { after, before, describe, test } from "node:test";
import OpenAI from "openai";
import { byteModelFolder } from "../helpers/byte-model.ts";
import { until } from "../helpers/in-process-cluster.ts";
import { checkPredictedReuse } from "../helpers/reuse.ts";
import { startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";

/**
 * `dynamo local --engine vllm` with two workers, each with a vLLM server of its own: the fake one, as a process. With the
 * real one: `vllm-real.test.ts`.
 */
const FAKE = resolve(import.meta.dirname, "../../src/engines/vllm/fixtures/fake-vllm-main.ts");
const LIMIT = { timeout: 120_000 };

describe("dynamo local --engine vllm (fake server)", LIMIT, () => {
  let root: string;
  let cluster: ProcessCluster;
  let client: OpenAI;
  const model = "bytes";

  before(async () => {
    root = mkdtempSync(join(tmpdir(), "vllm-e2e-"));
    cluster = await startProcessCluster(
      [
        "--engine=vllm",
        `--engine-command=${process.execPath} ${FAKE}`,
        `--model=${byteModelFolder(root)}`,
        `--model-name=${model}`,
        "--workers=2",
        "--engine-metrics-interval-secs=0.1",
        "--",
        "--num-gpu-blocks-override=400",
        "--max-model-len",
        "2048",
      ],
      { FAKE_VLLM_STEP_MS: "4" },
    );
    client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
  });
  after(async () => {
    assert.equal(await cluster.stop("SIGINT"), 0, cluster.output());
    rmSync(root, { recursive: true, force: true });
  });

  test("answers, and says how its engines started", async () => {
    const answer = await client.completions.create({
      model,
      prompt: "Hello, ".repeat(10),
      max_tokens: 7,
      temperature: 0,
    });
    assert.equal(answer.usage?.completion_tokens, 7);
    assert.equal(answer.usage.prompt_tokens, 70);
    assert.match(cluster.output(), /vLLM serves/);
    assert.match(cluster.output(), /version 0\.29\.0, tokens over \/inference\/v1\/generate/);
  });

  test("routed by the engines' own KV events: predicted reuse is what the engine reports", async () => {
    const prompts = Array.from(
      { length: 12 },
      (_, i) => `Group ${i % 3}: ${"shared words ".repeat(12)} and question ${i}`,
    );
    const reused = await checkPredictedReuse({
      client,
      baseUrl: cluster.baseUrl,
      model,
      prompts,
      blockSizeTokens: 16,
    });
    // Nine of them share 160 tokens and more with one before.
    assert.ok(reused >= 9 * 160, `${reused} tokens reused`);
  });

  test("an engine killed in mid-stream: the answers go on elsewhere, whole; it comes back into discovery", async () => {
    const ask = async (i: number): Promise<string> => {
      const body = { model, prompt: `Tell me story ${i}`, max_tokens: 300, temperature: 0, ignore_eos: true };
      const answer = await client.completions.create(body);
      assert.equal(answer.usage?.completion_tokens, 300);
      return answer.choices[0]!.text;
    };
    const wanted = await Promise.all(Array.from({ length: 8 }, (_, i) => ask(i)));
    const engines = (): number[] => cluster.pids("fake-vllm-main").filter((pid) => isEngine(pid));
    assert.equal(engines().length, 2);
    const running = Promise.all(Array.from({ length: 8 }, (_, i) => ask(i)));
    await new Promise((done) => setTimeout(done, 300));
    process.kill(engines()[0]!, "SIGKILL");
    assert.deepEqual(await running, wanted);
    await until(() => Promise.resolve(/vllm is back/.test(cluster.output())), "the engine", 30_000);
    assert.equal(engines().length, 2);
    assert.deepEqual(await Promise.all(Array.from({ length: 8 }, (_, i) => ask(i))), wanted);
  });
});

/** Not the shell that keeps it, and not the worker, which has it on its command line. */
function isEngine(pid: number): boolean {
  return readFileSync(`/proc/${pid}/cmdline`, "latin1").split("\0")[1] === FAKE;
}
