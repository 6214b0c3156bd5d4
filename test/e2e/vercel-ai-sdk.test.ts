import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import { startInProcessCluster, type InProcessCluster } from "../helpers/in-process-cluster.ts";

describe("vercel ai sdk", () => {
  let cluster: InProcessCluster;
  before(async () => {
    cluster = await startInProcessCluster();
  });
  after(() => cluster.stop());

  const provider = (): ReturnType<typeof createOpenAICompatible> =>
    createOpenAICompatible({ name: "dynamo", baseURL: `${cluster.baseUrl}/v1`, includeUsage: true });

  test("generateText gives text, finish reason and usage", async () => {
    const result = await generateText({
      model: provider().chatModel("echo"),
      prompt: "hello",
      maxOutputTokens: 8,
      maxRetries: 0,
    });
    assert.ok(result.text.length > 0);
    assert.equal(result.finishReason, "length");
    assert.equal(result.usage.outputTokens, 8);
  });

  test("streamText streams the same text", async () => {
    const model = provider().chatModel("echo");
    const whole = await generateText({ model, prompt: "hello", maxOutputTokens: 20, temperature: 0, maxRetries: 0 });
    const result = streamText({ model, prompt: "hello", maxOutputTokens: 20, temperature: 0, maxRetries: 0 });
    let text = "";
    for await (const delta of result.textStream) text += delta;
    assert.equal(text, whole.text);
    assert.equal((await result.usage).outputTokens, whole.usage.outputTokens);
  });
});
