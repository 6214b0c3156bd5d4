import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import OpenAI from "openai";
import { startInProcessCluster, until, type InProcessCluster } from "../helpers/in-process-cluster.ts";

/** The official `openai` npm client against a whole cluster with the echo engine: the wire format, not the model. */
describe("openai npm client", () => {
  let cluster: InProcessCluster;
  let client: OpenAI;

  before(async () => {
    cluster = await startInProcessCluster({ workers: 2 });
    client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
  });
  after(() => cluster.stop());

  test("lists the models", async () => {
    const models = await client.models.list();
    assert.deepEqual(
      models.data.map((model) => model.id),
      ["echo"],
    );
    assert.equal((await client.models.retrieve("echo")).id, "echo");
  });

  test("chat: a whole answer has text, finish reason and usage", async () => {
    const answer = await client.chat.completions.create({
      model: "echo",
      messages: [{ role: "user", content: "hello there" }],
      max_tokens: 12,
      temperature: 0,
    });
    assert.equal(answer.object, "chat.completion");
    assert.equal(answer.choices.length, 1);
    assert.equal(answer.choices[0]!.message.role, "assistant");
    assert.ok(answer.choices[0]!.message.content!.length > 0);
    assert.equal(answer.choices[0]!.finish_reason, "length");
    assert.equal(answer.usage!.completion_tokens, 12);
    assert.equal(answer.usage!.total_tokens, answer.usage!.prompt_tokens + 12);
  });

  test("chat: the streamed text equals the whole one, and usage comes last when asked for", async () => {
    const body = {
      model: "echo",
      messages: [{ role: "user" as const, content: "grüße 你好 👩‍👩‍👧" }],
      max_tokens: 90,
      temperature: 0,
      ignore_eos: true,
    };
    const whole = await client.chat.completions.create(body);
    const stream = await client.chat.completions.create({
      ...body,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let role: string | undefined;
    let finish: string | null | undefined;
    let usage: OpenAI.CompletionUsage | null | undefined;
    for await (const chunk of stream) {
      assert.equal(chunk.object, "chat.completion.chunk");
      text += chunk.choices[0]?.delta.content ?? "";
      role ??= chunk.choices[0]?.delta.role;
      finish = chunk.choices[0]?.finish_reason ?? finish;
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0]!.message.content);
    assert.equal(role, "assistant");
    assert.equal(finish, "length");
    assert.equal(usage!.completion_tokens, 90);
  });

  test("completions: several prompts, echo, n, token prompts", async () => {
    const answer = await client.completions.create({
      model: "echo",
      prompt: ["abc", "xyz"],
      max_tokens: 3,
      n: 2,
      echo: true,
    });
    assert.equal(answer.choices.length, 4);
    assert.deepEqual(new Set(answer.choices.map((choice) => choice.index)), new Set([0, 1, 2, 3]));
    for (const choice of answer.choices)
      assert.ok(choice.text.startsWith(choice.index < 2 ? "abc" : "xyz"), choice.text);
    const tokens = await client.completions.create({ model: "echo", prompt: [97, 98, 99], max_tokens: 3 });
    assert.equal(tokens.choices[0]!.text, "abc");
    assert.equal(tokens.usage!.prompt_tokens, 3);
  });

  test("completions: a stop string ends the text before it", async () => {
    const answer = await client.completions.create({
      model: "echo",
      prompt: "one two three",
      max_tokens: 64,
      stop: [" three"],
    });
    assert.equal(answer.choices[0]!.text, "one two");
    assert.equal(answer.choices[0]!.finish_reason, "stop");
  });

  test("logprobs: chat gives each token with its bytes and alternatives, completions the older shape", async () => {
    const chat = await client.chat.completions.create({
      model: "echo",
      messages: [{ role: "user", content: "hi" }],
      max_tokens: 4,
      logprobs: true,
      top_logprobs: 2,
    });
    const content = chat.choices[0]!.logprobs!.content!;
    assert.equal(content.length, 4);
    // The template's special tokens are not part of the text, but each has its logprob.
    const text = content.map((entry) => entry.token).join("");
    assert.equal(text, `<|im_start|>${chat.choices[0]!.message.content}`);
    for (const entry of content)
      assert.ok(entry.logprob <= 0 && entry.top_logprobs.length <= 2 && Array.isArray(entry.bytes));
    const completion = await client.completions.create({ model: "echo", prompt: "ab", max_tokens: 4, logprobs: 1 });
    const logprobs = completion.choices[0]!.logprobs!;
    assert.equal(logprobs.tokens!.join(""), completion.choices[0]!.text);
    assert.equal(logprobs.token_logprobs!.length, 4);
    assert.deepEqual(logprobs.text_offset, [0, 1, 2, 3]);
  });

  test("error classes: unknown model, unknown field, wrong type, over the context", async () => {
    const messages = [{ role: "user" as const, content: "hi" }];
    await assert.rejects(client.chat.completions.create({ model: "nope", messages }), (error) => {
      assert.ok(error instanceof OpenAI.NotFoundError);
      assert.equal(error.code, "model_not_found");
      return true;
    });
    await assert.rejects(
      client.chat.completions.create({ model: "echo", messages, surprise: 1 } as never),
      (error) => error instanceof OpenAI.BadRequestError && /surprise/.test(error.message),
    );
    await assert.rejects(
      client.chat.completions.create({ model: "echo", messages, temperature: "hot" } as never),
      (error) => error instanceof OpenAI.BadRequestError && /temperature.*"hot"/.test(error.message),
    );
    await assert.rejects(
      client.completions.create({ model: "echo", prompt: "x".repeat(5_000) }),
      (error) => error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded",
    );
  });

  test("abort: leaving a stream stops the engine's work for it", async () => {
    const slow = await startInProcessCluster({
      workers: 1,
      worker: { engine: { kind: "echo", contextLength: 100_000, maxSequences: 8, blockSizeTokens: 16, stepMs: 2 } },
    });
    try {
      const other = new OpenAI({ baseURL: `${slow.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
      const stream = await other.completions.create({ model: "echo", prompt: "abc", max_tokens: 50_000, stream: true });
      for await (const chunk of stream) {
        assert.equal(chunk.object, "text_completion");
        break;
      }
      await until(async () => {
        const text = await (await fetch(`${slow.baseUrl}/metrics`)).text();
        return (
          /dynamo_frontend_active_requests\{model="echo"\} 0/.test(text) &&
          /disconnected_clients\{model="echo"\} 1/.test(text)
        );
      }, "the frontend to notice the client leaving");
      await until(() => activeOnWorker(slow) === 0, "the engine to stop");
    } finally {
      await slow.stop();
    }
  });
});

function activeOnWorker(cluster: InProcessCluster): number {
  return cluster.workers.reduce(
    (sum, worker) => sum + worker.load().runningRequests + worker.load().waitingRequests,
    0,
  );
}
